// The matrix unit as a warpgroup uses it: four warps, the first of them a multiple of four (PTX ISA, "Asynchronous
// warpgroup-level matrix instructions"). Operands are read from shared memory while the threads go on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/shared.h"

namespace smartclip::ptx {

// What the unit reads from: rows of 128 bytes of depth, swizzled as tile/layout.h and copy_box do, in groups of 8 that
// follow one another. `shared` is a multiple of 1,024 bytes, or of 32 within the first row of such a place: a step of
// depth. ("Matrix descriptor": bits 0-13 address / 16; 16-29 the leading offset, which swizzled rows do not have; 32-45
// from one group to the next, / 16; 62-63 swizzling, 1: 128 bytes.)
SK_DEVICE uint64_t matrix_descriptor(const void* shared) {
  constexpr uint64_t kGroupBytes = 8 * 128, kSwizzle128 = 1;
  return (shared_address(shared) & 0x3ffff) >> 4 | uint64_t(1) << 16 | (kGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

// wgmma.fence.sync.aligned: before the first product, and after threads touched the sums.
SK_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

// wgmma.commit_group.sync.aligned: the products since the last one are a group.
SK_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// The sums of a thread, in the order of the registers: with w = warp % 4, g = lane / 4, t = lane % 4, register k of
// c[m] is row 16 w + g + 8 (k / 2), column 8 m + 2 t + k % 2.
#define SK_SUMS_8(c, m)                                                                                                \
  "+f"(c[m][0]), "+f"(c[m][1]), "+f"(c[m][2]), "+f"(c[m][3]), "+f"(c[m + 1][0]), "+f"(c[m + 1][1]), "+f"(c[m + 1][2]), \
      "+f"(c[m + 1][3])
#define SK_SUMS_32(c, m) SK_SUMS_8(c, m), SK_SUMS_8(c, m + 2), SK_SUMS_8(c, m + 4), SK_SUMS_8(c, m + 6)
#define SK_SUMS_OF_64(c) SK_SUMS_32(c, 0)
#define SK_SUMS_OF_128(c) SK_SUMS_32(c, 0), SK_SUMS_32(c, 8)
#define SK_SUMS_OF_256(c) SK_SUMS_32(c, 0), SK_SUMS_32(c, 8), SK_SUMS_32(c, 16), SK_SUMS_32(c, 24)
#define SK_NAMES_OF_64                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SK_NAMES_OF_128                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}"
#define SK_NAMES_OF_256                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "  \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "      \
  "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "      \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// wgmma.mma_async.sync.aligned.m64nNk16.f32: c += rows columns^T, for 64 rows, 8 kTiles columns and 32 bytes of depth;
// with `add` false c is only written. Until a wait has passed the operands are read, and the sums are nobody's.
#define SK_PRODUCT(kColumns, type, c, rows, columns, add, first, second, third)                                  \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" third                                                    \
               ", 0;\n"                                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type " " SK_NAMES_OF_##kColumns \
               ", %" first ", %" second ", add, 1, 1, 0, 0;\n}\n"                                                \
               : SK_SUMS_OF_##kColumns(c)                                                                        \
               : "l"(rows), "l"(columns), "r"(int(add)))

template <class Element, int kTiles>
SK_DEVICE void multiply_add_async(float (&c)[kTiles][4], uint64_t rows, uint64_t columns, bool add) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kHalf || std::is_same_v<Element, __nv_bfloat16>, "no such matrix instruction");
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32, "no such number of columns");
  if constexpr (kTiles == 8 && kHalf) SK_PRODUCT(64, "f16", c, rows, columns, add, "32", "33", "34");
  if constexpr (kTiles == 8 && !kHalf) SK_PRODUCT(64, "bf16", c, rows, columns, add, "32", "33", "34");
  if constexpr (kTiles == 16 && kHalf) SK_PRODUCT(128, "f16", c, rows, columns, add, "64", "65", "66");
  if constexpr (kTiles == 16 && !kHalf) SK_PRODUCT(128, "bf16", c, rows, columns, add, "64", "65", "66");
  if constexpr (kTiles == 32 && kHalf) SK_PRODUCT(256, "f16", c, rows, columns, add, "128", "129", "130");
  if constexpr (kTiles == 32 && !kHalf) SK_PRODUCT(256, "bf16", c, rows, columns, add, "128", "129", "130");
}

// wgmma.wait_group.sync.aligned: until at most the kPending latest groups of the warpgroup are under way. The sums pass
// through it, so that what reads them cannot be moved before it.
template <int kPending, int kTiles>
SK_DEVICE void wait_for_products(float (&c)[kTiles][4]) {
  static_assert(kPending >= 0, "a number of groups");
  if constexpr (kTiles == 8)
    asm volatile("wgmma.wait_group.sync.aligned %32;\n" : SK_SUMS_OF_64(c) : "n"(kPending) : "memory");
  if constexpr (kTiles == 16)
    asm volatile("wgmma.wait_group.sync.aligned %64;\n" : SK_SUMS_OF_128(c) : "n"(kPending) : "memory");
  if constexpr (kTiles == 32)
    asm volatile("wgmma.wait_group.sync.aligned %128;\n" : SK_SUMS_OF_256(c) : "n"(kPending) : "memory");
}

#undef SK_SUMS_8
#undef SK_SUMS_32
#undef SK_SUMS_OF_64
#undef SK_NAMES_OF_64
#undef SK_SUMS_OF_128
#undef SK_NAMES_OF_128
#undef SK_SUMS_OF_256
#undef SK_NAMES_OF_256
#undef SK_PRODUCT

// stmatrix.sync.aligned.m8n8.x4.shared.b16: what load_matrices reads, written: lane l gives the address of row l % 8 of
// matrix l / 8, and of each matrix bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4.
SK_DEVICE void store_matrices(const uint32_t (&in)[4], void* row) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

// setmaxnreg.sync.aligned: a warpgroup's registers a thread, a multiple of 8 from 24 to 256, fewer or more than before.
template <int kRegisters>
SK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
SK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace smartclip::ptx

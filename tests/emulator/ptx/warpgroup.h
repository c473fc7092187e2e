// Twin of csrc/cuda/ptx/warpgroup.h. Descriptors are taken apart in ../warpgroups.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/shared.h"

namespace smartclip::ptx {

// PTX ISA, "Matrix descriptor".
SK_DEVICE uint64_t matrix_descriptor(const void* shared, SK_HERE) {
  constexpr uint64_t kGroupBytes = 8 * 128, kSwizzle128 = 1;
  return (emulator::operand_address(shared, where) & 0x3ffff) >> 4 | uint64_t(1) << 16 | (kGroupBytes >> 4) << 32 |
         kSwizzle128 << 62;
}

// PTX ISA, "wgmma.fence" and "wgmma.commit_group".
SK_DEVICE void begin_products(SK_HERE) { emulator::begin_products(where); }
SK_DEVICE void commit_products(SK_HERE) { emulator::commit_products(where); }

// PTX ISA, "wgmma.mma_async": .m64nNk16.f32, of bf16 and f16.
template <class Element, int kTiles>
SK_DEVICE void multiply_add_async(float (&c)[kTiles][4], uint64_t rows, uint64_t columns, bool add, SK_HERE) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kHalf || std::is_same_v<Element, __nv_bfloat16>, "no such matrix instruction");
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32, "no such number of columns");
  emulator::multiply_add_async(kHalf, c[0], kTiles, rows, columns, add, where);
}

// PTX ISA, "wgmma.wait_group". The sums change behind the compiler's back; on a device no others are kept from being
// read before it.
template <int kPending, int kTiles>
SK_DEVICE void wait_for_products(float (&c)[kTiles][4], SK_HERE) {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("" ::"r"(c) : "memory");
  emulator::wait_for_products(c[0], kPending, where);
  asm volatile("" ::"r"(c) : "memory");
}

// PTX ISA, "stmatrix": .m8n8.x4.b16. Orders no memory.
SK_DEVICE void store_matrices(const uint32_t (&in)[4], void* row, SK_HERE) { emulator::store_matrices(in, row, where); }

// PTX ISA, "setmaxnreg".
template <int kRegisters>
SK_DEVICE void give_registers(SK_HERE) {
  emulator::set_registers(kRegisters, false, where);
}
template <int kRegisters>
SK_DEVICE void take_registers(SK_HERE) {
  emulator::set_registers(kRegisters, true, where);
}

}  // namespace smartclip::ptx

// The matrix unit as a warp uses it (PTX ISA, "Warp-level matrix instructions": ldmatrix, mma and their fragments).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/shared.h"

namespace smartclip::ptx {

// An element type that float32 stands for in memory: 1 + 8 + 10 bits.
struct Tf32 {
  float bits;
};

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8
// of matrix l / 8 (a multiple of 16) and gets, of each, bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4.
SK_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, for a tile of 16 rows, 8 columns and 32 bytes of depth; float32 sums. With g = lane / 4, t = lane % 4:
// register k of c is row g + 8 (k / 2), column 2 t + k % 2. The registers of a and b are those that load_matrices gives
// of rows 0–7 and 8–15 of a, first their bytes 0–15, then 16–31, and of the 8 columns of b, bytes 0–15, then 16–31.
template <class Element>
SK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
template <>
SK_DEVICE void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
template <>
SK_DEVICE void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What is multiplied, in place, as the unit wants it: only float32 changes.
template <class Element>
SK_DEVICE void round_operands(uint32_t (&)[4]) {}

// cvt.rna.tf32.f32: to the nearest, ties away from zero. Without it the unit drops the last 13 bits.
template <>
SK_DEVICE void round_operands<Tf32>(uint32_t (&x)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(x[k]) : "f"(__uint_as_float(x[k])));
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
template <>
SK_DEVICE void multiply_add<Tf32>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace smartclip::ptx

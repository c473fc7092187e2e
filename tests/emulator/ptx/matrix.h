// Twin of csrc/cuda/ptx/matrix.h. The fragments are taken apart in ../collectives.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/shared.h"

namespace smartclip::ptx {

struct Tf32 {
  float bits;
};

// PTX ISA, "ldmatrix": .m8n8.x4.b16. Orders no memory.
SK_DEVICE void load_matrices(uint32_t (&out)[4], const void* row, SK_HERE) { emulator::load_matrices(out, row, where); }

template <class Element>
SK_DEVICE void round_operands(uint32_t (&)[4]) {}

// PTX ISA, "cvt": .rna.tf32.f32, to the nearest, ties away from zero; any NaN becomes 0x7fffffff.
template <>
SK_DEVICE void round_operands<Tf32>(uint32_t (&x)[4]) {
  for (uint32_t& bits : x) {
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? 0x7fffffffu : (bits + 0x1000u) & 0xffffe000u;
  }
}

// PTX ISA, "mma": .m16n8k16.row.col.f32.bf16.bf16.f32, the same of f16, .m16n8k8.row.col.f32.tf32.tf32.f32.
template <class Element>
SK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SK_HERE) {
  using emulator::Instruction;
  constexpr bool kTf32 = std::is_same_v<Element, Tf32>, kHalf = std::is_same_v<Element, __half>;
  static_assert(kTf32 || kHalf || std::is_same_v<Element, __nv_bfloat16>, "no such matrix instruction");
  constexpr Instruction kInstruction = kTf32   ? Instruction::kMultiplyTf32
                                       : kHalf ? Instruction::kMultiplyHalf
                                               : Instruction::kMultiplyBfloat16;
  emulator::multiply_add(kInstruction, c, a, b0, b1, where);
}

}  // namespace smartclip::ptx

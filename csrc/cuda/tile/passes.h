// What the accumulators of a similarity are sums of: products of one operand of the rows with one of the columns, in
// the order of smartclip_kernels/operands.py.
#pragma once

#include "formulas.h"

namespace smartclip::cuda {

struct Pass {
  int accumulator, row, column;
  bool low = false;  // only where low halves of the columns' operands are not all 0
};

// kSplit: numbers of twice an element's digits come as high and low halves.
template <class Similarity, bool kSplit>
struct PassList;

template <bool kSplit>
struct PassList<device::Dot, kSplit> {
  static constexpr int kRowOperands = 1, kColumnOperands = 1;
  static constexpr Pass kPasses[] = {{0, 0, 0}};
};

// P = image (mask * text)^T, Q = image^2 (mask^2)^T
template <>
struct PassList<device::MaskedCosine, false> {
  static constexpr int kRowOperands = 2, kColumnOperands = 2;
  static constexpr Pass kPasses[] = {{0, 0, 0}, {1, 1, 1}};
};

// Rows: image, image^2 high and low. Columns: mask * text and mask^2 high, both low.
template <>
struct PassList<device::MaskedCosine, true> {
  static constexpr int kRowOperands = 3, kColumnOperands = 4;
  static constexpr Pass kPasses[] = {{0, 0, 0}, {0, 0, 2, true}, {1, 1, 1},
                                     {1, 2, 1}, {1, 1, 3, true}, {1, 2, 3, true}};
};

// The list as numbers of 4 bits: device code cannot read the array, and one of its own would lie in slow memory.
template <class Similarity, bool kSplit>
class Passes : public PassList<Similarity, kSplit> {
  using PassList<Similarity, kSplit>::kPasses;

 public:
  static constexpr int kCount = sizeof(kPasses) / sizeof(Pass);

 private:
  template <class NumberOf>
  static constexpr uint32_t packed(NumberOf number_of) {
    uint32_t bits = 0;
    for (int k = 0; k < kCount; ++k) bits |= uint32_t(number_of(kPasses[k])) << 4 * k;
    return bits;
  }
  // How many passes each accumulator has.
  static constexpr uint32_t counts(bool low) {
    uint32_t bits = 0;
    for (int k = 0; k < kCount; ++k) bits += uint32_t(kPasses[k].low == low) << 4 * kPasses[k].accumulator;
    return bits;
  }
  static constexpr uint32_t kRows = packed([](Pass pass) { return pass.row; });
  static constexpr uint32_t kColumns = packed([](Pass pass) { return pass.column; });
  static constexpr uint32_t kLows = packed([](Pass pass) { return pass.low; });
  static constexpr uint32_t kHighCounts = counts(false), kLowCounts = counts(true);

 public:
  static constexpr bool kLow = kLows != 0;

  SK_DEVICE static int row(int pass) { return kRows >> 4 * pass & 15; }
  SK_DEVICE static int column(int pass) { return kColumns >> 4 * pass & 15; }
  SK_DEVICE static bool low(int pass) { return kLows >> 4 * pass & 1; }
  SK_DEVICE static int count(int accumulator, bool with_low) {
    return (kHighCounts + (with_low ? kLowCounts : 0)) >> 4 * accumulator & 15;
  }
};

}  // namespace smartclip::cuda

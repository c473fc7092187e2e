// What a pair scores: from the accumulated products of a pair to sim, and from dL/dsim back to the products.
//
// V is a number or a pack of numbers. The products of a pair are accumulated in `accumulator[kAccumulators]`; `row` and
// `column` are the pair's factors. Beside the formulas a similarity says what a tile loop has to know of it.
#pragma once

#include "problem.h"

namespace smartclip::SK_ISA {

// sim = <image, text>
struct Dot {
  static constexpr const char* kName = "dot";
  static constexpr int kAccumulators = 1;
  static constexpr bool kFactors = false;

  template <class V>
  SK_HOST_DEVICE static V value(const V* accumulator, V, V) {
    return accumulator[0];
  }

  // From dL/dsim to dL/daccumulator.
  template <class V>
  SK_HOST_DEVICE static void derivative(const V*, V, V, V, V grad_sim, V* grad_accumulator) {
    grad_accumulator[0] = grad_sim;
  }
};

// sim = <image, text> / (|image| |text|); the factors are 1 / |image| and 1 / |text|.
struct Cosine {
  static constexpr const char* kName = "cosine";
  static constexpr int kAccumulators = 1;
  static constexpr bool kFactors = true;

  template <class V>
  SK_HOST_DEVICE static V value(const V* accumulator, V row, V column) {
    return accumulator[0] * row * column;
  }

  // At fixed lengths: what moves them is not the pair's, but a sum of dL/dsim sim over all pairs of a row or column.
  template <class V>
  SK_HOST_DEVICE static void derivative(const V*, V row, V column, V, V grad_sim, V* grad_accumulator) {
    grad_accumulator[0] = grad_sim * row * column;
  }
};

// sim = cos(image * mask, text) = P / (sqrt(Q) |text|), P = <image, mask * text>, Q = <image^2, mask^2>.
// The row's factor is the power of two that its image was divided by, the column's is 1 / |text|, or 0 where |text| is
// too small. Undefined where sqrt(Q) or |text| is: sim = 0, and no gradient.
struct MaskedCosine {
  static constexpr const char* kName = "masked_cosine";
  static constexpr int kAccumulators = 2;
  static constexpr bool kFactors = true;
  static constexpr double kMinImageNorm = 1e-6;

  template <class V>
  SK_HOST_DEVICE static V value(const V* accumulator, V row, V column) {
    const V norm = sqrt(accumulator[1]);
    return select(undefined(norm, row, column), V(0), accumulator[0] * column * (V(1) / norm));
  }

  // dP = dL/dsim / (sqrt(Q) |text|), dQ = -1/2 dL/dsim sim / Q
  template <class V>
  SK_HOST_DEVICE static void derivative(const V* accumulator, V row, V column, V sim, V grad_sim, V* grad_accumulator) {
    const V norm = sqrt(accumulator[1]);
    const auto none = undefined(norm, row, column);
    const V inverse = V(1) / norm;  // that of value(): a division takes as long as the rest
    const V per_norm = grad_sim * inverse;
    grad_accumulator[0] = select(none, V(0), per_norm * column);
    grad_accumulator[1] = select(none, V(0), V(-0.5) * per_norm * (sim * inverse));
  }

 private:
  // Written so that a NaN is defined: it has to reach the loss.
  template <class V>
  SK_HOST_DEVICE static auto undefined(V norm, V row, V column) {
    return (norm * row <= V(kMinImageNorm)) | (column == V(0));
  }
};

using Similarities = List<Dot, Cosine, MaskedCosine>;

}  // namespace smartclip::SK_ISA

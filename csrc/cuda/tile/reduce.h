// Sums, maxima and states over the lanes that share a row or a column, and over the warps that do.
#pragma once

#include "formulas.h"

namespace smartclip::cuda {

// kFirst, 2 kFirst, … below kEnd: the xor masks under which the lanes meet. All of them get the result.
template <int kFirst, int kEnd>
struct Lanes {
  static constexpr int kCount = kEnd / kFirst;

  template <class T>
  SK_DEVICE static T sum(T x) {
#pragma unroll
    for (int mask = kFirst; mask < kEnd; mask *= 2) x += ptx::shuffle_xor(x, mask);
    return x;
  }
  template <class T>
  SK_DEVICE static T max(T x) {
#pragma unroll
    for (int mask = kFirst; mask < kEnd; mask *= 2) {
      const T other = ptx::shuffle_xor(x, mask);
      x = other > x ? other : x;
    }
    return x;
  }
  template <class State>
  SK_DEVICE static State merged(State state) {
    constexpr int kPlanes = sizeof(State) / sizeof(float);
#pragma unroll
    for (int mask = kFirst; mask < kEnd; mask *= 2) {
      State other;
      float *to = reinterpret_cast<float*>(&other), *from = reinterpret_cast<float*>(&state);
#pragma unroll
      for (int k = 0; k < kPlanes; ++k) to[k] = ptx::shuffle_xor(from[k], mask);
      state.merge(other);
    }
    return state;
  }
};

using RowLanes = Lanes<1, 4>;      // lanes 4 g to 4 g + 3
using ColumnLanes = Lanes<4, 32>;  // lanes t, t + 4, …

}  // namespace smartclip::cuda

// What every launch takes: one batch of images (rows) and texts (columns), and what is known of each of them.
#pragma once

#include <cstdint>

// Formulas must be inlined: a call would send every register of the loop around it to memory.
#ifdef __CUDACC__
#define SK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SK_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The same headers are compiled once for every instruction set. Each has a namespace of its own, or the linker would
// keep one copy of an inline function for all, and that copy might not run on this machine.
#ifndef SK_ISA
#define SK_ISA device
#endif

namespace smartclip {

template <class... Types>
struct List {};

// What an anchor's loss depends on besides its statistics.
template <class V>
struct Target {
  V smoothing;
  V tau;    // how many of its negatives are taken to be positive, as a fraction
  V least;  // beta - alpha: no logit of features of length 1 is less
};

// One side of the score matrix. A plane is `size` numbers; plane k of an array starts at k * size.
template <class T>
struct Side {
  int64_t size = 0;
  const int32_t* id = nullptr;      // equal ids make a pair positive; null: one's own number
  const int32_t* ignore = nullptr;  // equal ignore ids take a pair out that is not positive; null: none are
  const T* factor = nullptr;        // what the similarity knows of this row or column; null where it needs nothing
  T* statistics = nullptr;          // Objective::kStatistics planes, filled by the forward sweep
  T* loss = nullptr;                // of every anchor
  const T* tau = nullptr;           // of every anchor; null: 0
  const T* ceiling = nullptr;       // of every anchor: a logit above which only positives count for it; null: none
  const T* weight = nullptr;        // of every anchor: the gradient of its loss
  T* anchor = nullptr;              // Objective::kAnchor planes: what G needs of an anchor
  T* score_gradient = nullptr;      // sum of dL/dsim * sim over the other side; null where nobody needs it

  SK_HOST_DEVICE int32_t id_of(int64_t index) const { return id ? id[index] : static_cast<int32_t>(index); }
  // A NaN is not above.
  SK_HOST_DEVICE bool is_above(int64_t index, T logit) const { return ceiling && logit > ceiling[index]; }
  SK_HOST_DEVICE Target<T> target_of(int64_t index, T smoothing, const T* scale, const T* bias) const {
    if (!tau) return {smoothing, T(0), T(0)};
    return {smoothing, tau[index], (bias ? *bias : T(0)) - *scale};
  }
};

template <class T>
struct Problem {
  Side<T> row, column;
  const T* scale = nullptr;  // alpha
  const T* bias = nullptr;   // beta; null: 0
  T label_smoothing = 0;
  double* parameter_gradient = nullptr;  // (rows, 2): sums over a row's scores of G * sim and of G

  Target<T> target_of(const Side<T>& side, int64_t index) const {
    return side.target_of(index, label_smoothing, scale, bias);
  }
};

}  // namespace smartclip

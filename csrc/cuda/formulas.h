// The functions that the formulas of similarity.h and objective.h call, for one number a thread; then the formulas.
#pragma once

#include <limits>

#include "../problem.h"
#include "ptx/number.h"

namespace smartclip::SK_ISA {

template <class V>
SK_DEVICE V lowest() {
  return V(-3.4028234663852886e38f);
}

SK_DEVICE float select(bool condition, float yes, float no) { return condition ? yes : no; }
SK_DEVICE float abs(float x) { return fabsf(x); }
SK_DEVICE float exp(float x) { return ptx::exp2(x * 1.44269504088896340736f); }
SK_DEVICE float log(float x) { return ptx::log_precise(x); }
SK_DEVICE float log1p(float x) { return ptx::log1p_precise(x); }
SK_DEVICE float sqrt(float x) { return ptx::square_root(x); }

// log(1 + y) for 0 <= y <= 1, exact in relative terms for small y: 2 atanh(z), z = y / (2 + y) <= 1/3, by its series.
SK_DEVICE float log1p_unit(float y) {
  constexpr int kTerms = 8;
  const float z = y / (2.0f + y);
  const float square = z * z;
  float series = 1.0f / (2 * kTerms - 1);
#pragma unroll
  for (int k = kTerms - 2; k >= 0; --k) series = series * square + 1.0f / (2 * k + 1);
  return 2.0f * z * series;
}

}  // namespace smartclip::SK_ISA

// The formulas call what is above, so they stand below.
#include "../objective.h"
#include "../similarity.h"

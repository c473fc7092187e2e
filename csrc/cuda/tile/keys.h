// A score and the index of its candidate as one integer whose order is that of a search: best first, NaN before all,
// ties to the lower index. So integer maxima do the rest, exactly.
#pragma once

#include "ptx/number.h"

namespace smartclip::cuda {

constexpr int64_t kNoKey = INT64_MIN;  // worse than every key

// Above, the bits of sim in the order of numbers; below, the candidate, the lower the better.
SK_DEVICE int64_t key_of(float sim, int64_t candidate) {
  const int32_t bits = static_cast<int32_t>(ptx::float_to_bits(sim + 0.0f));  // -0 becomes 0
  const int32_t ordered = sim != sim ? 0x7fffffff : bits < 0 ? bits ^ 0x7fffffff : bits;
  return (int64_t(ordered) << 32) | (0x7fffffff - candidate);
}

}  // namespace smartclip::cuda

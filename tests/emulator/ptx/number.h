// Twin of csrc/cuda/ptx/number.h. Approximate functions are exact here but for one rounding, so within their bounds.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "ptx/thread.h"

namespace smartclip::ptx {

SK_DEVICE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
SK_DEVICE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// PTX ISA, "ex2": .approx.ftz.f32. Subnormal numbers become 0 on the way in and on the way out.
SK_DEVICE float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// PTX ISA, "sqrt": .approx.f32.
SK_DEVICE float square_root(float x) { return std::sqrt(x); }

SK_DEVICE float log_precise(float x) { return std::log(x); }
SK_DEVICE float log1p_precise(float x) { return std::log1p(x); }

template <class Element>
SK_DEVICE Element narrow(float x);
template <>
SK_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
SK_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
SK_DEVICE __half narrow<__half>(float x) {
  return __float2half_rn(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

}  // namespace smartclip::ptx

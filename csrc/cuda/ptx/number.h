// Numbers: approximate functions of the special function unit, and float32 in other precisions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/thread.h"

namespace smartclip::ptx {

// ex2.approx.ftz.f32: 2^x, relative error 2^-22; 0 below the normal numbers.
SK_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// sqrt.approx.f32: relative error 2^-23.
SK_DEVICE float square_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

SK_DEVICE float log_precise(float x) { return logf(x); }
SK_DEVICE float log1p_precise(float x) { return log1pf(x); }

SK_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
SK_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// Rounded to the nearest, ties to even. float16 ends at 65,504: what is larger is brought there, for as an infinity it
// would make NaN of every sum that it meets; NaN stays NaN.
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

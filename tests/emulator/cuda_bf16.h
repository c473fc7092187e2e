// What kernels use of CUDA's header of this name.
#pragma once

#include <cstdint>
#include <cstring>

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x);
  operator float() const;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// To the nearest, ties to even; any NaN becomes 0x7fff, as cvt makes it.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  __nv_bfloat16 narrow;
  narrow.bits = static_cast<uint16_t>(nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  return narrow;
}

inline __nv_bfloat16::__nv_bfloat16(float x) { *this = __float2bfloat16_rn(x); }
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

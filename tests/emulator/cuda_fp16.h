// What kernels use of CUDA's header of this name.
#pragma once

#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;
  __half(float x);
  operator float() const;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &rest, sizeof(rest));
  magnitude *= 0x1p112f;  // biases are 15 and 127; subnormal numbers become normal
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  bits = sign | (rest >= 0x7c00u << 13 ? rest | 0x7f800000u : bits);
  std::memcpy(&magnitude, &bits, sizeof(bits));
  return magnitude;
}

// To the nearest, ties to even; any NaN becomes 0x7fff, as cvt makes it.
inline __half __float2half_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude < 0x38800000u) {  // below 2^-14: numbers are 2^-24 apart, as those at 1/2 are in float32
    float size;
    std::memcpy(&size, &magnitude, sizeof(size));
    size += 0.5f;
    std::memcpy(&rounded, &size, sizeof(size));
    rounded -= 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    if (rounded > 0x7c00u) rounded = 0x7c00u;
  }
  __half narrow;
  narrow.bits = static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fffu : sign | rounded);
  return narrow;
}

inline __half::__half(float x) { *this = __float2half_rn(x); }
inline __half::operator float() const { return __half2float(*this); }

// A pack of numbers that one instruction handles, and the functions that the formulas of similarity.h and objective.h
// call on it. Written with the compiler's vector types: one source for every instruction set, SK_VECTOR_BYTES wide.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../problem.h"

namespace smartclip::SK_ISA {

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int32_t IntVector __attribute__((vector_size(SK_VECTOR_BYTES)));
};
template <>
struct Lane<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int64_t IntVector __attribute__((vector_size(SK_VECTOR_BYTES)));
};

template <class T>
struct Mask {
  using Vector = typename Lane<T>::IntVector;
  Vector v;

  friend Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
  friend Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
  friend Mask operator~(Mask a) { return {~a.v}; }
  static Mask all() { return {Vector{} == Vector{}}; }
};

template <class T>
struct Pack {
  using Vector = typename Lane<T>::Vector;
  static constexpr int kLanes = SK_VECTOR_BYTES / sizeof(T);
  Vector v;

  Pack() = default;
  Pack(Vector vector) : v(vector) {}
  explicit Pack(T number) : v(number - Vector{}) {}

  static Pack load(const T* from) {
    Pack pack;
    __builtin_memcpy(&pack.v, from, sizeof(Vector));
    return pack;
  }
  // The first `count` lanes; the others are 0.
  static Pack load(const T* from, int count) {
    if (count == kLanes) return load(from);
    T lanes[kLanes] = {};
    for (int lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
    return load(lanes);
  }
  void store(T* to) const { __builtin_memcpy(to, &v, sizeof(Vector)); }
  void store(T* to, int count) const {
    if (count == kLanes) return store(to);
    for (int lane = 0; lane < count; ++lane) to[lane] = v[lane];
  }

  Pack& operator+=(Pack b) {
    v += b.v;
    return *this;
  }
  friend Pack operator+(Pack a, Pack b) { return a.v + b.v; }
  friend Pack operator-(Pack a, Pack b) { return a.v - b.v; }
  friend Pack operator*(Pack a, Pack b) { return a.v * b.v; }
  friend Pack operator/(Pack a, Pack b) { return a.v / b.v; }
  friend Pack operator-(Pack a) { return -a.v; }
  friend Mask<T> operator<(Pack a, Pack b) { return {a.v < b.v}; }
  friend Mask<T> operator>(Pack a, Pack b) { return {a.v > b.v}; }
  friend Mask<T> operator<=(Pack a, Pack b) { return {a.v <= b.v}; }
  friend Mask<T> operator==(Pack a, Pack b) { return {a.v == b.v}; }
};

template <class V>
struct Scalar {
  using type = V;
};
template <class T>
struct Scalar<Pack<T>> {
  using type = T;
};

// The ids of a pack's columns, as wide as its lanes.
template <class T>
struct Ids {
  typename Mask<T>::Vector v;

  static Ids load(const int32_t* from, int count) {
    Ids ids;
    if constexpr (sizeof(T) == sizeof(int32_t)) {
      if (count == Pack<T>::kLanes) {
        __builtin_memcpy(&ids.v, from, sizeof(ids.v));
        return ids;
      }
    }
    typename Lane<T>::Int lanes[Pack<T>::kLanes] = {};
    for (int lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
    __builtin_memcpy(&ids.v, lanes, sizeof(ids.v));
    return ids;
  }
  // Those of the columns from `first` on.
  static Ids load(const int32_t* ids, int64_t first, int count) {
    if (ids) return load(ids + first, count);
    Ids own;
    for (int lane = 0; lane < Pack<T>::kLanes; ++lane) own.v[lane] = static_cast<int32_t>(first) + lane;
    return own;
  }
  friend Mask<T> operator==(Ids a, int32_t id) { return {a.v == id}; }
};

template <class T>
SK_HOST_DEVICE bool any(Mask<T> mask) {
  typename Lane<T>::Int bits = 0;
  for (int lane = 0; lane < Pack<T>::kLanes; ++lane) bits |= mask.v[lane];
  return bits != 0;
}

template <class T>
SK_HOST_DEVICE Pack<T> select(Mask<T> mask, Pack<T> yes, Pack<T> no) {
  return mask.v ? yes.v : no.v;
}
inline float select(bool condition, float yes, float no) { return condition ? yes : no; }
inline double select(bool condition, double yes, double no) { return condition ? yes : no; }

template <class V>
SK_HOST_DEVICE V lowest() {
  return V(std::numeric_limits<typename Scalar<V>::type>::lowest());
}

using std::abs;
using std::exp;
using std::log;
using std::log1p;
using std::sqrt;

template <class T>
SK_HOST_DEVICE Pack<T> abs(Pack<T> x) {
  using Int = typename Mask<T>::Vector;
  return (typename Pack<T>::Vector)((Int)x.v & std::numeric_limits<typename Lane<T>::Int>::max());
}

template <class T>
SK_HOST_DEVICE Pack<T> sqrt(Pack<T> x) {
  for (int lane = 0; lane < Pack<T>::kLanes; ++lane) x.v[lane] = std::sqrt(x.v[lane]);
  return x;
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kMin = -87.33f, kMax = 88.37f;
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kMin = -708.39, kMax = 709.43;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
};

// e^x = 2^n e^r, |r| <= ln(2)/2, e^r by its Taylor series. 0 below the normal numbers, infinite from kMax, NaN for NaN.
template <class T>
SK_HOST_DEVICE Pack<T> exp(Pack<T> x) {
  using V = Pack<T>;
  using C = ExpConstants<T>;
  using Int = typename Mask<T>::Vector;
  V inside = select(x < V(C::kMin), V(C::kMin), x);
  inside = select(inside > V(C::kMax), V(C::kMax), inside);
  const V rounded = inside * V(T(1.44269504088896340736)) + V(C::kRound);
  const V n = rounded - V(C::kRound);
  const V r = (inside - n * V(C::kLn2High)) - n * V(C::kLn2Low);
  T inverse_factorial[C::kDegree + 1] = {1};
  for (int k = 1; k <= C::kDegree; ++k) inverse_factorial[k] = inverse_factorial[k - 1] / k;
  V series(inverse_factorial[C::kDegree]);
  for (int k = C::kDegree - 1; k >= 0; --k) series = series * r + V(inverse_factorial[k]);
  const Int exponent = (Int)rounded.v - (Int)V(C::kRound).v;
  const V power = (typename V::Vector)((exponent + C::kBias) << C::kMantissa);
  const V result = select(x < V(C::kMin), V(T(0)), series * power);
  return select(x > V(C::kMax), V(std::numeric_limits<T>::infinity()), result);
}

// log(1 + y) for 0 <= y <= 1, exact in relative terms for small y: 2 atanh(z), z = y / (2 + y) <= 1/3, by its series.
template <class T>
SK_HOST_DEVICE Pack<T> log1p_unit(Pack<T> y) {
  using V = Pack<T>;
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
  const V z = y / (V(T(2)) + y);
  const V square = z * z;
  V series(T(1) / (2 * kTerms - 1));
  for (int k = kTerms - 2; k >= 0; --k) series = series * square + V(T(1) / (2 * k + 1));
  return V(T(2)) * z * series;
}

// Lane i becomes lane i + by (modulo the number of lanes).
template <class T>
SK_HOST_DEVICE Pack<T> rotate(Pack<T> x, int by) {
  typename Mask<T>::Vector index{};
  for (int lane = 0; lane < Pack<T>::kLanes; ++lane) index[lane] = (lane + by) % Pack<T>::kLanes;
  return __builtin_shuffle(x.v, index);
}

}  // namespace smartclip::SK_ISA

// One vector register of floats, in the vector extensions of GCC and Clang: 16 lanes with AVX512, 8 with AVX2, 4 with SSE or NEON. (Wider
// types than the machine's go through memory: 17 times slower, measured on attention with GCC 12.) Kernels load float or bf16 and
// compute in float. Included by kernels only (inside their variant's namespace).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastlora::VARIANT {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float floatv __attribute__((vector_size(4 * kLanes)));
typedef int32_t intv __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uintv __attribute__((vector_size(4 * kLanes)));
typedef uint16_t shortv __attribute__((vector_size(2 * kLanes)));

struct bf16 { uint16_t bits; };

#define INLINE static inline __attribute__((always_inline))

INLINE floatv broadcast(float x) { return x - floatv{}; }

INLINE floatv load(const float* p) {
  floatv v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE floatv load(const bf16* p) {
  shortv bits;
  std::memcpy(&bits, p, sizeof bits);
  return (floatv)(__builtin_convertvector(bits, uintv) << 16);
}
INLINE void store(float* p, floatv v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest, ties to even; NaN stays NaN.
INLINE shortv round_bf16(floatv v) {
#if defined(__AVX512BF16__)
  return (shortv)_mm512_cvtneps_pbh((__m512)v);
#else
  const uintv bits = (uintv)v;
  const uintv rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uintv is_nan = (uintv)(v != v);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), shortv);
#endif
}
INLINE void store(bf16* p, floatv v) {
  const shortv bits = round_bf16(v);
  std::memcpy(p, &bits, sizeof bits);
}

// The first n < kLanes elements; lanes beyond them are `fill`.
template <class T> INLINE floatv load_first(const T* p, int64_t n, float fill = 0.0f) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  floatv v = load(padded);
  for (int64_t i = n; i < kLanes; ++i) v[i] = fill;
  return v;
}
template <class T> INLINE void store_first(T* p, floatv v, int64_t n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}
// A whole vector, or what is left of a row.
template <class T> INLINE floatv load_upto(const T* p, int64_t left, float fill = 0.0f) {
  return left >= kLanes ? load(p) : load_first(p, left, fill);
}
template <class T> INLINE void store_upto(T* p, floatv v, int64_t left) {
  if (left >= kLanes) store(p, v);
  else store_first(p, v, left);
}

// Pairwise.
INLINE float sum(floatv v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
#endif
}
INLINE floatv maximum(floatv a, floatv b) { return a > b ? a : b; }
INLINE float maximum(floatv v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// e^x to 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor of degree 7 in r (the rest is below 6e-9), times 2^n. Below -87 the result is 0, above 88 it is inf.
INLINE floatv exp(floatv x) {
  const floatv low = broadcast(-87.0f), high = broadcast(88.0f), x0 = x;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const floatv shifted = x * 1.44269504088896341f + kMagic, n = shifted - kMagic;
  const floatv r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floatv p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const intv exponent = ((intv)shifted - 0x4b400000) << 23;
  floatv result = (floatv)((intv)p + exponent);
  result = x0 < low ? floatv{} : result;
  result = x0 > high ? broadcast(INFINITY) : result;
  return x0 != x0 ? x0 : result;
}

// Rotary embedding (Su et al. 2021) of one head: x' = x cos + rotate_half(x) sin into floats; null cos copies. width is a multiple of 2 kLanes.
template <class T> INLINE void load_rotated(float* to, const T* x, const T* cos, const T* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    const floatv a = load(x + j), b = load(x + half + j);
    store(to + j, cos ? a * load(cos + j) - b * load(sin + j) : a);
    store(to + half + j, cos ? b * load(cos + half + j) + a * load(sin + half + j) : b);
  }
}

}  // namespace fastlora::VARIANT

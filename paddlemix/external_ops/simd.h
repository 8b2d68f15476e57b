// Licensed under the Apache License, Version 2.0; see LICENSE.
// Vectors of floats for the CPU operators, free of Paddle: AVX-512, AVX2 with FMA, and what every compiler has.
//
// Kernels are written once, in a file that is included for each of the three: `simd_each.h` does that.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace simd {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum Level { PLAIN, AVX2, AVX_VNNI, AVX512, VNNI };

// The best that this processor has; no more than what EMU3_OPS_SIMD names: "plain", "avx2", or "avx512". These three
// have no products of whole numbers.
inline Level level() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  static const bool avx_vnni = avx2 && __builtin_cpu_supports("avxvnni");
  const char* asked = std::getenv("EMU3_OPS_SIMD");
  const auto is = [&](const char* name) { return asked && !std::strcmp(asked, name); };
  if (is("plain") || !avx2) return PLAIN;
  if (is("avx2")) return AVX2;
  if (is("avx512")) return avx512 ? AVX512 : AVX2;
  return vnni ? VNNI : avx512 ? AVX512 : avx_vnni ? AVX_VNNI : AVX2;
#else
  return PLAIN;
#endif
}

// Whether it multiplies bfloat16, and nothing less was asked for.
inline bool has_bfloat16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && level() == VNNI;
#else
  return false;
#endif
}

template <class To, class From>
inline __attribute__((always_inline)) To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// One value as float; the compiler makes vectors of loops over these.
inline __attribute__((always_inline)) float widen(float x) { return x; }
inline __attribute__((always_inline)) float widen(int8_t x) { return x; }
inline __attribute__((always_inline)) float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline __attribute__((always_inline)) float widen(float16 x) {
  const uint32_t bits = x.bits & 0x7fff;
  const float small = bit_cast<float>(bits << 13) * 0x1p112f;  // the exponent's bias differs by 112
  const uint32_t large = bits << 13 | 0x7f800000;              // infinity and NaN
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  return bit_cast<float>((bits >= 0x7c00 ? large : bit_cast<uint32_t>(small)) | sign);
}

// To the nearest, ties to even.
inline __attribute__((always_inline)) bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {uint16_t(x != x ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// a * b + c; FUSED: rounded once, where the processor does that in one instruction
template <bool FUSED>
inline __attribute__((always_inline)) float multiply_add(float a, float b, float c) {
  if constexpr (FUSED)
    return __builtin_fmaf(a, b, c);
  else
    return a * b + c;
}

// e^x for x <= 88; less than 1e-37 for what is very negative.
template <bool FUSED = false>
inline __attribute__((always_inline)) float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = multiply_add<FUSED>(x, 1.44269504f, 0x1.8p23f) - 0x1.8p23f;  // to the nearest integer
  const float r = multiply_add<FUSED>(n, 2.12194440e-4f, multiply_add<FUSED>(n, -0.693359375f, x));
  float y = multiply_add<FUSED>(r, 1.0f / 5040, 1.0f / 720);
  y = multiply_add<FUSED>(y, r, 1.0f / 120);  // a loop over these would stay scalar
  y = multiply_add<FUSED>(y, r, 1.0f / 24);
  y = multiply_add<FUSED>(y, r, 1.0f / 6);
  y = multiply_add<FUSED>(y, r, 0.5f);
  y = multiply_add<FUSED>(y, r, 1);
  y = multiply_add<FUSED>(y, r, 1);
  return y * bit_cast<float>(((int32_t)n + 127) << 23);
}

template <bool FUSED = false>
inline __attribute__((always_inline)) float sigmoid(float x) {
  return 1.0f / (1.0f + exponential<FUSED>(x < -87.0f ? 87.0f : -x));
}

// A function for each number of rows from 1 to MOST: of[rows].
template <class F, int MOST>
struct ByRows {
  F of[MOST + 1];
};

template <int MOST, class Make, int... R>
constexpr auto by_rows(Make make, std::integer_sequence<int, R...>) {
  using F = decltype(+make(std::integral_constant<int, 1>()));
  return ByRows<F, MOST>{{nullptr, make(std::integral_constant<int, R + 1>())...}};
}

template <int MOST, class Make>
constexpr auto by_rows(Make make) {
  return by_rows<MOST>(make, std::make_integer_sequence<int, MOST>());
}

// Calls f(first, rows) for `count` rows in tiles of at most `most`, as even as can be.
template <class F>
void in_tiles(int64_t count, int64_t most, F f) {
  int64_t row = 0;
  for (int64_t tiles = (count + most - 1) / most; tiles > 0; --tiles) {
    const int64_t rows = (count - row + tiles - 1) / tiles;
    f(row, rows);
    row += rows;
  }
}

#if defined(__x86_64__)
#define SIMD_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#define SIMD_AVX2 __attribute__((target("avx2,fma,f16c")))

#define SIMD_INLINE SIMD_AVX512 inline __attribute__((always_inline))
namespace avx512 {
using floats = __m512;
constexpr int WIDTH = 16;
constexpr bool FUSED = true;  // has instructions for a * b + c
constexpr int TILE_ROWS = 6, TILE_OUTS = 4;  // of a product of few rows: sums that the registers hold
constexpr int PACKED_ROWS = 12, PACKED_VECTORS = 2;  // the same of a packed product

SIMD_INLINE floats fill(float x) { return _mm512_set1_ps(x); }
SIMD_INLINE floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
SIMD_INLINE floats max(floats a, floats b) { return _mm512_max_ps(a, b); }
SIMD_INLINE void store(float* p, floats x) { _mm512_storeu_ps(p, x); }
SIMD_INLINE floats load(const float* p) { return _mm512_loadu_ps(p); }
SIMD_INLINE floats load(const bfloat16* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
SIMD_INLINE floats load(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
SIMD_INLINE floats load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
SIMD_INLINE float largest(floats x) { return _mm512_reduce_max_ps(x); }
SIMD_INLINE __m256 half(floats x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
// The sums of four vectors.
SIMD_INLINE void sum4(floats a, floats b, floats c, floats d, float* out) {
  const __m256 ab = _mm256_hadd_ps(half(a), half(b)), cd = _mm256_hadd_ps(half(c), half(d));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
// Four bits each: the values of `scaled` that the low and the high halves of WIDTH bytes mean.
struct nibbles {
  floats table;
};
SIMD_INLINE nibbles scaled_nibbles(float scale) {
  const floats values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return {values * _mm512_set1_ps(scale)};
}
SIMD_INLINE void load(const uint8_t* p, nibbles n, floats& low, floats& high) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low = _mm512_permutexvar_ps(x, n.table);  // looks at the low four bits alone
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(x, 4), n.table);
}
}  // namespace avx512
#undef SIMD_INLINE

#define SIMD_INLINE SIMD_AVX2 inline __attribute__((always_inline))
namespace avx2 {
using floats = __m256;
constexpr int WIDTH = 8;
constexpr bool FUSED = true;
constexpr int TILE_ROWS = 4, TILE_OUTS = 4;
constexpr int PACKED_ROWS = 6, PACKED_VECTORS = 2;

SIMD_INLINE floats fill(float x) { return _mm256_set1_ps(x); }
SIMD_INLINE floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
SIMD_INLINE floats max(floats a, floats b) { return _mm256_max_ps(a, b); }
SIMD_INLINE void store(float* p, floats x) { _mm256_storeu_ps(p, x); }
SIMD_INLINE floats load(const float* p) { return _mm256_loadu_ps(p); }
SIMD_INLINE floats load(const bfloat16* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
SIMD_INLINE floats load(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
SIMD_INLINE floats load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
SIMD_INLINE float largest(floats x) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
SIMD_INLINE void sum4(floats a, floats b, floats c, floats d, float* out) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
struct nibbles {
  floats scale;
};
SIMD_INLINE nibbles scaled_nibbles(float scale) { return {_mm256_set1_ps(scale)}; }
SIMD_INLINE void load(const uint8_t* p, nibbles n, floats& low, floats& high) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), eight = _mm256_set1_epi32(8);
  low = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(x, _mm256_set1_epi32(15)), eight)) * n.scale;
  high = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(x, 4), eight)) * n.scale;
}
}  // namespace avx2
#undef SIMD_INLINE
#endif  // __x86_64__

#define SIMD_INLINE inline __attribute__((always_inline))
namespace plain {
typedef float floats __attribute__((vector_size(16)));
constexpr int WIDTH = 4;
constexpr bool FUSED = false;
constexpr int TILE_ROWS = 2, TILE_OUTS = 4;
constexpr int PACKED_ROWS = 6, PACKED_VECTORS = 2;

SIMD_INLINE floats fill(float x) { return floats{x, x, x, x}; }
SIMD_INLINE floats fma(floats a, floats b, floats c) { return a * b + c; }
SIMD_INLINE floats max(floats a, floats b) { return a > b ? a : b; }
SIMD_INLINE void store(float* p, floats x) { std::memcpy(p, &x, sizeof x); }
template <class T>
SIMD_INLINE floats load(const T* p) {
  return floats{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
SIMD_INLINE float largest(floats x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
SIMD_INLINE void sum4(floats a, floats b, floats c, floats d, float* out) {
  for (const floats& x : {a, b, c, d}) *out++ = (x[0] + x[1]) + (x[2] + x[3]);
}
struct nibbles {
  float scale;
};
SIMD_INLINE nibbles scaled_nibbles(float scale) { return {scale}; }
SIMD_INLINE void load(const uint8_t* p, nibbles n, floats& low, floats& high) {
  for (int i = 0; i < WIDTH; ++i) low[i] = ((p[i] & 15) - 8) * n.scale, high[i] = ((p[i] >> 4) - 8) * n.scale;
}
}  // namespace plain
#undef SIMD_INLINE

}  // namespace simd

// The function of the namespace that fits this processor.
#if defined(__x86_64__)
#define SIMD_CHOOSE(...)                                                                               \
  (simd::level() >= simd::AVX512 ? avx512::__VA_ARGS__ : simd::level() >= simd::AVX2 ? avx2::__VA_ARGS__ : plain::__VA_ARGS__)
#else
#define SIMD_CHOOSE(...) plain::__VA_ARGS__
#endif

#define SIMD_KERNELS "simd_tile.h"
#include "simd_each.h"
#undef SIMD_KERNELS

#define SIMD_KERNELS "simd_units.h"
#include "simd_each.h"
#undef SIMD_KERNELS

#include "simd_dot.h"

// Licensed under the Apache License, Version 2.0; see LICENSE.
// Linear layers by what some processors have for neural networks; few_rows_linear.h includes it. What is said here of
// each kind of arithmetic, streams.h uses for few rows, and panels.h for many.
//
//   bfloat:  bfloat16 weights times x rounded to bfloat16, sums of floats (AVX-512 BF16)
//   whole16: int8 weights times x rounded to 16 bits, a scale for each 128 inputs of a row (AVX-512 VNNI)
//   whole8:  4 bit weights times x rounded to 8 bits in the same way; nibbles are too large by 8, and 8 x is taken off
//            the integer sums, where nothing is rounded
//
// x is rounded by less than its weights were, so that a model's error stays that of its weights (benchmarks/quality.py).
// A row with infinity or NaN becomes NaN, since integers cannot say more.
#pragma once

#if defined(__x86_64__)

namespace few_rows_linear {

// x of a row as `T`, int8_t or int16_t up to `most`, with a scale for each group; groups are filled up with 0.
template <class T>
SIMD_VNNI inline void round_row(const Problem& p, int64_t row, int most, uint32_t* units, PackedRows& to) {
  T* out = (T*)units;
  for (int64_t g = 0; g < p.groups(); ++g, out += GROUP) {
    const int64_t count = std::min<int64_t>(GROUP, p.in - g * GROUP), at = row * p.groups() + g;
    float x[GROUP] = {};
    std::memcpy(x, p.x + row * p.in + g * GROUP, count * sizeof(float));
    const float size = std::max(avx512::largest(x, GROUP), TINY), inverse = most / size;
    to.scale[at] = std::isfinite(size) ? size / most : NAN;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; ++i) {
      const int32_t whole = (int32_t)__builtin_rintf(x[i] * inverse);
      out[i] = whole;
      sum += whole;
    }
    to.start[at] = sizeof(T) == 1 ? -8 * sum : 0;
  }
}

namespace whole {
SIMD_VNNI inline __attribute__((always_inline)) __m512i first_total(const PackedRows& x, int64_t at) {
  return _mm512_set1_epi32(x.start[at]);
}
SIMD_VNNI inline __attribute__((always_inline)) void add_group(__m512i total, const float* scale, const PackedRows& x,
                                                               int64_t at, float* sum) {
  const __m512 factor = _mm512_loadu_ps(scale) * _mm512_set1_ps(x.scale[at]);
  _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, _mm512_loadu_ps(sum)));
}
}  // namespace whole

namespace whole16 {
using namespace simd::whole16;
using whole::first_total, whole::add_group;
constexpr int UNIT = 2, GROUP_UNITS = GROUP / UNIT;
inline int64_t row_width(const Problem& p) { return p.groups() * GROUP_UNITS; }

SIMD_VNNI inline void row_units(const Problem& p, int64_t row, uint32_t* units, PackedRows& to) {
  round_row<int16_t>(p, row, 32767, units, to);
}
template <class T>  // int8_t
SIMD_VNNI void weight_units(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float* scale) {
  const T* from = (const T*)p.weight + o * p.in + first;
  int16_t* wide = (int16_t*)to;
  for (int64_t i = 0; i < count; ++i) wide[i] = from[i];
  for (int64_t g = 0; g * GROUP < count; ++g) scale[g * PACKED_VECTORS * WIDTH] = p.scale[o];
}

inline int64_t row_bytes(const Problem& p) { return p.in; }
constexpr int GROUP_BYTES = GROUP;
SIMD_VNNI inline __attribute__((always_inline)) units stream_units(const uint8_t* w, int s) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w + s));
}
SIMD_VNNI inline __attribute__((always_inline)) totals begin_total(const PackedRows&, int64_t) {
  return _mm512_setzero_si512();
}
inline float group_scale(const Problem&, const PackedRows& x, int64_t, int64_t r, int64_t g) {
  return x.scale[r * x.groups + g];
}
inline float end_sum(const Problem& p, int64_t o, float sum) { return sum * p.scale[o]; }
}  // namespace whole16

namespace whole8 {
using namespace simd::whole8;
using whole::first_total, whole::add_group;
constexpr int UNIT = 4, GROUP_UNITS = GROUP / UNIT;
inline int64_t row_width(const Problem& p) { return p.groups() * GROUP_UNITS; }

SIMD_VNNI inline void row_units(const Problem& p, int64_t row, uint32_t* units, PackedRows& to) {
  round_row<int8_t>(p, row, 127, units, to);
}
template <class T>  // uint8_t, of 4 bits
SIMD_VNNI void weight_units(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float* scale) {
  uint8_t* byte = (uint8_t*)to;
  for (int64_t i = 0; i < count; i += GROUP, byte += GROUP) {
    const int64_t g = o * p.groups() + (first + i) / GROUP;
    const uint8_t* from = (const uint8_t*)p.weight + g * (GROUP / 2);
    for (int j = 0; j < GROUP / 2; ++j) byte[j] = from[j] & 15, byte[j + GROUP / 2] = from[j] >> 4;
    scale[i / GROUP * PACKED_VECTORS * WIDTH] = p.scale[g];
  }
}

inline int64_t row_bytes(const Problem& p) { return p.groups() * GROUP / 2; }
constexpr int GROUP_BYTES = GROUP / 2;
SIMD_VNNI inline __attribute__((always_inline)) units stream_units(const uint8_t* w, int s) {
  const __m512i both = _mm512_loadu_si512(w);
  return _mm512_and_si512(s ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
}
SIMD_VNNI inline __attribute__((always_inline)) totals begin_total(const PackedRows& x, int64_t at) {
  return _mm512_zextsi128_si512(_mm_cvtsi32_si128(x.start[at]));  // in one of the sums
}
inline float group_scale(const Problem& p, const PackedRows& x, int64_t o, int64_t r, int64_t g) {
  return p.scale[o * x.groups + g] * x.scale[r * x.groups + g];
}
inline float end_sum(const Problem&, int64_t, float sum) { return sum; }
}  // namespace whole8

namespace bfloat {
using namespace simd::bfloat;
constexpr int GROUP_UNITS = PANEL_COLUMNS / UNIT;
inline int64_t row_width(const Problem& p) { return (p.in + 1) / 2; }

SIMD_BFLOAT inline __attribute__((always_inline)) totals first_total(const PackedRows&, int64_t) { return fill(0); }
SIMD_BFLOAT inline __attribute__((always_inline)) void add_group(totals total, const float*, const PackedRows&, int64_t,
                                                                 float* sum) {
  store(sum, total);
}

SIMD_BFLOAT inline void row_units(const Problem& p, int64_t row, uint32_t* units, PackedRows&) {
  round_units(p.x + row * p.in, p.in, units);
}
template <class T>  // simd::bfloat16
SIMD_BFLOAT void weight_units(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float*) {
  std::memcpy(to, (const T*)p.weight + o * p.in + first, count * sizeof(T));
}
}  // namespace bfloat

}  // namespace few_rows_linear

#define SIMD_TARGET SIMD_VNNI
#define SIMD whole16
#include "panels.h"
#include "streams.h"
#undef SIMD
#define SIMD whole8
#include "panels.h"
#include "streams.h"
#undef SIMD
#undef SIMD_TARGET
#define SIMD_TARGET SIMD_BFLOAT
#define SIMD bfloat
#include "panels.h"
#undef SIMD
#undef SIMD_TARGET

#endif

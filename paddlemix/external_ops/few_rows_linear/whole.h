// Licensed under the Apache License, Version 2.0; see LICENSE.
// Linear layers by products of whole numbers; few_rows_linear.h includes it for each width of vectors. streams.h does the
// rest for few rows, panels.h for many.
//
//   SIMD16: int8 weights times x rounded to 16 bits, a scale for each 128 inputs of a row
//   SIMD8:  4 bit weights times x rounded to 8 bits in the same way; nibbles are too large by 8, and 8 x is taken off the
//           integer sums, where nothing is rounded
//
// x is rounded by less than its weights were, so that a model's error stays that of its weights (benchmarks/quality.py).
// A row with infinity or NaN becomes NaN, since integers cannot say more.
namespace few_rows_linear {

namespace SIMD16 {
using namespace simd::SIMD16;
constexpr int UNIT = 2, GROUP_UNITS = GROUP / UNIT, GROUP_BYTES = GROUP;  // of weights
inline int64_t row_width(const Problem& p) { return p.groups() * GROUP_UNITS; }
inline int64_t row_bytes(const Problem& p) { return p.in; }

SIMD_TARGET inline __attribute__((always_inline)) totals first_total(const PackedRows& x, int64_t at) {
  return fill_units(x.start[at]);
}
SIMD_TARGET inline __attribute__((always_inline)) void add_group(totals total, const float* scale, const PackedRows& x,
                                                                 int64_t at, float* sum) {
  store(sum, fma(to_floats(total), load(scale) * fill(x.scale[at]), load(sum)));
}

inline void row_units(const Problem& p, int64_t row, uint32_t* units, PackedRows& to) {
  SIMD_FLOATS::round_row<int16_t>(p, row, 32767, units, to);
}
template <class T>  // int8_t
SIMD_TARGET void weight_units(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float* scale) {
  const T* from = (const T*)p.weight + o * p.in + first;
  int16_t* wide = (int16_t*)to;
  for (int64_t i = 0; i < count; ++i) wide[i] = from[i];
  for (int64_t g = 0; g * GROUP < count; ++g) scale[g * PACKED_VECTORS * WIDTH] = p.scale[o];
}
SIMD_TARGET inline __attribute__((always_inline)) units stream_units(const uint8_t* w, int s) {
  return widen_bytes(w + s * 2 * WIDTH);
}
inline float group_scale(const Problem&, const PackedRows& x, int64_t, int64_t r, int64_t g) {
  return x.scale[r * x.groups + g];
}
inline float end_sum(const Problem& p, int64_t o, float sum) { return sum * p.scale[o]; }
}  // namespace SIMD16

namespace SIMD8 {
using namespace simd::SIMD8;
constexpr int UNIT = 4, GROUP_UNITS = GROUP / UNIT, GROUP_BYTES = GROUP / 2;
inline int64_t row_width(const Problem& p) { return p.groups() * GROUP_UNITS; }
inline int64_t row_bytes(const Problem& p) { return p.groups() * GROUP_BYTES; }

SIMD_TARGET inline __attribute__((always_inline)) totals first_total(const PackedRows& x, int64_t at) {
  return fill_units(x.start[at]);
}
SIMD_TARGET inline __attribute__((always_inline)) void add_group(totals total, const float* scale, const PackedRows& x,
                                                                 int64_t at, float* sum) {
  store(sum, fma(to_floats(total), load(scale) * fill(x.scale[at]), load(sum)));
}

inline void row_units(const Problem& p, int64_t row, uint32_t* units, PackedRows& to) {
  SIMD_FLOATS::round_row<int8_t>(p, row, 127, units, to);
}
template <class T>  // uint8_t, of 4 bits
SIMD_TARGET void weight_units(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float* scale) {
  uint8_t* byte = (uint8_t*)to;
  for (int64_t i = 0; i < count; i += GROUP, byte += GROUP) {
    const int64_t g = o * p.groups() + (first + i) / GROUP;
    const uint8_t* from = (const uint8_t*)p.weight + g * GROUP_BYTES;
    for (int j = 0; j < GROUP / 2; ++j) byte[j] = from[j] & 15, byte[j + GROUP / 2] = from[j] >> 4;
    scale[i / GROUP * PACKED_VECTORS * WIDTH] = p.scale[g];
  }
}
SIMD_TARGET inline __attribute__((always_inline)) units stream_units(const uint8_t* w, int s) {
  constexpr int HALF = GROUP_BYTES / (4 * WIDTH);  // vectors of low nibbles, and then of high ones
  return nibbles_of(load_units(w + s % HALF * 4 * WIDTH), s >= HALF);
}
inline float group_scale(const Problem& p, const PackedRows& x, int64_t o, int64_t r, int64_t g) {
  return p.scale[o * x.groups + g] * x.scale[r * x.groups + g];
}
inline float end_sum(const Problem&, int64_t, float sum) { return sum; }
}  // namespace SIMD8

}  // namespace few_rows_linear

#define SIMD SIMD16
#include "panels.h"
#include "streams.h"
#undef SIMD
#define SIMD SIMD8
#include "panels.h"
#include "streams.h"
#undef SIMD

// Licensed under the Apache License, Version 2.0; see LICENSE.
// Many rows times bfloat16 weights where the processor multiplies bfloat16: x is rounded to it, sums are floats.
// few_rows_linear.h includes it; panels.h does the rest.
#pragma once

#if defined(__x86_64__)

namespace few_rows_linear {

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

#define SIMD_TARGET SIMD_BFLOAT
#define SIMD bfloat
#include "panels.h"
#undef SIMD
#undef SIMD_TARGET

#endif

// Licensed under the Apache License, Version 2.0; see LICENSE.
// A linear layer for few rows on a CPU, and the rounding of its weights; free of Paddle.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace few_rows_linear {

constexpr int FEW_ROWS = 64;  // so many rows do not depend on each other; more go by panels of weights
constexpr int GROUP = 128;  // inputs that share a scale in 4 bits
constexpr float TINY = 1e-30f;  // a row or group of nothing larger becomes zeros

struct Problem {
  const float* x;       // [rows, in]
  const void* weight;   // [out, in] of T, or 4 bits: [out, groups, GROUP / 2]
  const float* scale;   // null, [out], or 4 bits: [out, groups]
  float* y;             // [rows, out]
  int64_t rows, in, out;

  int64_t groups() const { return (in + GROUP - 1) / GROUP; }
};

// x for many rows: units of 32 bits in tiles of rows, [width][rows of the tile], and of whole numbers for each group
// what the sums start at and the scale, [rows][groups].
struct PackedRows {
  std::vector<uint32_t> units;
  std::vector<int32_t> start;
  std::vector<float> scale;
  int64_t width, groups;
};

constexpr size_t LARGEST_KEPT = 1 << 24;  // units whose memory a thread keeps
constexpr int PANEL_COLUMNS = 1024;  // inputs of a panel of weights, which is for the second level cache

}  // namespace few_rows_linear

#define SIMD_KERNELS "few_rows_linear/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

#define SIMD_KERNELS "few_rows_linear/panels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

#if defined(__x86_64__)
#define SIMD_TARGET SIMD_VNNI
#define SIMD_FLOATS avx512
#define SIMD16 whole16
#define SIMD8 whole8
#include "whole.h"
#undef SIMD_TARGET
#undef SIMD_FLOATS
#undef SIMD16
#undef SIMD8
#define SIMD_TARGET SIMD_AVX2
#define SIMD_FLOATS avx2
#define SIMD16 vex16
#define SIMD8 vex8
#include "whole.h"
#undef SIMD_TARGET
#undef SIMD_FLOATS
#undef SIMD16
#undef SIMD8
#endif

#include "bfloat.h"

namespace few_rows_linear {

// T: float, simd::bfloat16, int8_t, or uint8_t for 4 bits.
template <class T>
void linear(const Problem& p) {
  // small pieces, so that the threads end together; of whole tiles
  const int64_t piece = std::min<int64_t>(64, (p.out / (2 * omp_get_max_threads()) + 3) / 4 * 4 + 4);
  const bool few = p.rows <= FEW_ROWS;
#if defined(__x86_64__)
  const auto level = simd::level();
  if constexpr (std::is_same<T, simd::bfloat16>::value)
    if (!few && simd::has_bfloat16()) return bfloat::many_rows<T>(p);
  if constexpr (std::is_same<T, int8_t>::value) {
    if (level == simd::VNNI) return few ? whole16::few_rows(p, piece) : whole16::many_rows<T>(p);
    if (level == simd::AVX_VNNI) return few ? vex16::few_rows(p, piece) : vex16::many_rows<T>(p);
  }
  if constexpr (std::is_same<T, uint8_t>::value) {
    if (level == simd::VNNI) return few ? whole8::few_rows(p, piece) : whole8::many_rows<T>(p);
    if (level == simd::AVX_VNNI) return few ? vex8::few_rows(p, piece) : vex8::many_rows<T>(p);
  }
#endif
  if (!few) return SIMD_CHOOSE(many_rows<T>)(p);
  const auto outputs = SIMD_CHOOSE(stream_outputs<T>);
  in_parallel(p.out, piece, p.rows * p.in * p.out, [&](int64_t begin, int64_t end) { outputs(p, begin, end); });
}

// In few_rows_linear.cc, once for all that use them.
extern template void linear<float>(const Problem&);
extern template void linear<simd::bfloat16>(const Problem&);
extern template void linear<int8_t>(const Problem&);
extern template void linear<uint8_t>(const Problem&);

// T: float, simd::bfloat16 or simd::float16. codes and scale as Problem's weight and scale.
template <class T>
void quantize(const void* weight, int64_t out, int64_t in, int bits, void* codes, float* scale) {
  const auto rows = bits == 8 ? SIMD_CHOOSE(quantize8<T>) : SIMD_CHOOSE(quantize4<T>);
  in_parallel(out, 16, out * in, [&](int64_t begin, int64_t end) { rows(weight, in, begin, end, codes, scale); });
}

}  // namespace few_rows_linear

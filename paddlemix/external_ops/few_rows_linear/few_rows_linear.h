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

using Outputs = void (*)(const Problem&, int64_t begin, int64_t end);

}  // namespace few_rows_linear

#define SIMD_KERNELS "few_rows_linear/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

#include "vnni.h"

namespace few_rows_linear {

// T: float, simd::bfloat16, int8_t, or uint8_t for 4 bits.
template <class T>
void linear(const Problem& p) {
  const Outputs outputs = SIMD_CHOOSE(outputs<T>)(p.rows);
  // small pieces, so that the threads end together; of whole tiles
  const int64_t piece = std::min<int64_t>(64, (p.out / (2 * omp_get_max_threads()) + 3) / 4 * 4 + 4);
#if defined(__x86_64__)
  if constexpr (std::is_same<T, uint8_t>::value)
    if (p.rows > 0 && p.rows <= FEW_ROWS && simd::level() == simd::VNNI) return linear_vnni(p, piece);
#endif
  in_parallel(p.out, piece, p.rows * p.in * p.out, [&](int64_t begin, int64_t end) { outputs(p, begin, end); });
}

// T: float, simd::bfloat16 or simd::float16. codes and scale as Problem's weight and scale.
template <class T>
void quantize(const void* weight, int64_t out, int64_t in, int bits, void* codes, float* scale) {
  const auto rows = bits == 8 ? SIMD_CHOOSE(quantize8<T>) : SIMD_CHOOSE(quantize4<T>);
  in_parallel(out, 16, out * in, [&](int64_t begin, int64_t end) { rows(weight, in, begin, end, codes, scale); });
}

}  // namespace few_rows_linear

// Licensed under the Apache License, Version 2.0; see LICENSE.
// RMS norm and layer norm over the last axis on a CPU, forward and backward; free of Paddle. Sums are of double.
#pragma once

#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "../simd.h"

namespace norm {

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, simd::bfloat16* to) { *to = simd::to_bfloat16(x); }

inline void narrow(float x, simd::float16* to) {
  const uint32_t bits = simd::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) {
    to->bits = sign | 0x7e00;
  } else if (size >= 0x477ff000) {  // 65520 and more round to infinity
    to->bits = sign | 0x7c00;
  } else if (size < 0x38800000) {  // subnormal: the sum's last bit is 2^-24, so the addition rounds
    to->bits = sign | (simd::bit_cast<uint32_t>(simd::bit_cast<float>(size) + 0.5f) - 0x3f000000);
  } else {
    to->bits = sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  }
}

// x [rows, cols] of X; scale, bias, y and dy of W, bias null where there is none; mean null for RMS norm.
template <class X, class W>
struct Problem {
  const X* x;
  const W* scale;
  const W* bias;
  float* mean;    // [rows]
  float* rstd;  // [rows]
  int64_t rows, cols;
  double epsilon;
};

constexpr int64_t BLOCK = 64;            // columns

}  // namespace norm

#define SIMD_KERNELS "fused_ln/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace norm {

template <class X, class W>
void forward(const Problem<X, W>& p, W* y) {
  const auto one = SIMD_CHOOSE(normalize_row<X, W>);
  in_parallel(p.rows, 1, 4 * p.rows * p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one(p, row, y + row * p.cols);
  });
}

// dbias null where there is none.
template <class X, class W>
void backward(const Problem<X, W>& p, const W* dy, X* dx, W* dscale, W* dbias) {
  const auto one = SIMD_CHOOSE(row_gradient<X, W>);
  const auto block = SIMD_CHOOSE(column_gradients<X, W>);
  in_parallel(p.rows, 1, 4 * p.rows * p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one(p, row, dy + row * p.cols, dx + row * p.cols);
  });
  in_parallel(p.cols, BLOCK, 4 * p.rows * p.cols, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += BLOCK) block(p, begin, std::min(begin + BLOCK, end), dy, dscale, dbias);
  });
}

}  // namespace norm

// Licensed under the Apache License, Version 2.0; see LICENSE.
// Cross entropy of logits on a CPU, whose memory becomes the gradient's; free of Paddle.
#pragma once

#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "../simd.h"

namespace fused_cross_entropy {

struct Problem {
  float* logits;          // [rows, classes]; becomes softmax(logits) - one_hot(label)
  const int64_t* labels;  // [rows]
  float* losses;          // [rows]
  int64_t rows, classes;
};

}  // namespace fused_cross_entropy

#define SIMD_KERNELS "fused_cross_entropy/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace fused_cross_entropy {

inline void compute(const Problem& p) {
  const auto one = SIMD_CHOOSE(row_loss);
  in_parallel(p.rows, 1, 16 * p.rows * p.classes, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) one(p, row);
  });
}

}  // namespace fused_cross_entropy

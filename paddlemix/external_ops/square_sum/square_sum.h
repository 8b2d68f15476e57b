// Licensed under the Apache License, Version 2.0; see LICENSE.
// The sum of squares of many floats on a CPU, in double; free of Paddle.
#pragma once

#include <numeric>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace square_sum {
constexpr int64_t BLOCK = 1 << 15;  // numbers whose sum is one task's, so that threads do not change it
}

#define SIMD_KERNELS "square_sum/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace square_sum {

inline double compute(const float* x, int64_t count) {
  const auto block = SIMD_CHOOSE(sum_block);
  std::vector<double> sums((count + BLOCK - 1) / BLOCK);
  in_parallel(sums.size(), 1, count, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) sums[i] = block(x + i * BLOCK, std::min(BLOCK, count - i * BLOCK));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace square_sum

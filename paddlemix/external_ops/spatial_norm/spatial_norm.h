// Licensed under the Apache License, Version 2.0; see LICENSE.
// Group norm of a picture on a CPU, scaled and shifted by the latent where there is one; free of Paddle.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace spatial_norm {

constexpr int64_t PIECE = 256;  // pixels whose sums are kept in float32

struct Problem {
  const float* x;      // [height, width, channels]
  const float* weight;  // [channels]
  const float* bias;
  const float* scale;  // [height / times, width / times, channels], or null
  const float* shift;
  float* out;          // as x
  int64_t height, width, channels, groups, times;
  float epsilon;
  bool silu;
  const float* mean = nullptr;   // [channels], of its group: `statistics` gives both
  const float* slope = nullptr;  // [channels], the weight over the root of the variance
};

}  // namespace spatial_norm

#define SIMD_KERNELS "spatial_norm/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace spatial_norm {

// The mean of each channel's group, and the channel's weight over the root of its group's variance: [2][channels].
inline std::vector<float> statistics(const Problem& p) {
  const int64_t pixels = p.height * p.width, pieces = (pixels + PIECE - 1) / PIECE, size = p.channels / p.groups;
  std::vector<float> means(pieces * p.channels), squares(pieces * p.channels), found(2 * p.channels);
  const auto moments = SIMD_CHOOSE(moments);
  in_parallel(pieces, 1, 2 * pixels * p.channels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      moments(p.x + i * PIECE * p.channels, std::min(PIECE, pixels - i * PIECE), p.channels, &means[i * p.channels],
              &squares[i * p.channels]);
  });
  for (int64_t group = 0; group < p.groups; ++group) {  // the sums of pieces in their order, whatever the threads
    const int64_t first = group * size, last = first + size;
    double sum = 0, variance = 0;
    for (int64_t i = 0; i < pieces; ++i)
      for (int64_t c = first; c < last; ++c)
        sum += means[i * p.channels + c] * (double)std::min(PIECE, pixels - i * PIECE);
    const double middle = sum / (pixels * size);
    for (int64_t i = 0; i < pieces; ++i)
      for (int64_t c = first; c < last; ++c) {
        const double away = means[i * p.channels + c] - middle;
        variance += squares[i * p.channels + c] + away * away * std::min(PIECE, pixels - i * PIECE);
      }
    const double inverse = 1 / std::sqrt(variance / (pixels * size) + p.epsilon);
    for (int64_t c = first; c < last; ++c) {
      found[c] = middle;
      found[p.channels + c] = p.weight[c] * inverse;
    }
  }
  return found;
}

// silu(norm(x) * scale + shift), where norm(x) = (x - mean) / sqrt(variance + epsilon) * weight + bias by groups of
// channels.
inline void compute(Problem p) {
  const std::vector<float> found = statistics(p);
  p.mean = found.data();
  p.slope = p.mean + p.channels;
  const auto apply = SIMD_CHOOSE(apply_to_row);
  in_parallel(p.height, std::max<int64_t>(1, PIECE / p.width), 4 * p.height * p.width * p.channels,
              [&](int64_t begin, int64_t end) {
                for (; begin < end; ++begin) apply(p, begin);
              });
}

}  // namespace spatial_norm

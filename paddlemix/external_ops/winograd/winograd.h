// Licensed under the Apache License, Version 2.0; see LICENSE.
// 3 x 3 convolutions on a CPU by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308), free of Paddle.
//
// 16 products give 2 x 2 pixels, where 36 are counted by the definition. After a doubling of every pixel they give
// 3 x 3 pixels of each of the four places in a doubled pixel, which see 2 x 2 sums of the weights.
#pragma once

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace winograd {

constexpr int64_t POINTS = 16;
constexpr int64_t BLOCK = 48;  // tiles that share a panel of weights while it is in the cache
constexpr int64_t GROUP = 1 << 22;  // transformed weights that are in the cache together, over all pixels
constexpr int64_t INPUTS = 16, OUTPUTS = 64;  // channels are multiples of these

template <int N>
using Matrix = float[4][N];
// G for three weights; and for those that the first and the second of a doubled pixel see, made of the three
constexpr Matrix<3> SINGLE = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
constexpr Matrix<3> DOUBLED[2] = {{{1, 0, 0}, {.5, .5, .5}, {.5, -.5, -.5}, {0, 1, 1}},
                                  {{1, 1, 0}, {.5, .5, .5}, {.5, .5, -.5}, {0, 0, 1}}};

struct Problem {
  const float* x;       // [height, width, in]
  const float* weight;  // [out, in, 3, 3]
  const float* bias;    // [out]
  float* out_pixels;    // [height, width, out], or twice the height and width
  int64_t height, width, in, out;
  bool doubled;  // every pixel is doubled in both directions first
  bool add;      // the result is added to what is there
  int64_t first = 0, last = 0;  // panels of outputs whose weights are in `weights`, transformed: [.., POINTS, in, PANEL]
  float* weights = nullptr;

  int64_t parts() const { return doubled ? 4 : 1; }
  int64_t tiles_down() const { return doubled ? height / 3 + 1 : (height + 1) / 2; }
  int64_t tiles_across() const { return doubled ? width / 3 + 1 : (width + 1) / 2; }

  // Where a result goes, null where it is outside.
  float* pixel(int64_t row, int64_t column, int64_t part) const {
    int64_t rows = height, columns = width;
    if (doubled) {
      const int64_t below = part / 2, right = part % 2;
      row = 2 * row - below, column = 2 * column - right, rows *= 2, columns *= 2;
    }
    return row >= 0 && row < rows && column >= 0 && column < columns ? out_pixels + (row * columns + column) * out : nullptr;
  }
};

}  // namespace winograd

#define SIMD_KERNELS "winograd/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace winograd {

inline void convolve(Problem p) {
  static thread_local std::vector<float> buffer;
  const int64_t panel = SIMD_CHOOSE(PANEL), panels = p.parts() * p.out / panel, threads = omp_get_max_threads();
  const int64_t tiles = p.tiles_down() * p.tiles_across(), work = 9 * p.in * panel;
  const int64_t group = std::max(threads, GROUP / (POINTS * p.in * panel));
  // pieces of whole blocks, smaller where there are few, so that the threads end together
  const int64_t block = std::min(BLOCK, (tiles / (2 * threads) + 5) / 6 * 6 + 6);
  const auto lay_out = SIMD_CHOOSE(lay_out_panels);
  const auto compute = SIMD_CHOOSE(compute_tiles);
  buffer.resize(std::min(group, panels) * POINTS * p.in * panel);
  p.weights = buffer.data();
  for (p.first = 0; p.first < panels; p.first = p.last) {
    p.last = std::min(p.first + group, panels);
    in_parallel(p.last - p.first, 1, work * (p.last - p.first),
                [&](int64_t begin, int64_t end) { lay_out(p, p.first + begin, p.first + end); });
    in_parallel(tiles, block, work * (p.last - p.first) * tiles, [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += block) compute(p, begin, std::min(begin + block, end));
    });
  }
}

}  // namespace winograd

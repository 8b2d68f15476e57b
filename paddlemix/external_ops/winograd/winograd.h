// Licensed under the Apache License, Version 2.0; see LICENSE.
// 3 x 3 convolutions on a CPU by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308), free of Paddle.
//
// 36 products give 4 x 4 pixels, where 144 are counted by the definition. After a doubling of every pixel they give
// 5 x 5 pixels of each of the four places in a doubled pixel, which see 2 x 2 sums of the weights.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../parallel.h"
#include "../simd.h"
#include "../spatial_norm/spatial_norm.h"

namespace winograd {

constexpr int64_t SIDE = 6, POINTS = SIDE * SIDE;  // of a tile
constexpr int64_t DOWN = 8, ACROSS = 6;  // tiles that share a panel of weights while it is in the cache
constexpr int64_t MOST_PIXELS = (5 * (DOWN - 1) + SIDE) * (5 * (ACROSS - 1) + SIDE);  // of these tiles
constexpr int64_t CHUNK = 128;  // inputs whose products are added up by themselves: a short sum rounds less
constexpr int64_t GROUP = 1 << 24;  // transformed weights that are in memory together, over all pixels
constexpr int64_t LINE = 16;  // numbers of a line of the cache
constexpr int64_t INPUTS = 16, OUTPUTS = 64;  // channels are multiples of these

// Polynomials are known by their values at 0, A, -A, B, -B and their highest coefficient. Of the points that were
// tried these are among those that round least, half as much as 1 and 2; from 256 inputs on, with the short sums, about
// as much as oneDNN by the definition. Their powers are exact.
constexpr float A = 11. / 16, B = 11. / 8;
struct Matrix {
  float of[SIDE][3];
};
// G, made for the polynomial whose powers of x the three weights belong to.
constexpr Matrix values_at_points(int first, int second, int third) {
  const double points[] = {0, A, -A, B, -B};
  const int powers[] = {first, second, third};
  Matrix g{};
  for (int i = 0; i < 5; ++i) {
    double value = 1;
    for (int j = 0; j < 5; ++j) value /= i == j ? 1 : points[i] - points[j];
    for (int power = 0; power < 3; ++power, value *= points[i])
      for (int k = 0; k < 3; ++k)
        if (powers[k] == power) g.of[i][k] = value;
  }
  for (int k = 0; k < 3; ++k) g.of[5][k] = powers[k] == third;
  return g;
}
// The first of a doubled pixel sees one weight and the sum of two, the second the sum of two and one.
constexpr Matrix SINGLE = values_at_points(0, 1, 2),
                 DOUBLED[2] = {values_at_points(0, 1, 1), values_at_points(0, 0, 1)};

struct Problem {
  const float* x;       // [height, width, in]
  const float* weight;  // [out, in, 3, 3]
  const float* bias;    // [out]
  float* out_pixels;    // [height, width, out], or twice the height and width
  int64_t height, width, in, out;
  bool doubled;  // every pixel is doubled in both directions first
  bool add;      // the result is added to what is there
  spatial_norm::Problem* norm;  // applied to x first, null where it is not
  int64_t first = 0, last = 0;  // panels of outputs whose transformed weights are at hand
  float* weights = nullptr;     // [last - first, POINTS, in, PANEL]

  int64_t parts() const { return doubled ? 4 : 1; }
  int64_t size() const { return doubled ? 5 : 4; }  // of what a tile gives
  int64_t tiles_down() const { return (height + doubled + size() - 1) / size(); }
  int64_t tiles_across() const { return (width + doubled + size() - 1) / size(); }

  // Where a result goes, null where it is outside.
  float* pixel(int64_t row, int64_t column, int64_t part) const {
    int64_t rows = height, columns = width;
    if (doubled) {
      const int64_t below = part / 2, right = part % 2;
      row = 2 * row - below, column = 2 * column - right, rows *= 2, columns *= 2;
    }
    const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
    return inside ? out_pixels + (row * columns + column) * out : nullptr;
  }
};

// Memory that is kept from one use to the next, in large pages where the system has them.
class Buffer {
  float* start = nullptr;
  int64_t size = 0;

 public:
  ~Buffer() { std::free(start); }
  float* numbers(int64_t count) {
    constexpr int64_t PAGE = 1 << 21;
    if (count > size) {
      const int64_t bytes = (count * sizeof(float) + PAGE - 1) / PAGE * PAGE;
      std::free(std::exchange(start, nullptr));
      size = 0;  // until there is memory
      start = (float*)std::aligned_alloc(PAGE, bytes);
      if (!start) throw std::bad_alloc();
      size = bytes / sizeof(float);
#if defined(MADV_HUGEPAGE)
      madvise(start, bytes, MADV_HUGEPAGE);
#endif
    }
    return start;
  }
};

}  // namespace winograd

#define SIMD_KERNELS "winograd/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace winograd {

inline void convolve(Problem p) {
  static thread_local Buffer buffer;
  std::vector<float> found;
  if (p.norm) {
    found = spatial_norm::statistics(*p.norm);
    p.norm->mean = found.data();
    p.norm->slope = found.data() + p.in;
  }
  const int64_t panel = SIMD_CHOOSE(PANEL), vectors = SIMD_CHOOSE(VECTORS), threads = omp_get_max_threads();
  const int64_t panels = p.parts() * p.out / panel, rows = p.tiles_down(), columns = p.tiles_across();
  const int64_t work = POINTS * p.in * panel, most = std::max<int64_t>(1, GROUP / work);
  const int64_t groups = (panels + most - 1) / most;
  // blocks of tiles, smaller where there are few, so that the threads end together
  const int64_t blocks_across = (columns + ACROSS - 1) / ACROSS;
  const int64_t down = std::max<int64_t>(1, std::min(DOWN, rows * blocks_across / (2 * threads)));
  const int64_t blocks = (rows + down - 1) / down * blocks_across;
  const auto lay_out = SIMD_CHOOSE(lay_out_vectors);
  const auto compute = SIMD_CHOOSE(compute_tiles);
  p.weights = buffer.numbers((panels + groups - 1) / groups * work);
  for (int64_t group = 0; group < groups; ++group) {
    p.first = group * panels / groups;
    p.last = (group + 1) * panels / groups;
    in_parallel((p.last - p.first) * vectors, 1, work * (p.last - p.first), [&](int64_t begin, int64_t end) {
      lay_out(p, p.first * vectors + begin, p.first * vectors + end);
    });
    in_parallel(blocks, 1, work * (p.last - p.first) * rows * columns, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const int64_t top = begin / blocks_across * down, block = begin % blocks_across;
        const int64_t left = block * columns / blocks_across, right = (block + 1) * columns / blocks_across;
        compute(p, top, left, std::min(down, rows - top), right - left);
      }
    });
  }
}

}  // namespace winograd

// Licensed under the Apache License, Version 2.0; see LICENSE.
// Products of float32 matrices on a CPU as training needs them: either side may be transposed, weights may be of fewer
// bits, and the result may be added to what is there; free of Paddle.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../few_rows_linear/few_rows_linear.h"
#include "../parallel.h"
#include "../simd.h"

namespace float_product {

constexpr int DEPTH = 512;              // terms of a sum a time, a multiple of few_rows_linear::GROUP
constexpr int BLOCKS = 4;               // of outputs in a panel, which is for the second level cache
constexpr int64_t PACKED = 1 << 22;     // numbers of x that are packed at once

struct Problem {
  const float* x;      // [rows, depth], or turned [depth, rows]
  const void* weight;  // [out, depth] of T, or turned [depth, out]; 4 bits as few_rows_linear has them
  const float* scale;  // of the weight; null where T is a float
  float* y;            // [rows, out]
  int64_t rows, depth, out;
  bool x_turned, weight_turned, add;  // add: to what y holds

  // The weight as few_rows_linear names its axes.
  few_rows_linear::Problem stored() const {
    return {nullptr, weight, scale, nullptr, 0, weight_turned ? out : depth, weight_turned ? depth : out};
  }
};

}  // namespace float_product

#define SIMD_KERNELS "float_product/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace float_product {

// T: float, simd::bfloat16, int8_t, or uint8_t for 4 bits. A sum is made in one order, whatever the threads are.
template <class T>
void multiply(const Problem& p) {
  if (p.depth == 0 && !p.add) std::fill(p.y, p.y + p.rows * p.out, 0.0f);
  const int64_t tile = SIMD_CHOOSE(PACKED_ROWS), panel = SIMD_CHOOSE(PANEL_OUTS);
  const auto pack = SIMD_CHOOSE(pack_tiles);
  const auto multiply = SIMD_CHOOSE(multiply_panel<T>);
  static thread_local std::vector<float> packed;
  const int64_t most = PACKED / DEPTH / tile, panels = (p.out + panel - 1) / panel, threads = omp_get_max_threads();
  for (int64_t begin = 0; begin < p.rows; begin += most * tile) {
    const int64_t tiles = (std::min(most * tile, p.rows - begin) + tile - 1) / tile;
    const int64_t parts = std::min(tiles, std::max<int64_t>(1, 4 * threads / panels));  // of rows, where panels are few
    packed.resize(tiles * tile * DEPTH);
    for (int64_t first = 0; first < p.depth; first += DEPTH) {
      const int64_t count = std::min<int64_t>(DEPTH, p.depth - first), work = tiles * tile * count;
      in_parallel(tiles, 1, 4 * work, [&, to = packed.data()](int64_t i, int64_t end) {
        pack(p, begin + i * tile, end - i, first, count, to + i * tile * count);
      });
      in_parallel(panels * parts, 1, work * p.out, [&, x = packed.data()](int64_t i, int64_t end) {
        for (int64_t packed_panel = -1; i < end; ++i) {
          const int64_t from = i % parts * tiles / parts, to = (i % parts + 1) * tiles / parts, o = i / parts * panel;
          multiply(p, x + from * tile * count, begin + from * tile, to - from, o, first, count, packed_panel == o);
          packed_panel = o;
        }
      });
    }
  }
}

// In float_product.cc, once for all that use them.
extern template void multiply<float>(const Problem&);
extern template void multiply<simd::bfloat16>(const Problem&);
extern template void multiply<int8_t>(const Problem&);
extern template void multiply<uint8_t>(const Problem&);

}  // namespace float_product

// Licensed under the Apache License, Version 2.0; see LICENSE.
// float_product.h includes it for each kind of vectors. The plain loop:
//
//   for each row r and output o:
//     for k in depth: y[r][o] += x[r][k] * weight[o][k]  // turned: x[k][r], weight[k][o]
//
// by panels of DEPTH terms: x packed in tiles of PACKED_ROWS rows, the weights in blocks of OUTS outputs.
namespace float_product {
namespace SIMD {
using namespace simd::SIMD;

constexpr int OUTS = PACKED_VECTORS * WIDTH, PANEL_OUTS = BLOCKS * OUTS;

// `tiles` tiles of x from `row` on, the terms from `first` on, `count` of them: [tiles][count][PACKED_ROWS]. Missing rows
// are any numbers.
SIMD_TARGET inline void pack_tiles(const Problem& p, int64_t row, int64_t tiles, int64_t first, int64_t count, float* to) {
  constexpr int ROWS = PACKED_ROWS, REST = ROWS % WIDTH;
  for (; tiles > 0; --tiles, row += ROWS, to += ROWS * count) {
    if (p.x_turned) {
      const float* from = p.x + first * p.rows + row;
      if (row + ROWS <= p.rows)
        for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * ROWS, from + k * p.rows, ROWS * sizeof(float));
      else
        for (int64_t k = 0; k < count; ++k) std::copy(from + k * p.rows, p.x + (first + k + 1) * p.rows, to + k * ROWS);
      continue;
    }
    const auto from = [&](int64_t r) { return p.x + std::min(row + r, p.rows - 1) * p.depth + first; };
    const int64_t whole = count / WIDTH * WIDTH;
    for (int r = 0; r < ROWS; r += WIDTH)
      for (int64_t k = 0; k < whole; k += WIDTH) {
        lanes some[WIDTH];
        for (int i = 0; i < WIDTH; ++i) std::memcpy(&some[i], from(r + i) + k, sizeof some[i]);
        transpose(some);
        for (int i = 0; i < WIDTH; ++i)
          std::memcpy(to + (k + i) * ROWS + r, &some[i], r + WIDTH <= ROWS ? sizeof some[i] : REST * sizeof(float));
      }
    for (int64_t k = whole; k < count; ++k)
      for (int r = 0; r < ROWS; ++r) to[k * ROWS + r] = from(r)[k];
  }
}

// The weights of PANEL_OUTS outputs from `o` on and `count` terms from `first` on, as float32 [BLOCKS][DEPTH][OUTS].
// Missing outputs are any numbers.
template <class T>
SIMD_TARGET void pack_panel(const Problem& p, int64_t o, int64_t first, int64_t count, float* panel) {
  const few_rows_linear::Problem stored = p.stored();
  const int64_t outs = std::min<int64_t>(PANEL_OUTS, p.out - o);
  if (p.weight_turned) {
    constexpr int GROUP = few_rows_linear::GROUP;
    float wide[PANEL_OUTS + 2 * GROUP];
    const int64_t begin = o / GROUP * GROUP;  // where a group of 4 bits begins
    for (int64_t k = 0; k < count; ++k) {
      const float* from;
      if constexpr (std::is_same<T, float>::value) {
        from = (const float*)p.weight + (first + k) * p.out + o;
      } else {
        few_rows_linear::SIMD::weight_units<T>(stored, first + k, begin, o + outs - begin, (uint32_t*)wide, nullptr);
        from = wide + (o - begin);
      }
      for (int64_t i = 0; i < outs; i += OUTS) {
        float* to = panel + i * DEPTH + k * OUTS;
        if (i + OUTS <= outs)
          std::memcpy(to, from + i, OUTS * sizeof(float));
        else
          std::copy(from + i, from + outs, to);
      }
    }
    return;
  }
  alignas(64) uint32_t rows[WIDTH][DEPTH];
  for (int64_t i = 0; i < outs; i += WIDTH) {
    for (int r = 0; r < WIDTH; ++r)
      few_rows_linear::SIMD::weight_units<T>(stored, std::min(o + i + r, p.out - 1), first, count, rows[r], nullptr);
    pack(rows[0], DEPTH, (count + WIDTH - 1) / WIDTH * WIDTH, (uint32_t*)panel + i / OUTS * OUTS * DEPTH + i % OUTS, OUTS);
  }
}

// A tile of `rows` rows times a block of `outs` outputs, which y has at `to`.
SIMD_TARGET inline void multiply_tile(const float* x, const float* w, int64_t count, bool add, float* to, int64_t stride,
                                      int64_t rows, int64_t outs) {
  totals total[PACKED_ROWS][PACKED_VECTORS];
  for (int r = 0; r < PACKED_ROWS; ++r)
    for (int v = 0; v < PACKED_VECTORS; ++v) total[r][v] = fill(0);
  multiply_packed<PACKED_ROWS, 1>((const uint32_t*)x, (const uint32_t*)w, OUTS, count, total);
  if (rows == PACKED_ROWS && outs == OUTS) {
    for (int r = 0; r < PACKED_ROWS; ++r)
      for (int v = 0; v < PACKED_VECTORS; ++v) {
        float* y = to + r * stride + v * WIDTH;
        store(y, add ? load(y) + total[r][v] : total[r][v]);
      }
    return;
  }
  float part[PACKED_ROWS][OUTS];
  for (int r = 0; r < PACKED_ROWS; ++r)
    for (int v = 0; v < PACKED_VECTORS; ++v) store(part[r] + v * WIDTH, total[r][v]);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < outs; ++i) to[r * stride + i] = add ? to[r * stride + i] + part[r][i] : part[r][i];
}

// `tiles` tiles of packed x, whose first row is `row`, times the panel of outputs from `o` on; `packed`: the thread has
// this panel from the call before.
template <class T>
SIMD_TARGET void multiply_panel(const Problem& p, const float* x, int64_t row, int64_t tiles, int64_t o, int64_t first,
                                int64_t count, bool packed) {
  alignas(64) static thread_local float panel[PANEL_OUTS * DEPTH];
  if (!packed) pack_panel<T>(p, o, first, count, panel);
  for (; tiles > 0; --tiles, x += PACKED_ROWS * count, row += PACKED_ROWS)
    for (int64_t b = 0; b < BLOCKS && o + b * OUTS < p.out; ++b)
      multiply_tile(x, panel + b * OUTS * DEPTH, count, p.add || first, p.y + row * p.out + o + b * OUTS, p.out,
                    std::min<int64_t>(PACKED_ROWS, p.rows - row), std::min<int64_t>(OUTS, p.out - o - b * OUTS));
}

}  // namespace SIMD
}  // namespace float_product

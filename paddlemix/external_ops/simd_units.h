// Licensed under the Apache License, Version 2.0; see LICENSE.
// Products of packed matrices, for each kind of arithmetic; simd.h and few_rows_linear/whole.h include it.
//
// Both sides are rows of units of 32 bits: a float, two numbers of 16 bits, or four of 8. A namespace has `units`, a
// vector of WIDTH of them, `totals`, a vector of WIDTH sums, load_units, fill_units and multiply. The plain loop:
//
//   for each row r and output o:
//     for each unit i: total[r][o] += dot(w[i][o], x[r][i])  // one after the other: a row knows no other rows
namespace simd {
namespace SIMD {

typedef int32_t lanes __attribute__((vector_size(4 * WIDTH)));

// x[i][j] and x[j][i] change places. Each round puts the lower and the upper half of the rows' lanes in turns.
SIMD_TARGET inline __attribute__((always_inline)) void transpose(lanes (&x)[WIDTH]) {
  lanes low, high, y[WIDTH];
  for (int i = 0; i < WIDTH; ++i) {
    low[i] = i / 2 + i % 2 * WIDTH;
    high[i] = low[i] + WIDTH / 2;
  }
  for (int round = 1; round < WIDTH; round *= 2) {
    for (int i = 0; i < WIDTH / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + WIDTH / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + WIDTH / 2], high);
    }
    for (int i = 0; i < WIDTH; ++i) x[i] = y[i];
  }
}

// WIDTH rows of `count` units, whole vectors, `stride` apart, to columns: [count][to_stride].
SIMD_TARGET inline void pack(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    lanes x[WIDTH];
    for (int r = 0; r < WIDTH; ++r) std::memcpy(&x[r], from + r * stride + i, sizeof x[r]);
    transpose(x);
    for (int r = 0; r < WIDTH; ++r) std::memcpy(to + (i + r) * to_stride, &x[r], sizeof x[r]);
  }
}

// Adds to `total` the products of R rows of x and V vectors of outputs. x[i * X_UNIT + r * X_ROW] is unit i of row r.
template <int X_UNIT, int X_ROW, int R, int V>
SIMD_TARGET inline __attribute__((always_inline)) void multiply_packed(const uint32_t* x, const uint32_t* w,
                                                                       int64_t w_stride, int64_t count,
                                                                       totals (&total)[R][V]) {
  for (int64_t i = 0; i < count; ++i) {
    units row[V];
    for (int v = 0; v < V; ++v) row[v] = load_units(w + i * w_stride + v * WIDTH);
    for (int r = 0; r < R; ++r) {
      const units one = fill_units(x[i * X_UNIT + r * X_ROW]);
      for (int v = 0; v < V; ++v) total[r][v] = multiply(row[v], one, total[r][v]);
    }
  }
}

}  // namespace SIMD
}  // namespace simd

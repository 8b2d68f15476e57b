// Licensed under the Apache License, Version 2.0; see LICENSE.
// winograd.h includes it for each kind of vectors. The plain loop:
//
//   for each output o and input c: u[o][c] = G w[o][c] G'^T    // [6][6], once for all tiles
//   for each tile of the picture:
//     for each input c: v[c] = B^T x[c] B                       // [6][6] pixels
//     for each output o: m = sum over c of u[o][c] * v[c]       // 36 products by places, as 36 products of matrices
//                        out[o] = A^T m A + bias[o]
namespace winograd {
namespace SIMD {
using namespace simd::SIMD;

// of the product of tiles and weights: sums that the registers hold, of which each vector is of as many outputs
constexpr int ROWS = 6, VECTORS = WIDTH == 8 ? 2 : 4, PANEL = WIDTH * VECTORS;

// out = G w G'^T for weights [3][3] of WIDTH outputs: [6][6], each `stride` after the other.
SIMD_TARGET inline void transform_weights(const floats (&w)[3][3], const Matrix& rows, const Matrix& columns,
                                          float* out, int64_t stride) {
  for (int i = 0; i < SIDE; ++i) {
    floats row[3];
    for (int k = 0; k < 3; ++k)
      row[k] = fma(fill(rows.of[i][2]), w[2][k], fma(fill(rows.of[i][1]), w[1][k], fill(rows.of[i][0]) * w[0][k]));
    for (int j = 0; j < SIDE; ++j)
      store(out + (SIDE * i + j) * stride,
            fma(fill(columns.of[j][2]), row[2], fma(fill(columns.of[j][1]), row[1], fill(columns.of[j][0]) * row[0])));
  }
}

// Weights of WIDTH outputs, from one such vector to the next, in panels: [POINTS][in][PANEL] of each.
SIMD_TARGET inline void lay_out_vectors(const Problem& p, int64_t begin, int64_t end) {
  float lanes[INPUTS * 9][WIDTH];
  for (int64_t vector = begin; vector < end; ++vector) {
    const int64_t panel = vector / VECTORS, v = vector % VECTORS * WIDTH;
    const int64_t o = panel * PANEL % p.out + v, part = panel * PANEL / p.out;
    const Matrix &rows = p.doubled ? DOUBLED[part / 2] : SINGLE, &columns = p.doubled ? DOUBLED[part % 2] : SINGLE;
    float* to = p.weights + (panel - p.first) * POINTS * p.in * PANEL + v;
    for (int64_t c = 0; c < p.in; ++c) {
      if (c % INPUTS == 0)
        pack((const uint32_t*)p.weight + (o * p.in + c) * 9, p.in * 9, INPUTS * 9, (uint32_t*)lanes, WIDTH);
      floats w[3][3];
      for (int k = 0; k < 9; ++k) w[k / 3][k % 3] = load(lanes[c % INPUTS * 9 + k]);
      transform_weights(w, rows, columns, to + c * PANEL, p.in * PANEL);
    }
  }
}

// B^T d of six numbers
SIMD_TARGET inline __attribute__((always_inline)) void transform_pixels(const floats (&d)[SIDE], floats (&out)[SIDE]) {
  const floats even_a = fma(fill(-B * B), d[2], d[4]), odd_a = fma(fill(-B * B), d[1], d[3]),
               even_b = fma(fill(-A * A), d[2], d[4]), odd_b = fma(fill(-A * A), d[1], d[3]);
  out[0] = fma(fill(A * A * B * B), d[0], fma(fill(-A * A - B * B), d[2], d[4]));
  out[1] = fma(fill(A), odd_a, even_a);
  out[2] = fma(fill(-A), odd_a, even_a);
  out[3] = fma(fill(B), odd_b, even_b);
  out[4] = fma(fill(-B), odd_b, even_b);
  out[5] = fma(fill(A * A * B * B), d[1], fma(fill(-A * A - B * B), d[3], d[5]));
}

// A^T m of six numbers, and of those in the other direction
template <int SIZE>
SIMD_TARGET inline __attribute__((always_inline)) void transform_sums(const floats (&m)[SIDE], floats (&out)[SIZE]) {
  const floats even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + (even_a + even_b);
  out[1] = fma(fill(B), odd_b, fill(A) * odd_a);
  out[2] = fma(fill(B * B), even_b, fill(A * A) * even_a);
  out[3] = fma(fill(B * B * B), odd_b, fill(A * A * A) * odd_a);
  if constexpr (SIZE == 5) out[4] = fma(fill(B * B * B * B), even_b, fill(A * A * A * A) * even_a);
  out[SIZE - 1] = out[SIZE - 1] + m[5];
}

// The 6 x 6 pixels of a tile, `row` numbers from one row to the next and `count` in each pixel, to [POINTS] rows, each
// `stride` after the other.
SIMD_TARGET inline void transform_tile(const float* x, int64_t row, int64_t count, float* out, int64_t stride) {
  for (int64_t c = 0; c < count; c += WIDTH) {
    floats half[SIDE][SIDE];
    for (int j = 0; j < SIDE; ++j) {
      floats d[SIDE];
      for (int i = 0; i < SIDE; ++i) d[i] = load(x + i * row + j * count + c);
      transform_pixels(d, half[j]);
    }
    for (int i = 0; i < SIDE; ++i) {
      floats d[SIDE], done[SIDE];
      for (int j = 0; j < SIDE; ++j) d[j] = half[j][i];
      transform_pixels(d, done);
      for (int j = 0; j < SIDE; ++j) store(out + (SIDE * i + j) * stride + c, done[j]);
    }
  }
}

// Adds the products [R, count] times [count, PANEL] to sums [R, PANEL], or begins these; x has `in` numbers from one
// row to the next. Weights at `next`, which all tiles of the block would wait for, are asked for.
template <int R>
SIMD_TARGET void product(const float* x, int64_t in, const float* w, int64_t count, bool first, const float* next,
                         float* out) {
  floats sums[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = fill(0);
  for (int64_t c = 0; c < count; ++c) {
    __builtin_prefetch(next + c * LINE, 0, 2);
    floats row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(w + c * PANEL + v * WIDTH);
    for (int r = 0; r < R; ++r) {
      const floats one = fill(x[r * in + c]);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(one, row[v], sums[r][v]);
    }
  }
  if (!first)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(out + r * PANEL + v * WIDTH) + sums[r][v];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) store(out + r * PANEL + v * WIDTH, sums[r][v]);
}

// A^T m A of one tile and the panel that starts at output o, written where it belongs.
template <int SIZE>
SIMD_TARGET void write_tile(const Problem& p, const float* sums, int64_t stride, int64_t row, int64_t column, int64_t o,
                            int64_t part) {
  float* to[SIZE][SIZE];
  for (int i = 0; i < SIZE; ++i)
    for (int j = 0; j < SIZE; ++j) to[i][j] = p.pixel(row + i, column + j, part);
  for (int v = 0; v < PANEL; v += WIDTH) {
    floats half[SIDE][SIZE];
    for (int j = 0; j < SIDE; ++j) {
      floats m[SIDE];
      for (int i = 0; i < SIDE; ++i) m[i] = load(sums + (SIDE * i + j) * stride + v);
      transform_sums(m, half[j]);
    }
    const floats bias = load(p.bias + o + v);
    for (int i = 0; i < SIZE; ++i) {
      floats m[SIDE], y[SIZE];
      for (int j = 0; j < SIDE; ++j) m[j] = half[j][i];
      transform_sums(m, y);
      for (int j = 0; j < SIZE; ++j) {
        if (!to[i][j]) continue;
        float* at = to[i][j] + o + v;
        store(at, p.add ? load(at) + (y[j] + bias) : y[j] + bias);
      }
    }
  }
}

// `count` channels, from `first` on, of pixels of the picture, normed where that is wanted, and of zeros around it:
// [rows][columns][count].
SIMD_TARGET inline void read_pixels(const Problem& p, int64_t row, int64_t column, int64_t rows, int64_t columns,
                                    int64_t first, int64_t count, float* out) {
  for (int64_t y = row; y < row + rows; ++y)
    for (int64_t x = column; x < column + columns; ++x, out += count) {
      if (y < 0 || y >= p.height || x < 0 || x >= p.width)
        std::fill(out, out + count, 0.f);
      else if (p.norm)
        spatial_norm::SIMD::apply_to_pixel(*p.norm, y, x, first, count, out);
      else
        std::copy_n(p.x + (y * p.width + x) * p.in + first, count, out);
    }
}

// `down` x `across` tiles, at most DOWN x ACROSS, of which the first is the one at (top, left).
SIMD_TARGET inline void compute_tiles(const Problem& p, int64_t top, int64_t left, int64_t down, int64_t across) {
  static thread_local Buffer buffer;
  const int64_t size = p.size(), tiles = down * across, columns = size * (across - 1) + SIDE;
  // not a multiple of 4096 bytes: a cache keeps few lines of the same address modulo that
  const int64_t stride = tiles * p.in + LINE, sums_stride = tiles * PANEL + LINE;
  float* v = buffer.numbers(POINTS * (stride + sums_stride) + MOST_PIXELS * CHUNK);
  float *sums = v + POINTS * stride, *pixels = sums + POINTS * sums_stride;
  for (int64_t c = 0; c < p.in; c += CHUNK) {
    const int64_t count = std::min(CHUNK, p.in - c);
    read_pixels(p, top * size - 1, left * size - 1, size * (down - 1) + SIDE, columns, c, count, pixels);
    for (int64_t t = 0; t < tiles; ++t)
      transform_tile(pixels + size * (t / across * columns + t % across) * count, columns * count, count,
                     v + t * p.in + c, stride);
  }
  constexpr auto PRODUCT = simd::by_rows<ROWS>([](auto r) { return product<decltype(r)::value>; });
  for (int64_t panel = p.first; panel < p.last; ++panel) {
    for (int64_t point = 0; point < POINTS; ++point)
      for (int64_t c = 0; c < p.in; c += CHUNK) {
        const int64_t count = std::min(CHUNK, p.in - c);
        const float* w = p.weights + (((panel - p.first) * POINTS + point) * p.in + c) * PANEL;
        simd::in_tiles(tiles, ROWS, [&](int64_t t, int64_t rows) {
          PRODUCT.of[rows](v + point * stride + t * p.in + c, p.in, w, count, c == 0,
                           w + count * PANEL + t / ROWS * count * LINE, sums + point * sums_stride + t * PANEL);
        });
      }
    const int64_t o = panel * PANEL % p.out, part = panel * PANEL / p.out;
    for (int64_t t = 0; t < tiles; ++t)
      (p.doubled ? write_tile<5> : write_tile<4>)(p, sums + t * PANEL, sums_stride, (top + t / across) * size,
                                                  (left + t % across) * size, o, part);
  }
}

}  // namespace SIMD
}  // namespace winograd

// Licensed under the Apache License, Version 2.0; see LICENSE.
// winograd.h includes it for each kind of vectors. The plain loop:
//
//   for each output o and input c: u[o][c] = G w[o][c] G'^T     // [4][4], once for all tiles
//   for each tile of the picture:
//     for each input c: v[c] = B^T x[c] B                        // [4][4] pixels
//     for each output o: m = sum over c of u[o][c] * v[c]        // 16 products by places, as 16 products of matrices
//                        out[o] = A^T m A + bias[o]
namespace winograd {
namespace SIMD {
using namespace simd::SIMD;

// of the product of tiles and weights: sums that the registers hold, of which each vector is of as many outputs
constexpr int ROWS = 6, VECTORS = WIDTH == 8 ? 2 : 4, PANEL = WIDTH * VECTORS;

// out = G w G'^T for weights [3][3] of WIDTH outputs: [4][4], each `stride` after the other.
SIMD_TARGET inline void transform_weights(const floats (&w)[3][3], const Matrix<3>& rows, const Matrix<3>& columns,
                                          float* out, int64_t stride) {
  for (int i = 0; i < 4; ++i) {
    floats row[3];
    for (int k = 0; k < 3; ++k)
      row[k] = fma(fill(rows[i][2]), w[2][k], fma(fill(rows[i][1]), w[1][k], fill(rows[i][0]) * w[0][k]));
    for (int j = 0; j < 4; ++j)
      store(out + (4 * i + j) * stride,
            fma(fill(columns[j][2]), row[2], fma(fill(columns[j][1]), row[1], fill(columns[j][0]) * row[0])));
  }
}

// Panels of weights, from one to the next: [16][in][PANEL] of each.
SIMD_TARGET inline void lay_out_panels(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t o = panel * PANEL % p.out, part = panel * PANEL / p.out;
    const Matrix<3>&rows = p.doubled ? DOUBLED[part / 2] : SINGLE, &columns = p.doubled ? DOUBLED[part % 2] : SINGLE;
    for (int64_t c = 0; c < p.in; ++c)
      for (int v = 0; v < PANEL; v += WIDTH) {
        floats w[3][3];
        for (int lane = 0; lane < WIDTH; ++lane) {
          const float* from = p.weight + ((o + v + lane) * p.in + c) * 9;
          for (int k = 0; k < 9; ++k) w[k / 3][k % 3][lane] = from[k];
        }
        transform_weights(w, rows, columns, p.weights + ((panel - p.first) * POINTS * p.in + c) * PANEL + v, p.in * PANEL);
      }
  }
}

// B^T d of four numbers
SIMD_TARGET inline __attribute__((always_inline)) void transform4(floats& a, floats& b, floats& c, floats& d) {
  const floats first = a - c, sum = b + c, difference = c - b, last = d - b;
  a = first, b = sum, c = difference, d = last;
}

// The 4 x 4 pixels of a tile to [16] rows of `in` numbers, each `stride` after the other.
SIMD_TARGET inline void transform_pixels(const float* const (&pixels)[4][4], int64_t in, float* out, int64_t stride) {
  for (int64_t c = 0; c < in; c += WIDTH) {
    floats d[4][4];
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) d[i][j] = load(pixels[i][j] + c);
      transform4(d[i][0], d[i][1], d[i][2], d[i][3]);
    }
    for (int j = 0; j < 4; ++j) transform4(d[0][j], d[1][j], d[2][j], d[3][j]);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) store(out + (4 * i + j) * stride + c, d[i][j]);
  }
}

// [R, in] times [in, PANEL]
template <int R>
SIMD_TARGET void product(const float* x, const float* w, int64_t in, float* out) {
  floats sums[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = fill(0);
  for (int64_t c = 0; c < in; ++c) {
    floats row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(w + c * PANEL + v * WIDTH);
    for (int r = 0; r < R; ++r) {
      const floats one = fill(x[r * in + c]);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(one, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) store(out + r * PANEL + v * WIDTH, sums[r][v]);
}

// A^T m A of one tile and the panel that starts at output o, written where it belongs.
template <int M>
SIMD_TARGET void write_tile(const Problem& p, const float* sums, int64_t stride, int64_t row, int64_t column, int64_t o,
                            int64_t part) {
  for (int v = 0; v < PANEL; v += WIDTH) {
    floats half[M][4];
    for (int j = 0; j < 4; ++j) {
      const floats a = load(sums + j * stride + v), b = load(sums + (4 + j) * stride + v),
                   c = load(sums + (8 + j) * stride + v), d = load(sums + (12 + j) * stride + v);
      half[0][j] = a + b + c;
      half[1][j] = M == 2 ? b - c + d : b - c;
      if constexpr (M == 3) half[2][j] = b + c + d;
    }
    const floats bias = load(p.bias + o + v);
    for (int i = 0; i < M; ++i) {
      const floats *h = half[i];
      floats y[M];
      y[0] = h[0] + h[1] + h[2];
      y[1] = M == 2 ? h[1] - h[2] + h[3] : h[1] - h[2];
      if constexpr (M == 3) y[2] = h[1] + h[2] + h[3];
      for (int j = 0; j < M; ++j) {
        float* to = p.pixel(row + i, column + j, part);
        if (!to) continue;
        to += o + v;
        store(to, p.add ? load(to) + (y[j] + bias) : y[j] + bias);
      }
    }
  }
}

// Tiles from `begin` to `end`, at most BLOCK of them.
SIMD_TARGET inline void compute_tiles(const Problem& p, int64_t begin, int64_t end) {
  static thread_local std::vector<float> buffer;
  const int64_t count = end - begin, size = p.doubled ? 3 : 2;
  buffer.resize(POINTS * BLOCK * (p.in + PANEL) + p.in);
  float *pixels = buffer.data(), *sums = pixels + POINTS * BLOCK * p.in, *zeros = sums + POINTS * BLOCK * PANEL;
  std::fill(zeros, zeros + p.in, 0.f);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = (begin + t) / p.tiles_across() * size - 1, column = (begin + t) % p.tiles_across() * size - 1;
    const float* of[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const bool inside = row + i >= 0 && row + i < p.height && column + j >= 0 && column + j < p.width;
        of[i][j] = inside ? p.x + ((row + i) * p.width + column + j) * p.in : zeros;
      }
    transform_pixels(of, p.in, pixels + t * p.in, BLOCK * p.in);
  }
  constexpr auto PRODUCT = simd::by_rows<ROWS>([](auto r) { return product<decltype(r)::value>; });
  for (int64_t panel = p.first; panel < p.last; ++panel) {
    for (int64_t point = 0; point < POINTS; ++point)
      simd::in_tiles(count, ROWS, [&](int64_t t, int64_t rows) {
        PRODUCT.of[rows](pixels + (point * BLOCK + t) * p.in, p.weights + ((panel - p.first) * POINTS + point) * p.in * PANEL, p.in,
                         sums + (point * BLOCK + t) * PANEL);
      });
    const int64_t o = panel * PANEL % p.out, part = panel * PANEL / p.out;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = (begin + t) / p.tiles_across() * size, column = (begin + t) % p.tiles_across() * size;
      (p.doubled ? write_tile<3> : write_tile<2>)(p, sums + t * PANEL, BLOCK * PANEL, row, column, o, part);
    }
  }
}

}  // namespace SIMD
}  // namespace winograd

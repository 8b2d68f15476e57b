// Licensed under the Apache License, Version 2.0; see LICENSE.
// Products of few rows, for each kind of vectors; simd.h includes it.
namespace simd {
namespace SIMD {

// The first `count` < WIDTH of a vector, the others 0.
template <class T>
SIMD_TARGET inline __attribute__((always_inline)) floats load_part(const T* p, int64_t count) {
  T part[WIDTH] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <int R, int O>
struct Sums {
  floats of[R][O];

  SIMD_TARGET inline __attribute__((always_inline)) Sums() {
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < O; ++o) of[r][o] = fill(0);
  }

  SIMD_TARGET inline __attribute__((always_inline)) void add(int r, const floats (&w)[O], floats x) {
    for (int o = 0; o < O; ++o) of[r][o] = fma(w[o], x, of[r][o]);
  }

  SIMD_TARGET inline __attribute__((always_inline)) void total(float (&out)[R][O]) const {
    for (int r = 0; r < R; ++r) {
      int o = 0;
      for (; o + 4 <= O; o += 4) sum4(of[r][o], of[r][o + 1], of[r][o + 2], of[r][o + 3], out[r] + o);
      for (; o < O; ++o) {
        float four[4];
        sum4(of[r][o], fill(0), fill(0), fill(0), four);
        out[r][o] = four[0];
      }
    }
  }
};

// out[r][o]: the products of R rows of x and O rows of w, both `n` long. w comes from memory, and the rows of `next` are
// asked for: into the second level cache, which waits for more lines at a time than the first.
template <int R, int O, class T>
SIMD_TARGET inline void products(const T* w, int64_t w_stride, const T* next, const float* x, int64_t x_stride,
                                 int64_t n, float (&out)[R][O]) {
  constexpr int LINE = 64 / sizeof(T), STEP = LINE > WIDTH ? LINE : WIDTH;
  Sums<R, O> sums;
  floats row[O];
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    for (int o = 0; o < O; ++o) __builtin_prefetch(next + o * w_stride + i, 0, 2);
    for (int u = 0; u < STEP; u += WIDTH) {
      for (int o = 0; o < O; ++o) row[o] = load(w + o * w_stride + i + u);
      for (int r = 0; r < R; ++r) sums.add(r, row, load(x + r * x_stride + i + u));
    }
  }
  for (; i < n; i += WIDTH) {
    const int64_t count = n - i < WIDTH ? n - i : WIDTH;
    for (int o = 0; o < O; ++o) row[o] = load_part(w + o * w_stride + i, count);
    for (int r = 0; r < R; ++r) sums.add(r, row, load_part(x + r * x_stride + i, count));
  }
  sums.total(out);
}

// Floats as the units of a packed product, and other numbers widened to them; simd_dot.h has the same of bfloat16.
using units = floats;
using totals = floats;
constexpr int UNIT = 1;  // numbers of a unit
SIMD_TARGET inline __attribute__((always_inline)) units load_units(const uint32_t* p) { return load((const float*)p); }
SIMD_TARGET inline __attribute__((always_inline)) units fill_units(uint32_t x) { return fill(simd::bit_cast<float>(x)); }
SIMD_TARGET inline __attribute__((always_inline)) totals multiply(units w, units x, totals total) { return fma(w, x, total); }

SIMD_TARGET inline void round_units(const float* x, int64_t count, uint32_t* units) { std::memcpy(units, x, 4 * count); }
template <class T>
SIMD_TARGET inline void row_units(const T* from, int64_t count, uint32_t* units) {
  float* to = (float*)units;
  for (int64_t i = 0; i < count; ++i) to[i] = simd::widen(from[i]);
}
template <class T>
SIMD_TARGET inline void column_units(const T* from, int64_t, int, int64_t count, uint32_t* units) {
  row_units(from, count, units);
}

}  // namespace SIMD
}  // namespace simd

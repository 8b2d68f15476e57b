// Licensed under the Apache License, Version 2.0; see LICENSE.
// Few rows by whole numbers; whole.h includes it for each kind. The plain loop:
//
//   for each row r and output o:
//     y[r][o] = 0
//     for each group g:
//       total = start[r][g]                        // of integers
//       for i in g: total += weight[o][i] * x[r][i]
//       y[r][o] += total * x_scale[r][g] * scale   // in WIDTH sums, added up in the end
//
// A tile's weights come from memory once, and stay in the cache for all rows.
namespace few_rows_linear {
namespace SIMD {

// Outputs of a tile: one row is read a little faster with more of them.
constexpr int stream_outs(int64_t rows) { return rows == 1 ? 8 : 4; }

// Adds a group to the sums of O outputs from o on and R rows. Each of the outputs has its bytes `stride` after the last.
template <int R, int O>
SIMD_TARGET inline __attribute__((always_inline)) void stream_group(const Problem& p, const PackedRows& x,
                                                                    const uint8_t* w, int64_t stride, int64_t row,
                                                                    int64_t o, int64_t g, floats (&sums)[R][O]) {
  const uint32_t* from = &x.units[row * x.width + g * GROUP_UNITS];
  totals total[R][O];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) total[r][i] = in_one(x.start[(row + r) * x.groups + g]);
  for (int s = 0; s < GROUP_UNITS / WIDTH; ++s) {
    units wide[O];
    for (int i = 0; i < O; ++i) {
      wide[i] = stream_units(w + i * stride, s);
      if (s * WIDTH % 32 == 0) __builtin_prefetch(w + (O + i) * stride + s * WIDTH * 2, 0, 2);  // the next tile's
    }
    for (int r = 0; r < R; ++r) {
      const units one = load_units(from + r * x.width + s * WIDTH);
      for (int i = 0; i < O; ++i) total[r][i] = multiply(wide[i], one, total[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i)
      sums[r][i] = fma(to_floats(total[r][i]), fill(group_scale(p, x, o + i, row + r, g)), sums[r][i]);
}

// Outputs o to o + O of R rows from `row` on.
template <int R, int O>
SIMD_TARGET void stream_tile(const Problem& p, const PackedRows& x, int64_t row, int64_t o) {
  const int64_t stride = row_bytes(p), whole = stride / GROUP_BYTES;
  const uint8_t* w = (const uint8_t*)p.weight + o * stride;
  floats sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) sums[r][i] = fill(0);
  for (int64_t g = 0; g < whole; ++g, w += GROUP_BYTES) stream_group(p, x, w, stride, row, o, g, sums);
  if (whole < x.groups) {
    uint8_t part[O][GROUP_BYTES] = {};
    for (int i = 0; i < O; ++i) std::memcpy(part[i], w + i * stride, stride % GROUP_BYTES);
    stream_group(p, x, part[0], GROUP_BYTES, row, o, whole, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) {
      float sum[4];
      sum4(sums[r][i], sums[r][i], sums[r][i], sums[r][i], sum);
      p.y[(row + r) * p.out + o + i] = end_sum(p, o + i, sum[0]);
    }
}

template <int R>
SIMD_TARGET void stream_some(const Problem& p, const PackedRows& x, int64_t row, int64_t begin, int64_t end) {
  if (begin + stream_outs(R) == end) return stream_tile<R, stream_outs(R)>(p, x, row, begin);
  for (; begin < end; ++begin) stream_tile<R, 1>(p, x, row, begin);
}

inline void few_rows(const Problem& p, int64_t piece) {
  constexpr auto TILE = simd::by_rows<STREAM_ROWS>([](auto r) { return stream_some<decltype(r)::value>; });
  static thread_local PackedRows x;
  pack_rows<1>(p, x);
  in_parallel(p.out, piece, p.rows * p.in * p.out, [&, from = &x](int64_t begin, int64_t end) {
    for (const int outs = stream_outs(p.rows); begin < end; begin += outs)
      simd::in_tiles(p.rows, STREAM_ROWS, [&](int64_t row, int64_t rows) {
        TILE.of[rows](p, *from, row, begin, std::min(begin + outs, end));
      });
  });
}

}  // namespace SIMD
}  // namespace few_rows_linear

// Licensed under the Apache License, Version 2.0; see LICENSE.
// few_rows_linear.h includes it for each kind of vectors. The plain loop:
//
//   for each row r and output o:
//     y[r][o] = 0
//     for i in in: y[r][o] += x[r][i] * widen(weight[o][i])  // lane i % WIDTH of a vector of sums
//     y[r][o] *= scale[o]                                     // int8; of 4 bits a scale for each group, in `widen`
//
// The lanes are added up in the end in one order, whatever R and O are: a row does not depend on its neighbours.
namespace few_rows_linear {
namespace SIMD {
using namespace simd::SIMD;

// --- few rows: R rows from `row` on times O outputs from `o` on, in registers

template <int R, int O, class T>
SIMD_TARGET void stream(const Problem& p, int64_t row, int64_t o) {
  float sums[R][O];
  const T* w = (const T*)p.weight + o * p.in;
  products<R, O>(w, p.in, w + O * p.in, p.x + row * p.in, p.in, p.in, sums);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) p.y[(row + r) * p.out + o + i] = p.scale ? sums[r][i] * p.scale[o + i] : sums[r][i];
}

// One group of 4 bit weights for `O` outputs.
template <int R, int O>
SIMD_TARGET inline __attribute__((always_inline)) void add_group(Sums<R, O>& sums, const uint8_t* w, int64_t w_stride,
                                                                 const float* scale, int64_t scale_stride,
                                                                 const float* x, int64_t x_stride) {
  nibbles table[O];
  floats low[O], high[O];
  for (int o = 0; o < O; ++o) {
    table[o] = scaled_nibbles(scale[o * scale_stride]);
    __builtin_prefetch(w + (O + o) * w_stride, 0, 2);  // the next tile's
  }
  for (int i = 0; i < GROUP / 2; i += WIDTH) {
    for (int o = 0; o < O; ++o) load(w + o * w_stride + i, table[o], low[o], high[o]);
    for (int r = 0; r < R; ++r) {
      sums.add(r, low, load(x + r * x_stride + i));
      sums.add(r, high, load(x + r * x_stride + i + GROUP / 2));
    }
  }
}

template <int R, int O>
SIMD_TARGET void stream4(const Problem& p, int64_t row, int64_t o) {
  const int64_t groups = p.groups(), full = p.in / GROUP, rest = p.in % GROUP;
  const uint8_t* w = (const uint8_t*)p.weight + o * groups * (GROUP / 2);
  const float *scale = p.scale + o * groups, *from = p.x + row * p.in;
  Sums<R, O> sums;
  for (int64_t g = 0; g < full; ++g)
    add_group(sums, w + g * (GROUP / 2), groups * (GROUP / 2), scale + g, groups, from + g * GROUP, p.in);
  if (rest) {
    float x[R][GROUP] = {};
    for (int r = 0; r < R; ++r) std::memcpy(x[r], from + r * p.in + full * GROUP, rest * sizeof(float));
    add_group(sums, w + full * (GROUP / 2), groups * (GROUP / 2), scale + full, groups, x[0], GROUP);
  }
  float total[R][O];
  sums.total(total);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) p.y[(row + r) * p.out + o + i] = total[r][i];
}

template <int R, int O, class T>
SIMD_TARGET void stream_any(const Problem& p, int64_t row, int64_t o) {
  if constexpr (std::is_same<T, uint8_t>::value)
    stream4<R, O>(p, row, o);
  else
    stream<R, O, T>(p, row, o);
}

// Outputs of a tile. Where the registers hold the sums of twice as many, float weights are read faster that way.
template <class T>
constexpr int tile_outs(int64_t rows) {
  return sizeof(T) > 1 && WIDTH == 16 && rows <= TILE_ROWS / 2 ? 2 * TILE_OUTS : TILE_OUTS;
}

template <int R, class T>
SIMD_TARGET void stream_tile(const Problem& p, int64_t row, int64_t begin, int64_t end) {
  constexpr int OUTS = tile_outs<T>(R);
  if (begin + OUTS == end) return stream_any<R, OUTS, T>(p, row, begin);
  for (; begin + TILE_OUTS <= end; begin += TILE_OUTS) stream_any<R, TILE_OUTS, T>(p, row, begin);
  for (; begin < end; ++begin) stream_any<R, 1, T>(p, row, begin);
}

// Outputs from `begin` to `end`. The weights of a tile come from memory once and stay in the cache for all rows.
template <class T>
SIMD_TARGET void stream_outputs(const Problem& p, int64_t begin, int64_t end) {
  constexpr auto TILE = simd::by_rows<TILE_ROWS>([](auto r) { return stream_tile<decltype(r)::value, T>; });
  const int64_t outs = tile_outs<T>(p.rows);
  for (; begin < end; begin += outs)
    simd::in_tiles(p.rows, TILE_ROWS, [&](int64_t row, int64_t rows) {
      TILE.of[rows](p, row, begin, std::min(begin + outs, end));
    });
}

// --- many rows: weights are widened to floats, for panels.h

constexpr int GROUP_UNITS = PANEL_COLUMNS;
inline int64_t row_width(const Problem& p) { return p.in; }

SIMD_TARGET inline __attribute__((always_inline)) totals first_total(const PackedRows&, int64_t) { return fill(0); }
SIMD_TARGET inline __attribute__((always_inline)) void add_group(totals total, const float*, const PackedRows&, int64_t,
                                                                 float* sum) {
  store(sum, total);
}

inline void row_units(const Problem& p, int64_t row, uint32_t* units, PackedRows&) {
  std::memcpy(units, p.x + row * p.in, p.in * sizeof(float));
}

template <class T>
SIMD_TARGET void weight_units(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float*) {
  const T* from = (const T*)p.weight + o * p.in + first;
  const float scale = p.scale ? p.scale[o] : 1;
  float* out = (float*)to;
  for (int64_t i = 0; i < count; ++i) out[i] = simd::widen(from[i]) * scale;
}

template <>
SIMD_TARGET inline void weight_units<uint8_t>(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to,
                                              float*) {
  float* out = (float*)to;
  for (int64_t i = 0; i < count; i += GROUP) {
    const int64_t g = o * p.groups() + (first + i) / GROUP;
    const uint8_t* from = (const uint8_t*)p.weight + g * (GROUP / 2);
    const nibbles table = scaled_nibbles(p.scale[g]);
    for (int j = 0; j < GROUP / 2; j += WIDTH) {
      floats low, high;
      load(from + j, table, low, high);
      store(out + i + j, low);
      store(out + i + j + GROUP / 2, high);
    }
  }
}

// --- rounding to 8 or 4 bits

SIMD_TARGET inline float largest(const float* x, int64_t count) {
  uint32_t most = 0;  // as bits, so that NaN counts as larger than anything
  for (int64_t i = 0; i < count; ++i) most = std::max(most, simd::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
  return simd::bit_cast<float>(most);
}

// The integer nearest to x times `inverse`, of halves the even one: as Paddle rounds.
SIMD_TARGET inline __attribute__((always_inline)) int nearest(float x, float inverse) {
  return (int)__builtin_rintf(x * inverse);
}

// x of a row, for whole.h: as `T`, int8_t or int16_t up to `most`, with a scale for each group, which are filled up
// with 0.
template <class T>
SIMD_TARGET void round_row(const Problem& p, int64_t row, int most, uint32_t* units, PackedRows& to) {
  T* out = (T*)units;
  for (int64_t g = 0; g < p.groups(); ++g, out += GROUP) {
    const int64_t count = std::min<int64_t>(GROUP, p.in - g * GROUP), at = row * p.groups() + g;
    float x[GROUP] = {};
    std::memcpy(x, p.x + row * p.in + g * GROUP, count * sizeof(float));
    const float size = std::max(SIMD::largest(x, GROUP), TINY), inverse = most / size;
    const bool finite = std::isfinite(size);
    to.scale[at] = finite ? size / most : NAN;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; ++i) {
      const int32_t whole = finite ? nearest(x[i], inverse) : 0;
      out[i] = whole;
      sum += whole;
    }
    to.start[at] = sizeof(T) == 1 ? -8 * sum : 0;
  }
}

template <class T>
SIMD_TARGET void quantize8(const void* weight, int64_t in, int64_t begin, int64_t end, void* codes, float* scale) {
  constexpr int PIECE = 1024;
  float piece[PIECE];
  for (int64_t o = begin; o < end; ++o) {
    const T* w = (const T*)weight + o * in;
    float size = 0;
    for (int64_t first = 0; first < in; first += PIECE) {
      const int64_t count = std::min<int64_t>(PIECE, in - first);
      for (int64_t i = 0; i < count; ++i) piece[i] = simd::widen(w[first + i]);
      const float here = largest(piece, count);
      size = here <= size ? size : here;
    }
    const float inverse = size < TINY ? 0 : 127 / size;
    int8_t* q = (int8_t*)codes + o * in;
    for (int64_t i = 0; i < in; ++i) q[i] = nearest(simd::widen(w[i]), inverse);
    scale[o] = size / 127;
  }
}

template <class T>
SIMD_TARGET void quantize4(const void* weight, int64_t in, int64_t begin, int64_t end, void* codes, float* scale) {
  const int64_t groups = (in + GROUP - 1) / GROUP;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t g = 0; g < groups; ++g) {
      const T* w = (const T*)weight + o * in + g * GROUP;
      const int64_t count = std::min<int64_t>(GROUP, in - g * GROUP);
      float x[GROUP] = {};
      if (count == GROUP)
        for (int i = 0; i < GROUP; ++i) x[i] = simd::widen(w[i]);
      else
        for (int i = 0; i < count; ++i) x[i] = simd::widen(w[i]);
      const float size = largest(x, GROUP), inverse = size < TINY ? 0 : 7 / size;
      uint8_t* q = (uint8_t*)codes + (o * groups + g) * (GROUP / 2);
      for (int i = 0; i < GROUP / 2; ++i)
        q[i] = (nearest(x[i], inverse) + 8) + 16 * (nearest(x[i + GROUP / 2], inverse) + 8);
      scale[o * groups + g] = size / 7;
    }
}

}  // namespace SIMD
}  // namespace few_rows_linear

// Licensed under the Apache License, Version 2.0; see LICENSE.
// 4 bit weights times few rows by AVX-512 VNNI, whose sums of byte products take fewer instructions than floats do;
// few_rows_linear.h includes it.
//
// Each group of a row of x is made integers of 24 bits times a scale: the error is within 2^-24 of the group's largest
// value, as small as a sum of floats rounds. Their three bytes are multiplied one after the other, the highest first.
// Nibbles are too large by 8: 8 x is taken off the integer sums, where nothing is rounded. The plain loop:
//
//   for each row r and output o:
//     y[r][o] = 0
//     for each group g:
//       sum = 0                                        // of integers
//       for i in g: sum += nibble[o][i] * whole[r][i] - 8 * whole[r][i]
//       y[r][o] += sum * (scale[o][g] * x_scale[r][g])  // in 16 sums, added up in the end
#pragma once

namespace few_rows_linear {

#if defined(__x86_64__)

constexpr int VNNI_ROWS = 3;  // whose sums the registers hold

// Rows of x as integers.
struct Fixed {
  static constexpr int BYTES = 3, LANES = 16;
  std::vector<int8_t> bytes;    // [rows, groups, BYTES, GROUP], the highest first
  std::vector<int32_t> eights;  // [rows, groups, LANES]: 8 times the sum of what a lane of 32 bits multiplies
  std::vector<float> scale;     // [rows, groups]
  std::vector<char> finite;     // [rows]: integers cannot say infinity or NaN

  explicit Fixed(const Problem& p)
      : bytes(p.rows * p.groups() * BYTES * GROUP),
        eights(p.rows * p.groups() * LANES),
        scale(p.rows * p.groups()),
        finite(p.rows, true) {
    in_parallel(p.rows, 1, 16 * p.rows * p.in, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) finite[begin] = fill(p, begin);
    });
  }

 private:
  // Whether the row is finite.
  SIMD_VNNI bool fill(const Problem& p, int64_t r) {
    constexpr float MOST = 127 << 16;  // so that the highest byte stays one
    for (int64_t g = 0; g < p.groups(); ++g) {
      const int64_t count = std::min<int64_t>(GROUP, p.in - g * GROUP), at = r * p.groups() + g;
      float x[GROUP] = {};
      std::memcpy(x, p.x + r * p.in + g * GROUP, count * sizeof(float));
      const float size = std::max(avx512::largest(x, GROUP), TINY), inverse = MOST / size;
      if (!std::isfinite(size)) return false;
      scale[at] = size / MOST;
      int32_t whole[GROUP], sums[GROUP / 2];
      int8_t* to = &bytes[at * BYTES * GROUP];
      for (int i = 0; i < GROUP; ++i) {
        whole[i] = (int32_t)__builtin_rintf(x[i] * inverse);
        const int32_t middle = (whole[i] + 128) >> 8, high = (middle + 128) >> 8;  // the lower bytes have signs
        to[i] = high, to[GROUP + i] = middle, to[2 * GROUP + i] = whole[i];
      }
      for (int i = 0; i < GROUP / 2; ++i) sums[i] = whole[i] + whole[i + GROUP / 2];
      for (int i = 0; i < GROUP / 2; ++i) eights[at * LANES + i / 4] += 8 * sums[i];
    }
    return true;
  }
};

// Outputs o to o + O of R rows from `row` on.
template <int R, int O>
SIMD_VNNI inline void stream_vnni(const Problem& p, const Fixed& fixed, int64_t row, int64_t o) {
  const int64_t groups = p.groups(), stride = groups * (GROUP / 2);
  const uint8_t* w = (const uint8_t*)p.weight + o * stride;
  const float* scale = p.scale + o * groups;
  const int8_t* bytes = &fixed.bytes[row * groups * Fixed::BYTES * GROUP];
  const int32_t* eights = &fixed.eights[row * groups * Fixed::LANES];
  const float* x_scale = &fixed.scale[row * groups];
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) sums[r][i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i low[O], high[O];
    for (int i = 0; i < O; ++i) {
      const uint8_t* from = w + i * stride + g * (GROUP / 2);
      __builtin_prefetch(from + O * stride, 0, 2);  // the next tile's
      const __m512i both = _mm512_loadu_si512(from);
      low[i] = _mm512_and_si512(both, nibble);
      high[i] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
    __m512i total[R][O];
    for (int byte = 0; byte < Fixed::BYTES; ++byte)
      for (int r = 0; r < R; ++r) {
        const int8_t* x = bytes + ((r * groups + g) * Fixed::BYTES + byte) * GROUP;
        const __m512i x_low = _mm512_loadu_si512(x), x_high = _mm512_loadu_si512(x + GROUP / 2);
        for (int i = 0; i < O; ++i) {
          total[r][i] = byte ? _mm512_slli_epi32(total[r][i], 8) : _mm512_setzero_si512();
          total[r][i] = _mm512_dpbusd_epi32(total[r][i], low[i], x_low);
        }
        for (int i = 0; i < O; ++i) total[r][i] = _mm512_dpbusd_epi32(total[r][i], high[i], x_high);
      }
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * groups + g;
      const __m512i eight = _mm512_loadu_si512(eights + at * Fixed::LANES);
      for (int i = 0; i < O; ++i) {
        const __m512 factor = _mm512_set1_ps(scale[i * groups + g] * x_scale[at]);
        const __m512 part = _mm512_cvtepi32_ps(_mm512_sub_epi32(total[r][i], eight));
        sums[r][i] = _mm512_fmadd_ps(part, factor, sums[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < O; ++i) p.y[(row + r) * p.out + o + i] = _mm512_reduce_add_ps(sums[r][i]);
}

template <int R>
SIMD_VNNI void tile_vnni(const Problem& p, const Fixed& fixed, int64_t row, int64_t begin, int64_t end) {
  if (begin + 4 == end) return stream_vnni<R, 4>(p, fixed, row, begin);
  for (; begin < end; ++begin) stream_vnni<R, 1>(p, fixed, row, begin);
}

inline void linear_vnni(const Problem& p, int64_t piece) {
  constexpr auto TILE = simd::by_rows<VNNI_ROWS>([](auto r) { return tile_vnni<decltype(r)::value>; });
  const Fixed fixed(p);
  in_parallel(p.out, piece, p.rows * p.in * p.out, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += 4)
      simd::in_tiles(p.rows, VNNI_ROWS, [&](int64_t row, int64_t rows) {
        TILE.of[rows](p, fixed, row, begin, std::min(begin + 4, end));
      });
  });
  for (int64_t r = 0; r < p.rows; ++r) {  // a row that is not finite again, with floats
    if (fixed.finite[r]) continue;
    Problem one = p;
    one.x += r * p.in;
    one.y += r * p.out;
    one.rows = 1;
    in_parallel(p.out, piece, p.in * p.out,
                [&](int64_t begin, int64_t end) { avx512::stream_outputs<uint8_t>(one, begin, end); });
  }
}

#endif

}  // namespace few_rows_linear

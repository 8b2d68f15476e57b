// Licensed under the Apache License, Version 2.0; see LICENSE.
// spatial_norm.h includes it for each kind of vectors: the compiler makes them of these loops. The plain loop:
//
//   for each group of channels: mean and variance over all pixels
//   for each pixel and channel c:
//     v = (x - mean) / sqrt(variance + epsilon) * weight[c] + bias[c]
//     v = v * scale + shift            // of the latent's pixel below, where they are given
//     out = v * sigmoid(v), or v
namespace spatial_norm {
namespace SIMD {
using simd::multiply_add;
using simd::sigmoid;
using simd::SIMD::FUSED;

// Of each channel of `count` pixels: the mean, and the sum of squared distances from it. Sums are of distances from the
// first pixel, which keeps them small.
SIMD_TARGET inline void moments(const float* x, int64_t count, int64_t channels, float* mean, float* squares) {
  std::fill(mean, mean + channels, 0.f);
  std::fill(squares, squares + channels, 0.f);
  for (int64_t i = 1; i < count; ++i) {
    const float* row = x + i * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const float d = row[c] - x[c];
      mean[c] += d;
      squares[c] = multiply_add<FUSED>(d, d, squares[c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float shift = mean[c] / count;
    squares[c] = std::max(0.f, squares[c] - shift * mean[c]);
    mean[c] = x[c] + shift;
  }
}

template <bool LATENT, bool SILU>
SIMD_TARGET void apply(const Problem& p, int64_t pixel, int64_t latent, int64_t first, int64_t count,
                       float* __restrict out) {
  const float *x = p.x + pixel * p.channels + first, *mean = p.mean + first, *slope = p.slope + first,
              *bias = p.bias + first, *scale = p.scale + latent * p.channels + first,
              *shift = p.shift + latent * p.channels + first;
  for (int64_t c = 0; c < count; ++c) {
    float v = multiply_add<FUSED>(x[c] - mean[c], slope[c], bias[c]);
    if (LATENT) v = multiply_add<FUSED>(v, scale[c], shift[c]);
    out[c] = SILU ? v * sigmoid<FUSED>(v) : v;
  }
}

// `count` channels, from `first` on, of a pixel.
SIMD_TARGET inline void apply_to_pixel(const Problem& p, int64_t row, int64_t column, int64_t first, int64_t count,
                                       float* out) {
  const int64_t pixel = row * p.width + column;
  const int64_t latent = p.scale ? row / p.times * (p.width / p.times) + column / p.times : 0;
  if (p.scale)
    (p.silu ? apply<true, true> : apply<true, false>)(p, pixel, latent, first, count, out);
  else
    (p.silu ? apply<false, true> : apply<false, false>)(p, pixel, latent, first, count, out);
}

SIMD_TARGET inline void apply_to_row(const Problem& p, int64_t row) {
  for (int64_t column = 0; column < p.width; ++column)
    apply_to_pixel(p, row, column, 0, p.channels, p.out + (row * p.width + column) * p.channels);
}

}  // namespace SIMD
}  // namespace spatial_norm

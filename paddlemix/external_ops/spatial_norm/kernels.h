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
SIMD_TARGET void apply_row(const float* x, const float* mean, const float* slope, const float* bias,
                           const float* scale, const float* shift, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    float v = multiply_add<FUSED>(x[c] - mean[c], slope[c], bias[c]);
    if (LATENT) v = multiply_add<FUSED>(v, scale[c], shift[c]);
    out[c] = SILU ? v * sigmoid<FUSED>(v) : v;
  }
}

SIMD_TARGET inline void apply(const Problem& p, const float* mean, const float* slope, int64_t row) {
  const auto pixel = p.scale ? (p.silu ? apply_row<true, true> : apply_row<true, false>)
                             : (p.silu ? apply_row<false, true> : apply_row<false, false>);
  for (int64_t column = 0; column < p.width; ++column) {
    const int64_t at = (row * p.width + column) * p.channels;
    const int64_t latent = p.scale ? (row / p.times * (p.width / p.times) + column / p.times) * p.channels : 0;
    pixel(p.x + at, mean, slope, p.bias, p.scale + latent, p.shift + latent, p.channels, p.out + at);
  }
}

}  // namespace SIMD
}  // namespace spatial_norm

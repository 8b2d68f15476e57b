// Licensed under the Apache License, Version 2.0; see LICENSE.
// decoder_step.h includes it for each kind of vectors: the compiler makes them of these loops.
namespace decoder_step {
namespace SIMD {

// Turns pairs (i, i + dim / 2) by angles whose cosines are doubled, [cos, cos], and whose sines are [-sin, sin].
template <class K>
SIMD_TARGET void rotate(const float* x, const float* cosine, const float* sine, int64_t dim, K* to) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) norm::narrow(x[i] * cosine[i] + x[i + half] * sine[i], to + i);
  for (int64_t i = half; i < dim; ++i) norm::narrow(x[i] * cosine[i] + x[i - half] * sine[i], to + i);
}

// x = silu(x) * up
SIMD_TARGET inline void gate(float* x, const float* up, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) x[i] *= simd::sigmoid<simd::SIMD::FUSED>(x[i]) * up[i];
}

}  // namespace SIMD
}  // namespace decoder_step

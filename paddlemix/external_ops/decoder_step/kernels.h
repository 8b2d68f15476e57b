// Licensed under the Apache License, Version 2.0; see LICENSE.
// decoder_step.h includes it for each kind of vectors: the compiler makes them of these loops, which are the plain ones.
// The layer that decoder_step.h makes of them:
//
//   q, k, v = linear(rms_norm(x)); rotate(q), rotate(k); k and v go into the cache
//   x = x + linear(attention(q, the cache))
//   x = x + linear(silu(gate) * up), gate, up = linear(rms_norm(x))
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

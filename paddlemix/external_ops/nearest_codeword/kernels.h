// Licensed under the Apache License, Version 2.0; see LICENSE.
// nearest_codeword.h includes this for each kind of vectors: the compiler makes them of these loops. The plain loop:
//
//   for each latent i:
//     for each codeword j: distance[j] = |latent i|^2 + |codeword j|^2 - 2 latent i . codeword j
//     code[i] = the first j of the least distance
//
// in blocks of codewords, which a thread's positions use together.
namespace nearest_codeword {
namespace SIMD {

SIMD_TARGET inline void search_range(const Problem& p, int64_t begin, int64_t end) {
  float best[POSITIONS], distances[BLOCK];
  for (int64_t i = begin; i < end; ++i) {
    best[i - begin] = std::numeric_limits<float>::infinity();
    p.codes[i] = 0;
  }
  for (int64_t first = 0; first < p.size; first += BLOCK) {
    const int64_t count = std::min(BLOCK, p.size - first);
    const float* squares = p.codeword_squares + first;
    for (int64_t i = begin; i < end; ++i) {
      const float* x = p.latents + i * p.dim;
      for (int64_t j = 0; j < count; ++j) distances[j] = 0;
      for (int64_t d = 0; d < p.dim; ++d) {
        const float* codewords = p.codebook + d * p.size + first;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) distances[j] = simd::multiply_add<simd::SIMD::FUSED>(x[d], codewords[j], distances[j]);
      }
      float least = best[i - begin];
#pragma omp simd reduction(min : least)
      for (int64_t j = 0; j < count; ++j) {
        distances[j] = simd::multiply_add<simd::SIMD::FUSED>(-2, distances[j], p.latent_squares[i] + squares[j]);
        least = distances[j] < least ? distances[j] : least;
      }
      if (least < best[i - begin]) {
        best[i - begin] = least;
        p.codes[i] = first + (std::find(distances, distances + count, least) - distances);
      }
    }
  }
}

}  // namespace SIMD
}  // namespace nearest_codeword

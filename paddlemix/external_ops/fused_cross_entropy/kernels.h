// Licensed under the Apache License, Version 2.0; see LICENSE.
// fused_cross_entropy.h includes it for each kind of vectors. The plain loop, of each row:
//
//   total = the sum of exp(logit - largest)
//   loss = log(total) + largest - logit[label]
//   gradient = exp(logit - largest) / total, less 1 at the label
namespace fused_cross_entropy {
namespace SIMD {
using namespace simd::SIMD;

SIMD_TARGET inline void row_loss(const Problem& p, int64_t row) {
  constexpr int64_t PIECE = 1024;  // of a float sum
  float* x = p.logits + row * p.classes;
  const int64_t label = p.labels[row];
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < p.classes; ++i) largest = std::max(largest, x[i]);
  const double shifted = (double)x[label] - largest;
  double total = 0;
  for (int64_t begin = 0; begin < p.classes; begin += PIECE) {
    const int64_t end = std::min(begin + PIECE, p.classes);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += x[i] = simd::exponential<FUSED>(x[i] - largest);
    total += sum;
  }
  const float share = 1 / total;
  for (int64_t i = 0; i < p.classes; ++i) x[i] *= share;
  x[label] -= 1;
  p.losses[row] = std::log(total) - shifted;
}

}  // namespace SIMD
}  // namespace fused_cross_entropy

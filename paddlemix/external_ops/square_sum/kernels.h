// Licensed under the Apache License, Version 2.0; see LICENSE.
// square_sum.h includes it for each kind of vectors, which the compiler makes of this loop.
namespace square_sum {
namespace SIMD {

SIMD_TARGET inline double sum_block(const float* x, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += (double)x[i] * x[i];
  return sum;
}

}  // namespace SIMD
}  // namespace square_sum

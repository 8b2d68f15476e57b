// Licensed under the Apache License, Version 2.0; see LICENSE.
// silu_and_mul.h includes it for each kind of vectors, which the compiler makes of these loops.
namespace silu_and_mul {
namespace SIMD {
using namespace simd::SIMD;

SIMD_TARGET inline void forward(const Problem& p, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) p.out[i] = p.gate[i] * simd::sigmoid<FUSED>(p.gate[i]) * p.up[i];
}

SIMD_TARGET inline void backward(const Problem& p, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float gate = p.gate[i], share = simd::sigmoid<FUSED>(gate), dout = p.dout[i];
    p.dgate[i] = dout * p.up[i] * share * (1 + gate * (1 - share));
    p.dup[i] = dout * gate * share;
  }
}

}  // namespace SIMD
}  // namespace silu_and_mul

// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "few_rows_linear_cuda.h"

#include "few_rows_linear.cuh"

namespace {

template <class T, int BITS>
int linear(const few_rows_linear_cuda::Problem& p, cudaStream_t stream) {
  using namespace few_rows_linear_cuda;
  return p.rows <= ROWS * MOST_TILES ? few_rows<T, BITS>(p, stream) : many_rows<T, BITS>(p, stream);
}

}  // namespace

extern "C" int emu3_quantized_linear(int type, int bits, const void* x, const void* weight, const float* scale, void* y,
                                     int64_t rows, int64_t in, int64_t out, void* stream) {
  const few_rows_linear_cuda::Problem problem{x, {{weight, scale, y, out}}, nullptr, false, rows, in};
  const auto on = (cudaStream_t)stream;
  if (type == 1 && bits == 8) return linear<__half, 8>(problem, on);
  if (type == 1 && bits == 4) return linear<__half, 4>(problem, on);
  if (type == 2 && bits == 8) return linear<__nv_bfloat16, 8>(problem, on);
  if (type == 2 && bits == 4) return linear<__nv_bfloat16, 4>(problem, on);
  return cudaErrorInvalidValue;
}

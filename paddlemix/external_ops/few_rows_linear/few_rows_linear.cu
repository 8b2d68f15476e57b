// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "few_rows_linear_cuda.h"

#include "quantized.cuh"

extern "C" int emu3_quantized_linear(int type, int bits, const void* x, const void* weight, const float* scale, void* y,
                                     int64_t rows, int64_t in, int64_t out, void* stream) {
  const quantized_cuda::Problem problem{x, (const uint8_t*)weight, scale, y, rows, in, out};
  const auto on = (cudaStream_t)stream;
  if (type == 1 && bits == 8) return quantized_cuda::linear<__half, 8>(problem, on);
  if (type == 1 && bits == 4) return quantized_cuda::linear<__half, 4>(problem, on);
  if (type == 2 && bits == 8) return quantized_cuda::linear<__nv_bfloat16, 8>(problem, on);
  if (type == 2 && bits == 4) return quantized_cuda::linear<__nv_bfloat16, 4>(problem, on);
  return cudaErrorInvalidValue;
}

// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "norm_cuda.h"

#include "norm.cuh"

namespace {

template <class F>
int with_type(int type, F f) {
  switch (type) {
    case 0:
      return f(float());
    case 1:
      return f(__half());
    case 2:
      return f(__nv_bfloat16());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" {

int emu3_norm_forward(int x_type, int w_type, const void* x, const void* scale, const void* bias, void* y, float* mean,
                      float* rstd, int64_t rows, int64_t cols, float epsilon, void* stream) {
  return with_type(x_type, [&](auto x_value) {
    return with_type(w_type, [&](auto w_value) {
      using X = decltype(x_value);
      using W = decltype(w_value);
      return int(norm_cuda::forward((const X*)x, (const W*)scale, (const W*)bias, (W*)y, mean, rstd, rows, cols,
                                    epsilon, (cudaStream_t)stream));
    });
  });
}

int emu3_norm_parts(int64_t rows) { return norm_cuda::parts(rows); }

int emu3_norm_backward(int x_type, int w_type, const void* x, const void* scale, const float* mean, const float* rstd,
                       const void* dy, void* dx, void* dscale, void* dbias, float* workspace, int64_t rows,
                       int64_t cols, void* stream) {
  return with_type(x_type, [&](auto x_value) {
    return with_type(w_type, [&](auto w_value) {
      using X = decltype(x_value);
      using W = decltype(w_value);
      return int(norm_cuda::backward((const X*)x, (const W*)scale, mean, rstd, (const W*)dy, (X*)dx, (W*)dscale,
                                     (W*)dbias, workspace, rows, cols, (cudaStream_t)stream));
    });
  });
}

}  // extern "C"

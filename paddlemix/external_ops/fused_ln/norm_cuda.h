// Licensed under the Apache License, Version 2.0; see LICENSE.
// norm.cuh behind a C interface; free of Paddle and of CUDA's headers. Types: 0 float32, 1 float16, 2 bfloat16.
// Each gives a cudaError_t. Pointers as in norm.cuh, on the device.
#pragma once

#include <cstdint>

extern "C" {
int emu3_norm_forward(int x_type, int w_type, const void* x, const void* scale, const void* bias, void* y, float* mean,
                      float* rstd, int64_t rows, int64_t cols, float epsilon, void* stream);
int emu3_norm_parts(int64_t rows);
int emu3_norm_backward(int x_type, int w_type, const void* x, const void* scale, const float* mean, const float* rstd,
                       const void* dy, void* dx, void* dscale, void* dbias, float* workspace, int64_t rows,
                       int64_t cols, void* stream);
}

// Licensed under the Apache License, Version 2.0; see LICENSE.
// few_rows_linear.cuh behind a C interface; free of Paddle and of CUDA's headers. Types: 1 float16, 2 bfloat16. It gives a
// cudaError_t. Pointers as in few_rows_linear.cuh, on the device.
#pragma once

#include <cstdint>

extern "C" {
int emu3_quantized_linear(int type, int bits, const void* x, const void* weight, const float* scale, void* y,
                          int64_t rows, int64_t in, int64_t out, void* stream);
}

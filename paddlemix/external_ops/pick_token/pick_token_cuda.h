// Licensed under the Apache License, Version 2.0; see LICENSE.
// pick_token.cuh behind a C interface; free of Paddle and of CUDA's headers. It gives a cudaError_t. Pointers as in
// pick_token.cuh, on the device.
#pragma once

#include <cstdint>

extern "C" {
int emu3_pick_token(const float* logits, const float* noise, int64_t* ids, int64_t rows, int64_t positions,
                    int64_t tokens, int64_t top_k, float guidance_scale, float temperature, int64_t offset,
                    void* stream);
}

// Licensed under the Apache License, Version 2.0; see LICENSE.
// pick_token.cuh and accept_tokens.cuh behind a C interface; free of Paddle and of CUDA's headers. It gives a
// cudaError_t. Pointers as there, on the device.
#pragma once

#include <cstdint>

extern "C" {
int emu3_pick_token(const float* logits, const float* noise, int64_t* ids, int64_t rows, int64_t positions,
                    int64_t tokens, int64_t top_k, float guidance_scale, float temperature, float top_p, int64_t offset,
                    void* stream);
int emu3_accept_tokens(const int64_t* ids, const int64_t* past, const int64_t* picked, const int64_t* forced,
                       const int64_t* table, int64_t* next_ids, int64_t* next_past, int64_t rows, int64_t read,
                       int64_t picks, int64_t places, void* stream);
}

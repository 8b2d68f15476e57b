// Licensed under the Apache License, Version 2.0; see LICENSE.
// nearest_codeword.cuh behind a C interface; free of Paddle and of CUDA's headers. Gives a cudaError_t.
#pragma once

#include <cstdint>

extern "C" int emu3_nearest_codeword(const float* latents, const float* latent_squares, const float* codebook,
                                     const float* codeword_squares, int64_t* codes, int64_t positions, int64_t dim,
                                     int64_t size, void* stream);

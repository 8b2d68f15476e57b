// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "nearest_codeword_cuda.h"

#include "nearest_codeword.cuh"

extern "C" int emu3_nearest_codeword(const float* latents, const float* latent_squares, const float* codebook,
                                     const float* codeword_squares, int64_t* codes, int64_t positions, int64_t dim,
                                     int64_t size, void* stream) {
  return nearest_codeword_cuda::search(latents, latent_squares, codebook, codeword_squares, codes, positions, dim, size,
                                       (cudaStream_t)stream);
}

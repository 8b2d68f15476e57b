// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "pick_token_cuda.h"

#include "pick_token.cuh"

extern "C" int emu3_pick_token(const float* logits, const float* noise, int64_t* ids, int64_t rows, int64_t positions,
                               int64_t tokens, int64_t top_k, float guidance_scale, float temperature, int64_t offset,
                               void* stream) {
  return pick_token_cuda::pick({logits, noise, ids, rows, positions, tokens, top_k, guidance_scale, temperature, offset},
                               (cudaStream_t)stream);
}

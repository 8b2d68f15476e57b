// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "pick_token_cuda.h"

#include "accept_tokens.cuh"
#include "pick_token.cuh"

extern "C" int emu3_pick_token(const float* logits, const float* noise, int64_t* ids, int64_t rows, int64_t positions,
                               int64_t tokens, int64_t top_k, float guidance_scale, float temperature, float top_p,
                               int64_t offset, void* stream) {
  return pick_token_cuda::pick(
      {logits, noise, ids, rows, positions, tokens, top_k, guidance_scale, temperature, top_p, offset},
      (cudaStream_t)stream);
}

extern "C" int emu3_accept_tokens(const int64_t* ids, const int64_t* past, const int64_t* picked, const int64_t* forced,
                                  const int64_t* table, int64_t* next_ids, int64_t* next_past, int64_t rows,
                                  int64_t read, int64_t picks, int64_t places, void* stream) {
  return accept_tokens_cuda::accept(
      {ids, past, picked, forced, table, next_ids, next_past, rows, read, picks, places}, (cudaStream_t)stream);
}

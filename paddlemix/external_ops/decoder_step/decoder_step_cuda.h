// Licensed under the Apache License, Version 2.0; see LICENSE.
// decoder_step.cuh behind a C interface; free of Paddle and of CUDA's headers. Both give a cudaError_t: nothing is done
// where sizes, types or addresses are others than those below.
#pragma once

#include <cstdint>

extern "C" {

// Pointers are on the device, x, weights, cache, y and workspace at addresses of 16 bytes.
struct Emu3DecoderStep {
  const void *x, *input_norm, *post_norm;  // [batch, news, hidden], [hidden], [hidden]
  const void* weights[7];                  // of q, k, v, o, gate, up and down, as in few_rows_linear.cuh
  const float* scales[7];
  const float *cosine, *sine;  // [angles, news, dim]
  void *key, *value;           // [slots, kv_heads, capacity, dim]; the new tokens are written
  const int64_t* lengths;      // [batch]: tokens of each row, the new ones with them
  const int64_t* row_slots;    // [batch], or null: row b is in slot b
  void* y;                     // [batch, news, hidden]
  void* workspace;
  int64_t batch, news, hidden, heads, kv_heads, dim, inner;  // batch * news up to 64
  int64_t angles;                                            // batch, or 1 for all rows
  int64_t slots, capacity;
  float epsilon;
  int type;  // of x, norms, cache and y: 1 float16, 2 bfloat16
  int bits;  // of the weights: 16 (of that type), 8 or 4
};

int emu3_decoder_step(const Emu3DecoderStep* step, void* stream);

// How large the workspace must be.
int emu3_decoder_step_bytes(const Emu3DecoderStep* step, int64_t* bytes);
}

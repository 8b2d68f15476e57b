// Licensed under the Apache License, Version 2.0; see LICENSE.
#include "decoder_step_cuda.h"

#include "decoder_step.cuh"

extern "C" {

int emu3_decoder_step(const Emu3DecoderStep* step, void* stream) {
  using namespace decoder_step_cuda;
  const auto on = (cudaStream_t)stream;
  if (!is_right(*step)) return cudaErrorInvalidValue;
  switch (step->type * 100 + step->bits) {
    case 116:
      return run<__half, 16>(*step, on);
    case 108:
      return run<__half, 8>(*step, on);
    case 104:
      return run<__half, 4>(*step, on);
    case 216:
      return run<__nv_bfloat16, 16>(*step, on);
    case 208:
      return run<__nv_bfloat16, 8>(*step, on);
    case 204:
      return run<__nv_bfloat16, 4>(*step, on);
    default:
      return cudaErrorInvalidValue;
  }
}

int emu3_decoder_step_bytes(const Emu3DecoderStep* step, int64_t* bytes) {
  if (!decoder_step_cuda::is_size(*step)) return cudaErrorInvalidValue;
  *bytes = decoder_step_cuda::Workspace(*step).bytes;
  return cudaSuccess;
}

}  // extern "C"

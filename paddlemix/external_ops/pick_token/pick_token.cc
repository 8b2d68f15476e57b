// Licensed under the Apache License, Version 2.0; see LICENSE.
// Paddle's side of pick_token.cuh. __init__.py checks what is given.
#include "pick_token_cuda.h"

#include "paddle/extension.h"

namespace {

using paddle::Tensor;

std::vector<Tensor> PickToken(const Tensor& logits, const paddle::optional<Tensor>& noise, float guidance_scale,
                              float temperature, int64_t top_k, int64_t offset) {
  const std::vector<int64_t> shape = logits.shape();
  PD_CHECK(shape.size() == 3 && (!noise || noise->shape() == std::vector<int64_t>({shape[1], shape[2]})),
           "logits must be [rows, positions, tokens], noise [positions, tokens]");
#ifdef PADDLE_WITH_CUDA
  if (logits.is_gpu()) {
    Tensor ids = paddle::empty({shape[1]}, paddle::DataType::INT64, logits.place());
    const int error = emu3_pick_token(logits.data<float>(), noise ? noise->data<float>() : nullptr, ids.data<int64_t>(),
                                      shape[0], shape[1], shape[2], top_k, guidance_scale, temperature, offset,
                                      logits.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in pick_token");
    return {ids};
  }
#endif
  PD_THROW("pick_token computes on a card");
}

}  // namespace

PD_BUILD_OP(pick_token)
    .Inputs({"logits", paddle::Optional("noise")})
    .Outputs({"ids"})
    .Attrs({"guidance_scale: float", "temperature: float", "top_k: int64_t", "offset: int64_t"})
    .SetKernelFn(PD_KERNEL(PickToken));

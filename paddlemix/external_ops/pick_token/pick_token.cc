// Licensed under the Apache License, Version 2.0; see LICENSE.
// Paddle's side of pick_token.cuh and accept_tokens.cuh. __init__.py checks what is given.
#include "pick_token_cuda.h"

#include "../kernel.h"

namespace {

using paddle::Tensor;

std::vector<Tensor> PickToken(const Tensor& logits, const paddle::optional<Tensor>& noise, float guidance_scale,
                              float temperature, int64_t top_k, float top_p, int64_t offset) {
  const std::vector<int64_t> shape = logits.shape();
  PD_CHECK(shape.size() == 3 && (!noise || noise->shape() == std::vector<int64_t>({shape[1], shape[2]})),
           "logits must be [rows, positions, tokens], noise [positions, tokens]");
#ifdef PADDLE_WITH_CUDA
  if (logits.is_gpu()) {
    Tensor ids = paddle::empty({shape[1]}, paddle::DataType::INT64, logits.place());
    const int error = emu3_pick_token(logits.data<float>(), noise ? noise->data<float>() : nullptr, ids.data<int64_t>(),
                                      shape[0], shape[1], shape[2], top_k, guidance_scale, temperature, top_p, offset,
                                      logits.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in pick_token");
    return {ids};
  }
#endif
  PD_THROW("pick_token computes on a card");
}

std::vector<Tensor> AcceptTokens(const Tensor& ids, const Tensor& past, const Tensor& picked, const Tensor& forced,
                                 const Tensor& table) {
  const int64_t rows = past.numel(), read = ids.shape()[1], picks = picked.shape()[1], places = forced.shape()[1];
  PD_CHECK(ids.shape()[0] == rows && table.shape() == std::vector<int64_t>({rows, 4}) &&
               picked.shape()[0] == forced.shape()[0],
           "ids must be [rows, read], past [rows], picked [sequences, picks], forced [sequences, places], table [rows, "
           "4]");
#ifdef PADDLE_WITH_CUDA
  if (ids.is_gpu()) {
    Tensor next_ids = paddle::empty({rows, picks}, paddle::DataType::INT64, ids.place());
    Tensor next_past = paddle::empty({rows}, paddle::DataType::INT64, ids.place());
    const int error =
        emu3_accept_tokens(ids.data<int64_t>(), past.data<int64_t>(), picked.data<int64_t>(), forced.data<int64_t>(),
                           table.data<int64_t>(), next_ids.data<int64_t>(), next_past.data<int64_t>(), rows, read,
                           picks, places, ids.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in accept_tokens");
    return {next_ids, next_past};
  }
#endif
  PD_THROW("accept_tokens computes on a card");
}

}  // namespace

PD_BUILD_OP(pick_token)
    .Inputs({"logits", paddle::Optional("noise")})
    .Outputs({"ids"})
    .Attrs({"guidance_scale: float", "temperature: float", "top_k: int64_t", "top_p: float", "offset: int64_t"})
    .SetKernelFn(KERNEL(PickToken));

PD_BUILD_OP(accept_tokens)
    .Inputs({"ids", "past", "picked", "forced", "table"})
    .Outputs({"next_ids", "next_past"})
    .SetKernelFn(KERNEL(AcceptTokens));

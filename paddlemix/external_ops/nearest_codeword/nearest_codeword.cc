// Licensed under the Apache License, Version 2.0; see LICENSE.
// Paddle's side of nearest_codeword.h. __init__.py checks what is given and brings the squares.
#include "nearest_codeword.h"

#include "nearest_codeword_cuda.h"
#include "../kernel.h"

namespace {

using paddle::Tensor;

std::vector<Tensor> NearestCodeword(const Tensor& latents, const Tensor& latent_squares, const Tensor& codebook,
                                    const Tensor& codeword_squares) {
  const int64_t positions = latents.shape()[0], dim = latents.shape()[1], size = codebook.shape()[1];
  Tensor codes = paddle::empty({positions}, paddle::DataType::INT64, latents.place());
#ifdef PADDLE_WITH_CUDA
  if (latents.is_gpu()) {
    const int error = emu3_nearest_codeword(latents.data<float>(), latent_squares.data<float>(),
                                            codebook.data<float>(), codeword_squares.data<float>(),
                                            codes.data<int64_t>(), positions, dim, size, latents.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in nearest_codeword");
    return {codes};
  }
#endif
  nearest_codeword::search({latents.data<float>(), latent_squares.data<float>(), codebook.data<float>(),
                            codeword_squares.data<float>(), codes.data<int64_t>(), positions, dim, size});
  return {codes};
}

}  // namespace

PD_BUILD_OP(nearest_codeword)
    .Inputs({"latents", "latent_squares", "codebook", "codeword_squares"})
    .Outputs({"codes"})
    .SetKernelFn(KERNEL(NearestCodeword));

// Licensed under the Apache License, Version 2.0; see LICENSE.
// winograd_conv: Paddle's side of winograd.h. __init__.py says what is given; it is checked here.
#include "winograd.h"

#include "../spatial_norm/tensors.h"

namespace {

using paddle::Tensor;
using spatial_norm::Optional;

void WinogradConv(const Tensor& x, const Tensor& weight, const Tensor& bias, const Optional& norm_weight,
                  const Optional& norm_bias, const Optional& scale, const Optional& shift, Tensor& out, bool doubled,
                  bool add, int64_t groups, float epsilon, bool silu) {
  const auto pixels = x.shape(), w = weight.shape();
  PD_CHECK(pixels.size() == 3 && x.numel() > 0 && pixels[2] % winograd::INPUTS == 0 && is_float(x, pixels),
           "x must be float32 on a CPU, [height, width, in], not empty, of a multiple of ", winograd::INPUTS,
           " channels");
  PD_CHECK(w.size() == 4 && w[0] > 0 && w[0] % winograd::OUTPUTS == 0 && is_float(weight, {w[0], pixels[2], 3, 3}),
           "weight must be float32 on a CPU, [out, in, 3, 3], out a multiple of ", winograd::OUTPUTS);
  const int64_t times = doubled ? 2 : 1;
  PD_CHECK(is_float(bias, {w[0]}), "bias must be float32 on a CPU, [out]");
  PD_CHECK(is_float(out, {times * pixels[0], times * pixels[1], w[0]}),
           "out must be float32 on a CPU, [height, width, out] of the result");
  winograd::Problem p{};
  p.x = x.data<float>();
  p.weight = weight.data<float>();
  p.bias = bias.data<float>();
  p.out_pixels = out.data<float>();
  p.height = pixels[0];
  p.width = pixels[1];
  p.in = w[1];
  p.out = w[0];
  p.doubled = doubled;
  p.add = add;
  spatial_norm::Problem norm{};
  if (norm_weight) {
    PD_CHECK(norm_bias, "the norm has a weight, but no bias");
    norm = spatial_norm::problem(x, *norm_weight, *norm_bias, scale, shift, groups, epsilon, silu);
    p.norm = &norm;
  }
  winograd::convolve(p);
}

}  // namespace

PD_BUILD_OP(winograd_conv)
    .Inputs({"x", "weight", "bias", paddle::Optional("norm_weight"), paddle::Optional("norm_bias"),
             paddle::Optional("scale"), paddle::Optional("shift"), "out"})
    .Outputs({"y"})
    .Attrs({"doubled: bool", "add: bool", "groups: int64_t", "epsilon: float", "silu: bool"})
    .SetInplaceMap({{"out", "y"}})
    .SetKernelFn(KERNEL(WinogradConv));

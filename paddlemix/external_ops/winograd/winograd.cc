// Licensed under the Apache License, Version 2.0; see LICENSE.
// winograd_conv: Paddle's side of winograd.h. __init__.py says what is given; it is checked here.
#include "winograd.h"

#include "paddle/extension.h"

namespace {

using paddle::Tensor;

void WinogradConv(const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor& out, bool doubled, bool add) {
  for (const Tensor* t : {&x, &weight, &bias, const_cast<const Tensor*>(&out)})
    PD_CHECK(t->is_cpu() && t->dtype() == paddle::DataType::FLOAT32, "winograd_conv takes float32 on a CPU");
  const auto pixels = x.shape(), w = weight.shape();
  PD_CHECK(pixels.size() == 3 && pixels[0] > 0 && pixels[1] > 0 && pixels[2] > 0 && pixels[2] % winograd::INPUTS == 0,
           "x must be [height, width, in], not empty, of a multiple of ", winograd::INPUTS, " channels");
  PD_CHECK(w.size() == 4 && w[0] > 0 && w[0] % winograd::OUTPUTS == 0 && w[1] == pixels[2] && w[2] == 3 && w[3] == 3,
           "weight must be [out, in, 3, 3], out a multiple of ", winograd::OUTPUTS);
  const int64_t times = doubled ? 2 : 1;
  PD_CHECK(bias.shape() == std::vector<int64_t>{w[0]}, "bias must be [out]");
  PD_CHECK((out.shape() == std::vector<int64_t>{times * pixels[0], times * pixels[1], w[0]}),
           "out must be [height, width, out] of the result");
  winograd::convolve({x.data<float>(), weight.data<float>(), bias.data<float>(), out.data<float>(), pixels[0], pixels[1],
                      w[1], w[0], doubled, add});
}

}  // namespace

PD_BUILD_OP(winograd_conv)
    .Inputs({"x", "weight", "bias", "out"})
    .Outputs({"y"})
    .Attrs({"doubled: bool", "add: bool"})
    .SetInplaceMap({{"out", "y"}})
    .SetKernelFn(PD_KERNEL(WinogradConv));

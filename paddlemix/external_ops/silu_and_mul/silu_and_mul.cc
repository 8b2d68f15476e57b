// Licensed under the Apache License, Version 2.0; see LICENSE.
// silu_and_mul: Paddle's side of silu_and_mul.h.
#include "silu_and_mul.h"

#include "../dtypes.h"
#include "../pages.h"

namespace {

using paddle::Tensor;

Tensor result(const Tensor& gate) {
  Tensor x = paddle::empty_like(gate);
  ask_large_pages(x.data(), x.numel() * sizeof(float));
  return x;
}

std::vector<Tensor> Forward(const Tensor& gate, const Tensor& up) {
  PD_CHECK(is_float(gate, gate.shape()) && is_float(up, gate.shape()), "gate and up must be float32, on a CPU");
  Tensor out = result(gate);
  silu_and_mul::compute({gate.data<float>(), up.data<float>(), nullptr, out.data<float>()}, gate.numel());
  return {out};
}

std::vector<Tensor> Backward(const Tensor& gate, const Tensor& up, const Tensor& dout) {
  PD_CHECK(is_float(dout, gate.shape()), "the gradient of silu_and_mul's result must be as the result");
  Tensor dgate = result(gate), dup = result(gate);
  silu_and_mul::compute({gate.data<float>(), up.data<float>(), dout.data<float>(), nullptr, dgate.data<float>(), dup.data<float>()},
                  gate.numel());
  return {dgate, dup};
}

}  // namespace

PD_BUILD_OP(silu_and_mul).Inputs({"gate", "up"}).Outputs({"out"}).SetKernelFn(KERNEL(Forward));

PD_BUILD_GRAD_OP(silu_and_mul)
    .Inputs({"gate", "up", paddle::Grad("out")})
    .Outputs({paddle::Grad("gate"), paddle::Grad("up")})
    .SetKernelFn(KERNEL(Backward));

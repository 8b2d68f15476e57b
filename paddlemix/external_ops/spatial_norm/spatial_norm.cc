// Licensed under the Apache License, Version 2.0; see LICENSE.
// spatial_norm: Paddle's side of spatial_norm.h. __init__.py says what is given; tensors.h checks it.
#include "tensors.h"

namespace {

using paddle::Tensor;
using spatial_norm::Optional;

void SpatialNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Optional& scale,
                 const Optional& shift, Tensor& out, int64_t groups, float epsilon, bool silu) {
  spatial_norm::Problem p = spatial_norm::problem(x, weight, bias, scale, shift, groups, epsilon, silu);
  PD_CHECK(is_float(out, x.shape()), "out must be as x");
  p.out = out.data<float>();
  spatial_norm::compute(p);
}

}  // namespace

PD_BUILD_OP(spatial_norm)
    .Inputs({"x", "weight", "bias", paddle::Optional("scale"), paddle::Optional("shift"), "out"})
    .Outputs({"y"})
    .Attrs({"groups: int64_t", "epsilon: float", "silu: bool"})
    .SetInplaceMap({{"out", "y"}})
    .SetKernelFn(KERNEL(SpatialNorm));

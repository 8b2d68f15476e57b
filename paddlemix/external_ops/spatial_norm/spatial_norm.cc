// Licensed under the Apache License, Version 2.0; see LICENSE.
// spatial_norm: Paddle's side of spatial_norm.h. __init__.py says what is given; it is checked here.
#include "spatial_norm.h"

#include "../dtypes.h"

namespace {

using paddle::Tensor;
using Shape = std::vector<int64_t>;

void SpatialNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, const paddle::optional<Tensor>& scale,
                 const paddle::optional<Tensor>& shift, Tensor& out, int64_t groups, float epsilon, bool silu) {
  const Shape shape = x.shape();
  PD_CHECK(shape.size() == 3 && x.numel() > 0 && is_float(x, shape),
           "x must be float32 [height, width, channels] on a CPU, not empty");
  const int64_t channels = shape[2];
  PD_CHECK(groups > 0 && channels % groups == 0, "channels must be a multiple of the groups");
  PD_CHECK(is_float(weight, {channels}) && is_float(bias, {channels}), "weight and bias must be float32 [channels]");
  PD_CHECK(is_float(out, shape), "out must be as x");
  int64_t times = 1;
  if (scale) {
    PD_CHECK(scale->shape().size() == 3 && scale->numel() > 0, "scale must be [height, width, channels] of the latent");
    times = shape[0] / scale->shape()[0];
    const Shape latent = {shape[0] / std::max<int64_t>(times, 1), shape[1] / std::max<int64_t>(times, 1), channels};
    PD_CHECK(times > 0 && shape[0] % times == 0 && shape[1] % times == 0 && is_float(*scale, latent) && shift &&
                 is_float(*shift, latent),
             "scale and shift must be float32, of a whole fraction of x's height and width");
  }
  spatial_norm::Problem p{};
  p.x = x.data<float>();
  p.weight = weight.data<float>();
  p.bias = bias.data<float>();
  p.scale = scale ? scale->data<float>() : nullptr;
  p.shift = scale ? shift->data<float>() : nullptr;
  p.out = out.data<float>();
  p.height = shape[0];
  p.width = shape[1];
  p.channels = channels;
  p.groups = groups;
  p.times = times;
  p.epsilon = epsilon;
  p.silu = silu;
  spatial_norm::compute(p);
}

}  // namespace

PD_BUILD_OP(spatial_norm)
    .Inputs({"x", "weight", "bias", paddle::Optional("scale"), paddle::Optional("shift"), "out"})
    .Outputs({"y"})
    .Attrs({"groups: int64_t", "epsilon: float", "silu: bool"})
    .SetInplaceMap({{"out", "y"}})
    .SetKernelFn(PD_KERNEL(SpatialNorm));

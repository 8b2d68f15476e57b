// Licensed under the Apache License, Version 2.0; see LICENSE.
// From Paddle's tensors to spatial_norm's Problem, checked; winograd_conv takes one too.
#pragma once

#include "../dtypes.h"
#include "spatial_norm.h"

namespace spatial_norm {

using Optional = paddle::optional<paddle::Tensor>;

inline Problem problem(const paddle::Tensor& x, const paddle::Tensor& weight, const paddle::Tensor& bias,
                       const Optional& scale, const Optional& shift, int64_t groups, float epsilon, bool silu) {
  using Shape = std::vector<int64_t>;
  const Shape shape = x.shape();
  PD_CHECK(shape.size() == 3 && x.numel() > 0 && is_float(x, shape),
           "x must be float32 [height, width, channels] on a CPU, not empty");
  const int64_t channels = shape[2];
  PD_CHECK(groups > 0 && channels % groups == 0, "channels must be a multiple of the groups");
  PD_CHECK(is_float(weight, {channels}) && is_float(bias, {channels}), "weight and bias must be float32 [channels]");
  int64_t times = 1;
  if (scale) {
    PD_CHECK(scale->shape().size() == 3 && scale->numel() > 0, "scale must be [height, width, channels] of the latent");
    times = shape[0] / scale->shape()[0];
    const Shape latent = {shape[0] / std::max<int64_t>(times, 1), shape[1] / std::max<int64_t>(times, 1), channels};
    PD_CHECK(times > 0 && shape[0] % times == 0 && shape[1] % times == 0 && is_float(*scale, latent) && shift &&
                 is_float(*shift, latent),
             "scale and shift must be float32, of a whole fraction of x's height and width");
  }
  Problem p{};
  p.x = x.data<float>();
  p.weight = weight.data<float>();
  p.bias = bias.data<float>();
  p.scale = scale ? scale->data<float>() : nullptr;
  p.shift = scale ? shift->data<float>() : nullptr;
  p.height = shape[0];
  p.width = shape[1];
  p.channels = channels;
  p.groups = groups;
  p.times = times;
  p.epsilon = epsilon;
  p.silu = silu;
  return p;
}

}  // namespace spatial_norm

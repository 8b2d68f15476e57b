// Licensed under the Apache License, Version 2.0; see LICENSE.
// fused_cross_entropy: Paddle's side of fused_cross_entropy.h.
#include "fused_cross_entropy.h"

#include "../dtypes.h"

namespace {

using paddle::DataType;
using paddle::Tensor;

void CrossEntropy(Tensor& logits, const Tensor& labels, Tensor& losses) {
  const auto shape = logits.shape();
  PD_CHECK(shape.size() == 2 && is_float(logits, shape), "logits must be float32 [rows, classes], on a CPU");
  PD_CHECK(labels.is_cpu() && labels.dtype() == DataType::INT64 && labels.shape() == std::vector<int64_t>{shape[0]},
           "labels must be int64 [rows], on a CPU");
  PD_CHECK(is_float(losses, {shape[0]}), "losses must be float32 [rows], on a CPU");
  fused_cross_entropy::Problem p{logits.data<float>(), labels.data<int64_t>(), losses.data<float>(), shape[0], shape[1]};
  for (int64_t i = 0; i < p.rows; ++i) PD_CHECK(0 <= p.labels[i] && p.labels[i] < p.classes, "a label is not a class");
  fused_cross_entropy::compute(p);
}

}  // namespace

PD_BUILD_OP(fused_cross_entropy)
    .Inputs({"logits", "labels", "losses"})
    .Outputs({"gradient", "sums"})
    .SetInplaceMap({{"logits", "gradient"}, {"losses", "sums"}})
    .SetKernelFn(KERNEL(CrossEntropy));

// Licensed under the Apache License, Version 2.0; see LICENSE.
// square_sum: Paddle's side of square_sum.h.
#include "square_sum.h"

#include "../dtypes.h"

namespace {

std::vector<paddle::Tensor> SquareSum(const paddle::Tensor& x) {
  PD_CHECK(is_float(x, x.shape()), "square_sum takes float32, on a CPU");
  paddle::Tensor sum = paddle::empty({1}, paddle::DataType::FLOAT64, x.place());
  *sum.data<double>() = square_sum::compute(x.data<float>(), x.numel());
  return {sum};
}

}  // namespace

PD_BUILD_OP(square_sum).Inputs({"x"}).Outputs({"sum"}).SetKernelFn(KERNEL(SquareSum));

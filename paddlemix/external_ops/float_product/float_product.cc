// Licensed under the Apache License, Version 2.0; see LICENSE.
// float_product: Paddle's side of float_product.h. few_rows_linear/__init__.py checks what is given.
#include "float_product.h"

#include "../dtypes.h"
#include "../pages.h"

namespace float_product {
template void multiply<float>(const Problem&);
template void multiply<simd::bfloat16>(const Problem&);
template void multiply<int8_t>(const Problem&);
template void multiply<uint8_t>(const Problem&);
}  // namespace float_product

namespace {

using paddle::Tensor;

void FloatProduct(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& scale, Tensor& into, bool x_turned,
                  bool weight_turned, bool add) {
  PD_CHECK(x.shape().size() == 2 && weight.shape().size() == 2 && into.shape().size() == 2, "matrices have two axes");
  float_product::Problem p{};
  p.rows = x.shape()[x_turned];
  p.depth = x.shape()[!x_turned];
  p.out = into.shape()[1];
  p.x_turned = x_turned;
  p.weight_turned = weight_turned;
  p.add = add;
  const auto stored = p.stored();
  const bool is_int4 = weight.dtype() == paddle::DataType::UINT8;
  PD_CHECK(is_float(x, x.shape()) && is_float(into, {p.rows, p.out}), "x and into must be float32, on a CPU");
  PD_CHECK(weight.shape() == (std::vector<int64_t>{
               stored.out, is_int4 ? stored.groups() * few_rows_linear::GROUP / 2 : stored.in}),
           "the weight does not fit x and into");
  p.x = x.data<float>();
  p.weight = weight.data();
  p.scale = scale ? scale->data<float>() : nullptr;
  p.y = into.data<float>();
  if (!add) ask_large_pages(p.y, into.numel() * sizeof(float));
  with_weight(weight.dtype(), [&](auto type) { float_product::multiply<decltype(type)>(p); });
}

}  // namespace

PD_BUILD_OP(float_product)
    .Inputs({"x", "weight", paddle::Optional("scale"), "into"})
    .Outputs({"y"})
    .Attrs({"x_turned: bool", "weight_turned: bool", "add: bool"})
    .SetInplaceMap({{"into", "y"}})
    .SetKernelFn(KERNEL(FloatProduct));

// Licensed under the Apache License, Version 2.0; see LICENSE.
// few_rows_linear, quantize_weight: Paddle's side of few_rows_linear.h. __init__.py checks what is given.
#include "few_rows_linear.h"

#include "../dtypes.h"
#include "few_rows_linear_cuda.h"

namespace few_rows_linear {
template void linear<float>(const Problem&);
template void linear<simd::bfloat16>(const Problem&);
template void linear<int8_t>(const Problem&);
template void linear<uint8_t>(const Problem&);
}  // namespace few_rows_linear

namespace {

using paddle::DataType;
using paddle::Tensor;

std::vector<Tensor> FewRowsLinear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& scale) {
  PD_CHECK(!x.shape().empty() && weight.shape().size() == 2, "x must be [..., in], a weight [out, in]");
  const int64_t in = x.shape().back(), out = weight.shape()[0];
  std::vector<int64_t> shape = x.shape();
  shape.back() = out;
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    Tensor y = paddle::empty(shape, x.dtype(), x.place());
    const int type = x.dtype() == DataType::FLOAT16 ? 1 : x.dtype() == DataType::BFLOAT16 ? 2 : 0;
    const int bits = !scale ? 0 : weight.dtype() == DataType::INT8 ? 8 : 4;
    const int error = emu3_quantized_linear(type, bits, x.data(), weight.data(), scale ? scale->data<float>() : nullptr,
                                            y.data(), x.numel() / in, in, out, x.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in few_rows_linear");
    return {y};
  }
#endif
  Tensor y = paddle::empty(shape, DataType::FLOAT32, x.place());
  few_rows_linear::Problem p;
  p.x = x.data<float>();
  p.weight = weight.data();
  p.scale = scale ? scale->data<float>() : nullptr;
  p.y = y.data<float>();
  p.rows = in ? x.numel() / in : 0;
  p.in = in;
  p.out = out;
  with_weight(weight.dtype(), [&](auto type) { few_rows_linear::linear<decltype(type)>(p); });
  return {y};
}

std::vector<Tensor> QuantizeWeight(const Tensor& weight, int bits) {
  PD_CHECK(weight.is_cpu(), "quantize_weight computes on a CPU");
  const int64_t out = weight.shape()[0], in = weight.shape()[1];
  const int64_t groups = (in + few_rows_linear::GROUP - 1) / few_rows_linear::GROUP;
  const auto place = weight.place();
  Tensor codes = bits == 8 ? paddle::empty({out, in}, DataType::INT8, place)
                           : paddle::empty({out, groups * few_rows_linear::GROUP / 2}, DataType::UINT8, place);
  Tensor scale = bits == 8 ? paddle::empty({out}, DataType::FLOAT32, place)
                           : paddle::empty({out, groups}, DataType::FLOAT32, place);
  with_float(weight.dtype(), "quantize_weight", [&](auto type) {
    few_rows_linear::quantize<decltype(type)>(weight.data(), out, in, bits, codes.data(), scale.data<float>());
  });
  return {codes, scale};
}

}  // namespace

PD_BUILD_OP(few_rows_linear)
    .Inputs({"X", "Weight", paddle::Optional("Scale")})
    .Outputs({"Out"})
    .SetKernelFn(KERNEL(FewRowsLinear));

PD_BUILD_OP(quantize_weight)
    .Inputs({"Weight"})
    .Outputs({"Codes", "Scale"})
    .Attrs({"bits: int"})
    .SetKernelFn(KERNEL(QuantizeWeight));

// Licensed under the Apache License, Version 2.0; see LICENSE.
// fused_rms_norm, fused_ln: Paddle's side of norm.h and norm_cuda.h.
#include <vector>

#include "../dtypes.h"
#include "norm.h"
#include "norm_cuda.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

Shape rows_of(Shape shape) {
  shape.pop_back();
  return shape;
}

// The dtypes that `check` lets through, as norm_cuda.h numbers them.
int type_of(const Tensor& x) {
  return x.dtype() == DataType::FLOAT32 ? 0 : x.dtype() == DataType::FLOAT16 ? 1 : 2;
}

template <class F>
void with_types(const Tensor& x, const Tensor& scale, F f) {
  with_float(x.dtype(), "a norm",
             [&](auto a) { with_float(scale.dtype(), "a norm's scale", [&](auto b) { f(a, b); }); });
}

void check(const Tensor& x, const Tensor& scale, const Tensor* bias) {
  PD_CHECK(!x.shape().empty() && x.shape().back() > 0 && scale.shape() == Shape{x.shape().back()},
           "a norm takes x [..., cols], of at least one column, and its scale [cols]");
  PD_CHECK(!bias || (bias->shape() == scale.shape() && bias->dtype() == scale.dtype()),
           "the bias of a norm must have the shape and dtype of its scale");
  PD_CHECK(x.place() == scale.place() && (!bias || bias->place() == x.place()), "a norm takes tensors of one device");
#ifndef PADDLE_WITH_CUDA
  PD_CHECK(x.is_cpu(), "emu3_ops was built without CUDA: build it again where nvcc is");
#endif
  with_types(x, scale, [](auto, auto) {});  // other dtypes end here, for CUDA, too
}

void* pointer(Tensor* x) { return x ? x->data() : nullptr; }
const void* pointer(const Tensor* x) { return x ? x->data() : nullptr; }

// {y, mean, rstd}; bias null: RMS norm, and mean is no tensor.
std::vector<Tensor> forward(const Tensor& x, const Tensor& scale, const Tensor* bias, float epsilon) {
  check(x, scale, bias);
  const int64_t cols = x.shape().back(), rows = x.numel() / cols;
  Tensor y = paddle::empty(x.shape(), scale.dtype(), x.place()), mean;
  Tensor rstd = paddle::empty(rows_of(x.shape()), DataType::FLOAT32, x.place());
  if (bias) mean = paddle::empty(rows_of(x.shape()), DataType::FLOAT32, x.place());
  float* means = bias ? mean.data<float>() : nullptr;
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    const int error =
        emu3_norm_forward(type_of(x), type_of(scale), x.data(), scale.data(), pointer(bias), y.data(), means,
                          rstd.data<float>(), rows, cols, epsilon, x.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in a norm");
    return {y, mean, rstd};
  }
#endif
  with_types(x, scale, [&](auto a, auto b) {
    using X = decltype(a);
    using W = decltype(b);
    norm::Problem<X, W> p{};
    p.x = (const X*)x.data();
    p.scale = (const W*)scale.data();
    p.bias = (const W*)pointer(bias);
    p.mean = means;
    p.rstd = rstd.data<float>();
    p.rows = rows;
    p.cols = cols;
    p.epsilon = epsilon;
    norm::forward(p, (W*)y.data());
  });
  return {y, mean, rstd};
}

// {dx, dscale, dbias}; mean and bias null: RMS norm, and dbias is no tensor.
std::vector<Tensor> backward(const Tensor& x, const Tensor& scale, const Tensor* bias, const Tensor* mean,
                                    const Tensor& rstd, const Tensor& dy) {
  check(x, scale, bias);
  PD_CHECK(dy.initialized() || (dy.defined() && !dy.numel()),
           "a norm has a gradient through y alone, not through mean or rstd");
  PD_CHECK(dy.shape() == x.shape() && dy.dtype() == scale.dtype(), "the gradient of a norm's y must be as y");
  const int64_t cols = x.shape().back(), rows = x.numel() / cols;
  Tensor dx = paddle::empty(x.shape(), x.dtype(), x.place());
  Tensor dscale = paddle::empty(scale.shape(), scale.dtype(), x.place()), dbias;
  if (bias) dbias = paddle::empty(scale.shape(), scale.dtype(), x.place());
  Tensor* dbias_pointer = bias ? &dbias : nullptr;
  const float* means = mean ? mean->data<float>() : nullptr;
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    Tensor workspace = paddle::empty({2, emu3_norm_parts(rows), cols}, DataType::FLOAT32, x.place());
    const int error = emu3_norm_backward(type_of(x), type_of(scale), x.data(), scale.data(), means,
                                         rstd.data<float>(), dy.data(), dx.data(), dscale.data(),
                                         pointer(dbias_pointer), workspace.data<float>(), rows, cols, x.stream());
    PD_CHECK(error == 0, "CUDA error ", error, " in the gradient of a norm");
    return {dx, dscale, dbias};
  }
#endif
  with_types(x, scale, [&](auto a, auto b) {
    using X = decltype(a);
    using W = decltype(b);
    norm::Problem<X, W> p{};
    p.x = (const X*)x.data();
    p.scale = (const W*)scale.data();
    p.mean = const_cast<float*>(means);
    p.rstd = const_cast<float*>(rstd.data<float>());
    p.rows = rows;
    p.cols = cols;
    norm::backward(p, (const W*)dy.data(), (X*)dx.data(), (W*)dscale.data(), (W*)pointer(dbias_pointer));
  });
  return {dx, dscale, dbias};
}

std::vector<Tensor> RmsNorm(const Tensor& x, const Tensor& scale, float epsilon) {
  const auto out = forward(x, scale, nullptr, epsilon);
  return {out[0], out[2]};
}

std::vector<Tensor> RmsNormGrad(const Tensor& x, const Tensor& scale, const Tensor& rstd, const Tensor& dy) {
  const auto out = backward(x, scale, nullptr, nullptr, rstd, dy);
  return {out[0], out[1]};
}

std::vector<Tensor> LayerNorm(const Tensor& x, const Tensor& scale, const Tensor& bias, float epsilon) {
  return forward(x, scale, &bias, epsilon);
}

std::vector<Tensor> LayerNormGrad(const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor& mean,
                                         const Tensor& rstd, const Tensor& dy) {
  return backward(x, scale, &bias, &mean, rstd, dy);
}

std::vector<Shape> RmsNormShape(Shape x, Shape scale, float) { return {x, rows_of(x)}; }
std::vector<Shape> LayerNormShape(Shape x, Shape scale, Shape bias, float) {
  return {x, rows_of(x), rows_of(x)};
}
std::vector<DataType> RmsNormType(DataType x, DataType scale) { return {scale, DataType::FLOAT32}; }
std::vector<DataType> LayerNormType(DataType x, DataType scale, DataType bias) {
  return {scale, DataType::FLOAT32, DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(fused_rms_norm)
    .Inputs({"x", "scale"})
    .Outputs({"y", "rstd"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(KERNEL(RmsNorm))
    .SetInferShapeFn(PD_INFER_SHAPE(RmsNormShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(RmsNormType));

PD_BUILD_GRAD_OP(fused_rms_norm)
    .Inputs({"x", "scale", "rstd", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale")})
    .SetKernelFn(KERNEL(RmsNormGrad));

PD_BUILD_OP(fused_ln)
    .Inputs({"x", "scale", "bias"})
    .Outputs({"y", "mean", "rstd"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(KERNEL(LayerNorm))
    .SetInferShapeFn(PD_INFER_SHAPE(LayerNormShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(LayerNormType));

PD_BUILD_GRAD_OP(fused_ln)
    .Inputs({"x", "scale", "bias", "mean", "rstd", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale"), paddle::Grad("bias")})
    .SetKernelFn(KERNEL(LayerNormGrad));

#ifdef PADDLE_WITH_CUDA
// Says by being there that the operators compute on a GPU: external_ops.operators_for asks for its name.
static std::vector<paddle::Tensor> Same(const paddle::Tensor& x) { return {x}; }
PD_BUILD_OP(emu3_ops_cuda).Inputs({"x"}).Outputs({"y"}).SetKernelFn(KERNEL(Same));
#endif

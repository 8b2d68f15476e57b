// Licensed under the Apache License, Version 2.0; see LICENSE.
// causal_attention: Paddle's side of causal_attention.h.
#include "causal_attention.h"

#include "../dtypes.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

causal_attention::Problem problem(const Tensor& query, const Tensor& key, const Tensor& value, float dropout,
                                  int seed) {
  const Shape q = query.shape(), k = key.shape();
  PD_CHECK(q.size() == 4 && k.size() == 4 && query.numel() && k[1] > 0 && q[2] % k[1] == 0 && is_float(query, q) &&
               is_float(key, {q[0], k[1], q[1], q[3]}) && is_float(value, k),
           "query must be float32 [B, length, H, D], key and value [B, kv, length, D], on a CPU, not empty");
  causal_attention::Problem p{};
  p.query = query.data<float>();
  p.key = key.data<float>();
  p.value = value.data<float>();
  p.batch = q[0];
  p.length = q[1];
  p.heads = q[2];
  p.kv_heads = k[1];
  p.dim = q[3];
  p.dropout = dropout;
  p.seed = seed;
  return p;
}

std::vector<Tensor> Attention(const Tensor& query, const Tensor& key, const Tensor& value, float dropout, int seed) {
  const auto p = problem(query, key, value, dropout, seed);
  Tensor out = paddle::empty({p.batch, p.length, p.heads * p.dim}, DataType::FLOAT32, query.place());
  Tensor logs = paddle::empty({p.batch, p.heads, p.length}, DataType::FLOAT32, query.place());
  causal_attention::forward(p, out.data<float>(), logs.data<float>());
  return {out, logs};
}

std::vector<Tensor> AttentionGrad(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                  const Tensor& logs, const Tensor& dout, float dropout, int seed) {
  auto p = problem(query, key, value, dropout, seed);
  PD_CHECK(is_float(dout, out.shape()), "the gradient of causal_attention's result must be as the result");
  Tensor dquery = paddle::empty_like(query), dkey = paddle::empty_like(key), dvalue = paddle::empty_like(value);
  p.out = out.data<float>();
  p.dout = dout.data<float>();
  p.logs = logs.data<float>();
  p.dquery = dquery.data<float>();
  p.dkey = dkey.data<float>();
  p.dvalue = dvalue.data<float>();
  causal_attention::backward(p);
  return {dquery, dkey, dvalue};
}

std::vector<Shape> AttentionShape(Shape q, Shape, Shape, float, int) {
  return {{q[0], q[1], q[2] * q[3]}, {q[0], q[2], q[1]}};
}
std::vector<DataType> AttentionType(DataType q, DataType, DataType, float, int) { return {q, q}; }

}  // namespace

PD_BUILD_OP(causal_attention)
    .Inputs({"query", "key", "value"})
    .Outputs({"out", "logs"})
    .Attrs({"dropout: float", "seed: int"})
    .SetKernelFn(KERNEL(Attention))
    .SetInferShapeFn(PD_INFER_SHAPE(AttentionShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(AttentionType));

PD_BUILD_GRAD_OP(causal_attention)
    .Inputs({"query", "key", "value", "out", "logs", paddle::Grad("out")})
    .Outputs({paddle::Grad("query"), paddle::Grad("key"), paddle::Grad("value")})
    .Attrs({"dropout: float", "seed: int"})
    .SetKernelFn(KERNEL(AttentionGrad));

// Licensed under the Apache License, Version 2.0; see LICENSE.
// cached_attention: Paddle's side of cached_attention.h.
#include "cached_attention.h"

#include "../dtypes.h"

namespace {

using paddle::DataType;
using paddle::Tensor;

std::vector<Tensor> CachedAttention(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const paddle::optional<Tensor>& allowed, int64_t length) {
  const auto q = query.shape(), k = key.shape();
  PD_CHECK(q.size() == 4 && k.size() == 4 && value.shape() == k && q[0] == k[0] && q[3] == k[3] && k[1] > 0 &&
               q[2] % k[1] == 0,
           "query must be [B, new, H, D], key and value [B, kv, room, D]");
  PD_CHECK(q[1] <= length && length <= k[2], "length must be at least the new tokens and at most the room");
  PD_CHECK(query.dtype() == DataType::FLOAT32 && key.dtype() == value.dtype(), "query must be float32, key as value");
  PD_CHECK(!allowed || (allowed->dtype() == DataType::BOOL && allowed->numel() == q[0] * length),
           "allowed must be bool [B, length]");
  Tensor out = paddle::empty({q[0], q[1], q[2] * q[3]}, DataType::FLOAT32, query.place());
  if (!out.numel()) return {out};
  const cached_attention::Problem problem{query.data<float>(),
                                          key.data(),
                                          value.data(),
                                          allowed ? allowed->data<bool>() : nullptr,
                                          out.data<float>(),
                                          q[0],
                                          q[1],
                                          q[2],
                                          k[1],
                                          q[3],
                                          length,
                                          k[2]};
  with_float(key.dtype(), "the cache of cached_attention",
             [&](auto type) { cached_attention::attention<decltype(type)>(problem); });
  return {out};
}

}  // namespace

PD_BUILD_OP(cached_attention)
    .Inputs({"Query", "Key", "Value", paddle::Optional("Allowed")})
    .Outputs({"Out"})
    .Attrs({"length: int64_t"})
    .SetKernelFn(PD_KERNEL(CachedAttention));

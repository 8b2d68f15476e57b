// Licensed under the Apache License, Version 2.0; see LICENSE.
// cached_attention: Paddle's side of cached_attention.h.
#include "cached_attention.h"

#include "../dtypes.h"
#include "cache_rows.h"

namespace cached_attention {
template void attend_by_tiles<float>(const Problem&);
template void attention<float>(const Problem&);
template void attention<simd::bfloat16>(const Problem&);
template void attention<simd::float16>(const Problem&);
}  // namespace cached_attention

namespace {

using paddle::DataType;
using paddle::Tensor;

std::vector<Tensor> CachedAttention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lengths,
                                    const paddle::optional<Tensor>& slots, const paddle::optional<Tensor>& allowed) {
  const auto q = query.shape(), k = key.shape();
  PD_CHECK(q.size() == 4 && k.size() == 4 && value.shape() == k && q[3] == k[3] && k[1] > 0 && q[2] % k[1] == 0,
           "query must be [B, new, H, D], key and value [S, kv, capacity, D]");
  PD_CHECK(query.dtype() == DataType::FLOAT32 && key.dtype() == value.dtype(), "query must be float32, key as value");
  const CacheRows rows(lengths, slots, q[0], q[1], k);
  PD_CHECK(!allowed || (allowed->dtype() == DataType::BOOL && allowed->numel() == q[0] * rows.longest),
           "allowed must be bool [B, max(lengths)]");
  Tensor out = paddle::empty({q[0], q[1], q[2] * q[3]}, DataType::FLOAT32, query.place());
  if (!out.numel()) return {out};
  cached_attention::Problem p;
  p.query = query.data<float>();
  p.key = key.data();
  p.value = value.data();
  p.lengths = rows.lengths;
  p.slots = rows.slots.data();
  p.allowed = allowed ? allowed->data<bool>() : nullptr;
  p.out = out.data<float>();
  p.batch = q[0];
  p.news = q[1];
  p.heads = q[2];
  p.kv_heads = k[1];
  p.dim = q[3];
  p.longest = rows.longest;
  p.capacity = k[2];
  with_float(key.dtype(), "the cache of cached_attention",
             [&](auto type) { cached_attention::attention<decltype(type)>(p); });
  return {out};
}

}  // namespace

PD_BUILD_OP(cached_attention)
    .Inputs({"Query", "Key", "Value", "Lengths", paddle::Optional("Slots"), paddle::Optional("Allowed")})
    .Outputs({"Out"})
    .SetKernelFn(KERNEL(CachedAttention));

// Licensed under the Apache License, Version 2.0; see LICENSE.
// decoder_step: Paddle's side of decoder_step.h. __init__.py says what is given; it is checked here.
#include "decoder_step.h"

#include "../cached_attention/cache_rows.h"
#include "../dtypes.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

constexpr size_t NORMS = 2, WEIGHTS = 7;

std::vector<float> widen(const Tensor& x) {
  return with_float(x.dtype(), "a norm of decoder_step", [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(x.data());
    std::vector<float> wide(x.numel());
    std::transform(from, from + wide.size(), wide.begin(), [](auto value) { return simd::widen(value); });
    return wide;
  });
}

// Writes to `key` and `value`, which are a cache and have no gradients.
Tensors DecoderStep(const Tensor& x, const Tensors& norms, const Tensors& weights,
                    const paddle::optional<Tensors>& scales, const Tensor& cosine, const Tensor& sine,
                    const Tensor& key, const Tensor& value, const Tensor& lengths,
                    const paddle::optional<Tensor>& slots, const paddle::optional<Tensor>& allowed, double epsilon) {
  PD_CHECK(norms.size() == NORMS && weights.size() == WEIGHTS && (!scales || scales->size() == WEIGHTS),
           "decoder_step takes two norms, seven weights and as many scales or none");
  const auto is_given = [](const Tensor& t) { return t.initialized() && t.numel() > 0; };
  PD_CHECK(is_given(x) && is_given(cosine) && is_given(sine) && is_given(key) && is_given(value) &&
               std::all_of(norms.begin(), norms.end(), is_given) && std::all_of(weights.begin(), weights.end(), is_given),
           "a tensor of decoder_step is missing or empty");
  const auto shape = x.shape(), cache = key.shape();
  PD_CHECK(shape.size() == 3 && is_float(x, shape), "x must be float32 [B, new, hidden]");
  PD_CHECK(cosine.shape().size() == 4 && weights[0].shape().size() == 2 && weights[1].shape().size() == 2 &&
               weights[4].shape().size() == 2,
           "cosine must have four axes and a weight two");
  PD_CHECK(cache.size() == 4 && cache[3] % 2 == 0 && value.shape() == cache && value.dtype() == key.dtype(),
           "key and value must be [S, kv, capacity, D] of one dtype, D even");
  const CacheRows rows(lengths, slots, shape[0], shape[1], cache);
  PD_CHECK(rows.differ(), "two rows of decoder_step must not be written into one slot");
  PD_CHECK(!allowed || (allowed->dtype() == DataType::BOOL && allowed->shape() == Shape({shape[0], rows.longest})),
           "allowed must be bool [B, max(lengths)]");
  const int64_t angles = cosine.shape()[0];
  PD_CHECK((angles == 1 || angles == shape[0]) && is_float(cosine, {angles, shape[1], 1, cache[3]}) &&
               is_float(sine, cosine.shape()),
           "cosine and sine must be float32 [1 or B, new, 1, D]");
  const auto input_norm = widen(norms[0]), post_norm = widen(norms[1]);
  const auto weight = [&](size_t i, int64_t in, int64_t out) {
    const Tensor& w = weights[i];
    const int64_t groups = (in + few_rows_linear::GROUP - 1) / few_rows_linear::GROUP;
    const bool in_4_bits = w.dtype() == DataType::UINT8, in_8_bits = w.dtype() == DataType::INT8;
    const int64_t columns = in_4_bits ? groups * few_rows_linear::GROUP / 2 : in;
    PD_CHECK(w.dtype() == weights[0].dtype() && w.shape() == Shape({out, columns}), "weight ", i, " must be [", out,
             ", ", columns, "], of the dtype of weight 0");
    PD_CHECK(bool(scales) == (in_4_bits || in_8_bits), "int8 and uint8 weights have scales, floats none");
    PD_CHECK(!scales || is_float((*scales)[i], in_4_bits ? Shape({out, groups}) : Shape({out})), "scale ", i,
             " is not as few_rows_linear takes it");
    return decoder_step::Weight{w.data(), scales ? (*scales)[i].data<float>() : nullptr, in, out};
  };
  const int64_t hidden = shape[2], attended = weights[0].shape()[0], inner = weights[4].shape()[0];
  const int64_t kept = cache[1] * cache[3];
  PD_CHECK(norms[0].numel() == hidden && norms[1].numel() == hidden, "norms must be [hidden]");
  PD_CHECK(kept > 0 && attended > 0 && attended % kept == 0, "query heads must be a multiple of the cache's");
  Tensor y = paddle::empty(shape, DataType::FLOAT32, x.place());
  const auto linear =
      with_weight(weights[0].dtype(), [](auto type) { return &few_rows_linear::linear<decltype(type)>; });
  const auto step = with_float(key.dtype(), "the cache of decoder_step",
                               [](auto type) { return &decoder_step::step<decltype(type)>; });
  decoder_step::Problem p;
  p.linear = linear;
  p.x = x.data<float>();
  p.input_norm = input_norm.data();
  p.post_norm = post_norm.data();
  p.q = weight(0, hidden, attended);
  p.k = weight(1, hidden, kept);
  p.v = weight(2, hidden, kept);
  p.o = weight(3, attended, hidden);
  p.gate = weight(4, hidden, inner);
  p.up = weight(5, hidden, inner);
  p.down = weight(6, inner, hidden);
  p.cosine = cosine.data<float>();
  p.sine = sine.data<float>();
  p.key = key.data();
  p.value = value.data();
  p.lengths = rows.lengths;
  p.slots = rows.slots.data();
  p.allowed = allowed ? allowed->data<bool>() : nullptr;
  p.y = y.data<float>();
  p.batch = shape[0];
  p.news = shape[1];
  p.heads = attended / cache[3];
  p.kv_heads = cache[1];
  p.dim = cache[3];
  p.angles = angles;
  p.longest = rows.longest;
  p.capacity = cache[2];
  p.epsilon = epsilon;
  step(p);
  return {y};
}

}  // namespace

PD_BUILD_OP(decoder_step)
    .Inputs({"X", paddle::Vec("Norms"), paddle::Vec("Weights"), paddle::Optional(paddle::Vec("Scales")), "Cosine",
             "Sine", "Key", "Value", "Lengths", paddle::Optional("Slots"), paddle::Optional("Allowed")})
    .Outputs({"Out"})
    .Attrs({"epsilon: double"})
    .SetKernelFn(PD_KERNEL(DecoderStep));

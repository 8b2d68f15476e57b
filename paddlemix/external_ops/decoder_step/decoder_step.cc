// Licensed under the Apache License, Version 2.0; see LICENSE.
// decoder_step: Paddle's side of decoder_step.h. __init__.py says what is given; it is checked here.
#include "decoder_step.h"

#include "../cached_attention/cache_rows.h"
#include "../dtypes.h"
#include "decoder_step_cuda.h"

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

struct Sizes {
  int64_t batch, news, hidden, attended, inner, slots, kv_heads, capacity, dim, angles;
};

bool is_like(const Tensor& t, const Shape& shape, DataType dtype, const Tensor& beside) {
  return t.shape() == shape && t.dtype() == dtype && t.place() == beside.place();
}

// What is asked for on a CPU and on a card.
Sizes check(const Tensor& x, const Tensors& norms, const Tensors& weights, const paddle::optional<Tensors>& scales,
            const Tensor& cosine, const Tensor& sine, const Tensor& key, const Tensor& value) {
  PD_CHECK(norms.size() == NORMS && weights.size() == WEIGHTS && (!scales || scales->size() == WEIGHTS),
           "decoder_step takes two norms, seven weights and as many scales or none");
  const auto is_given = [](const Tensor& t) { return t.initialized() && t.numel() > 0; };
  const auto are_given = [&](const Tensors& ts) { return std::all_of(ts.begin(), ts.end(), is_given); };
  PD_CHECK(is_given(x) && is_given(cosine) && is_given(sine) && is_given(key) && is_given(value) && are_given(norms) &&
               are_given(weights),
           "a tensor of decoder_step is missing or empty");
  const auto shape = x.shape(), cache = key.shape();
  PD_CHECK(shape.size() == 3, "x must be [B, new, hidden]");
  PD_CHECK(cosine.shape().size() == 4 && weights[0].shape().size() == 2 && weights[1].shape().size() == 2 &&
               weights[4].shape().size() == 2,
           "cosine must have four axes and a weight two");
  PD_CHECK(cache.size() == 4 && cache[3] % 2 == 0 && is_like(value, cache, key.dtype(), x) && key.place() == x.place(),
           "key and value must be [S, kv, capacity, D] of one dtype, D even, where x is");
  const Sizes sizes{shape[0], shape[1], shape[2], weights[0].shape()[0], weights[4].shape()[0],
                    cache[0], cache[1], cache[2], cache[3],              cosine.shape()[0]};
  PD_CHECK((sizes.angles == 1 || sizes.angles == sizes.batch) &&
               is_like(cosine, {sizes.angles, sizes.news, 1, sizes.dim}, DataType::FLOAT32, x) &&
               is_like(sine, cosine.shape(), DataType::FLOAT32, x),
           "cosine and sine must be float32 [1 or B, new, 1, D]");
  PD_CHECK(norms[0].numel() == sizes.hidden && norms[1].numel() == sizes.hidden, "norms must be [hidden]");
  const int64_t kept = sizes.kv_heads * sizes.dim;
  PD_CHECK(kept > 0 && sizes.attended > 0 && sizes.attended % kept == 0,
           "query heads must be a multiple of the cache's");
  const int64_t in[] = {sizes.hidden, sizes.hidden, sizes.hidden, sizes.attended,
                        sizes.hidden, sizes.hidden, sizes.inner};
  const int64_t out[] = {sizes.attended, kept, kept, sizes.hidden, sizes.inner, sizes.inner, sizes.hidden};
  const auto dtype = weights[0].dtype();
  const bool in_4_bits = dtype == DataType::UINT8;
  PD_CHECK(bool(scales) == (in_4_bits || dtype == DataType::INT8), "int8 and uint8 weights have scales, floats none");
  for (size_t i = 0; i < WEIGHTS; ++i) {
    const int64_t groups = (in[i] + few_rows_linear::GROUP - 1) / few_rows_linear::GROUP;
    const int64_t columns = in_4_bits ? groups * few_rows_linear::GROUP / 2 : in[i];
    PD_CHECK(is_like(weights[i], {out[i], columns}, dtype, x), "weight ", i, " must be [", out[i], ", ", columns,
             "], of the dtype of weight 0, where x is");
    const Shape scale = in_4_bits ? Shape({out[i], groups}) : Shape({out[i]});
    PD_CHECK(!scales || is_like((*scales)[i], scale, DataType::FLOAT32, x), "scale ", i,
             " is not as few_rows_linear takes it");
  }
  return sizes;
}

#ifdef PADDLE_WITH_CUDA
// What lengths and slots hold is not looked at: it would be waited for.
Tensors on_card(const Sizes& sizes, const Tensor& x, const Tensors& norms, const Tensors& weights,
                const paddle::optional<Tensors>& scales, const Tensor& cosine, const Tensor& sine, const Tensor& key,
                const Tensor& value, const Tensor& lengths, const paddle::optional<Tensor>& slots, double epsilon) {
  const auto dtype = x.dtype(), weight = weights[0].dtype();
  PD_CHECK((dtype == DataType::FLOAT16 || dtype == DataType::BFLOAT16) && key.dtype() == dtype &&
               is_like(norms[0], {sizes.hidden}, dtype, x) && is_like(norms[1], {sizes.hidden}, dtype, x),
           "on a card decoder_step takes x, norms and cache of one dtype, float16 or bfloat16");
  PD_CHECK(scales || weight == dtype, "on a card floats must be of x's dtype");
  PD_CHECK(is_like(lengths, {sizes.batch}, DataType::INT64, x) &&
               (slots ? is_like(*slots, {sizes.batch}, DataType::INT64, x) : sizes.batch == sizes.slots),
           "lengths and slots must be int64 [B], where x is; without slots the cache must have one for each row");
  Tensor y = paddle::empty(x.shape(), dtype, x.place());
  Emu3DecoderStep step{};
  step.x = x.data();
  step.input_norm = norms[0].data();
  step.post_norm = norms[1].data();
  for (size_t i = 0; i < WEIGHTS; ++i) {
    step.weights[i] = weights[i].data();
    step.scales[i] = scales ? (*scales)[i].data<float>() : nullptr;
  }
  step.cosine = cosine.data<float>();
  step.sine = sine.data<float>();
  step.key = const_cast<void*>(key.data());
  step.value = const_cast<void*>(value.data());
  step.lengths = lengths.data<int64_t>();
  step.row_slots = slots ? slots->data<int64_t>() : nullptr;
  step.y = y.data();
  step.batch = sizes.batch;
  step.news = sizes.news;
  step.hidden = sizes.hidden;
  step.heads = sizes.attended / sizes.dim;
  step.kv_heads = sizes.kv_heads;
  step.dim = sizes.dim;
  step.inner = sizes.inner;
  step.angles = sizes.angles;
  step.slots = sizes.slots;
  step.capacity = sizes.capacity;
  step.epsilon = epsilon;
  step.type = dtype == DataType::FLOAT16 ? 1 : 2;
  step.bits = !scales ? 16 : weight == DataType::INT8 ? 8 : 4;
  int64_t bytes = 0;
  PD_CHECK(emu3_decoder_step_bytes(&step, &bytes) == 0, "decoder_step on a card does not take these sizes");
  Tensor workspace = paddle::empty({bytes}, DataType::UINT8, x.place());
  step.workspace = workspace.data();
  const int error = emu3_decoder_step(&step, x.stream());
  PD_CHECK(error == 0, "CUDA error ", error, " in decoder_step");
  return {y};
}
#endif

// Writes to `key` and `value`, which are a cache and have no gradients.
Tensors DecoderStep(const Tensor& x, const Tensors& norms, const Tensors& weights,
                    const paddle::optional<Tensors>& scales, const Tensor& cosine, const Tensor& sine,
                    const Tensor& key, const Tensor& value, const Tensor& lengths,
                    const paddle::optional<Tensor>& slots, const paddle::optional<Tensor>& allowed, double epsilon) {
  const Sizes sizes = check(x, norms, weights, scales, cosine, sine, key, value);
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    PD_CHECK(!allowed, "on a card decoder_step takes no mask");
    return on_card(sizes, x, norms, weights, scales, cosine, sine, key, value, lengths, slots, epsilon);
  }
#endif
  PD_CHECK(is_float(x, x.shape()), "x must be float32");
  const CacheRows rows(lengths, slots, sizes.batch, sizes.news, key.shape());
  PD_CHECK(rows.differ(), "two rows of decoder_step must not be written into one slot");
  PD_CHECK(!allowed || (allowed->dtype() == DataType::BOOL && allowed->shape() == Shape({sizes.batch, rows.longest})),
           "allowed must be bool [B, max(lengths)]");
  const auto input_norm = widen(norms[0]), post_norm = widen(norms[1]);
  const auto weight = [&](size_t i, int64_t in, int64_t out) {
    return decoder_step::Weight{weights[i].data(), scales ? (*scales)[i].data<float>() : nullptr, in, out};
  };
  const int64_t hidden = sizes.hidden, attended = sizes.attended, inner = sizes.inner;
  const int64_t kept = sizes.kv_heads * sizes.dim;
  Tensor y = paddle::empty(x.shape(), DataType::FLOAT32, x.place());
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
  p.batch = sizes.batch;
  p.news = sizes.news;
  p.heads = attended / sizes.dim;
  p.kv_heads = sizes.kv_heads;
  p.dim = sizes.dim;
  p.angles = sizes.angles;
  p.longest = rows.longest;
  p.capacity = sizes.capacity;
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
    .SetKernelFn(KERNEL(DecoderStep));

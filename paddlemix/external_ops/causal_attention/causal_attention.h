// Licensed under the Apache License, Version 2.0; see LICENSE.
// Causal attention of whole rows on a CPU, with its gradient; free of Paddle. Forward is cached_attention's; the gradient
// computes the weights again from the logarithms of their sums, a block of keys a time (Dao, arXiv 2307.08691, section
// 3.1.2): memory is linear in the length.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../cached_attention/cached_attention.h"
#include "../float_product/float_product.h"

namespace causal_attention {

constexpr int BLOCK = cached_attention::BLOCK;  // keys a time
constexpr int TILES = 4;                        // of queries a time

struct Problem {
  const float *query, *out, *dout;  // [batch, length, heads, dim]
  const float *key, *value;         // [batch, kv_heads, length, dim]
  const float* logs;                // [batch, heads, length]
  float *dquery, *dkey, *dvalue;    // as query, key and value
  int64_t batch, length, heads, kv_heads, dim;
  float dropout;
  uint64_t seed;

  int64_t group() const { return heads / kv_heads; }
};

}  // namespace causal_attention

#define SIMD_KERNELS "causal_attention/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace causal_attention {

inline void forward(const Problem& p, float* out, float* logs) {
  cached_attention::Problem to{};
  std::vector<int64_t> lengths(p.batch, p.length), slots(p.batch);
  std::iota(slots.begin(), slots.end(), 0);
  to.query = p.query;
  to.key = p.key;
  to.value = p.value;
  to.lengths = lengths.data();
  to.slots = slots.data();
  to.out = out;
  to.batch = p.batch;
  to.news = to.longest = to.capacity = p.length;
  to.heads = p.heads;
  to.kv_heads = p.kv_heads;
  to.dim = p.dim;
  to.logs = logs;
  to.dropout = p.dropout;
  to.seed = p.seed;
  cached_attention::attend_by_tiles<float>(to);
}

// A task is a row and a head of queries. The heads of one head of keys are added up in their order: the result does not
// depend on the threads.
inline void backward(const Problem& p) {
  const int64_t heads = p.batch * p.heads, size = p.length * p.dim, group = p.group();
  std::vector<float> keys(group > 1 ? heads * size : 0), values(keys.size());
  float *dkey = group > 1 ? keys.data() : p.dkey, *dvalue = group > 1 ? values.data() : p.dvalue;
  const auto one = SIMD_CHOOSE(head_gradient);
  in_parallel(heads, 1, heads * p.length * size, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) one(p, i / p.heads, i % p.heads, dkey + i * size, dvalue + i * size);
  });
  if (group == 1) return;
  in_parallel(p.batch * p.kv_heads, 1, heads * size, [&](int64_t i, int64_t end) {
    for (; i < end; ++i)
      for (auto [from, to] : {std::pair(dkey + i * group * size, p.dkey + i * size),
                              std::pair(dvalue + i * group * size, p.dvalue + i * size)}) {
        std::copy(from, from + size, to);
        for (int64_t g = 1; g < group; ++g)
          for (int64_t j = 0; j < size; ++j) to[j] += from[g * size + j];
      }
  });
}

}  // namespace causal_attention

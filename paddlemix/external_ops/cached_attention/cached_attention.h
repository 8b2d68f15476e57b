// Licensed under the Apache License, Version 2.0; see LICENSE.
// Attention of few new tokens over the cache, on a CPU; free of Paddle. Softmax goes along with the keys (Milakov and
// Gimelshein, arXiv 1805.02867), so that keys and values pass by once.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace cached_attention {

constexpr int BLOCK = 64;          // keys a time
constexpr int LEAST_PIECE = 256;   // keys: fewer are not worth a thread of their own
constexpr float HIDDEN = -1e30f;   // a score; finite, so that a query that sees nothing makes no NaN

struct Problem {
  const float* query;  // [batch, news, heads, dim]
  const void* key;     // [batch, kv_heads, room, dim] of T
  const void* value;
  const bool* allowed;  // null or [batch, length]
  float* out;           // [batch, news, heads, dim]
  int64_t batch, news, heads, kv_heads, dim, length, room;

  int64_t group() const { return heads / kv_heads; }
};

// What the queries of one key head know of the keys so far.
struct State {
  int64_t width;  // dim, up to whole tiles
  std::vector<float> largest, total, sums;

  State(int64_t queries, int64_t width) : width(width), largest(queries, HIDDEN), total(queries), sums(queries * width) {}
};

}  // namespace cached_attention

#define SIMD_KERNELS "cached_attention/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace cached_attention {

template <class T>
void attention(const Problem& p) {
  const auto attend = SIMD_CHOOSE(attend<T>);
  const int64_t width = SIMD_CHOOSE(padded)(p.dim), heads = p.batch * p.kv_heads, queries = p.group() * p.news;
  const int64_t wanted = (2 * omp_get_max_threads() + heads - 1) / heads;
  const int64_t pieces = std::clamp<int64_t>(wanted, 1, (p.length + LEAST_PIECE - 1) / LEAST_PIECE);
  const int64_t piece = ((p.length + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK;
  std::vector<State> states(heads * pieces, State(queries, width));
  in_parallel(heads * pieces, 1, heads * queries * p.length * p.dim, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = i / pieces, begin = i % pieces * piece;
      if (begin < p.length)
        attend(p, head / p.kv_heads, head % p.kv_heads, begin, std::min(begin + piece, p.length), states[i]);
    }
  });
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t q = 0; q < queries; ++q) {
      const State* state = &states[head * pieces];
      float largest = HIDDEN, total = 0;
      for (int64_t i = 0; i < pieces; ++i) largest = std::max(largest, state[i].largest[q]);
      const int64_t row = head / p.kv_heads * p.news + q % p.news;
      float* out = p.out + (row * p.heads + head % p.kv_heads * p.group() + q / p.news) * p.dim;
      std::fill(out, out + p.dim, 0.0f);
      for (int64_t i = 0; i < pieces; ++i) {
        const float share = simd::exponential(state[i].largest[q] - largest);
        total += share * state[i].total[q];
        for (int64_t j = 0; j < p.dim; ++j) out[j] += share * state[i].sums[q * width + j];
      }
      for (int64_t j = 0; j < p.dim; ++j) out[j] /= total;
    }
}

}  // namespace cached_attention

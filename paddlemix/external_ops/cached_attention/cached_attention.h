// Licensed under the Apache License, Version 2.0; see LICENSE.
// Attention of few new tokens over the cache, on a CPU; free of Paddle. Softmax goes along with the keys (Milakov and
// Gimelshein, arXiv 1805.02867), so that keys and values pass by once.
//
// The result of a query is a function of itself and of the keys that it sees: blocks and pieces of keys begin at fixed
// places, pieces are merged in their order, and what a query does not see is left out of its sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "../simd.h"

namespace cached_attention {

constexpr int BLOCK = 64;   // keys a time
constexpr int PIECE = 512;  // keys of one thread's task, whole blocks
constexpr int MOST_NEW = 64;       // tokens of a row; of more the queries are divided among threads, not the keys
constexpr int TASK_QUERIES = 256;  // of one thread's task

struct Problem {
  const float* query;      // [batch, news, heads, dim]
  const void* key;         // [slots, kv_heads, capacity, dim] of T
  const void* value;
  const int64_t* lengths;  // [batch]: tokens of each row, the new ones with them
  const int64_t* slots;    // [batch]: where in the cache each row is
  const bool* allowed;     // null or [batch, longest]
  float* out;              // [batch, news, heads, dim]
  int64_t batch, news, heads, kv_heads, dim, longest, capacity;
  // Of tiles, for training:
  float* logs = nullptr;  // null or [batch, heads, news]: the logarithm of the sum of exp(score)
  float dropout = 0;      // of weights
  uint64_t seed = 0;

  int64_t group() const { return heads / kv_heads; }
  int64_t queries() const { return news * group(); }  // of a key head: those of a token one after the other
  // Where a query of a key head and a row lies in `query` and `out`.
  int64_t at(int64_t row, int64_t head, int64_t q) const {
    return ((row * news + q / group()) * heads + head * group() + q % group()) * dim;
  }
  // The first key or value of a row and a key head.
  int64_t kept(int64_t row, int64_t head) const { return (slots[row] * kv_heads + head) * capacity * dim; }
};

// Keys from `begin` to `end` for the queries of one row and key head, and what these know then.
struct Piece {
  int64_t row, head, begin, end;
  float *largest, *total;  // [queries]; total 0: nothing was seen
  float* sums;             // [queries, width]
};

// The mean of all values of a row: of a query that sees none.
template <class T>
void mean(const Problem& p, int64_t row, int64_t head, float* out) {
  const T* values = (const T*)p.value + p.kept(row, head);
  std::fill(out, out + p.dim, 0.0f);
  for (int64_t i = 0; i < p.lengths[row]; ++i)
    for (int64_t j = 0; j < p.dim; ++j) out[j] += simd::widen(values[i * p.dim + j]);
  for (int64_t j = 0; j < p.dim; ++j) out[j] /= p.lengths[row];
}

}  // namespace cached_attention

#define SIMD_KERNELS "cached_attention/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS
#define SIMD_KERNELS "cached_attention/tiles.h"
#include "../simd_each.h"
#undef SIMD_KERNELS
#if defined(__x86_64__)
namespace cached_attention::bfloat {  // queries and weights are rounded to what the cache holds
using namespace simd::bfloat;
using avx512::hide, avx512::keep, avx512::weigh;
}  // namespace cached_attention::bfloat
#define SIMD bfloat
#define SIMD_TARGET SIMD_BFLOAT
#include "tiles.h"
#undef SIMD
#undef SIMD_TARGET
#endif

namespace cached_attention {

// The queries of a row and key head, of their `count` pieces.
template <class T>
void merge(const Problem& p, const Piece* pieces, int64_t count, int64_t width) {
  const int64_t row = pieces->row, head = pieces->head;
  for (int64_t q = 0; q < p.queries(); ++q) {
    float largest = -INFINITY, total = 0;
    float* out = p.out + p.at(row, head, q);
    std::fill(out, out + p.dim, 0.0f);
    for (int64_t i = 0; i < count; ++i)
      if (pieces[i].total[q] != 0) largest = std::max(largest, pieces[i].largest[q]);
    for (int64_t i = 0; i < count; ++i) {
      if (pieces[i].total[q] == 0) continue;
      const float share = simd::exponential(pieces[i].largest[q] - largest);
      total += share * pieces[i].total[q];
      for (int64_t j = 0; j < p.dim; ++j) out[j] += share * pieces[i].sums[q * width + j];
    }
    if (total == 0)
      mean<T>(p, row, head, out);
    else
      for (int64_t j = 0; j < p.dim; ++j) out[j] /= total;
  }
}

// New tokens by tiles, however few there are.
template <class T>
void attend_by_tiles(const Problem& p) {
  SIMD_CHOOSE(attend_many<T>)(p);
}

template <class T>
void attention(const Problem& p) {
#if defined(__x86_64__)
  if constexpr (std::is_same<T, simd::bfloat16>::value)
    if (p.news > MOST_NEW && simd::has_bfloat16()) return bfloat::attend_many<T>(p);
#endif
  if (p.news > MOST_NEW) return attend_by_tiles<T>(p);
  const auto attend = SIMD_CHOOSE(attend<T>);
  const int64_t width = SIMD_CHOOSE(padded)(p.dim), queries = p.queries();
  std::vector<Piece> pieces;
  std::vector<int64_t> first;  // piece of each row and key head
  int64_t keys = 0;
  for (int64_t row = 0; row < p.batch; ++row)
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      first.push_back(pieces.size());
      keys += p.lengths[row];
      for (int64_t begin = 0; begin < p.lengths[row]; begin += PIECE)
        pieces.push_back({row, head, begin, std::min(begin + PIECE, p.lengths[row]), nullptr, nullptr, nullptr});
    }
  first.push_back(pieces.size());
  const int64_t count = pieces.size();
  std::vector<float> known(count * queries * (width + 2));
  for (int64_t i = 0; i < count; ++i) {
    pieces[i].sums = &known[i * queries * width];
    pieces[i].largest = &known[(count * width + 2 * i) * queries];
    pieces[i].total = pieces[i].largest + queries;
  }
  in_parallel(count, 1, keys * queries * p.dim, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) attend(p, pieces[begin], width);
  });
  in_parallel(first.size() - 1, 1, 4 * count * queries * p.dim, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) merge<T>(p, &pieces[first[begin]], first[begin + 1] - first[begin], width);
  });
}

// In cached_attention.cc, once for all that use them.
extern template void attend_by_tiles<float>(const Problem&);
extern template void attention<float>(const Problem&);
extern template void attention<simd::bfloat16>(const Problem&);
extern template void attention<simd::float16>(const Problem&);

}  // namespace cached_attention

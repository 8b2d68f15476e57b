// Licensed under the Apache License, Version 2.0; see LICENSE.
// A decoder layer for few new tokens of each row over the cache with CUDA, in eight launches; free of Paddle.
//
//   normed = rms_norm(x)                                    a block for each token
//   q, k, v = linear(normed)                                one launch: a block takes outputs of one of them
//   partial = attention over SLICE keys                     a block for each row, key head, slice and QUERIES queries
//   attended = partial, merged                              a block for each token and head
//   middle = x + linear(attended)
//   normed = rms_norm(middle)
//   inner = silu(gate) * up, gate, up = linear(normed)      one launch: a warp takes the same outputs of both
//   y = middle + linear(inner)
//
// What is kept between launches is of 16 bits, sums are of float32. How many tokens a row has is read on the device, so
// that a CUDA graph of a step stands for those at other positions: the grid covers the capacity of the cache, and
// blocks behind a row's end leave at once.
#pragma once

#include "../few_rows_linear/few_rows_linear.cuh"
#include "../fused_ln/norm.cuh"
#include "decoder_step_cuda.h"

namespace decoder_step_cuda {

using namespace tensor_cores;
using few_rows_linear_cuda::read;
using Step = Emu3DecoderStep;

constexpr int WARP = 32, WARPS = 4, THREADS = WARP * WARPS;
constexpr int SLICE = 256;                // keys of a block
constexpr int KEYS = 16, QUERIES = 16;    // of a warp at a time
constexpr int MOST_TOKENS = 64, MOST_DIM = 256;
constexpr float NOTHING = -1e30f;         // less than any score

struct Attention {
  const void *q, *k, *v;       // [batch, news, heads or kv_heads, dim], not rotated
  const float *cosine, *sine;  // [angles, news, dim]
  void *key, *value;           // [slots, kv_heads, capacity, dim]
  const int64_t *lengths, *row_slots;
  float* sums;   // [batch, kv_heads, slices, queries, dim]
  float* known;  // [batch, kv_heads, slices, queries, 2]: the largest score, in base 2, and the sum of the weights
  void* out;     // [batch, news, heads, dim]
  int64_t batch, news, heads, kv_heads, dim, angles, slots, capacity;

  __host__ __device__ int group() const { return heads / kv_heads; }
  __host__ __device__ int queries() const { return news * group(); }  // of a key head: those of a token in a row
  __host__ __device__ int tiles() const { return (queries() + QUERIES - 1) / QUERIES; }
  __host__ __device__ int slices() const { return (capacity + SLICE - 1) / SLICE; }
  __device__ int64_t length(int64_t row) const { return min(lengths[row], capacity); }
  // The keys that a query sees are before this one.
  __device__ int64_t end(int64_t row, int query) const { return length(row) - news + query / group() + 1; }
};

// Numbers i and i + dim / 2 of a query or key, turned by the angle of its token. Cosines are doubled, [cos, cos], sines
// are [-sin, sin].
template <class T>
__device__ inline void rotate(const Attention& a, const T* from, int64_t row, int64_t token, int i, T* to) {
  const int other = i + a.dim / 2;
  const int64_t angle = ((a.angles == 1 ? 0 : row * a.news) + token) * a.dim;
  const float x = widen(from[i]), y = widen(from[other]);
  to[i] = narrow(x * a.cosine[angle + i] + y * a.sine[angle + i], T());
  to[other] = narrow(y * a.cosine[angle + other] + x * a.sine[angle + other], T());
}

// DIM: 64, 128 or 256, a.dim or more. The products are those of tensor_cores.cuh: queries times keys gives scores,
// whose layout is that of the factor of the values. A lane reads 16 bytes of a key or value at a time: which of its
// numbers meet in a product does not matter as long as both factors agree.
template <class T, int DIM>
__global__ void __launch_bounds__(THREADS, 2) attend_kernel(Attention a) {
  alignas(16) __shared__ T query[QUERIES][DIM + 8];
  __shared__ float merged[QUERIES][DIM + 1], largest_of[WARPS][QUERIES], totals[QUERIES];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, place = lane / 4, pair = lane % 4;
  const int dim = a.dim, half = dim / 2, group = a.group();
  const int slice = blockIdx.x / a.tiles(), first_query = blockIdx.x % a.tiles() * QUERIES;
  const int count = min(QUERIES, a.queries() - first_query);
  const int64_t row = blockIdx.y / a.kv_heads, head = blockIdx.y % a.kv_heads;
  const int64_t slot = a.row_slots ? a.row_slots[row] : row;
  const int64_t begin = int64_t(slice) * SLICE;
  const int64_t end = min(begin + SLICE, a.end(row, first_query + count - 1));  // of the keys that a query here sees
  if (begin >= end || slot < 0 || slot >= a.slots) return;
  T* const keys = static_cast<T*>(a.key) + (slot * a.kv_heads + head) * a.capacity * dim;
  T* const values = static_cast<T*>(a.value) + (slot * a.kv_heads + head) * a.capacity * dim;

  for (int i = threadIdx.x; i < QUERIES * half; i += THREADS) {
    const int q = i / half;
    if (q >= count) {
      query[q][i % half] = query[q][i % half + half] = narrow(0.f, T());
      continue;
    }
    const int64_t token = (first_query + q) / group, of_token = (first_query + q) % group;
    const T* from = static_cast<const T*>(a.q) + ((row * a.news + token) * a.heads + head * group + of_token) * dim;
    rotate(a, from, row, token, i % half, query[q]);
  }
  // New keys of this slice. Where there are several blocks of queries, all of them write the same.
  const int64_t before = a.length(row) - a.news;
  for (int64_t at = max(begin, before); at < end; ++at) {
    const int64_t token = at - before, from = ((row * a.news + token) * a.kv_heads + head) * dim;
    for (int i = threadIdx.x; i < half; i += THREADS)
      rotate(a, static_cast<const T*>(a.k) + from, row, token, i, keys + at * dim);
    for (int i = threadIdx.x; i < dim; i += THREADS) values[at * dim + i] = static_cast<const T*>(a.v)[from + i];
  }
  __syncthreads();

  // A lane has sums [c][j][i] of queries place + 8 * (i / 2) and of numbers 64 * c + 8 * (2 * pair + i % 2) + j of a
  // value.
  float sum[DIM / 64][8][4] = {}, largest[2] = {NOTHING, NOTHING}, total[2] = {};
  const float scale = 1.44269504f / sqrtf(dim);  // to base 2
  const int64_t ends[2] = {a.end(row, first_query + place), a.end(row, first_query + place + 8)};
  // Of values 2 * pair, 2 * pair + 1, 2 * pair + 8 and 2 * pair + 9 the eight numbers from 64 * c + 8 * place on.
  const auto read_values = [&](int64_t first, int c, uint4 to[4]) {
    const int at = c * 64 + place * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t key = first + 2 * pair + i / 2 * 8 + i % 2;
      to[i] = read(values + key * dim + at, at < dim && key < end);
    }
  };
  for (int64_t first = begin + warp * KEYS; first < end; first += WARPS * KEYS) {
    constexpr bool EARLY = DIM <= 128;  // values are asked for before the scores are known, where registers allow it
    uint4 ahead[EARLY ? DIM / 64 : 1][4];
#pragma unroll
    for (int c = 0; EARLY && c < DIM / 64; ++c) read_values(first, c, ahead[EARLY ? c : 0]);
    float score[2][4] = {};  // of keys 8 * t + 2 * pair + i % 2: [t][i]
#pragma unroll 4
    for (int c = 0; c < DIM / 32; ++c) {
      const int at = c * 32 + pair * 8;
      const uint4 q = read(&query[place][at], at < dim), more = read(&query[place + 8][at], at < dim);
      const uint32_t early[4] = {q.x, more.x, q.y, more.y}, late[4] = {q.z, more.z, q.w, more.w};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int64_t key = first + t * 8 + place;
        const uint4 k = read(keys + key * dim + at, at < dim && key < end);
        const uint32_t k_early[2] = {k.x, k.y}, k_late[2] = {k.z, k.w};
        multiply(score[t], early, k_early, T());
        multiply(score[t], late, k_late, T());
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t seen = ends[r] - first - 2 * pair;
      float most = largest[r];
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = score[t][2 * r + i];
          x = t * 8 + i < seen ? x * scale : -INFINITY;
          most = fmaxf(most, x);
        }
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
      const float less = exp2f(largest[r] - most);
      largest[r] = most;
      total[r] *= less;
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = score[t][2 * r + i];
          x = exp2f(x - most);
          total[r] += x;
        }
#pragma unroll
      for (int c = 0; c < DIM / 64; ++c)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[c][j][2 * r] *= less, sum[c][j][2 * r + 1] *= less;
    }
    const uint32_t weights[4] = {both(score[0][0], score[0][1], T()), both(score[0][2], score[0][3], T()),
                                 both(score[1][0], score[1][1], T()), both(score[1][2], score[1][3], T())};
#pragma unroll
    for (int c = 0; c < DIM / 64; ++c) {
      uint32_t words[4][4];
      if (!EARLY) read_values(first, c, ahead[0]);
      memcpy(words, ahead[EARLY ? c : 0], sizeof words);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t which = j % 2 ? 0x7632 : 0x5410;
        const uint32_t v[2] = {__byte_perm(words[0][j / 2], words[1][j / 2], which),
                               __byte_perm(words[2][j / 2], words[3][j / 2], which)};
        multiply(sum[c][j], weights, v, T());
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
    if (pair == 0) largest_of[warp][place + 8 * r] = largest[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int q = place + 8 * r;
    float most = largest[r];
    for (int other = 0; other < WARPS; ++other) most = fmaxf(most, largest_of[other][q]);
    const float share = exp2f(largest[r] - most);
    largest[r] = most, total[r] *= share;
#pragma unroll
    for (int c = 0; c < DIM / 64; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[c][j][2 * r] *= share, sum[c][j][2 * r + 1] *= share;
  }
  for (int turn = 0; turn < WARPS; ++turn) {  // in one order
    if (warp == turn)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int q = place + 8 * r;
        if (pair == 0) totals[q] = turn ? totals[q] + total[r] : total[r];
#pragma unroll
        for (int c = 0; c < DIM / 64; ++c)
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& to = merged[q][c * 64 + (2 * pair + i) * 8 + j];
              to = turn ? to + sum[c][j][2 * r + i] : sum[c][j][2 * r + i];
            }
      }
    __syncthreads();
  }
  const int64_t part = (blockIdx.y * int64_t(a.slices()) + slice) * a.queries() + first_query;
  for (int i = threadIdx.x; i < count * dim; i += THREADS) a.sums[part * dim + i] = merged[i / dim][i % dim];
  if (warp == 0 && pair == 0)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (place + 8 * r < count) {
        float* to = a.known + (part + place + 8 * r) * 2;
        to[0] = largest[r], to[1] = totals[place + 8 * r];
      }
}

// A block has a thread for each number of a head.
template <class T>
__global__ void merge_kernel(Attention a) {
  const int64_t row = blockIdx.x / a.news, head = blockIdx.y;
  const int query = blockIdx.x % a.news * a.group() + head % a.group();
  const int64_t first = (row * a.kv_heads + head / a.group()) * a.slices() * a.queries() + query;
  const int slices = (a.end(row, query) + SLICE - 1) / SLICE;
  float largest = NOTHING, total = 0.f, sum = 0.f;
  for (int i = 0; i < slices; ++i) largest = fmaxf(largest, a.known[(first + i * a.queries()) * 2]);
  for (int i = 0; i < slices; ++i) {
    const int64_t part = first + i * a.queries();
    const float share = exp2f(a.known[part * 2] - largest);
    total += share * a.known[part * 2 + 1];
    sum += share * a.sums[part * a.dim + threadIdx.x];
  }
  static_cast<T*>(a.out)[(blockIdx.x * a.heads + head) * a.dim + threadIdx.x] = narrow(sum / total, T());
}

template <class T>
cudaError_t attend(const Attention& a, cudaStream_t stream) {
  const dim3 blocks(a.slices() * a.tiles(), a.batch * a.kv_heads);
  if (a.dim <= 64)
    attend_kernel<T, 64><<<blocks, THREADS, 0, stream>>>(a);
  else if (a.dim <= 128)
    attend_kernel<T, 128><<<blocks, THREADS, 0, stream>>>(a);
  else
    attend_kernel<T, MOST_DIM><<<blocks, THREADS, 0, stream>>>(a);
  const dim3 tokens(a.batch * a.news, a.heads);
  merge_kernel<T><<<tokens, a.dim, 0, stream>>>(a);
  return cudaGetLastError();
}

inline bool is_size(const Step& s) {
  const auto is_between = [](int64_t least, int64_t x, int64_t most) { return least <= x && x <= most; };
  return is_between(1, s.batch, MOST_TOKENS) && is_between(1, s.news, MOST_TOKENS / s.batch) &&
         is_between(1, s.kv_heads, 512) && is_between(1, s.heads, 512) && s.heads % s.kv_heads == 0 &&
         is_between(16, s.dim, MOST_DIM) && s.dim % 16 == 0 && is_between(16, s.hidden, 1 << 20) &&
         s.hidden % 16 == 0 && is_between(16, s.inner, 1 << 20) && s.inner % 16 == 0 &&
         is_between(1, s.slots, INT_MAX) && is_between(s.news, s.capacity, 1 << 22) &&
         (s.angles == 1 || s.angles == s.batch);
}

inline bool is_right(const Step& s) {
  const auto is_aligned = [](const void* pointer) {
    return pointer && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  for (const void* weight : s.weights)
    if (!is_aligned(weight)) return false;
  return is_size(s) && is_aligned(s.x) && is_aligned(s.key) && is_aligned(s.value) && is_aligned(s.y) &&
         is_aligned(s.workspace);
}

// Where in the workspace what is, in bytes.
struct Workspace {
  int64_t bytes = 0, normed, q, k, v, attended, middle, inner, rstd, sums, known;

  explicit Workspace(const Step& s) {
    const int64_t tokens = s.batch * s.news, slices = (s.capacity + SLICE - 1) / SLICE;
    const int64_t parts = tokens * s.heads * slices;
    const auto take = [&](int64_t size) {
      const int64_t at = bytes;
      bytes += (size + 15) / 16 * 16;
      return at;
    };
    normed = take(tokens * s.hidden * 2);
    q = take(tokens * s.heads * s.dim * 2);
    k = take(tokens * s.kv_heads * s.dim * 2);
    v = take(tokens * s.kv_heads * s.dim * 2);
    attended = take(tokens * s.heads * s.dim * 2);
    middle = take(tokens * s.hidden * 2);
    inner = take(tokens * s.inner * 2);
    rstd = take(tokens * 4);
    sums = take(parts * s.dim * 4);
    known = take(parts * 2 * 4);
  }
};

template <class T, int BITS>
cudaError_t run(const Step& s, cudaStream_t stream) {
  const Workspace places(s);
  const auto at = [&](int64_t place) { return static_cast<char*>(s.workspace) + place; };
  void *const normed = at(places.normed), *const middle = at(places.middle), *const inner = at(places.inner);
  void *const q = at(places.q), *const k = at(places.k), *const v = at(places.v), *const attended = at(places.attended);
  const int64_t tokens = s.batch * s.news, queries = s.heads * s.dim, keys = s.kv_heads * s.dim;
  const auto norm = [&](const void* x, const void* scale) {
    return norm_cuda::forward<T, T>(static_cast<const T*>(x), static_cast<const T*>(scale), nullptr,
                                    static_cast<T*>(normed), nullptr, reinterpret_cast<float*>(at(places.rstd)), tokens,
                                    s.hidden, s.epsilon, stream);
  };
  const auto matrix = [&](int i, void* y, int64_t out) {
    return few_rows_linear_cuda::Matrix{s.weights[i], s.scales[i], y, out};
  };
  const auto linear = [&](const few_rows_linear_cuda::Problem& p) {
    return few_rows_linear_cuda::few_rows<T, BITS>(p, stream);
  };
  const Attention attention{q, k, v, s.cosine, s.sine, s.key, s.value, s.lengths, s.row_slots,
                            reinterpret_cast<float*>(at(places.sums)), reinterpret_cast<float*>(at(places.known)),
                            attended, s.batch, s.news, s.heads, s.kv_heads, s.dim, s.angles, s.slots, s.capacity};
  cudaError_t error = norm(s.x, s.input_norm);
  if (!error)
    error = linear({normed, {matrix(0, q, queries), matrix(1, k, keys), matrix(2, v, keys)}, nullptr, false, tokens,
                    s.hidden});
  if (!error) error = attend<T>(attention, stream);
  if (!error) error = linear({attended, {matrix(3, middle, s.hidden)}, s.x, false, tokens, queries});
  if (!error) error = norm(middle, s.post_norm);
  if (!error)
    error = linear({normed, {matrix(4, inner, s.inner), matrix(5, nullptr, s.inner)}, nullptr, true, tokens, s.hidden});
  if (!error) error = linear({inner, {matrix(6, s.y, s.hidden)}, middle, false, tokens, s.inner});
  return error;
}

}  // namespace decoder_step_cuda

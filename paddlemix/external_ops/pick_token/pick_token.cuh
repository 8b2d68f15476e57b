// Licensed under the Apache License, Version 2.0; see LICENSE.
// A token from logits with CUDA: guidance, temperature, top-k and Gumbel noise in one launch; free of Paddle.
//
//   for each position, of its logits [rows][tokens]:
//     value[t] = logits[0][t], of two rows logits[1][t] + guidance_scale * (logits[0][t] - logits[1][t])
//     least = the top_k-th largest value / temperature
//     id = offset + the first t of the largest (value[t] / temperature + noise[t]) of all not below least
//
// Every operation is rounded to float32 by itself, as a chain of operators rounds. A block takes a position. It finds the
// top_k-th largest value digit by digit: values are counted by their highest 8 bits, those with the bits that the one
// looked for must have by the next 8, and so on: whole numbers, so the same each time. Values are made again for each
// digit: logits come from the card's cache, which is faster than to keep what was made of them.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace pick_token_cuda {

constexpr int THREADS = 1024;
constexpr int AHEAD = 4;  // values that a thread reads at a time
constexpr int BITS = 8, BINS = 1 << BITS;

struct Problem {
  const float* logits;  // [rows, positions, tokens]
  const float* noise;   // [positions, tokens]; null: the largest value is taken, and top_k and temperature do not matter
  int64_t* ids;         // [positions]
  int64_t rows;         // 1, or 2 with guidance
  int64_t positions, tokens;
  int64_t top_k;  // 0: all
  float guidance_scale, temperature;
  int64_t offset;
};

// f(t, value[t]) of all tokens of the block's position, for each thread in rising order.
template <class F>
__device__ inline void for_each_value(const Problem& p, F f) {
  const float* row = p.logits + blockIdx.x * p.tokens;
  const float* second = row + p.positions * p.tokens;
  const int tokens = int(p.tokens);
  for (int first = threadIdx.x; first < tokens; first += AHEAD * THREADS) {
    float values[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int t = first + i * THREADS;
      values[i] = t < tokens ? row[t] : 0.f;
      if (p.rows == 2 && t < tokens) {
        const float without = second[t];
        values[i] = without + __fmul_rn(p.guidance_scale, values[i] - without);
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (first + i * THREADS < tokens) f(first + i * THREADS, values[i]);
  }
}

// A whole number that is the larger the larger x is, and back.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float number(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

// The k-th largest value, 1 <= k <= tokens, in every thread.
__device__ inline float kth_largest(const Problem& p, int k) {
  __shared__ int counts[BINS];
  __shared__ int chosen, above_chosen;
  uint32_t prefix = 0;  // its highest bits
  for (int shift = 32 - BITS; shift >= 0; shift -= BITS) {
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) counts[bin] = 0;
    __syncthreads();
    for_each_value(p, [&](int, float value) {
      const uint64_t bits = ordered(value);  // 64 bits, since all 32 are shifted out of the first digit's
      if (bits >> (shift + BITS) == prefix) atomicAdd(&counts[bits >> shift & (BINS - 1)], 1);
    });
    __syncthreads();
    for (int step = 1; step < BINS; step *= 2) {  // counts of bins become those of them and all above
      const int more = threadIdx.x + step < BINS ? counts[threadIdx.x + step] : 0;
      __syncthreads();
      if (threadIdx.x < BINS) counts[threadIdx.x] += more;
      __syncthreads();
    }
    if (threadIdx.x < BINS) {
      const int above = threadIdx.x + 1 < BINS ? counts[threadIdx.x + 1] : 0;
      if (above < k && k <= counts[threadIdx.x]) {
        chosen = threadIdx.x;
        above_chosen = above;
      }
    }
    __syncthreads();
    prefix = prefix << BITS | chosen;
    k -= above_chosen;
  }
  return number(prefix);
}

__global__ void __launch_bounds__(THREADS) pick_kernel(Problem p) {
  __shared__ float bests[THREADS];
  __shared__ int places[THREADS];
  const float* noise = p.noise ? p.noise + blockIdx.x * p.tokens : nullptr;
  const bool hides = noise && p.top_k > 0 && p.top_k < p.tokens;
  const float least = hides ? kth_largest(p, int(p.top_k)) / p.temperature : -INFINITY;
  float best = -INFINITY;
  int place = 0;
  for_each_value(p, [&](int t, float value) {
    if (noise) {
      value = value / p.temperature;
      if (value < least) return;
      value += noise[t];
    }
    if (value > best) {
      best = value;
      place = t;
    }
  });
  bests[threadIdx.x] = best;
  places[threadIdx.x] = place;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    const float other = bests[threadIdx.x + half];
    const int its = places[threadIdx.x + half];
    if (other > bests[threadIdx.x] || (other == bests[threadIdx.x] && its < places[threadIdx.x])) {
      bests[threadIdx.x] = other;
      places[threadIdx.x] = its;
    }
  }
  if (threadIdx.x == 0) p.ids[blockIdx.x] = p.offset + places[0];
}

inline cudaError_t pick(const Problem& p, cudaStream_t stream) {
  if (p.rows < 1 || p.rows > 2 || p.positions < 0 || p.positions > INT_MAX || p.tokens < 1 ||
      p.tokens > INT_MAX - AHEAD * THREADS || p.top_k < 0 || !(p.temperature > 0))
    return cudaErrorInvalidValue;
  if (p.positions == 0) return cudaSuccess;
  pick_kernel<<<unsigned(p.positions), THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pick_token_cuda

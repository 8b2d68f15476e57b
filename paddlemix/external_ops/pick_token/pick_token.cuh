// Licensed under the Apache License, Version 2.0; see LICENSE.
// A token from logits with CUDA: guidance, temperature, top-k, top-p and Gumbel noise in one launch; free of Paddle.
//
//   for each position, of its logits [rows][tokens]:
//     value[t] = logits[0][t], of two rows logits[1][t] + guidance_scale * (logits[0][t] - logits[1][t])
//     scaled[t] = value[t] / temperature
//     least = the top_k-th largest scaled
//     least = the largest x for which exp(scaled[t]) of all scaled[t] >= x is top_p or more of that of all >= least
//     id = offset + the first t of the largest (scaled[t] + noise[t]) of all not below least
//
// Every operation is rounded to float32 by itself, as a chain of operators rounds. A block takes a position. It finds
// the top_k-th largest value digit by digit: values are counted by their highest 8 bits, those with the bits that the
// one looked for must have by the next 8, and so on. Top-p goes bit by bit: exp(scaled) beside the largest, in units of
// 2^-44, is added up by thread. Both add whole numbers, so the result is the same each time. Values are made again each
// time: logits come from the card's cache, which is faster than to keep what was made of them.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace pick_token_cuda {

constexpr int THREADS = 1024;
constexpr int AHEAD = 4;  // values that a thread reads at a time
constexpr int BITS = 8, BINS = 1 << BITS;
constexpr int MOST_TOKENS = 1 << 19;  // with top-p: their weights of up to UNIT add up in 64 bits
constexpr float UNIT = float(1ull << 44);

struct Problem {
  const float* logits;  // [rows, positions, tokens]
  const float* noise;   // [positions, tokens]; null: the largest value is taken, and the settings do not matter
  int64_t* ids;         // [positions]
  int64_t rows;         // 1, or 2 with guidance
  int64_t positions, tokens;
  int64_t top_k;  // 0: all
  float guidance_scale, temperature, top_p;
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

// The sum of every thread's number, in every thread.
__device__ inline uint64_t summed(uint64_t number) {
  __shared__ uint64_t sums[THREADS];
  __syncthreads();  // the sum before was read
  sums[threadIdx.x] = number;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

// The least scaled value that top-p keeps of those not below `least`, in every thread.
__device__ inline float least_of_top_p(const Problem& p, float least) {
  const float largest = kth_largest(p, 1) / p.temperature;
  const auto weight_from = [&](uint32_t lowest) {
    uint64_t sum = 0;
    for_each_value(p, [&](int, float value) {
      value = value / p.temperature;
      if (value >= least && ordered(value) >= lowest)  // the largest may be infinite
        sum += uint64_t(value == largest ? UNIT : expf(value - largest) * UNIT);
    });
    return summed(sum);
  };
  const double wanted = ceil(double(p.top_p) * double(weight_from(0)));
  uint32_t found = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1)
    if (double(weight_from(found | bit)) >= wanted) found |= bit;
  return number(found);
}

__global__ void __launch_bounds__(THREADS, 1) pick_kernel(Problem p) {
  __shared__ float bests[THREADS];
  __shared__ int places[THREADS];
  const float* noise = p.noise ? p.noise + blockIdx.x * p.tokens : nullptr;
  const bool hides = noise && p.top_k > 0 && p.top_k < p.tokens;
  float least = hides ? kth_largest(p, int(p.top_k)) / p.temperature : -INFINITY;
  if (noise && p.top_p < 1) least = least_of_top_p(p, least);
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
      p.tokens > (p.top_p < 1 ? MOST_TOKENS : INT_MAX - AHEAD * THREADS) || p.top_k < 0 || !(p.temperature > 0) ||
      !(p.top_p > 0))
    return cudaErrorInvalidValue;
  if (p.positions == 0) return cudaSuccess;
  pick_kernel<<<unsigned(p.positions), THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pick_token_cuda

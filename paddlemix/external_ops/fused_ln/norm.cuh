// Licensed under the Apache License, Version 2.0; see LICENSE.
// RMS norm and layer norm over the last axis with CUDA, forward and backward; free of Paddle.
//
// A block of threads takes a row. Sums are of float, over differences from the mean, by a tree. The gradients of scale
// and bias are summed over a slice of the rows by each of PARTS rows of blocks, and those in turn by a second kernel:
// no atomics, so the same numbers every time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace norm_cuda {

constexpr int WARP = 32;
constexpr int MOST_THREADS = 1024;
constexpr int COLUMNS = 32, LANES = 16;  // of a block that sums columns

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// N values that lie together, so that a thread reads and writes 8 or 16 bytes a time.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T of[N];
};

// The sum over the block, in every thread. blockDim.x is a multiple of WARP.
__device__ inline float block_sum(float x) {
  __shared__ float warps[WARP];
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  __syncthreads();  // whoever still reads an earlier sum is done with it
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
  __syncthreads();
  x = threadIdx.x % WARP < blockDim.x / WARP ? warps[threadIdx.x % WARP] : 0.f;
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

// bias null where there is none; mean null for RMS norm.
template <class X, class W, int N>
__global__ void __launch_bounds__(MOST_THREADS)
    forward_kernel(const X* x, const W* scale, const W* bias, W* y, float* mean, float* rstd, int cols,
                   float epsilon) {
  const int64_t row = blockIdx.x;
  const auto* from = reinterpret_cast<const Pack<X, N>*>(x + row * cols);
  float average = 0.f;
  if (mean) {
    for (int i = threadIdx.x; i < cols / N; i += blockDim.x) {
      const Pack<X, N> values = from[i];
#pragma unroll
      for (int k = 0; k < N; ++k) average += widen(values.of[k]);
    }
    average = block_sum(average) / cols;
  }
  float squares = 0.f;
  for (int i = threadIdx.x; i < cols / N; i += blockDim.x) {
    const Pack<X, N> values = from[i];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float centred = widen(values.of[k]) - average;
      squares += centred * centred;
    }
  }
  const float size = 1.f / sqrtf(block_sum(squares) / cols + epsilon);
  if (threadIdx.x == 0) {
    rstd[row] = size;
    if (mean) mean[row] = average;
  }
  auto* to = reinterpret_cast<Pack<W, N>*>(y + row * cols);
  for (int i = threadIdx.x; i < cols / N; i += blockDim.x) {
    const Pack<X, N> values = from[i];  // from the cache
    const Pack<W, N> factors = reinterpret_cast<const Pack<W, N>*>(scale)[i];
    Pack<W, N> shifts, out;
    if (bias) shifts = reinterpret_cast<const Pack<W, N>*>(bias)[i];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float value = (widen(values.of[k]) - average) * size * widen(factors.of[k]);
      narrow(bias ? value + widen(shifts.of[k]) : value, out.of + k);
    }
    to[i] = out;
  }
}

// With n = (x - mean) * rstd and g = dy * scale: dx = (g - mean(g) - n * mean(g * n)) * rstd, and mean(g) is left
// out of RMS norm.
template <class X, class W, int N>
__global__ void __launch_bounds__(MOST_THREADS)
    row_gradient_kernel(const X* x, const W* scale, const float* mean, const float* rstd, const W* dy, X* dx,
                        int cols) {
  const int64_t row = blockIdx.x;
  const auto* from = reinterpret_cast<const Pack<X, N>*>(x + row * cols);
  const auto* above = reinterpret_cast<const Pack<W, N>*>(dy + row * cols);
  const auto* factors = reinterpret_cast<const Pack<W, N>*>(scale);
  const float average = mean ? mean[row] : 0.f, size = rstd[row];
  float sum = 0.f, product = 0.f;
  for (int i = threadIdx.x; i < cols / N; i += blockDim.x) {
    const Pack<X, N> values = from[i];
    const Pack<W, N> gradients = above[i], factor = factors[i];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float g = widen(gradients.of[k]) * widen(factor.of[k]);
      sum += g;
      product += g * ((widen(values.of[k]) - average) * size);
    }
  }
  const float slope = block_sum(product) / cols;
  const float shift = mean ? block_sum(sum) / cols : 0.f;
  auto* to = reinterpret_cast<Pack<X, N>*>(dx + row * cols);
  for (int i = threadIdx.x; i < cols / N; i += blockDim.x) {
    const Pack<X, N> values = from[i];
    const Pack<W, N> gradients = above[i], factor = factors[i];
    Pack<X, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float g = widen(gradients.of[k]) * widen(factor.of[k]);
      narrow((g - shift - (widen(values.of[k]) - average) * size * slope) * size, out.of + k);
    }
    to[i] = out;
  }
}

// Sums `value(row, column)` over LANES rows a time, for the block's COLUMNS columns; true in the threads that hold
// a sum.
template <class Value>
__device__ bool column_sums(int64_t begin, int64_t end, int column, bool inside, Value value, float* scale,
                            float* bias) {
  __shared__ float sums[2][LANES][COLUMNS];
  float a = 0.f, b = 0.f;
  if (inside)
    for (int64_t row = begin + threadIdx.y; row < end; row += LANES) value(row, column, a, b);
  sums[0][threadIdx.y][threadIdx.x] = a;
  sums[1][threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  if (threadIdx.y || !inside) return false;
  for (int lane = 1; lane < LANES; ++lane) {
    a += sums[0][lane][threadIdx.x];
    b += sums[1][lane][threadIdx.x];
  }
  *scale = a;
  *bias = b;
  return true;
}

// partial: float [2, gridDim.y, cols], of scale and of bias
template <class X, class W>
__global__ void column_gradient_kernel(const X* x, const float* mean, const float* rstd, const W* dy, float* partial,
                                       int64_t rows, int cols) {
  const int column = blockIdx.x * COLUMNS + threadIdx.x;
  const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  float scale, bias;
  const auto value = [=](int64_t row, int c, float& a, float& b) {
    const float gradient = widen(dy[row * cols + c]);
    a += gradient * ((widen(x[row * cols + c]) - (mean ? mean[row] : 0.f)) * rstd[row]);
    b += gradient;
  };
  if (column_sums(begin, end, column, column < cols, value, &scale, &bias)) {
    partial[int64_t(blockIdx.y) * cols + column] = scale;
    partial[int64_t(gridDim.y + blockIdx.y) * cols + column] = bias;
  }
}

template <class W>
__global__ void add_partial_kernel(const float* partial, W* dscale, W* dbias, int parts, int cols) {
  const int column = blockIdx.x * COLUMNS + threadIdx.x;
  float scale, bias;
  const auto value = [=](int64_t part, int c, float& a, float& b) {
    a += partial[part * cols + c];
    b += partial[(parts + part) * cols + c];
  };
  if (column_sums(0, parts, column, column < cols, value, &scale, &bias)) {
    narrow(scale, dscale + column);
    if (dbias) narrow(bias, dbias + column);
  }
}

inline int threads_for(int64_t packs) {
  int threads = WARP;
  while (threads < packs && threads < MOST_THREADS) threads *= 2;
  return threads;
}

// A grid has at most 2^31 - 1 blocks, one a row; the kernels count columns in int, and step past the last by a block.
inline bool fits(int64_t rows, int64_t cols) { return rows <= INT_MAX && cols <= INT_MAX - MOST_THREADS; }

// 1, or 4 where every pointer and row allows to read four values a time.
template <class... T>
int values_a_time(int64_t cols, const T*... pointers) {
  const bool aligned = (... && (reinterpret_cast<uintptr_t>(pointers) % (4 * sizeof(T)) == 0));
  return cols % 4 == 0 && aligned ? 4 : 1;
}

// x [rows, cols], scale and bias [cols] (bias null: none), y [rows, cols]; mean (null: RMS norm) and rstd [rows].
// All on the device and contiguous.
template <class X, class W>
cudaError_t forward(const X* x, const W* scale, const W* bias, W* y, float* mean, float* rstd, int64_t rows,
                    int64_t cols, float epsilon, cudaStream_t stream) {
  if (!fits(rows, cols)) return cudaErrorInvalidValue;
  if (rows == 0 || cols == 0) return cudaSuccess;
  if (values_a_time(cols, x, scale, bias, y) == 4)
    forward_kernel<X, W, 4>
        <<<rows, threads_for(cols / 4), 0, stream>>>(x, scale, bias, y, mean, rstd, cols, epsilon);
  else
    forward_kernel<X, W, 1><<<rows, threads_for(cols), 0, stream>>>(x, scale, bias, y, mean, rstd, cols, epsilon);
  return cudaGetLastError();
}

// Slices of the rows whose column sums are kept apart; `backward` needs float [2, parts(rows), cols] of workspace.
inline int parts(int64_t rows) { return rows < 64 ? 1 : rows < 8192 ? int(rows / 64) : 128; }

// dbias null where there is none.
template <class X, class W>
cudaError_t backward(const X* x, const W* scale, const float* mean, const float* rstd, const W* dy, X* dx, W* dscale,
                     W* dbias, float* workspace, int64_t rows, int64_t cols, cudaStream_t stream) {
  if (!fits(rows, cols)) return cudaErrorInvalidValue;
  if (cols == 0) return cudaSuccess;
  if (rows && values_a_time(cols, x, scale, dy, dx) == 4)
    row_gradient_kernel<X, W, 4>
        <<<rows, threads_for(cols / 4), 0, stream>>>(x, scale, mean, rstd, dy, dx, cols);
  else if (rows)
    row_gradient_kernel<X, W, 1><<<rows, threads_for(cols), 0, stream>>>(x, scale, mean, rstd, dy, dx, cols);
  const dim3 threads(COLUMNS, LANES), blocks((cols + COLUMNS - 1) / COLUMNS, parts(rows));
  column_gradient_kernel<<<blocks, threads, 0, stream>>>(x, mean, rstd, dy, workspace, rows, cols);
  add_partial_kernel<<<blocks.x, threads, 0, stream>>>(workspace, dscale, dbias, parts(rows), cols);
  return cudaGetLastError();
}

}  // namespace norm_cuda

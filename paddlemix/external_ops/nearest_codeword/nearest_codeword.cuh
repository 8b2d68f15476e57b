// Licensed under the Apache License, Version 2.0; see LICENSE.
// The nearest codeword with CUDA, free of Paddle; without a [positions, codebook] matrix.
//
// A block takes POSITIONS positions; its SLICES x POSITIONS threads search slices of the codebook, tiles of which pass
// through shared memory, and the least distance of a position's threads wins.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace nearest_codeword_cuda {

constexpr int POSITIONS = 32, SLICES = 8;
constexpr int TILE = 256;     // codewords
constexpr int MOST_DIM = 32;  // of a latent: it is held in registers

// latents [positions, dim], codebook [dim, size], squares of their lengths [positions] and [size]; codes [positions].
// distance = (latent_square + codeword_square) - 2 * product, in float32; of equal ones the first.
template <int DIM>
__global__ void __launch_bounds__(POSITIONS* SLICES)
    search_kernel(const float* latents, const float* latent_squares, const float* codebook,
                  const float* codeword_squares, int64_t* codes, int64_t positions, int dim, int size) {
  __shared__ float tile[DIM + 1][TILE];  // the codewords' squares last
  __shared__ float least[SLICES][POSITIONS];
  __shared__ int which[SLICES][POSITIONS];
  const int64_t position = int64_t(blockIdx.x) * POSITIONS + threadIdx.x;
  const bool inside = position < positions;
  const int thread = threadIdx.y * POSITIONS + threadIdx.x;
  float x[DIM];
#pragma unroll
  for (int d = 0; d < DIM; ++d) x[d] = inside && d < dim ? latents[position * dim + d] : 0.f;
  const float square = inside ? latent_squares[position] : 0.f;
  float best = INFINITY;
  int code = 0;
  for (int first = 0; first < size; first += TILE) {
    const int count = min(TILE, size - first);
    __syncthreads();  // nobody reads the last tile any more
    for (int i = thread; i < (DIM + 1) * TILE; i += POSITIONS * SLICES) {
      const int d = i / TILE, j = i % TILE;
      float value = 0.f;
      if (j < count && d < dim) value = codebook[int64_t(d) * size + first + j];
      if (j < count && d == DIM) value = codeword_squares[first + j];
      tile[d][j] = value;
    }
    __syncthreads();
    for (int j = threadIdx.y; j < count; j += SLICES) {  // a warp reads one codeword: no bank conflicts
      float product = 0.f;
#pragma unroll
      for (int d = 0; d < DIM; ++d) product = fmaf(x[d], tile[d][j], product);
      const float distance = (square + tile[DIM][j]) - 2.f * product;
      if (distance < best) {
        best = distance;
        code = first + j;
      }
    }
  }
  least[threadIdx.y][threadIdx.x] = best;
  which[threadIdx.y][threadIdx.x] = code;
  __syncthreads();
  if (threadIdx.y || !inside) return;
  for (int slice = 1; slice < SLICES; ++slice) {
    const float other = least[slice][threadIdx.x];
    const int its = which[slice][threadIdx.x];
    if (other < best || (other == best && its < code)) {
      best = other;
      code = its;
    }
  }
  codes[position] = code;
}

inline cudaError_t search(const float* latents, const float* latent_squares, const float* codebook,
                          const float* codeword_squares, int64_t* codes, int64_t positions, int64_t dim, int64_t size,
                          cudaStream_t stream) {
  if (dim > MOST_DIM || size > INT_MAX - TILE) return cudaErrorInvalidValue;
  if (positions == 0) return cudaSuccess;
  const auto kernel = dim <= 4 ? search_kernel<4> : dim <= 8 ? search_kernel<8> : search_kernel<MOST_DIM>;
  const dim3 threads(POSITIONS, SLICES);
  kernel<<<(positions + POSITIONS - 1) / POSITIONS, threads, 0, stream>>>(
      latents, latent_squares, codebook, codeword_squares, codes, positions, dim, size);
  return cudaGetLastError();
}

}  // namespace nearest_codeword_cuda

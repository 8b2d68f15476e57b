// Licensed under the Apache License, Version 2.0; see LICENSE.
// A linear layer over int8 or int4 weights with CUDA: 16-bit activations, sums of float32; free of Paddle.
//
//   y[row][o] = sum over groups of scale[o][group] * (sum over the group's inputs i of x[row][i] * level[o][i])
//
// (of int8 there is one group). Levels are whole numbers that 16 bits hold exactly, so that tensor cores multiply them
// and only y is rounded. SPLIT warps take the same outputs and in turn units of 128 inputs; a lane reads 16 bytes of an
// output at a time. In which order a warp goes through the inputs of a unit does not matter, so bytes are widened where
// they lie, and the activations are read to match.
#pragma once

#include <climits>
#include <type_traits>

#include "tensor_cores.cuh"

namespace quantized_cuda {

constexpr int WARP = 32, WARPS = 8;
constexpr int OUTPUTS = 16, ROWS = 8;  // of a tile
constexpr int UNIT = 128;              // inputs; of int4 those that share a scale
constexpr int MOST_TILES = 8;          // of rows, in a block

struct Problem {
  const void* x;          // [rows, in]
  const uint8_t* weight;  // int8 [out, in], int4 [out, units, UNIT / 2] in the layout of ../README.md
  const float* scale;     // [out], int4: [out, units]
  void* y;                // [rows, out]
  int64_t rows, in, out;
};

// The levels of 4 bytes of int8: (first, third), (second, fourth).
template <class T>
__device__ inline void widen8(uint32_t bytes, uint32_t pairs[2]) {
  bytes ^= 0x80808080u;  // level + 128
  if constexpr (std::is_same<T, __half>::value) {
    pairs[0] = subtract(0x64006400u | (bytes & 0x00ff00ffu), 1024 + 128, T());  // 0x6400 is 1024, in steps of 1
    pairs[1] = subtract(0x64006400u | (bytes >> 8 & 0x00ff00ffu), 1024 + 128, T());
  } else {
    float levels[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)  // 0x4b000000 is 2^23, in steps of 1
      levels[i] = __uint_as_float(0x4b000000u | (bytes >> 8 * i & 0xffu)) - (8388608.f + 128.f);
    pairs[0] = both(levels[0], levels[2], T());
    pairs[1] = both(levels[1], levels[3], T());
  }
}

// The levels of the low 4 bits of 4 bytes: (first, third), (second, fourth).
template <class T>
__device__ inline void widen4(uint32_t bytes, uint32_t pairs[2]) {
  constexpr bool half = std::is_same<T, __half>::value;
  constexpr uint32_t base = half ? 0x64006400u : 0x43004300u;  // 1024 or 128, in steps of 1
  constexpr float zero = (half ? 1024.f : 128.f) + 8.f;
  pairs[0] = subtract(base | (bytes & 0x000f000fu), zero, T());
  pairs[1] = subtract(base | (bytes >> 8 & 0x000f000fu), zero, T());
}

__device__ inline uint4 read(const void* from, bool inside) {
  return inside ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}

// A block takes ROWS * TILES rows and, by WARPS / SPLIT groups of warps, M tiles of outputs each.
template <class T, int BITS, int TILES, int M, int SPLIT>
__global__ void __launch_bounds__(WARP* WARPS, 1) linear_kernel(Problem p) {
  constexpr int GROUPS = WARPS / SPLIT, WIDE = OUTPUTS * M;  // outputs of a warp
  __shared__ float sums[SPLIT > 1 ? WARPS : 1][SPLIT > 1 ? ROWS * TILES : 1][SPLIT > 1 ? OUTPUTS + 1 : 1];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = warp % SPLIT;
  const int place = lane / 4, pair = lane % 4;  // as tensor_cores.cuh has them
  const int64_t first_row = int64_t(blockIdx.x) * ROWS * TILES;
  const int64_t first_output = (int64_t(blockIdx.y) * GROUPS + warp / SPLIT) * WIDE;
  const int units = (p.in + UNIT - 1) / UNIT;
  const int64_t bytes = BITS == 8 ? p.in : int64_t(units) * UNIT / 2;  // of an output
  const uint8_t* from_weight[2 * M];
#pragma unroll
  for (int o = 0; o < 2 * M; ++o) from_weight[o] = p.weight + (first_output + place + 8 * o) * bytes + pair * 16;
  const T* from_x = static_cast<const T*>(p.x) + (first_row + place) * p.in + pair * 16;
  float sum[M][TILES][4] = {};
  constexpr int AHEAD = TILES * M == 1 ? 4 : TILES * M <= 5 ? 2 : 1;
#pragma unroll AHEAD
  for (int unit = part; unit < units; unit += SPLIT) {
    uint4 weights[2 * M][2];  // [output][int8: inputs 0 to 63 or 64 to 127 of the unit; int4: the first holds both]
#pragma unroll
    for (int o = 0; o < 2 * M; ++o)
#pragma unroll
      for (int half = 0; half < BITS / 4; ++half)
        weights[o][half] =
            read(from_weight[o] + unit * (UNIT * BITS / 8) + half * 64,
                 first_output + place + 8 * o < p.out && (BITS == 4 || unit * UNIT + half * 64 + pair * 16 < p.in));
    float of_unit[BITS == 4 ? M : 1][TILES][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int input = unit * UNIT + half * 64;
      uint32_t levels[M][4][4];  // of each 4 bytes what multiply takes
#pragma unroll
      for (int o = 0; o < 2 * M; ++o) {
        uint32_t words[4];
        memcpy(words, &weights[o][BITS == 8 ? half : 0], 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t pairs[2];
          if (BITS == 8)
            widen8<T>(words[i], pairs);
          else
            widen4<T>(words[i] >> 4 * half, pairs);
          levels[o / 2][i][o % 2] = pairs[0], levels[o / 2][i][o % 2 + 2] = pairs[1];
        }
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const bool inside = first_row + tile * ROWS + place < p.rows && input + pair * 16 < p.in;
        uint32_t words[8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 eight = read(from_x + tile * ROWS * p.in + input + 8 * i, inside);
          memcpy(words + 4 * i, &eight, 16);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // (first, third), (second, fourth)
          const uint32_t x[2] = {__byte_perm(words[2 * i], words[2 * i + 1], 0x5410),
                                 __byte_perm(words[2 * i], words[2 * i + 1], 0x7632)};
#pragma unroll
          for (int m = 0; m < M; ++m)
            multiply(BITS == 8 ? sum[m][tile] : of_unit[BITS == 4 ? m : 0][tile], levels[m][i], x, T());
        }
      }
    }
    if (BITS == 4) {
#pragma unroll
      for (int o = 0; o < 2 * M; ++o) {
        const int64_t output = first_output + place + 8 * o;
        const float scale = output < p.out ? p.scale[output * units + unit] : 0.f;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& to = sum[o / 2][tile][o % 2 * 2 + i];
            to = fmaf(of_unit[BITS == 4 ? o / 2 : 0][tile][o % 2 * 2 + i], scale, to);
          }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (SPLIT == 1) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = first_row + tile * ROWS + 2 * pair + i % 2;
          const int64_t output = first_output + m * OUTPUTS + place + i / 2 * 8;
          if (row >= p.rows || output >= p.out) continue;
          const float whole = BITS == 8 ? sum[m][tile][i] * p.scale[output] : sum[m][tile][i];
          static_cast<T*>(p.y)[row * p.out + output] = narrow(whole, T());
        }
      continue;
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][tile * ROWS + 2 * pair + i % 2][place + i / 2 * 8] = sum[m][tile][i];
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * TILES * OUTPUTS * GROUPS; i += WARP * WARPS) {
      const int group = i / (ROWS * TILES * OUTPUTS), rest = i % (ROWS * TILES * OUTPUTS);
      const int64_t row = first_row + rest / OUTPUTS;
      const int64_t output = (int64_t(blockIdx.y) * GROUPS + group) * WIDE + m * OUTPUTS + rest % OUTPUTS;
      if (row >= p.rows || output >= p.out) continue;
      float whole = 0.f;
#pragma unroll
      for (int other = 0; other < SPLIT; ++other)  // in one order
        whole += sums[group * SPLIT + other][rest / OUTPUTS][rest % OUTPUTS];
      if (BITS == 8) whole *= p.scale[output];
      static_cast<T*>(p.y)[row * p.out + output] = narrow(whole, T());
    }
  }
}

template <class T, int BITS, int TILES, int M, int SPLIT>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  constexpr int WIDE = OUTPUTS * M * (WARPS / SPLIT);
  const dim3 grid((p.rows + ROWS * TILES - 1) / (ROWS * TILES), (p.out + WIDE - 1) / WIDE);
  linear_kernel<T, BITS, TILES, M, SPLIT><<<grid, WARP * WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

// Inputs by the 16; x, weight and y at addresses of 16 bytes; compute capability 8.0 or more.
template <class T, int BITS>
cudaError_t linear(const Problem& p, cudaStream_t stream) {
  if (p.in % 16 || p.in < 1 || p.in > INT_MAX / 2 || p.out < 1 || p.out > int64_t(65535) * OUTPUTS || p.rows < 0 ||
      p.rows > INT_MAX)
    return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  // measured on an H200: more outputs of a warp share what is read of the activations, but fewer blocks are busy
  if (p.rows <= ROWS) return launch<T, BITS, 1, 1, 8>(p, stream);
  if (p.rows <= 2 * ROWS) return launch<T, BITS, 2, 1, 8>(p, stream);
  if (p.rows <= 5 * ROWS) return launch<T, BITS, 5, 2, 8>(p, stream);
  if (p.rows <= MOST_TILES * ROWS) return launch<T, BITS, MOST_TILES, 2, 8>(p, stream);
  return launch<T, BITS, MOST_TILES, 2, 1>(p, stream);
}

}  // namespace quantized_cuda

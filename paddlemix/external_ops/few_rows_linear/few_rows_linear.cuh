// Licensed under the Apache License, Version 2.0; see LICENSE.
// A linear layer with CUDA over weights of 16 bits, int8 or int4: 16-bit activations, sums of float32; free of Paddle.
//
//   y[row][o] = sum over groups of scale[o][group] * (sum over the group's inputs i of x[row][i] * level[o][i])
//
// (of int8 there is one group; of 16 bits one without a scale). Levels are whole numbers that 16 bits hold exactly, so
// that tensor cores multiply them and only y is rounded. SPLIT warps take the same outputs and in turn units of 128
// inputs; a lane reads 16 bytes of an output at a time. In which order a warp goes through the inputs of a unit does
// not matter, so bytes are widened where they lie, and the activations are read to match.
#pragma once

#include <climits>
#include <cmath>
#include <type_traits>

#include "tensor_cores.cuh"

namespace few_rows_linear_cuda {

using namespace tensor_cores;

constexpr int WARP = 32, WARPS = 8;
constexpr int OUTPUTS = 16, ROWS = 8;  // of a tile
constexpr int UNIT = 128;              // inputs; of int4 those that share a scale
constexpr int MOST_TILES = 8;          // of rows, in a block
constexpr int MATRICES = 3;

struct Matrix {
  const void* weight;  // 16 bits or int8 [out, in], int4 [out, units, UNIT / 2] in the layout of ../README.md
  const float* scale;  // int8: [out], int4: [out, units]
  void* y;             // [rows, out]
  int64_t out;
};

// Up to MATRICES of one x, or, gated, two that give one y = silu(first) * second.
struct Problem {
  const void* x;  // [rows, in]
  Matrix matrices[MATRICES];
  const void* residual;  // null or [rows, out], added to y
  bool gated;
  int64_t rows, in;
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

template <class T>
__device__ inline void write(const Problem& p, const Matrix& matrix, int64_t row, int64_t output, float value) {
  const int64_t at = row * matrix.out + output;
  if (p.residual) value += widen(static_cast<const T*>(p.residual)[at]);
  static_cast<T*>(matrix.y)[at] = narrow(value, T());
}

// A block takes ROWS * TILES rows and, by WARPS / SPLIT groups of warps, M tiles of outputs each, of one matrix; gated,
// one tile of each matrix.
template <class T, int BITS, int TILES, int M, int SPLIT>
__global__ void __launch_bounds__(WARP* WARPS, 1) linear_kernel(Problem p) {
  constexpr int GROUPS = WARPS / SPLIT;
  constexpr int PIECES = BITS / 4;                     // of 16 bytes, that a lane reads of an output and a unit
  constexpr int PIECE = 128 / BITS, SPAN = 4 * PIECE;  // inputs of a piece, and of those of 4 lanes
  constexpr int X_PIECE = BITS == 16 ? 8 : 16, X_SPAN = BITS == 16 ? 32 : 8;  // where x is read to match
  __shared__ float sums[SPLIT > 1 ? WARPS : 1][SPLIT > 1 ? ROWS * TILES : 1][SPLIT > 1 ? OUTPUTS + 1 : 1];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = warp % SPLIT;
  const int place = lane / 4, pair = lane % 4;  // as tensor_cores.cuh has them
  const int64_t first_row = int64_t(blockIdx.x) * ROWS * TILES;
  const bool gated = SPLIT > 1 && M == 2 && p.gated;
  const int tiles = gated ? 1 : M;  // of a matrix
  int block = blockIdx.y;
  int which = 0;  // of the matrices, but gated
  if (SPLIT > 1 && !gated) {
#pragma unroll
    for (int i = 1; i < MATRICES; ++i) {
      const int blocks = (p.matrices[i - 1].out + OUTPUTS * M * GROUPS - 1) / (OUTPUTS * M * GROUPS);
      if (which == i - 1 && block >= blocks) block -= blocks, which = i;
    }
  }
  const auto matrix_of = [&](int tile) -> const Matrix& { return p.matrices[gated ? tile : which]; };
  const int in = p.in, out = matrix_of(0).out;  // gated, both matrices have the same
  const auto output_of = [&](int group, int tile, int place) {
    return (block * GROUPS + group) * OUTPUTS * tiles + (gated ? 0 : tile * OUTPUTS) + place;
  };
  const int units = (in + UNIT - 1) / UNIT;
  const int64_t bytes = BITS == 4 ? int64_t(units) * UNIT / 2 : int64_t(in) * (BITS / 8);  // of an output
  const uint8_t* from_weight[2 * M];
#pragma unroll
  for (int o = 0; o < 2 * M; ++o)
    from_weight[o] = static_cast<const uint8_t*>(matrix_of(o / 2).weight) +
                     output_of(warp / SPLIT, o / 2, place + o % 2 * 8) * bytes + pair * 16;
  const T* from_x = static_cast<const T*>(p.x) + (first_row + place) * p.in + pair * X_PIECE;
  float sum[M][TILES][4] = {};
  constexpr int AHEAD = TILES * M == 1 ? 4 : TILES * M <= 5 ? 2 : 1;
#pragma unroll AHEAD
  for (int unit = part; unit < units; unit += SPLIT) {
    uint4 weights[2 * M][PIECES];  // int4: one piece holds inputs 0 to 63 and 64 to 127
#pragma unroll
    for (int o = 0; o < 2 * M; ++o)
#pragma unroll
      for (int i = 0; i < PIECES; ++i)
        weights[o][i] = read(from_weight[o] + unit * (UNIT * BITS / 8) + i * 64,
                             output_of(warp / SPLIT, o / 2, place + o % 2 * 8) < out &&
                                 (BITS == 4 || unit * UNIT + i * SPAN + pair * PIECE < in));
    float of_unit[BITS == 4 ? M : 1][TILES][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int input = unit * UNIT + half * 64;
      uint32_t levels[M][4][4];  // what multiply takes
#pragma unroll
      for (int o = 0; o < 2 * M; ++o) {
        uint32_t words[BITS == 16 ? 8 : 4];
        memcpy(words, &weights[o][BITS == 4 ? 0 : half * PIECES / 2], sizeof words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t pairs[2];
          if constexpr (BITS == 16)
            pairs[0] = words[2 * i], pairs[1] = words[2 * i + 1];
          else if (BITS == 8)
            widen8<T>(words[i], pairs);
          else
            widen4<T>(words[i] >> 4 * half, pairs);
          levels[o / 2][i][o % 2] = pairs[0], levels[o / 2][i][o % 2 + 2] = pairs[1];
        }
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const bool is_row = first_row + tile * ROWS + place < p.rows;
        uint32_t words[8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 eight = read(from_x + tile * ROWS * p.in + input + X_SPAN * i,
                                   is_row && input + (BITS == 16 ? X_SPAN * i : 0) + pair * X_PIECE < in);
          memcpy(words + 4 * i, &eight, 16);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t x[2] = {words[2 * i], words[2 * i + 1]};
          if (BITS != 16) {  // (first, third), (second, fourth)
            x[0] = __byte_perm(words[2 * i], words[2 * i + 1], 0x5410);
            x[1] = __byte_perm(words[2 * i], words[2 * i + 1], 0x7632);
          }
#pragma unroll
          for (int m = 0; m < M; ++m)
            multiply(BITS == 4 ? of_unit[BITS == 4 ? m : 0][tile] : sum[m][tile], levels[m][i], x, T());
        }
      }
    }
    if (BITS == 4) {
#pragma unroll
      for (int o = 0; o < 2 * M; ++o) {
        const int output = output_of(warp / SPLIT, o / 2, place + o % 2 * 8);
        const float scale = output < out ? matrix_of(o / 2).scale[int64_t(output) * units + unit] : 0.f;
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
  if constexpr (SPLIT == 1) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = first_row + tile * ROWS + 2 * pair + i % 2;
          const int output = output_of(warp, m, place + i / 2 * 8);
          if (row >= p.rows || output >= out) continue;
          const float whole = BITS == 8 ? sum[m][tile][i] * matrix_of(0).scale[output] : sum[m][tile][i];
          static_cast<T*>(matrix_of(0).y)[row * out + output] = narrow(whole, T());
        }
  } else {
    constexpr int VALUES = ROWS * TILES * OUTPUTS * GROUPS, THREADS = WARP * WARPS;
    float gates[(VALUES + THREADS - 1) / THREADS];  // of the first matrix, till the second's come
#pragma unroll
    for (int m = 0; m < M; ++m) {
      __syncthreads();
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][tile * ROWS + 2 * pair + i % 2][place + i / 2 * 8] = sum[m][tile][i];
      __syncthreads();
#pragma unroll
      for (int turn = 0; turn * THREADS < VALUES; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        const int group = i / (ROWS * TILES * OUTPUTS), rest = i % (ROWS * TILES * OUTPUTS);
        const int64_t row = first_row + rest / OUTPUTS;
        const int output = output_of(group, m, rest % OUTPUTS);
        if (i >= VALUES || row >= p.rows || output >= out) continue;
        float whole = 0.f;
#pragma unroll
        for (int other = 0; other < SPLIT; ++other)  // in one order
          whole += sums[group * SPLIT + other][rest / OUTPUTS][rest % OUTPUTS];
        if (BITS == 8) whole *= matrix_of(m).scale[output];
        if (gated && m == 0)
          gates[turn] = whole;
        else
          write<T>(p, matrix_of(0), row, output, gated ? gates[turn] / (1.f + expf(-gates[turn])) * whole : whole);
      }
    }
  }
}

template <class T, int BITS, int TILES, int M, int SPLIT>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  constexpr int GROUPS = WARPS / SPLIT;
  int64_t blocks = 0;
  for (const Matrix& matrix : p.matrices)
    if (!p.gated || &matrix == p.matrices)
      blocks += (matrix.out + OUTPUTS * GROUPS * (p.gated ? 1 : M) - 1) / (OUTPUTS * GROUPS * (p.gated ? 1 : M));
  if (blocks > 65535) return cudaErrorInvalidValue;
  const dim3 grid((p.rows + ROWS * TILES - 1) / (ROWS * TILES), blocks);
  linear_kernel<T, BITS, TILES, M, SPLIT><<<grid, WARP * WARPS, 0, stream>>>(p);
  return cudaGetLastError();
}

// Up to MOST_TILES * ROWS rows. Inputs by the 16; x, weights and y at addresses of 16 bytes; compute capability 8.0 or
// more.
template <class T, int BITS>
cudaError_t few_rows(const Problem& p, cudaStream_t stream) {
  const auto& [first, second, third] = p.matrices;
  if (p.in % 16 || p.in < 1 || p.in > INT_MAX / 2 || first.out < 1 || second.out < 0 || third.out < 0 || p.rows < 0 ||
      p.rows > MOST_TILES * ROWS || (p.gated && (second.out != first.out || third.out)))
    return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  // measured on an H200: more outputs of a warp share what is read of the activations, but fewer blocks are busy
  if (p.rows <= ROWS) return p.gated ? launch<T, BITS, 1, 2, 8>(p, stream) : launch<T, BITS, 1, 1, 8>(p, stream);
  if (p.rows <= 2 * ROWS) return p.gated ? launch<T, BITS, 2, 2, 8>(p, stream) : launch<T, BITS, 2, 1, 8>(p, stream);
  if (p.rows <= 5 * ROWS) return launch<T, BITS, 5, 2, 8>(p, stream);
  return launch<T, BITS, MOST_TILES, 2, 8>(p, stream);
}

// More of them, of one matrix and without a residual.
template <class T, int BITS>
cudaError_t many_rows(const Problem& p, cudaStream_t stream) {
  if (p.in % 16 || p.in < 1 || p.in > INT_MAX / 2 || p.matrices[0].out < 1 || p.rows > INT_MAX)
    return cudaErrorInvalidValue;
  return launch<T, BITS, MOST_TILES, 2, 1>(p, stream);
}

}  // namespace few_rows_linear_cuda

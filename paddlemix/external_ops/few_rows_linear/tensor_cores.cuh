// Licensed under the Apache License, Version 2.0; see LICENSE.
// What the tensor cores of compute capability 8.0 and later do, and pairs of 16-bit numbers. Compiled
// for an older card it does nothing: Python does not call it there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tensor_cores {

__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline __half narrow(float x, __half) { return __float2half_rn(x); }
__device__ inline __nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }

// sum [16, 8] += a [16, 16] times b [16, 8], by a warp. With row = lane / 4 and pair = lane % 4, a lane holds of a the
// pairs (row, pair), (row + 8, pair), (row, pair + 4), (row + 8, pair + 4), of b pairs of its column `row`: pair and
// pair + 4, and of sum (row, 2 pair), (row, 2 pair + 1), and the same of row + 8.
#if __CUDA_ARCH__ >= 800
__device__ inline void multiply(float sum[4], const uint32_t a[4], const uint32_t b[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply(float sum[4], const uint32_t a[4], const uint32_t b[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two numbers in a word less one number, each.
template <class Pair>
__device__ inline uint32_t less(uint32_t pair, Pair numbers) {
  Pair x;
  memcpy(&x, &pair, 4);
  x = __hsub2(x, numbers);
  memcpy(&pair, &x, 4);
  return pair;
}

__device__ inline uint32_t subtract(uint32_t pair, float number, __half) {
  return less(pair, __float2half2_rn(number));
}

__device__ inline uint32_t subtract(uint32_t pair, float number, __nv_bfloat16) {
  return less(pair, __float2bfloat162_rn(number));
}

// Two numbers in a word, the first in the low half.
__device__ inline uint32_t both(float first, float second, __half) {
  const __half2 x = __floats2half2_rn(first, second);
  uint32_t pair;
  memcpy(&pair, &x, 4);
  return pair;
}

__device__ inline uint32_t both(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(first, second);
  uint32_t pair;
  memcpy(&pair, &x, 4);
  return pair;
}

#else
template <class T>
__device__ inline void multiply(float[4], const uint32_t[4], const uint32_t[2], T) {}
template <class T>
__device__ inline uint32_t subtract(uint32_t pair, float, T) {
  return pair;
}
template <class T>
__device__ inline uint32_t both(float, float, T) {
  return 0;
}
#endif

}  // namespace tensor_cores

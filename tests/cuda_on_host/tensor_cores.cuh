// Licensed under the Apache License, Version 2.0; see LICENSE.
// In place of external_ops' file of that name: what the tensor cores compute, lane by lane.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cuda_on_host {

struct Fragments {
  uint32_t a[4], b[2];
};
inline Fragments fragments[2][1024];

template <class T>
T number(uint32_t pair, int second) {
  return T{uint16_t(pair >> 16 * second)};
}

}  // namespace cuda_on_host

namespace tensor_cores {

inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __half narrow(float x, __half) { return __float2half_rn(x); }
inline __nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }

template <class T>
void multiply(float sum[4], const uint32_t a[4], const uint32_t b[2], T) {
  using namespace cuda_on_host;
  const int turn = threads[current].turn ^= 1, lane = current % WARP;
  auto& given = fragments[turn][current];
  std::copy(a, a + 4, given.a);
  std::copy(b, b + 2, given.b);
  wait(IN_SHUFFLE);
  const Fragments* of_warp = fragments[turn] + (current - lane);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k / 2 % 4, late = k / 8;
      const uint32_t from_a = of_warp[row * 4 + pair].a[2 * late + i / 2], from_b = of_warp[column * 4 + pair].b[late];
      sum[i] += widen(number<T>(from_a, k % 2)) * widen(number<T>(from_b, k % 2));
    }
  }
}

template <class T>
uint32_t both(float first, float second, T) {
  return narrow(first, T()).bits | uint32_t(narrow(second, T()).bits) << 16;
}

template <class T>
uint32_t subtract(uint32_t pair, float less, T) {
  using cuda_on_host::number;
  return both(widen(number<T>(pair, 0)) - less, widen(number<T>(pair, 1)) - less, T());
}

}  // namespace tensor_cores

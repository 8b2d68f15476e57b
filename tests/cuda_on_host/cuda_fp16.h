// Licensed under the Apache License, Version 2.0; see LICENSE.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;  // sign, 5 of the exponent, 10 of the fraction
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                    : std::ldexp(float(fraction), -24);
  return x.bits & 0x8000 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  if (std::fabs(x) >= 65520.f) return {uint16_t(sign | 0x7c00)};
  const int exponent = std::max(x == 0.f ? -14 : std::ilogb(x), -14);  // -14: subnormal or of the least exponent
  const int fraction = std::lrint(std::ldexp(std::fabs(x), 10 - exponent));  // 1024 and more: with the leading one
  return {uint16_t(sign | (((exponent + 14) << 10) + fraction))};
}

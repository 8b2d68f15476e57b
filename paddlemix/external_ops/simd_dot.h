// Licensed under the Apache License, Version 2.0; see LICENSE.
// The units that some x86-64 processors multiply at once, for packed products (simd_units.h): pairs of bfloat16
// (AVX-512 BF16), pairs of 16-bit and fours of 8-bit whole numbers (AVX-512 VNNI). simd.h includes it.
#pragma once

#if defined(__x86_64__)

#define SIMD_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))
#define SIMD_BFLOAT \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))

namespace simd {

#define SIMD_INLINE SIMD_VNNI inline __attribute__((always_inline))
namespace whole {  // what both kinds of whole numbers share
using avx512::fill, avx512::floats, avx512::fma, avx512::load, avx512::PACKED_ROWS, avx512::PACKED_VECTORS, avx512::store,
    avx512::WIDTH;
using units = __m512i;
using totals = __m512i;
SIMD_INLINE units load_units(const uint32_t* p) { return _mm512_loadu_si512(p); }
SIMD_INLINE units fill_units(uint32_t x) { return _mm512_set1_epi32(x); }
}  // namespace whole
namespace whole16 {
using namespace whole;
SIMD_INLINE totals multiply(units w, units x, totals total) {
  asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(w), "v"(x));  // GCC 12 copies registers around its intrinsic
  return total;
}
}  // namespace whole16
namespace whole8 {
using namespace whole;
SIMD_INLINE totals multiply(units w, units x, totals total) {
  asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(w), "v"(x));
  return total;
}
}  // namespace whole8
#undef SIMD_INLINE

#define SIMD_INLINE SIMD_BFLOAT inline __attribute__((always_inline))
namespace bfloat {
using avx512::fill, avx512::floats, avx512::fma, avx512::load, avx512::PACKED_ROWS, avx512::PACKED_VECTORS, avx512::store,
    avx512::WIDTH;
using units = __m512i;
using totals = __m512;
SIMD_INLINE units load_units(const uint32_t* p) { return _mm512_loadu_si512(p); }
SIMD_INLINE units fill_units(uint32_t x) { return _mm512_set1_epi32(x); }
SIMD_INLINE totals multiply(units w, units x, totals total) {
  return _mm512_dpbf16_ps(total, (__m512bh)w, (__m512bh)x);
}
constexpr int UNIT = 2;

SIMD_BFLOAT inline void round_units(const float* x, int64_t count, uint32_t* units) {
  uint16_t* to = (uint16_t*)units;
  if (count % 2) to[count] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(x[i]), odd = bits >> 16 & 1;
    to[i] = (bits + ((bits & 0x7fffffff) > 0x7f800000 ? 0x10000 : 0x7fff + odd)) >> 16;
  }
}
// A row of numbers.
SIMD_BFLOAT inline void row_units(const bfloat16* from, int64_t count, uint32_t* to) {
  if (count % 2) to[count / 2] = 0;
  std::memcpy(to, from, count * sizeof *from);
}
// UNIT rows of numbers, `stride` apart, of which `rows` are there: each unit has one of each row.
SIMD_BFLOAT inline void column_units(const bfloat16* from, int64_t stride, int rows, int64_t count, uint32_t* to) {
  const bfloat16* other = rows > 1 ? from + stride : from;
  for (int64_t i = 0; i < count; ++i) to[i] = from[i].bits | (rows > 1 ? (uint32_t)other[i].bits << 16 : 0);
}
}  // namespace bfloat
#undef SIMD_INLINE

}  // namespace simd

#define SIMD_TARGET SIMD_VNNI
#define SIMD whole16
#include "simd_units.h"
#undef SIMD
#define SIMD whole8
#include "simd_units.h"
#undef SIMD
#undef SIMD_TARGET
#define SIMD_TARGET SIMD_BFLOAT
#define SIMD bfloat
#include "simd_units.h"
#undef SIMD
#undef SIMD_TARGET

#endif

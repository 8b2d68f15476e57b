// Licensed under the Apache License, Version 2.0; see LICENSE.
// The units that some x86-64 processors multiply at once, for packed products (simd_units.h): pairs of bfloat16
// (AVX-512 BF16), pairs of 16-bit and fours of 8-bit whole numbers (AVX-512 VNNI, AVX-VNNI). simd.h includes it.
#pragma once

#if defined(__x86_64__)

#define SIMD_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))
#define SIMD_BFLOAT \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))

namespace simd {

// Whole numbers by vectors of 512 bits. GCC 12 copies registers around the intrinsics of these products.
#define SIMD_INLINE SIMD_VNNI inline __attribute__((always_inline))
namespace whole {
using avx512::fill, avx512::floats, avx512::fma, avx512::load, avx512::PACKED_ROWS, avx512::PACKED_VECTORS, avx512::store,
    avx512::sum4, avx512::WIDTH;
using units = __m512i;
using totals = __m512i;
constexpr int STREAM_ROWS = 3;  // of few rows times four outputs: sums and totals that the registers hold
SIMD_INLINE units load_units(const void* p) { return _mm512_loadu_si512(p); }
SIMD_INLINE units fill_units(uint32_t x) { return _mm512_set1_epi32(x); }
SIMD_INLINE totals in_one(int32_t x) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(x)); }  // the others are 0
SIMD_INLINE floats to_floats(totals x) { return _mm512_cvtepi32_ps(x); }
SIMD_INLINE units widen_bytes(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
SIMD_INLINE units nibbles_of(units bytes, bool high) {
  return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}
}  // namespace whole
namespace whole16 {
using namespace whole;
SIMD_INLINE totals multiply(units w, units x, totals total) {
  asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(w), "v"(x));
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

// The same by vectors of 256 bits. A test takes the prefix away: AVX-512 VNNI knows these products too, in its own code.
#ifndef SIMD_VEX
#define SIMD_VEX "%{vex%} "
#endif
#define SIMD_INLINE SIMD_AVX2 inline __attribute__((always_inline))
namespace vex {
using avx2::fill, avx2::floats, avx2::fma, avx2::load, avx2::PACKED_ROWS, avx2::PACKED_VECTORS, avx2::store, avx2::sum4,
    avx2::WIDTH;
using units = __m256i;
using totals = __m256i;
constexpr int STREAM_ROWS = 1;
SIMD_INLINE units load_units(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
SIMD_INLINE units fill_units(uint32_t x) { return _mm256_set1_epi32(x); }
SIMD_INLINE totals in_one(int32_t x) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(x)); }
SIMD_INLINE floats to_floats(totals x) { return _mm256_cvtepi32_ps(x); }
SIMD_INLINE units widen_bytes(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
SIMD_INLINE units nibbles_of(units bytes, bool high) {
  return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}
}  // namespace vex
namespace vex16 {
using namespace vex;
SIMD_INLINE totals multiply(units w, units x, totals total) {
  asm(SIMD_VEX "vpdpwssd %2, %1, %0" : "+x"(total) : "x"(w), "x"(x));
  return total;
}
}  // namespace vex16
namespace vex8 {
using namespace vex;
SIMD_INLINE totals multiply(units w, units x, totals total) {
  asm(SIMD_VEX "vpdpbusd %2, %1, %0" : "+x"(total) : "x"(w), "x"(x));
  return total;
}
}  // namespace vex8
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
  bfloat16* to = (bfloat16*)units;
  if (count % 2) to[count] = {0};
  for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(x[i]);
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
#define SIMD_TARGET SIMD_AVX2
#define SIMD vex16
#include "simd_units.h"
#undef SIMD
#define SIMD vex8
#include "simd_units.h"
#undef SIMD
#undef SIMD_TARGET
#define SIMD_TARGET SIMD_BFLOAT
#define SIMD bfloat
#include "simd_units.h"
#undef SIMD
#undef SIMD_TARGET

#endif

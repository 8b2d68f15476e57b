// Licensed under the Apache License, Version 2.0; see LICENSE.
// The nearest codeword on a CPU, free of Paddle; without a [positions, codebook] matrix.
#pragma once

#include <algorithm>
#include <limits>

#include "../parallel.h"
#include "../simd.h"

namespace nearest_codeword {

constexpr int64_t BLOCK = 512;      // codewords whose distances are held at a time
constexpr int64_t POSITIONS = 32;   // that share a block of the codebook while it is in the cache

// distance = (latent_square + codeword_square) - 2 * product, in float32; of equal ones the first.
struct Problem {
  const float* latents;           // [positions, dim]
  const float* latent_squares;    // [positions]
  const float* codebook;          // [dim, size]: the codebook's transpose
  const float* codeword_squares;  // [size]
  int64_t* codes;                 // [positions]
  int64_t positions, dim, size;
};

}  // namespace nearest_codeword

#define SIMD_KERNELS "nearest_codeword/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace nearest_codeword {

inline void search(const Problem& p) {
  const auto range = SIMD_CHOOSE(search_range);
  in_parallel(p.positions, POSITIONS, p.positions * p.size * p.dim, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += POSITIONS) range(p, begin, std::min(begin + POSITIONS, end));
  });
}

}  // namespace nearest_codeword

// Licensed under the Apache License, Version 2.0; see LICENSE.
// silu(gate) * up on a CPU, with its gradient; free of Paddle.
#pragma once

#include "../parallel.h"
#include "../simd.h"

namespace silu_and_mul {

struct Problem {
  const float *gate, *up, *dout;  // [count]; dout null forward
  float *out, *dgate, *dup;
};

}  // namespace silu_and_mul

#define SIMD_KERNELS "silu_and_mul/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace silu_and_mul {

inline void compute(const Problem& p, int64_t count) {
  const auto some = p.dout ? SIMD_CHOOSE(backward) : SIMD_CHOOSE(forward);
  in_parallel(count, 1 << 14, 16 * count, [&](int64_t begin, int64_t end) { some(p, begin, end); });
}

}  // namespace silu_and_mul

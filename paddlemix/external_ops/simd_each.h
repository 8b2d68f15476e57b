// Licensed under the Apache License, Version 2.0; see LICENSE.
// Includes SIMD_KERNELS, a file without include guard, for each kind of vectors. In it `SIMD` is the namespace of the
// vectors and of what the file defines, and every function is marked SIMD_TARGET.
#if defined(__x86_64__)
#define SIMD avx512
#define SIMD_TARGET SIMD_AVX512
#include SIMD_KERNELS
#undef SIMD
#undef SIMD_TARGET

#define SIMD avx2
#define SIMD_TARGET SIMD_AVX2
#include SIMD_KERNELS
#undef SIMD
#undef SIMD_TARGET
#endif

#define SIMD plain
#define SIMD_TARGET
#include SIMD_KERNELS
#undef SIMD
#undef SIMD_TARGET

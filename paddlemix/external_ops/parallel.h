// Licensed under the Apache License, Version 2.0; see LICENSE.
// Threads of the CPU operators: those of the OpenMP runtime that Paddle uses, as many as Paddle was told.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

// Calls f(begin, end) for pieces of [0, count); each thread takes the next one when it is done. Paddle's OpenMP runtime
// lacks what GCC makes of schedule(dynamic), so the count is kept here. `work`: multiplications.
template <class F>
void in_parallel(int64_t count, int64_t piece, int64_t work, F f) {
  constexpr int64_t LEAST_WORK = 1 << 17;  // less is not worth a second thread
  if (work <= LEAST_WORK || count <= piece || omp_get_max_threads() == 1) {
    if (count > 0) f(0, count);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel
  for (int64_t begin; (begin = next.fetch_add(piece)) < count;) f(begin, std::min(begin + piece, count));
}

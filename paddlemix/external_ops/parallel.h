// Licensed under the Apache License, Version 2.0; see LICENSE.
// Threads of the CPU operators: those of the OpenMP runtime that Paddle uses, as many as Paddle was told.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

// Calls f(begin, end) for parts of [0, count), each of some pieces; a thread takes the next one when it is done. Large
// parts come first, since a thread reads memory best where it goes on, and then smaller ones, so that all end together.
// Paddle's OpenMP runtime lacks what GCC makes of schedule(guided), so the count is kept here. `work`: multiplications.
template <class F>
void in_parallel(int64_t count, int64_t piece, int64_t work, F f) {
  constexpr int64_t LEAST_WORK = 1 << 17;  // less is not worth a second thread
  const int64_t threads = omp_get_max_threads();
  if (work <= LEAST_WORK || count <= piece || threads == 1) {
    if (count > 0) f(0, count);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
#pragma omp parallel
  try {
    for (int64_t begin = next; begin < count;) {
      const int64_t end = begin + piece * std::max<int64_t>(1, (count - begin) / (2 * threads * piece));
      if (!next.compare_exchange_weak(begin, end)) continue;  // begin is now where the others are
      f(begin, std::min(end, count));
      begin = next;
    }
  } catch (...) {  // out of the region it would end the process
    next = count;
#pragma omp critical(emu3_ops_error)
    error = std::current_exception();
  }
  if (error) std::rethrow_exception(error);
}

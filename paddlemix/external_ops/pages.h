// Licensed under the Apache License, Version 2.0; see LICENSE.
// Large pages for large results: of small ones the system clears each when it is first written, at a tenth of a step's time.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

// Memory that is written next. It stays as it is where the system has no large pages.
inline void ask_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t SIZE = 1 << 21;
  const uintptr_t begin = ((uintptr_t)memory + SIZE - 1) / SIZE * SIZE, end = ((uintptr_t)memory + bytes) / SIZE * SIZE;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Licensed under the Apache License, Version 2.0; see LICENSE.
// Loaded before the C++ library: after fail_after(n) all but the next n large allocations of the module emu3_ops fail,
// until fail_after(-1). Those of Paddle, which makes its tensors, do not.
#include <dlfcn.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {
constexpr size_t LARGE = 1024;
std::atomic<long> left{-1};

bool fails(size_t size, void* caller) {
  Dl_info from;
  const bool counts = size >= LARGE && left >= 0 && dladdr(caller, &from) && std::strstr(from.dli_fname, "emu3_ops");
  return counts && left.fetch_sub(left > 0) == 0;
}

void* allocate(size_t size, void* caller) {
  void* memory = fails(size, caller) ? nullptr : std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}
}  // namespace

extern "C" void fail_after(long n) { left = n; }

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  return fails(size, __builtin_return_address(0)) ? nullptr : memalign(alignment, size);
}

void* operator new(size_t size) { return allocate(size, __builtin_return_address(0)); }
void* operator new[](size_t size) { return allocate(size, __builtin_return_address(0)); }

// Licensed under the Apache License, Version 2.0; see LICENSE.
// As much of CUDA as the kernels of external_ops use, on a CPU, so that their arithmetic is tested without a card.
//
// A block's threads are fibers, and blocks run one after another. A warp runs until all its threads wait in
// __syncthreads, then the next one does, from the first to the last or (cuda_on_host_backwards) from the last to the
// first: what lacks a barrier gives other numbers in one of the two orders. A barrier that only some of a warp's or
// block's threads reach ends the program, as does a launch that a card would refuse.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" inline int cuda_on_host_backwards = 0;

namespace cuda_on_host {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 << 10;
enum State { IN_SHUFFLE, IN_SYNCTHREADS, ENDED };

struct Thread {
  jmp_buf here;
  std::vector<char> stack;
  State state = ENDED;
  int turn = 0;  // of the two places for what is shuffled
};
inline std::vector<Thread> threads(1024);
inline jmp_buf scheduler;
inline unsigned current;
inline float shuffled[2][1024];
inline const std::function<void()>* body;

inline void refuse(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

inline void wait(State state) {
  threads[current].state = state;
  if (!_setjmp(threads[current].here)) _longjmp(scheduler, 1);
}

inline void run_kernels() {
  while (true) {
    (*body)();
    wait(ENDED);
  }
}

// Runs the current thread until it waits. Contexts begin a fiber; jumps, which call no system, go on with it.
inline void resume() {
  if (_setjmp(scheduler)) return;
  Thread& thread = threads[current];
  if (!thread.stack.empty()) _longjmp(thread.here, 1);
  thread.stack.resize(STACK);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.data();
  context.uc_stack.ss_size = STACK;
  makecontext(&context, run_kernels, 0);
  setcontext(&context);
}

// The one state in which all threads of a warp or block are
inline State common(unsigned first, unsigned end) {
  for (unsigned i = first; i < end; ++i)
    if (threads[i].state != threads[first].state) refuse("a barrier that not all threads reach");
  return threads[first].state;
}

inline void run_warp(unsigned first, unsigned end) {
  do {
    for (unsigned i = 0; i < end - first; ++i) {
      current = cuda_on_host_backwards ? end - 1 - i : first + i;
      threadIdx = dim3(current % blockDim.x, current / blockDim.x);
      resume();
    }
  } while (common(first, end) == IN_SHUFFLE);
}

inline void run_block() {
  const unsigned count = blockDim.x * blockDim.y, warps = (count + WARP - 1) / WARP;
  do {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = cuda_on_host_backwards ? warps - 1 - i : i;
      run_warp(warp * WARP, std::min(count, (warp + 1) * WARP));
    }
  } while (common(0, count) == IN_SYNCTHREADS);
}

// kernel<<<grid, block, shared, stream>>>(...) as the test rewrites it
inline void launch(dim3 grid, dim3 block, size_t, cudaStream_t, const std::function<void()>& kernel) {
  const uint64_t count = uint64_t(block.x) * block.y * block.z;
  if (!grid.x || grid.x > 0x7fffffff || !grid.y || grid.y > 65535 || grid.z != 1 || !count || count > 1024 ||
      block.z != 1)
    refuse("a launch of a size that CUDA refuses");
  gridDim = grid, blockDim = block, body = &kernel;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

}  // namespace cuda_on_host

struct uint4 {
  uint32_t x, y, z, w;
};

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __fmul_rn(float x, float y) { return x * y; }

inline void atomicAdd(int* to, int number) { *to += number; }
inline void atomicMin(int* to, int number) { *to = std::min(*to, number); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::IN_SYNCTHREADS); }

inline float __shfl_xor_sync(unsigned mask, float x, int lanes) {
  using namespace cuda_on_host;
  if (mask != 0xffffffff || blockDim.x * blockDim.y % WARP) refuse("a shuffle among part of a warp");
  const int turn = threads[current].turn ^= 1;  // whoever reads the other place has read it before the next turn
  shuffled[turn][current] = x;
  wait(IN_SHUFFLE);
  return shuffled[turn][current ^ lanes];
}

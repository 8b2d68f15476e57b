// Licensed under the Apache License, Version 2.0; see LICENSE.
// Which guesses of a window are accepted, and the next window, with CUDA, so that forward passes follow each other
// without the host; free of Paddle.
//
//   for each row r of the pass, of sequence s:
//     before = past[r] + unpicked[r] - base[r]: the place of the id that the first pick follows
//     token(i) = forced[s][before + 1 + i], or where that is negative picked[s][i]; behind the last pick the last one
//     right = 1 + how many of the window's guesses ids[r][unpicked[r] + 1 + i], from the first on, are token(i)
//     right = at most end[r] - past[r] - unpicked[r], but not below 0
//     next_past[r] = past[r] + unpicked[r] + right
//     next_ids[r][i] = token(max(right, 1) - 1 + i)
//
// A row at its end, or of no sequence (end 0), stays where it is. Whole numbers only, a block for each row.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace accept_tokens_cuda {

constexpr int THREADS = 64;

struct Problem {
  const int64_t* ids;     // [rows, read]
  const int64_t* past;    // [rows], tokens in the cache before the pass
  const int64_t* picked;  // [sequences, picks]
  const int64_t* forced;  // [sequences, places]; for a place beside these the nearest one stands
  const int64_t* table;   // [rows, 4]: sequence, base, end, unpicked
  int64_t* next_ids;      // [rows, picks]
  int64_t* next_past;     // [rows]
  int64_t rows, read, picks, places;
};

__global__ void __launch_bounds__(THREADS) accept_kernel(Problem p) {
  __shared__ int first_wrong;
  const int row = blockIdx.x, picks = int(p.picks);
  const int64_t *numbers = p.table + 4 * row, at = p.past[row] + numbers[3], left = numbers[2] - at;
  const int64_t *forced = p.forced + numbers[0] * p.places, *picked = p.picked + numbers[0] * picks;
  const int64_t *guesses = p.ids + row * p.read + numbers[3] + 1, place = at - numbers[1] + 1;
  const auto token = [&](int i) {
    const int64_t known = forced[max(int64_t(0), min(place + i, p.places - 1))];
    return known < 0 ? picked[min(i, picks - 1)] : known;
  };
  if (threadIdx.x == 0) first_wrong = picks - 1;
  __syncthreads();
  for (int i = threadIdx.x; i < picks - 1; i += THREADS)
    if (token(i) != guesses[i]) atomicMin(&first_wrong, i);
  __syncthreads();
  const int right = int(max(int64_t(0), min(int64_t(1 + first_wrong), left)));
  for (int i = threadIdx.x; i < picks; i += THREADS) p.next_ids[row * p.picks + i] = token(max(right, 1) - 1 + i);
  if (threadIdx.x == 0) p.next_past[row] = at + right;
}

inline cudaError_t accept(const Problem& p, cudaStream_t stream) {
  if (p.rows < 0 || p.rows > INT_MAX || p.picks < 1 || p.read < p.picks || p.read > INT_MAX || p.places < 1)
    return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  accept_kernel<<<unsigned(p.rows), THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace accept_tokens_cuda

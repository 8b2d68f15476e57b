// Licensed under the Apache License, Version 2.0; see LICENSE.
// A decoder layer for new tokens on a CPU, few or a part of a prompt, of the other operators' parts; free of Paddle.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../cached_attention/cached_attention.h"
#include "../few_rows_linear/few_rows_linear.h"
#include "../fused_ln/norm.h"

#define SIMD_KERNELS "decoder_step/kernels.h"
#include "../simd_each.h"
#undef SIMD_KERNELS

namespace decoder_step {

// A linear layer's, as few_rows_linear's Problem has them.
struct Weight {
  const void* data;
  const float* scale;
  int64_t in, out;
};

// The attention's fields, of which `query` and `out` are set on the way. The new tokens are written into `key` and
// `value`.
struct Problem : cached_attention::Problem {
  void (*linear)(const few_rows_linear::Problem&);  // for the dtype of the weights
  const float* x;                                   // [batch, news, hidden]
  const float *input_norm, *post_norm;              // [hidden]
  Weight q, k, v, o, gate, up, down;
  const float *cosine, *sine;  // [angles, news, dim]
  float* y;                    // [batch, news, hidden]
  int64_t angles;              // batch, or 1 for all rows
  double epsilon;

  int64_t rows() const { return batch * news; }
};

// Numbers that are not set yet. A thread keeps their memory for its next layers: to get new pages from the system would
// take a tenth of a prompt's time.
class Floats {
 public:
  explicit Floats(int64_t size) {
    const auto is_better = [&](const Memory& a, const Memory& b) {  // the smallest that is large enough
      return (a.size >= size) != (b.size >= size) ? a.size >= size : a.size < b.size;
    };
    const auto best = std::min_element(kept().begin(), kept().end(), is_better);
    if (best != kept().end() && best->size >= size) {
      memory = std::move(*best);
      kept().erase(best);
    } else {
      memory = {std::unique_ptr<float[]>(new float[size]), size};
    }
  }
  Floats(Floats&& other) = default;
  ~Floats() {
    if (memory.numbers && memory.size <= LARGEST_KEPT) kept().push_back(std::move(memory));
    if (kept().size() > MOST_KEPT) kept().erase(kept().begin());
  }
  float* data() { return memory.numbers.get(); }
  float& operator[](int64_t i) { return memory.numbers[i]; }

 private:
  struct Memory {
    std::unique_ptr<float[]> numbers;
    int64_t size;
  };
  static constexpr size_t MOST_KEPT = 8;  // as many as a layer has at once
  static constexpr int64_t LARGEST_KEPT = 1 << 24;  // 64 MB: twice what a part of a prompt takes in the released model
  static std::vector<Memory>& kept() {
    static thread_local std::vector<Memory> all;
    all.reserve(MOST_KEPT + 1);  // here, and not in a destructor, may memory be missing
    return all;
  }
  Memory memory;
};

inline Floats linear(const Problem& p, const float* x, const Weight& w) {
  Floats y(p.rows() * w.out);
  few_rows_linear::Problem one;
  one.x = x;
  one.weight = w.data;
  one.scale = w.scale;
  one.y = y.data();
  one.rows = p.rows();
  one.in = w.in;
  one.out = w.out;
  p.linear(one);
  return y;
}

inline Floats rms_norm(const Problem& p, const float* x, const float* scale) {
  const int64_t hidden = p.q.in;
  Floats y(p.rows() * hidden), rstd(p.rows());
  norm::Problem<float, float> one{};
  one.x = x;
  one.scale = scale;
  one.rstd = rstd.data();
  one.rows = p.rows();
  one.cols = hidden;
  one.epsilon = p.epsilon;
  norm::forward(one, y.data());
  return y;
}

// K: of the cache, float, simd::bfloat16 or simd::float16.
template <class K>
Floats attention(const Problem& p, Floats x) {
  const auto rotate = SIMD_CHOOSE(rotate<float>);
  const auto rotate_key = SIMD_CHOOSE(rotate<K>);
  Floats query = linear(p, x.data(), p.q), key = linear(p, x.data(), p.k), value = linear(p, x.data(), p.v);
  in_parallel(p.rows(), 1, p.rows() * p.q.out, [&](int64_t row, int64_t end) {
    Floats turned(p.dim);
    for (; row < end; ++row) {
      const int64_t b = row / p.news, i = row % p.news, angle = (p.angles == 1 ? i : row) * p.dim;
      for (int64_t h = 0; h < p.heads; ++h) {
        float* q = &query[(row * p.heads + h) * p.dim];
        rotate(q, p.cosine + angle, p.sine + angle, p.dim, turned.data());
        std::copy(turned.data(), turned.data() + p.dim, q);
      }
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int64_t from = (row * p.kv_heads + h) * p.dim;
        const int64_t to = p.kept(b, h) + (p.lengths[b] - p.news + i) * p.dim;
        rotate_key(&key[from], p.cosine + angle, p.sine + angle, p.dim, (K*)p.key + to);
        for (int64_t j = 0; j < p.dim; ++j) norm::narrow(value[from + j], (K*)p.value + to + j);
      }
    }
  });
  Floats out(p.rows() * p.q.out);
  cached_attention::Problem over = p;
  over.query = query.data();
  over.out = out.data();
  cached_attention::attention<K>(over);
  return linear(p, out.data(), p.o);
}

inline Floats mlp(const Problem& p, Floats x) {
  const auto gate = SIMD_CHOOSE(gate);
  const int64_t size = p.rows() * p.gate.out;
  Floats inner = linear(p, x.data(), p.gate), up = linear(p, x.data(), p.up);
  in_parallel(size, 4096, 16 * size, [&](int64_t begin, int64_t end) { gate(inner.data(), up.data(), begin, end); });
  return linear(p, inner.data(), p.down);
}

// to = x + more; x may be `to`
inline void add(const Problem& p, const float* x, Floats more, float* to) {
  const int64_t size = p.rows() * p.q.in;
  in_parallel(size, 4096, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = x[i] + more[i];
  });
}

template <class K>
void step(const Problem& p) {
  add(p, p.x, attention<K>(p, rms_norm(p, p.x, p.input_norm)), p.y);
  add(p, p.y, mlp(p, rms_norm(p, p.y, p.post_norm)), p.y);
}

}  // namespace decoder_step

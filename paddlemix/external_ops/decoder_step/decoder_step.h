// Licensed under the Apache License, Version 2.0; see LICENSE.
// A decoder layer for few new tokens on a CPU, of the other operators' parts; free of Paddle.
#pragma once

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

using Floats = std::vector<float>;

inline Floats linear(const Problem& p, const Floats& x, const Weight& w) {
  Floats y(p.rows() * w.out);
  few_rows_linear::Problem one;
  one.x = x.data();
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
Floats attention(const Problem& p, const Floats& x) {
  const auto rotate = SIMD_CHOOSE(rotate<float>);
  const auto rotate_key = SIMD_CHOOSE(rotate<K>);
  Floats query = linear(p, x, p.q), out(query.size()), turned(p.dim);
  const Floats key = linear(p, x, p.k), value = linear(p, x, p.v);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < p.news; ++i) {
      const int64_t row = b * p.news + i, angle = (p.angles == 1 ? i : row) * p.dim;
      for (int64_t h = 0; h < p.heads; ++h) {
        float* q = &query[(row * p.heads + h) * p.dim];
        rotate(q, p.cosine + angle, p.sine + angle, p.dim, turned.data());
        std::copy(turned.begin(), turned.end(), q);
      }
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int64_t from = (row * p.kv_heads + h) * p.dim;
        const int64_t to = p.kept(b, h) + (p.lengths[b] - p.news + i) * p.dim;
        rotate_key(&key[from], p.cosine + angle, p.sine + angle, p.dim, (K*)p.key + to);
        for (int64_t j = 0; j < p.dim; ++j) norm::narrow(value[from + j], (K*)p.value + to + j);
      }
    }
  cached_attention::Problem over = p;
  over.query = query.data();
  over.out = out.data();
  cached_attention::attention<K>(over);
  return linear(p, out, p.o);
}

inline Floats mlp(const Problem& p, const Floats& x) {
  const auto gate = SIMD_CHOOSE(gate);
  Floats inner = linear(p, x, p.gate);
  const Floats up = linear(p, x, p.up);
  in_parallel(inner.size(), 4096, 16 * inner.size(),
              [&](int64_t begin, int64_t end) { gate(inner.data(), up.data(), begin, end); });
  return linear(p, inner, p.down);
}

template <class K>
void step(const Problem& p) {
  const Floats attended = attention<K>(p, rms_norm(p, p.x, p.input_norm));
  for (size_t i = 0; i < attended.size(); ++i) p.y[i] = p.x[i] + attended[i];
  const Floats more = mlp(p, rms_norm(p, p.y, p.post_norm));
  for (size_t i = 0; i < more.size(); ++i) p.y[i] += more[i];
}

}  // namespace decoder_step

// Licensed under the Apache License, Version 2.0; see LICENSE.
// causal_attention.h includes it for each kind of vectors. The plain loop, q scaled by 1 / sqrt(dim):
//
//   for each query q: delta[q] = dout[q] . out[q]
//   for each key k and each query q >= k:
//     weight = exp(q . k - logs[q])
//     dscore = weight * (factor * dout[q] . v[k] - delta[q])  // factor: 1, or what dropout makes of it
//     dv[k] += weight * factor * dout[q],  dk[k] += dscore * q,  dq[q] += dscore * k / sqrt(dim)
//
// by blocks of keys and tiles of queries, whose five products are packed ones.
namespace causal_attention {
namespace SIMD {
using namespace simd::SIMD;
using cached_attention::SIMD::mix_tile, cached_attention::SIMD::OUTS, cached_attention::SIMD::score_tile;

constexpr int QUERIES = TILES * PACKED_ROWS;     // a time
constexpr int KEYS = PACKED_ROWS > 8 ? 8 : 4;  // of a tile of the transposed products

// `count` rows of `dim` numbers, `stride` apart, times `scale`: [count][width], filled up with 0.
SIMD_TARGET inline void widen_rows(const float* from, int64_t stride, int64_t count, int64_t dim, int64_t width, float scale,
                                   float* to) {
  for (int64_t r = 0; r < count; ++r, from += stride, to += width) {
    for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * scale;
    std::fill(to + dim, to + width, 0.0f);
  }
}

// sums[k] += the sum over `count` queries of weights[q][k] * rows[q], for a block of keys.
SIMD_TARGET inline void mix_queries(const float* weights, const float* rows, int64_t count, int64_t width, float* sums) {
  for (int k = 0; k < BLOCK; k += KEYS)
    for (int64_t c = 0; c < width; c += OUTS) {
      float* to = sums + k * width + c;
      totals total[KEYS][PACKED_VECTORS];
      for (int r = 0; r < KEYS; ++r)
        for (int v = 0; v < PACKED_VECTORS; ++v) total[r][v] = load(to + r * width + v * WIDTH);
      multiply_packed<BLOCK, 1>((const uint32_t*)weights + k, (const uint32_t*)rows + c, width, count, total);
      for (int r = 0; r < KEYS; ++r)
        for (int v = 0; v < PACKED_VECTORS; ++v) store(to + r * width + v * WIDTH, total[r][v]);
    }
}

// The scores of one query and a block of keys, of which it sees `seen`, become weights, and what `dweights` holds the
// gradients of the scores.
SIMD_TARGET inline void weigh(float* scores, float* dweights, const float* factors, int64_t seen, float log, float delta) {
  for (int j = 0; j < BLOCK; ++j) {
    const float all = simd::exponential<FUSED>(scores[j] - log), weight = j < seen ? all : 0;
    dweights[j] = weight * (factors[j] * dweights[j] - delta);
    scores[j] = weight * factors[j];
  }
}

// dquery of one row and head, and its part of dkey and dvalue, [length, dim].
SIMD_TARGET inline void head_gradient(const Problem& p, int64_t row, int64_t head, float* dkey, float* dvalue) {
  constexpr int ROWS = PACKED_ROWS;
  const int64_t width = (p.dim + OUTS - 1) / OUTS * OUTS, tiles = (p.length + ROWS - 1) / ROWS, padded = tiles * ROWS;
  const int64_t stride = p.heads * p.dim, first = row * p.length * stride + head * p.dim;
  const int64_t kept = (row * p.kv_heads + head / p.group()) * p.length * p.dim;
  const float scale = 1 / std::sqrt((float)p.dim), *logs = p.logs + (row * p.heads + head) * p.length;
  std::vector<float> query(padded * width), dout(padded * width), dquery(padded * width), delta(p.length);
  std::vector<float> query_tiles(padded * width), dout_tiles(padded * width);
  widen_rows(p.query + first, stride, p.length, p.dim, width, scale, query.data());
  widen_rows(p.dout + first, stride, p.length, p.dim, width, 1, dout.data());
  for (auto [from, to] : {std::pair(&query, &query_tiles), std::pair(&dout, &dout_tiles)}) {
    float_product::Problem packed{};
    packed.x = from->data();
    packed.rows = padded;
    packed.depth = width;
    float_product::SIMD::pack_tiles(packed, 0, tiles, 0, width, to->data());
  }
  for (int64_t q = 0; q < p.length; ++q) {
    double sum = 0;
    for (int64_t i = 0; i < p.dim; ++i) sum += dout[q * width + i] * p.out[first + q * stride + i];
    delta[q] = sum;
  }
  std::vector<float> keys(BLOCK * width), values(BLOCK * width), turned_keys(BLOCK * width), turned_values(BLOCK * width);
  std::vector<float> dkeys(BLOCK * width), dvalues(BLOCK * width), scores(QUERIES * BLOCK), dscores(QUERIES * BLOCK);
  float factors[BLOCK];
  std::fill(factors, factors + BLOCK, 1.0f);
  const auto units = [](const std::vector<float>& x) { return (uint32_t*)x.data(); };
  for (int64_t key = 0; key < p.length; key += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, p.length - key), from = kept + key * p.dim;
    widen_rows(p.key + from, p.dim, count, p.dim, width, 1, keys.data());
    widen_rows(p.value + from, p.dim, count, p.dim, width, 1, values.data());
    for (int j = 0; j < BLOCK; j += WIDTH) {
      pack(units(keys) + j * width, width, width, units(turned_keys) + j, BLOCK);
      pack(units(values) + j * width, width, width, units(turned_values) + j, BLOCK);
    }
    std::fill(dkeys.begin(), dkeys.end(), 0.0f);
    std::fill(dvalues.begin(), dvalues.end(), 0.0f);
    for (int64_t tile = key / ROWS; tile < tiles; tile += TILES) {
      const int64_t begin = tile * ROWS, end = std::min((tile + TILES) * ROWS, padded);
      for (int64_t t = begin; t < end; t += ROWS) {
        float *s = &scores[(t - begin) * BLOCK], *ds = &dscores[(t - begin) * BLOCK];
        score_tile<ROWS>(units(query_tiles) + t * width, units(turned_keys), width, s);
        score_tile<ROWS>(units(dout_tiles) + t * width, units(turned_values), width, ds);
        for (int64_t q = t; q < t + ROWS; ++q, s += BLOCK, ds += BLOCK) {
          const int64_t seen = q < p.length ? std::min(q + 1 - key, count) : 0;
          if (p.dropout > 0)
            cached_attention::SIMD::keep(p.dropout, p.seed, (row * p.heads + head) * p.length + q, key, factors);
          weigh(s, ds, factors, seen, q < p.length ? logs[q] : 0, q < p.length ? delta[q] : 0);
        }
        mix_tile<ROWS>(units(dscores) + (t - begin) * BLOCK, units(keys), BLOCK, width, &dquery[t * width]);
      }
      mix_queries(scores.data(), &dout[begin * width], end - begin, width, dvalues.data());
      mix_queries(dscores.data(), &query[begin * width], end - begin, width, dkeys.data());
    }
    for (int64_t j = 0; j < count; ++j) {
      std::copy(dkeys.data() + j * width, dkeys.data() + j * width + p.dim, dkey + (key + j) * p.dim);
      std::copy(dvalues.data() + j * width, dvalues.data() + j * width + p.dim, dvalue + (key + j) * p.dim);
    }
  }
  for (int64_t q = 0; q < p.length; ++q)
    for (int64_t i = 0; i < p.dim; ++i) p.dquery[first + q * stride + i] = dquery[q * width + i] * scale;
}

}  // namespace SIMD
}  // namespace causal_attention

// Licensed under the Apache License, Version 2.0; see LICENSE.
// cached_attention.h includes it for each kind of vectors.
namespace cached_attention {
namespace SIMD {
using namespace simd::SIMD;

constexpr int VECTORS = WIDTH == 8 ? 2 : 4;  // of values that a tile's registers hold for each query

// scores[r][0..count) of R queries and `count` keys; `next`: the keys of the block after
template <int R, class T>
SIMD_TARGET void score(const T* key, const T* next, int64_t dim, const float* query, int64_t q_stride, int count,
                       float* scores) {
  int j = 0;
  for (; j + TILE_OUTS <= count; j += TILE_OUTS) {
    float sums[R][TILE_OUTS];
    products<R, TILE_OUTS, true>(key + j * dim, dim, next + j * dim, query, q_stride, dim, sums);
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * BLOCK + j, sums[r], sizeof sums[r]);
  }
  for (; j < count; ++j) {
    float sums[R][1];
    products<R, 1, true>(key + j * dim, dim, next + j * dim, query, q_stride, dim, sums);
    for (int r = 0; r < R; ++r) scores[r * BLOCK + j] = sums[r][0];
  }
}

// sums[r] += weights[r] times values, for R queries, `count` keys and `width` columns; `next`: the block's after
template <int R, class T>
SIMD_TARGET void mix(const T* value, const T* next, int64_t v_stride, const float* weights, int count, int64_t width,
                     float* sums) {
  constexpr int CHUNK = VECTORS * WIDTH, LINE = 64 / sizeof(T);
  for (int64_t c = 0; c < width; c += CHUNK) {
    floats part[R][VECTORS], row[VECTORS];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) part[r][v] = load(sums + r * width + c + v * WIDTH);
    for (int j = 0; j < count; ++j) {
      for (int i = 0; i < CHUNK; i += LINE) __builtin_prefetch(next + j * v_stride + c + i, 0, 2);
      for (int v = 0; v < VECTORS; ++v) row[v] = load(value + j * v_stride + c + v * WIDTH);
      for (int r = 0; r < R; ++r) {
        const floats weight = fill(weights[r * BLOCK + j]);
        for (int v = 0; v < VECTORS; ++v) part[r][v] = fma(row[v], weight, part[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) store(sums + r * width + c + v * WIDTH, part[r][v]);
  }
}

// Turns the scores of one query into weights, exp(score - the largest so far); keeps the largest and the weights' sum.
SIMD_TARGET inline void weigh(float* scores, float& largest, float& total, float* sums, int64_t width) {
  floats top = fill(largest), weights = fill(0);
  float lanes[WIDTH], sum = 0;
  for (int j = 0; j < BLOCK; j += WIDTH) top = max(top, load(scores + j));
  store(lanes, top);
  const float most = *std::max_element(lanes, lanes + WIDTH);
  for (int j = 0; j < BLOCK; ++j) scores[j] = simd::exponential(scores[j] - most);
  for (int j = 0; j < BLOCK; j += WIDTH) weights = fma(load(scores + j), fill(1), weights);
  store(lanes, weights);
  for (float lane : lanes) sum += lane;
  const float before = simd::exponential(largest - most);
  total = total * before + sum;
  if (before != 1)
    for (int64_t i = 0; i < width; ++i) sums[i] *= before;
  largest = most;
}

// All queries of one key head over the keys from `begin` to `end`.
template <class T>
SIMD_TARGET void attend(const Problem& p, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, State& state) {
  const int64_t queries = p.group() * p.news, width = state.width, head = batch * p.kv_heads + kv_head;
  const T* keys = (const T*)p.key + head * p.room * p.dim;
  const T* values = (const T*)p.value + head * p.room * p.dim;
  const bool in_place = width == p.dim;
  std::vector<float> query(queries * width), scores(queries * BLOCK);
  std::vector<T> tiles(in_place ? 0 : BLOCK * width);  // values up to whole tiles
  const float scale = 1 / std::sqrt((float)p.dim);
  for (int64_t q = 0; q < queries; ++q) {  // those of one head one after the other
    const float* from = p.query + ((batch * p.news + q % p.news) * p.heads + kv_head * p.group() + q / p.news) * p.dim;
    for (int64_t i = 0; i < p.dim; ++i) query[q * width + i] = from[i] * scale;
  }
  constexpr auto SCORE = simd::by_rows<TILE_ROWS>([](auto r) { return score<decltype(r)::value, T>; });
  constexpr auto MIX = simd::by_rows<TILE_ROWS>([](auto r) { return mix<decltype(r)::value, T>; });
  for (; begin < end; begin += BLOCK) {
    const int count = std::min<int64_t>(BLOCK, end - begin);
    const T *key = keys + begin * p.dim, *value = values + begin * p.dim;
    const int64_t ahead = begin + BLOCK < end ? BLOCK * p.dim : 0;
    simd::in_tiles(queries, TILE_ROWS, [&](int64_t q, int64_t rows) {
      SCORE.of[rows](key, key + ahead, p.dim, &query[q * width], width, count, &scores[q * BLOCK]);
    });
    for (int64_t q = 0; q < queries; ++q) {
      float* s = &scores[q * BLOCK];
      const int seen = std::clamp<int64_t>(p.length - p.news + 1 + q % p.news - begin, 0, count);
      for (int j = seen; j < BLOCK; ++j) s[j] = j < count ? HIDDEN : 2 * HIDDEN;  // of no key: less than a hidden one
      if (p.allowed)
        for (int j = 0; j < seen; ++j) s[j] = p.allowed[batch * p.length + begin + j] ? s[j] : HIDDEN;
      weigh(s, state.largest[q], state.total[q], &state.sums[q * width], width);
    }
    if (!in_place)
      for (int j = 0; j < count; ++j) std::copy(value + j * p.dim, value + (j + 1) * p.dim, &tiles[j * width]);
    const T *from = in_place ? value : tiles.data(), *next = in_place ? value + ahead : from;
    simd::in_tiles(queries, TILE_ROWS, [&](int64_t q, int64_t rows) {
      MIX.of[rows](from, next, width, &scores[q * BLOCK], count, width, &state.sums[q * width]);
    });
  }
}

inline int64_t padded(int64_t dim) { return (dim + VECTORS * WIDTH - 1) / (VECTORS * WIDTH) * (VECTORS * WIDTH); }

}  // namespace SIMD
}  // namespace cached_attention

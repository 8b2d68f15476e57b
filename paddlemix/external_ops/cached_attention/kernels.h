// Licensed under the Apache License, Version 2.0; see LICENSE.
// cached_attention.h includes it for each kind of vectors. The plain loop:
//
//   for each row, new token and head:
//     for each key that the token sees: score = query . key / sqrt(dim)
//     weight = exp(score - largest), largest of the scores so far: where it grows, sums and total shrink by its growth
//     for each of them: sums += weight * value, total += weight
//     out = sums / total
//
// in blocks of keys, and tiles of queries that use a block together.
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
    products<R, TILE_OUTS>(key + j * dim, dim, next + j * dim, query, q_stride, dim, sums);
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * BLOCK + j, sums[r], sizeof sums[r]);
  }
  for (; j < count; ++j) {
    float sums[R][1];
    products<R, 1>(key + j * dim, dim, next + j * dim, query, q_stride, dim, sums);
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

// Turns the scores of one query, -inf where it does not see the key, into weights, exp(score - the largest so far);
// keeps the largest and the weights' sum.
SIMD_TARGET inline void weigh(float* scores, float& largest, float& total, float* sums, int64_t width) {
  floats top = fill(largest), weights = fill(0);
  float sum[4];
  for (int j = 0; j < BLOCK; j += WIDTH) top = max(top, load(scores + j));
  const float most = simd::SIMD::largest(top);
  for (int j = 0; j < BLOCK; ++j) {
    const float weight = simd::exponential<FUSED>(scores[j] - most);
    scores[j] = scores[j] == -INFINITY ? 0 : weight;
  }
  for (int j = 0; j < BLOCK; j += WIDTH) weights = fma(load(scores + j), fill(1), weights);
  sum4(weights, weights, weights, weights, sum);
  const float before = simd::exponential(largest - most);
  total = total * before + sum[0];
  if (before != 1)
    for (int64_t i = 0; i < width; ++i) sums[i] *= before;
  largest = most;
}

// What the weights of a query and a block of keys are multiplied by in training: 0 or 1 / (1 - dropout), a function of the
// seed, the number of the query and the place of the key.
SIMD_TARGET inline void keep(float dropout, uint64_t seed, int64_t query, int64_t key, float* factors) {
  uint64_t x = seed + (query + 1) * 0x9e3779b97f4a7c15;  // splitmix64 for the query, murmur3's last steps for the key
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  const uint32_t start = (x >> 32) + key * 0x9e3779b9u;
  const int32_t limit = dropout * (1 << 24);
  const float kept = 1 / (1 - dropout);
  for (int j = 0; j < BLOCK; ++j) {
    uint32_t y = start + j * 0x9e3779b9u;
    y = (y ^ y >> 16) * 0x85ebca6b;
    y = (y ^ y >> 13) * 0xc2b2ae35;
    factors[j] = int32_t((y ^ y >> 16) >> 8) < limit ? 0 : kept;
  }
}

// Leaves the scores of the keys that a query sees, of a block of keys that starts at `begin`. Whether it sees any.
SIMD_TARGET inline bool hide(const Problem& p, int64_t row, int64_t begin, int seen, float* scores) {
  for (int j = seen; j < BLOCK; ++j) scores[j] = -INFINITY;
  if (!p.allowed) return true;
  const bool* allowed = p.allowed + row * p.longest + begin;
  for (int j = 0; j < seen; ++j) scores[j] = allowed[j] ? scores[j] : -INFINITY;
  return std::count(allowed, allowed + seen, true) > 0;
}

// All queries of one row and key head over a piece of its keys.
template <class T>
SIMD_TARGET void attend(const Problem& p, const Piece& piece, int64_t width) {
  const int64_t queries = p.queries(), row = piece.row, length = p.lengths[row], kept = p.kept(row, piece.head);
  const T *keys = (const T*)p.key + kept, *values = (const T*)p.value + kept;
  const bool in_place = width == p.dim;
  std::vector<float> query(queries * width), scores(queries * BLOCK);
  std::vector<T> tiles(in_place ? 0 : BLOCK * width);  // values up to whole tiles
  std::vector<int64_t> ends(queries);                  // of the keys that a query sees
  const float scale = 1 / std::sqrt((float)p.dim);
  for (int64_t q = 0; q < queries; ++q) {
    const float* from = p.query + p.at(row, piece.head, q);
    for (int64_t i = 0; i < p.dim; ++i) query[q * width + i] = from[i] * scale;
    piece.largest[q] = -INFINITY;
    ends[q] = length - p.news + 1 + q / p.group();
  }
  constexpr auto SCORE = simd::by_rows<TILE_ROWS>([](auto r) { return score<decltype(r)::value, T>; });
  constexpr auto MIX = simd::by_rows<TILE_ROWS>([](auto r) { return mix<decltype(r)::value, T>; });
  for (int64_t begin = piece.begin; begin < piece.end; begin += BLOCK) {
    const int count = std::min<int64_t>(BLOCK, piece.end - begin);
    const T *key = keys + begin * p.dim, *value = values + begin * p.dim;
    const int64_t ahead = begin + BLOCK < length ? BLOCK * p.dim : 0;
    const auto seen = [&](int64_t q) { return (int)std::min<int64_t>(ends[q] - begin, count); };
    const int64_t first = std::max<int64_t>(0, begin - (length - p.news)) * p.group();  // query that sees some of it
    simd::in_tiles(queries - first, TILE_ROWS, [&](int64_t q, int64_t rows) {
      q += first;
      SCORE.of[rows](key, key + ahead, p.dim, &query[q * width], width, count, &scores[q * BLOCK]);
    });
    for (int64_t q = first; q < queries; ++q) {
      float* s = &scores[q * BLOCK];
      if (hide(p, row, begin, seen(q), s))
        weigh(s, piece.largest[q], piece.total[q], &piece.sums[q * width], width);
      else
        std::fill(s, s + BLOCK, 0.0f);
    }
    if (!in_place)
      for (int j = 0; j < count; ++j) std::copy(value + j * p.dim, value + (j + 1) * p.dim, &tiles[j * width]);
    const T *from = in_place ? value : tiles.data(), *next = in_place ? value + ahead : from;
    simd::in_tiles(queries - first, TILE_ROWS, [&](int64_t q, int64_t rows) {
      q += first;
      const int all = seen(q);  // the keys that all of these queries see; the later ones see more
      MIX.of[rows](from, next, width, &scores[q * BLOCK], all, width, &piece.sums[q * width]);
      for (int64_t one = q + 1; one < q + rows; ++one)
        if (seen(one) > all)
          mix<1>(from + all * width, next + all * width, width, &scores[one * BLOCK + all], seen(one) - all, width,
                 &piece.sums[one * width]);
    });
  }
}

inline int64_t padded(int64_t dim) { return (dim + VECTORS * WIDTH - 1) / (VECTORS * WIDTH) * (VECTORS * WIDTH); }

}  // namespace SIMD
}  // namespace cached_attention

// Licensed under the Apache License, Version 2.0; see LICENSE.
// Attention of many new tokens, as flash attention computes it (Dao, arXiv 2307.08691), for each kind of vectors;
// cached_attention.h includes it after kernels.h, whose plain loop it is. No more than a block of scores is kept: for each
// block of keys, packed once for all queries of a task,
//
//   scores = queries . keys, a packed product
//   weigh them; sums += weights . values, a packed product
namespace cached_attention {
namespace SIMD {

constexpr int OUTS = PACKED_VECTORS * WIDTH, BLOCK_UNITS = BLOCK / UNIT;

// What a thread needs for a task; kept from one to the next. Numbers are units of this arithmetic, but for the floats.
struct Room {
  std::vector<uint32_t> queries;               // in tiles of rows, [depth][rows of the tile]
  std::vector<uint32_t> wide, keys, values;    // a block's: [BLOCK][depth], [depth][BLOCK], [BLOCK_UNITS][width]
  std::vector<uint32_t> weights;               // a tile's, [rows][BLOCK_UNITS]
  std::vector<float> scores, sums;             // a tile's [rows][BLOCK], [queries][width]
  std::vector<float> scaled, largest, total;  // [dim], [queries], [queries]
};

template <int R>
SIMD_TARGET void score_tile(const uint32_t* query, const uint32_t* keys, int64_t depth, float* scores) {
  for (int k = 0; k < BLOCK; k += OUTS) {
    totals total[R][PACKED_VECTORS];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < PACKED_VECTORS; ++v) total[r][v] = fill(0);
    multiply_packed<R, 1>(query, keys + k, BLOCK, depth, total);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < PACKED_VECTORS; ++v) store(scores + r * BLOCK + k + v * WIDTH, total[r][v]);
  }
}

template <int R>
SIMD_TARGET void mix_tile(const uint32_t* weights, const uint32_t* values, int count, int64_t width, float* sums) {
  for (int64_t c = 0; c < width; c += OUTS) {
    totals total[R][PACKED_VECTORS];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < PACKED_VECTORS; ++v) total[r][v] = load(sums + r * width + c + v * WIDTH);
    multiply_packed<1, BLOCK_UNITS>(weights, values + c, width, count, total);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < PACKED_VECTORS; ++v) store(sums + r * width + c + v * WIDTH, total[r][v]);
  }
}

// What one query sees of a block's values from unit `first` on. Of a unit that it sees a part of the rest is taken for 0,
// which its weight is: no product with what may be infinite.
SIMD_TARGET inline void mix_rest(const uint32_t* weights, Room& room, int64_t first, int64_t seen, int64_t width,
                                 float* sums) {
  const int64_t whole = seen / UNIT;
  if (whole > first) mix_tile<1>(weights + first, &room.values[first * width], whole - first, width, sums);
  if (seen <= 0 || seen % UNIT == 0) return;
  for (int64_t c = 0; c < width; ++c) room.wide[c] = room.values[whole * width + c] & 0xffff;
  mix_tile<1>(weights + whole, room.wide.data(), 1, width, sums);
}

// The keys and values of a block, `count` of them; the missing ones are 0.
template <class T>
SIMD_TARGET void pack_keys(const T* key, const T* value, int count, int64_t dim, int64_t depth, int64_t width, Room& room) {
  std::fill(room.wide.begin(), room.wide.end(), 0);
  for (int j = 0; j < count; ++j) simd::SIMD::row_units(key + j * dim, dim, &room.wide[j * depth]);
  for (int j = 0; j < BLOCK; j += WIDTH) pack(&room.wide[j * depth], depth, depth, &room.keys[j], BLOCK);
  std::fill(room.values.begin(), room.values.end(), 0);
  for (int j = 0; j < count; j += UNIT)
    simd::SIMD::column_units(value + j * dim, dim, count - j, dim, &room.values[j / UNIT * width]);
}

// New tokens `begin` to `end` of one row for the queries of one key head.
template <class T>
SIMD_TARGET void attend_tiles(const Problem& p, int64_t row, int64_t head, int64_t begin, int64_t end, Room& room) {
  const int64_t group = p.group(), queries = (end - begin) * group, first = begin * group;
  const int64_t width = (p.dim + OUTS - 1) / OUTS * OUTS, depth = (p.dim + UNIT * WIDTH - 1) / (UNIT * WIDTH) * WIDTH;
  const int64_t past = p.lengths[row] - p.news, stop = past + end, kept = p.kept(row, head);
  const float scale = 1 / std::sqrt((float)p.dim);
  const auto number = [&](int64_t q) { return (row * p.heads + head * group + q % group) * p.news + begin + q / group; };
  room.queries.resize(queries * depth);
  room.wide.resize(BLOCK * depth);
  room.keys.resize(BLOCK * depth);
  room.values.resize(BLOCK_UNITS * width);
  room.weights.resize(PACKED_ROWS * BLOCK_UNITS);
  room.scores.resize(PACKED_ROWS * BLOCK);
  room.scaled.resize(p.dim);
  room.sums.assign(queries * width, 0.0f);
  room.largest.assign(queries, -INFINITY);
  room.total.assign(queries, 0.0f);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // first query, queries
  simd::in_tiles(queries, PACKED_ROWS, [&](int64_t q, int64_t rows) {
    tiles.push_back({q, rows});
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = p.query + p.at(row, head, first + q + r);
      for (int64_t i = 0; i < p.dim; ++i) room.scaled[i] = from[i] * scale;
      uint32_t* units = room.wide.data();
      std::fill(units, units + depth, 0);
      round_units(room.scaled.data(), p.dim, units);
      for (int64_t i = 0; i < depth; ++i) room.queries[q * depth + i * rows + r] = units[i];
    }
  });
  constexpr auto SCORE = simd::by_rows<PACKED_ROWS>([](auto r) { return score_tile<decltype(r)::value>; });
  constexpr auto MIX = simd::by_rows<PACKED_ROWS>([](auto r) { return mix_tile<decltype(r)::value>; });
  for (int64_t key = 0; key < stop; key += BLOCK) {
    const int count = std::min<int64_t>(BLOCK, stop - key);
    const int64_t from = kept + key * p.dim;
    pack_keys((const T*)p.key + from, (const T*)p.value + from, count, p.dim, depth, width, room);
    for (const auto& [q, rows] : tiles) {
      const auto seen = [&](int64_t q) { return std::min<int64_t>(count, past + begin + q / group + 1 - key); };
      const int most = seen(q + rows - 1);
      if (most <= 0) continue;
      SCORE.of[rows](&room.queries[q * depth], room.keys.data(), depth, room.scores.data());
      for (int64_t r = 0; r < rows; ++r) {
        float *scores = &room.scores[r * BLOCK], *sums = &room.sums[(q + r) * width];
        if (seen(q + r) > 0 && hide(p, row, key, seen(q + r), scores))
          weigh(scores, room.largest[q + r], room.total[q + r], sums, width);
        else
          std::fill(scores, scores + BLOCK, 0.0f);
        if (p.dropout > 0) {
          float factors[BLOCK];
          keep(p.dropout, p.seed, number(q + r), key, factors);
          for (int j = 0; j < BLOCK; ++j) scores[j] *= factors[j];
        }
      }
      round_units(room.scores.data(), rows * BLOCK, room.weights.data());
      const int64_t all = std::max<int64_t>(0, seen(q)) / UNIT;  // units of values that all of these queries see
      MIX.of[rows](room.weights.data(), room.values.data(), all, width, &room.sums[q * width]);
      for (int64_t r = 0; r < rows; ++r)
        mix_rest(&room.weights[r * BLOCK_UNITS], room, all, seen(q + r), width, &room.sums[(q + r) * width]);
    }
  }
  for (int64_t q = 0; q < queries; ++q) {
    float* out = p.out + p.at(row, head, first + q);
    if (p.logs) p.logs[number(q)] = room.largest[q] + std::log(room.total[q]);
    if (room.total[q] == 0)
      mean<T>(p, row, head, out);
    else
      for (int64_t i = 0; i < p.dim; ++i) out[i] = room.sums[q * width + i] / room.total[q];
  }
}

template <class T>
SIMD_TARGET void attend_many(const Problem& p) {
  const int64_t tokens = std::max<int64_t>(1, TASK_QUERIES / p.group()), parts = (p.news + tokens - 1) / tokens;
  const int64_t count = p.batch * p.kv_heads * parts;
  in_parallel(count, 1, count * tokens * p.group() * p.longest * p.dim, [&](int64_t task, int64_t last) {
    static thread_local Room room;
    for (; task < last; ++task) {
      const int64_t begin = (parts - 1 - task / (p.batch * p.kv_heads)) * tokens, one = task % (p.batch * p.kv_heads);
      attend_tiles<T>(p, one / p.kv_heads, one % p.kv_heads, begin, std::min(begin + tokens, p.news), room);
    }
  });
}

}  // namespace SIMD
}  // namespace cached_attention

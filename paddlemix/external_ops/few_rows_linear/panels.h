// Licensed under the Apache License, Version 2.0; see LICENSE.
// Many rows times weights, for each kind of arithmetic of simd_units.h; few_rows_linear.h includes it. The plain loop:
//
//   pack x in tiles of rows
//   for each panel, of PANEL_OUTS outputs and PANEL_COLUMNS inputs:
//     pack the weights in blocks of OUTS outputs
//     for each tile of rows and block of outputs: y[r][o] += the sum over the panel of x[r][i] * weight[o][i]
//
// Sums are made in one order, whatever the tile is: a row does not depend on its neighbours.
//
// The namespace of the arithmetic has UNIT, inputs of a unit, row_units and weight_units for what is packed, and how sums
// of GROUP_UNITS begin and end: first_total, add_group.
namespace few_rows_linear {
namespace SIMD {

constexpr int OUTS = PACKED_VECTORS * WIDTH, PANEL_OUTS = 2 * OUTS, PANEL_UNITS = PANEL_COLUMNS / UNIT;

// Outputs o to o + OUTS of the inputs from `first` on, `count` of them: units [PANEL_UNITS][OUTS], and their scales
// [groups][OUTS]. Missing outputs are 0.
template <class T>
SIMD_TARGET void pack_block(const Problem& p, int64_t o, int64_t first, int64_t count, uint32_t* to, float* scale) {
  alignas(64) uint32_t rows[WIDTH][PANEL_UNITS];
  const int64_t units = (count + UNIT - 1) / UNIT, whole = (units + WIDTH - 1) / WIDTH * WIDTH;
  for (int v = 0; v < PACKED_VECTORS; ++v) {
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t out = o + v * WIDTH + i;
      std::fill(rows[i] + (out < p.out ? (units - 1) / WIDTH * WIDTH : 0), rows[i] + whole, 0);
      if (out < p.out) weight_units<T>(p, out, first, count, rows[i], scale + v * WIDTH + i);
    }
    pack(rows[0], PANEL_UNITS, whole, to + v * WIDTH, OUTS);
  }
}

template <int R>
SIMD_TARGET void multiply_tile(const Problem& p, const PackedRows& x, const uint32_t* w, const float* scale, int64_t row,
                               int64_t o, int64_t first, int64_t units) {
  alignas(64) float sums[R][OUTS] = {};
  const uint32_t* from = &x.units[row * x.width + first * R];
  for (int64_t g = 0; g * GROUP_UNITS < units; ++g) {
    const int64_t at = first / GROUP_UNITS + g, count = std::min<int64_t>(GROUP_UNITS, units - g * GROUP_UNITS);
    totals total[R][PACKED_VECTORS];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < PACKED_VECTORS; ++v) total[r][v] = first_total(x, (row + r) * x.groups + at);
    multiply_packed<R, 1>(from + g * GROUP_UNITS * R, w + g * GROUP_UNITS * OUTS, OUTS, count, total);
    for (int v = 0; v < PACKED_VECTORS; ++v)
      for (int r = 0; r < R; ++r)
        add_group(total[r][v], scale + g * OUTS + v * WIDTH, x, (row + r) * x.groups + at, sums[r] + v * WIDTH);
  }
  const int64_t outs = std::min<int64_t>(OUTS, p.out - o);
  for (int r = 0; r < R; ++r) {
    float* y = p.y + (row + r) * p.out + o;
    if (first)
      for (int64_t i = 0; i < outs; ++i) y[i] += sums[r][i];
    else
      for (int64_t i = 0; i < outs; ++i) y[i] = sums[r][i];
  }
}

// Outputs from `begin` to `end`.
template <class T>
SIMD_TARGET void multiply_panels(const Problem& p, const PackedRows& x, int64_t begin, int64_t end) {
  constexpr int GROUPS = PANEL_COLUMNS / GROUP, BLOCK = PANEL_UNITS * OUTS;
  constexpr auto TILE = simd::by_rows<PACKED_ROWS>([](auto r) { return multiply_tile<decltype(r)::value>; });
  alignas(64) static thread_local uint32_t panel[PANEL_OUTS / OUTS * BLOCK];
  float scale[PANEL_OUTS / OUTS][GROUPS * OUTS];
  for (; begin < end; begin += PANEL_OUTS) {
    const int64_t stop = std::min(begin + PANEL_OUTS, end);
    for (int64_t first = 0; first < p.in; first += PANEL_COLUMNS) {
      const int64_t count = std::min<int64_t>(PANEL_COLUMNS, p.in - first), units = (count + UNIT - 1) / UNIT;
      for (int64_t o = begin, b = 0; o < stop; o += OUTS, ++b)
        pack_block<T>(p, o, first, count, panel + b * BLOCK, scale[b]);
      simd::in_tiles(p.rows, PACKED_ROWS, [&](int64_t row, int64_t rows) {
        for (int64_t o = begin, b = 0; o < stop; o += OUTS, ++b)
          TILE.of[rows](p, x, panel + b * BLOCK, scale[b], row, o, first / UNIT, units);
      });
    }
  }
}

// x as units, in tiles of at most MOST rows.
template <int MOST>
SIMD_TARGET void pack_rows(const Problem& p, PackedRows& x) {
  x.width = row_width(p);
  x.groups = p.groups();
  x.units.resize(p.rows * x.width);
  x.start.resize(p.rows * x.groups);
  x.scale.resize(p.rows * x.groups);
  std::vector<std::pair<int64_t, int64_t>> tiles;
  simd::in_tiles(p.rows, MOST, [&](int64_t row, int64_t rows) { tiles.push_back({row, rows}); });
  in_parallel(tiles.size(), 1, 16 * p.rows * p.in, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> units(x.width);
    for (; begin < end; ++begin) {
      const auto [row, rows] = tiles[begin];
      for (int64_t r = 0; r < rows; ++r) {
        row_units(p, row + r, units.data(), x);
        uint32_t* to = &x.units[row * x.width + r];
        for (int64_t i = 0; i < x.width; ++i) to[i * rows] = units[i];
      }
    }
  });
}

template <class T>
SIMD_TARGET void many_rows(const Problem& p) {
  static thread_local PackedRows x;  // its memory is kept: new pages take the system longer than the packing
  pack_rows<PACKED_ROWS>(p, x);
  in_parallel(p.out, PANEL_OUTS, p.rows * p.in * p.out,
              [&, from = &x](int64_t begin, int64_t end) { multiply_panels<T>(p, *from, begin, end); });
  if (x.units.size() > LARGEST_KEPT) x = PackedRows();
}

}  // namespace SIMD
}  // namespace few_rows_linear

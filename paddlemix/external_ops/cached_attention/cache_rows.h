// Licensed under the Apache License, Version 2.0; see LICENSE.
// The lengths and slots of rows in a cache, checked: cached_attention reads there, and decoder_step writes.
#pragma once

#include <algorithm>
#include <vector>

#include "paddle/phi/api/all.h"

struct CacheRows {
  const int64_t* lengths;      // [batch]
  std::vector<int64_t> slots;  // [batch]
  int64_t longest = 0;

  // Of `batch` rows with `news` new tokens each; cache [slots, kv_heads, capacity, dim].
  CacheRows(const paddle::Tensor& given, const paddle::optional<paddle::Tensor>& places, int64_t batch, int64_t news,
            const std::vector<int64_t>& cache)
      : slots(batch) {
    const auto is_rows = [&](const paddle::Tensor& t) {
      return t.is_cpu() && t.dtype() == paddle::DataType::INT64 && t.shape() == std::vector<int64_t>{batch};
    };
    PD_CHECK(is_rows(given) && (!places || is_rows(*places)), "lengths and slots must be int64 [B], on a CPU");
    PD_CHECK(places || batch == cache[0], "without slots the cache must have one for each row");
    lengths = given.data<int64_t>();
    for (int64_t i = 0; i < batch; ++i) {
      slots[i] = places ? places->data<int64_t>()[i] : i;
      PD_CHECK(news <= lengths[i] && lengths[i] <= cache[2], "a length must be of the new tokens to the capacity");
      PD_CHECK(0 <= slots[i] && slots[i] < cache[0], "a slot must be one of the cache's");
      longest = std::max(longest, lengths[i]);
    }
  }

  bool differ() const {
    std::vector<int64_t> sorted = slots;
    std::sort(sorted.begin(), sorted.end());
    return std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  }
};

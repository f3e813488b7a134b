// Causal attention over cached rows, tile by tile with a running softmax: no score matrix is kept.
#pragma once

#include <cstdint>

#include "cache.h"
#include "scratch.h"

namespace localds {

// `groups` of `queries` heads each; the heads of group g share its keys, columns
// [g * key_width, (g + 1) * key_width) of a cached row, and its values, columns
// [value_offset + g * value_width, ...). MLA is one group whose values are a part of its keys.
struct AttentionShape {
  int64_t groups;
  int64_t queries;
  int64_t key_width;
  int64_t value_width;
  int64_t value_offset;
  bool values_in_keys;
};

// q [groups, n * queries, key_width], scaled, rows ordered by token, then head: token t attends to
// the rows [0, past + t] of the cache. out [n, groups * queries, value_width].
void attend(const AttentionShape& shape, const CacheRows& cache, int64_t past, int64_t n,
            const float* q, float* out, Scratch& scratch);

}  // namespace localds

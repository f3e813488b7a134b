// Causal attention over cached rows, tile by tile with a running softmax: no score matrix is kept.
#pragma once

#include <cstdint>

#include "cache.h"
#include "profile.h"
#include "scratch.h"

namespace localds {

// `groups` of `queries` heads each; the heads of a group share its keys and values.
struct AttentionShape {
  int64_t groups;
  int64_t queries;
  int64_t key_width;
  int64_t value_width;
};

struct KeyValues {
  FloatTile keys;    // [rows, key_width]
  FloatTile values;  // [rows, value_width]
  bool rounded;      // read from a cache that is not float32
};

// Where keys and values come from. Used by several threads, each with its own `work`.
class KeySource {
 public:
  virtual ~KeySource() = default;

  // Floats of `work` for blocks of up to `rows` rows.
  virtual int64_t work_size(int64_t rows) const = 0;
  // Query rows that make reading a block worth while.
  virtual int64_t query_rows() const = 0;
  // Called once before the blocks of a group.
  virtual void start(int64_t group, float* work) const = 0;
  // What reading the first `rows` rows for all groups takes.
  virtual Work work(int64_t rows) const = 0;
  // The cache, where its rows are keys and, in their first columns, values; null otherwise.
  virtual const CacheRows* shared_rows() const { return nullptr; }
  // The cached rows [row0, row1) as `group` sees them.
  virtual KeyValues read(int64_t group, int64_t row0, int64_t row1, float* work) const = 0;
};

// Keys and values that lie in the cache as they are: for group g, columns [g * key_width, ...) and
// [value_offset + g * value_width, ...). With an offset of 0 the values are a part of the keys.
class CachedKeys : public KeySource {
 public:
  CachedKeys(const AttentionShape& shape, const CacheRows& cache, int64_t value_offset)
      : shape_(shape), cache_(cache), value_offset_(value_offset) {}

  int64_t work_size(int64_t rows) const override;
  int64_t query_rows() const override { return 64; }
  void start(int64_t, float*) const override {}
  Work work(int64_t rows) const override { return {.bytes = rows * cache_.row_bytes}; }
  const CacheRows* shared_rows() const override { return value_offset_ == 0 ? &cache_ : nullptr; }
  KeyValues read(int64_t group, int64_t row0, int64_t row1, float* work) const override;

 private:
  AttentionShape shape_;
  CacheRows cache_;
  int64_t value_offset_;
};

// q [groups, n * queries, key_width], scaled, rows ordered by token, then head: token t attends to
// the cached rows [0, past + t]. out [n, groups * queries, value_width].
void attend(const AttentionShape& shape, const KeySource& source, int64_t past, int64_t n,
            const float* q, float* out, Scratch& scratch);

}  // namespace localds

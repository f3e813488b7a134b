#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>

#include "kernels.h"
#include "phases.h"
#include "thread_pool.h"

namespace localds {
namespace {

constexpr int64_t kQueryTile = 64;    // query rows multiplied with a block at a time
constexpr int64_t kContextTile = 64;  // cached rows of a block
// Few query rows do not make enough tasks: then the context is cut too. A constant, so that
// results do not depend on the machine.
constexpr int64_t kWantedTasks = 32;

constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kernels on matrix tiles, if there are any and they fit; null otherwise.
const TiledAttention* usable_tiles(const AttentionShape& shape, const KeySource& source,
                                   int64_t seen) {
  constexpr int64_t kQueries = 16, kValues = 32;
  constexpr int64_t kFewRows = 2 * kContextTile;  // not worth packing the queries
  const CacheRows* rows = source.shared_rows();
  const bool fit = rows && rows->type == Type::F16 && seen > kFewRows && shape.groups == 1 &&
                   shape.queries % kQueries == 0 && shape.value_width % kValues == 0;
  return fit ? kernels().tiled_attention : nullptr;
}

// A thread's memory, for up to `rows` query rows.
struct TileScratch {
  float* source;   // of the key source, or a block packed for matrix tiles
  float* queries;  // packed for matrix tiles
  float* scores;   // [kQueryTile, kContextTile]
  float* context;  // [rows, value_width], weighted by exp(score - maximum)
  float* maximum;  // [rows]
  float* sum;      // [rows]
};

TileScratch take_tile_scratch(const AttentionShape& shape, const KeySource& source,
                              const TiledAttention* tiled, int64_t rows, Scratch& scratch) {
  const auto floats = [](int64_t bytes) { return bytes / static_cast<int64_t>(sizeof(float)); };
  const int64_t source_size =
      tiled ? floats(tiled->block_bytes(shape.key_width)) : source.work_size(kContextTile);
  const int64_t query_size = tiled ? floats(tiled->query_bytes(rows, shape.key_width)) : 0;
  return {scratch.take<float>(source_size),
          scratch.take<float>(query_size),
          scratch.take<float>(kQueryTile * kContextTile),
          scratch.take<float>(rows * shape.value_width),
          scratch.take<float>(rows),
          scratch.take<float>(rows)};
}

float max_of(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kNothing);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

// Turns one row of scores, of which `visible` may be seen, into weights, and updates the running
// maximum, sum and context of the row.
void softmax_step(float* scores, int64_t visible, int64_t n, float* maximum, float* sum,
                  float* context, int64_t value_width) {
  if (visible > 0) {
    const float highest = max_of(scores, visible);
    if (highest > *maximum) {
      if (*sum != 0) {
        const float shrink = std::exp(*maximum - highest);
        *sum *= shrink;
        kernels().scale(shrink, value_width, context);
      }
      *maximum = highest;
    }
    *sum += kernels().exp_sum(scores, visible, *maximum);
  }
  std::fill(scores + visible, scores + n, 0.0f);
}

// Everything about one call.
struct Attention {
  const AttentionShape& shape;
  const KeySource& source;
  const TiledAttention* tiled;
  int64_t past;
  int64_t n;
  const float* q;
  float* out;

  int64_t rows() const { return n * shape.queries; }  // query rows of a group
  Work work() const {
    Work total = source.work(past + n);
    const int64_t seen = n * past + n * (n + 1) / 2;
    total.floats += seen * shape.groups * shape.queries * (shape.key_width + shape.value_width);
    return total;
  }
  int64_t visible(int64_t row) const { return past + row / shape.queries + 1; }
  float* out_row(int64_t group, int64_t row) const {
    const int64_t token = row / shape.queries;
    const int64_t head = group * shape.queries + row % shape.queries;
    return out + (token * shape.groups * shape.queries + head) * shape.value_width;
  }

  const float* queries(int64_t group, int64_t row) const {
    return q + (group * rows() + row) * shape.key_width;
  }

  void range(int64_t group, int64_t row0, int64_t row1, int64_t begin, int64_t end,
             const TileScratch& t) const;
  void float_block(int64_t group, int64_t row0, int64_t row1, int64_t at, int64_t size,
                   const TileScratch& t) const;
  void tiled_block(int64_t row0, int64_t row1, int64_t at, int64_t size,
                   const TileScratch& t) const;
  template <class Body>
  void for_query_tiles(int64_t row0, int64_t row1, int64_t at, Body body) const;
  void soften(int64_t row, int64_t rows, int64_t row0, int64_t at, int64_t size,
              const TileScratch& t) const;
};

// Query rows [row0, row1) of `group` over the cached rows [begin, end), into t.context, t.maximum
// and t.sum.
void Attention::range(int64_t group, int64_t row0, int64_t row1, int64_t begin, int64_t end,
                      const TileScratch& t) const {
  std::fill_n(t.context, (row1 - row0) * shape.value_width, 0.0f);
  std::fill_n(t.maximum, row1 - row0, kNothing);
  std::fill_n(t.sum, row1 - row0, 0.0f);

  end = std::min(end, visible(row1 - 1));
  if (begin >= end) return;
  if (tiled) {
    tiled->pack_queries(queries(group, row0), row1 - row0, shape.key_width, t.queries);
  } else {
    source.start(group, t.source);
  }
  for (int64_t at = begin; at < end; at += kContextTile) {
    const int64_t size = std::min(kContextTile, end - at);
    if (tiled) {
      tiled_block(row0, row1, at, size, t);
    } else {
      float_block(group, row0, row1, at, size, t);
    }
  }
}

void Attention::float_block(int64_t group, int64_t row0, int64_t row1, int64_t at, int64_t size,
                            const TileScratch& t) const {
  const KeyValues block = source.read(group, at, at + size, t.source);
  const auto gemm_nt = block.rounded ? kernels().near_nt : kernels().gemm_nt;
  const auto gemm_nn = block.rounded ? kernels().near_nn : kernels().gemm_nn;
  for_query_tiles(row0, row1, at, [&](int64_t row, int64_t rows) {
    gemm_nt(rows, size, shape.key_width, queries(group, row), shape.key_width, block.keys.data,
            block.keys.stride, t.scores, kContextTile);
    soften(row, rows, row0, at, size, t);
    gemm_nn(rows, shape.value_width, size, t.scores, kContextTile, block.values.data,
            block.values.stride, t.context + (row - row0) * shape.value_width, shape.value_width);
  });
}

void Attention::tiled_block(int64_t row0, int64_t row1, int64_t at, int64_t size,
                            const TileScratch& t) const {
  const CacheRows& cache = *source.shared_rows();
  tiled->pack_block(cache.row(at), cache.row_bytes, size, shape.key_width, t.source);
  for_query_tiles(row0, row1, at, [&](int64_t row, int64_t rows) {
    const auto* packed = reinterpret_cast<const std::byte*>(t.queries) +
                         tiled->query_bytes(row - row0, shape.key_width);
    tiled->scores(packed, rows, t.source, size, shape.key_width, t.scores, kContextTile);
    soften(row, rows, row0, at, size, t);
    tiled->add_values(t.scores, kContextTile, rows, t.source, size, shape.key_width,
                      shape.value_width, t.context + (row - row0) * shape.value_width);
  });
}

// body(first row, rows) for the query tiles that see the cached row `at`.
template <class Body>
void Attention::for_query_tiles(int64_t row0, int64_t row1, int64_t at, Body body) const {
  for (int64_t row = row0; row < row1; row += kQueryTile) {
    const int64_t last = std::min(row1, row + kQueryTile);
    if (visible(last - 1) > at) body(row, last - row);
  }
}

// Turns the scores of a tile of query rows, over a block, into weights.
void Attention::soften(int64_t row, int64_t rows, int64_t row0, int64_t at, int64_t size,
                       const TileScratch& t) const {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t seen = std::clamp<int64_t>(visible(row + i) - at, 0, size);
    const int64_t to = row + i - row0;
    softmax_step(t.scores + i * kContextTile, seen, size, t.maximum + to, t.sum + to,
                 t.context + to * shape.value_width, shape.value_width);
  }
}

// What the tasks of a context cut in `chunks` leave behind.
struct Partials {
  int64_t chunks;
  int64_t rows;
  int64_t value_width;
  float* context;  // [groups, rows, chunks, value_width]
  float* maximum;  // [groups, rows, chunks]
  float* sum;

  void store(int64_t group, int64_t row, int64_t chunk, const float* c, float max, float s) {
    const int64_t at = (group * rows + row) * chunks + chunk;
    std::copy(c, c + value_width, context + at * value_width);
    maximum[at] = max;
    sum[at] = s;
  }

  void merge(int64_t group, int64_t row, float* out) const {
    const int64_t at = (group * rows + row) * chunks;
    const float highest = max_of(maximum + at, chunks);
    float total = 0;
    std::fill(out, out + value_width, 0.0f);
    for (int64_t i = at; i < at + chunks; ++i) {
      if (sum[i] == 0) continue;  // a chunk that this row does not see
      const float weight = std::exp(maximum[i] - highest);
      total += weight * sum[i];
      kernels().axpy(weight, context + i * value_width, value_width, out);
    }
    kernels().scale(1.0f / total, value_width, out);
  }
};

}  // namespace

int64_t CachedKeys::work_size(int64_t rows) const {
  return rows * (shape_.key_width + (value_offset_ == 0 ? 0 : shape_.value_width));
}

KeyValues CachedKeys::read(int64_t group, int64_t row0, int64_t row1, float* work) const {
  const int64_t key_width = shape_.key_width;
  const FloatTile keys = read_cache(cache_, row0, row1, group * key_width, key_width, work);
  const bool rounded = cache_.rounded();
  if (value_offset_ == 0) return {keys, keys, rounded};
  return {keys,
          read_cache(cache_, row0, row1, value_offset_ + group * shape_.value_width,
                     shape_.value_width, work + (row1 - row0) * key_width),
          rounded};
}

void attend(const AttentionShape& shape, const KeySource& source, int64_t past, int64_t n,
            const float* q, float* out, Scratch& scratch) {
  const TiledAttention* tiled = usable_tiles(shape, source, past + n);
  const Attention attention{shape, source, tiled, past, n, q, out};
  const Timed timed("attention", attention.work());
  const int64_t rows = attention.rows();
  const int64_t range_rows = std::min(rows, source.query_rows());
  const int64_t ranges = ceil_div(rows, range_rows);
  const int64_t blocks = ceil_div(past + n, kContextTile);
  const int64_t wanted = std::clamp<int64_t>(kWantedTasks / (shape.groups * ranges), 1, blocks);
  const int64_t chunk = ceil_div(blocks, wanted) * kContextTile;
  const int64_t chunks = ceil_div(past + n, chunk);

  Partials partials{chunks, rows, shape.value_width, nullptr, nullptr, nullptr};
  if (chunks > 1) {
    const int64_t count = shape.groups * rows * chunks;
    partials.context = scratch.take<float>(count * shape.value_width);
    partials.maximum = scratch.take<float>(count);
    partials.sum = scratch.take<float>(count);
  }
  TileScratch* tile_scratch = scratch.take<TileScratch>(scratch.threads());
  for (int i = 0; i < scratch.threads(); ++i) {
    tile_scratch[i] = take_tile_scratch(shape, source, tiled, range_rows, scratch);
  }

  auto task = [&](int64_t i, int thread) {
    const int64_t part = i % chunks;
    const int64_t group = i / chunks % shape.groups;
    // Late tokens see more: theirs are the long tasks, and go first.
    const int64_t row0 = (ranges - 1 - i / chunks / shape.groups) * range_rows;
    const int64_t row1 = std::min(rows, row0 + range_rows);
    const TileScratch& t = tile_scratch[thread];
    attention.range(group, row0, row1, part * chunk, (part + 1) * chunk, t);
    for (int64_t row = row0; row < row1; ++row) {
      const int64_t j = row - row0;
      const float* context = t.context + j * shape.value_width;
      if (chunks > 1) {
        partials.store(group, row, part, context, t.maximum[j], t.sum[j]);
      } else {
        float* to = attention.out_row(group, row);
        std::copy_n(context, shape.value_width, to);
        kernels().scale(1.0f / t.sum[j], shape.value_width, to);
      }
    }
  };
  ThreadPool::instance().run(ranges * shape.groups * chunks, std::ref(task));

  if (chunks > 1) {
    parallel_rows(shape.groups * rows, chunks * shape.value_width,
                  [&](int64_t i0, int64_t i1, int) {
                    for (int64_t i = i0; i < i1; ++i) {
                      partials.merge(i / rows, i % rows, attention.out_row(i / rows, i % rows));
                    }
                  });
  }
}

}  // namespace localds

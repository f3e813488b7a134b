#include "recorder.h"

#include <algorithm>
#include <stdexcept>

#include "thread_pool.h"

namespace localds {

namespace {

// squares[c] += row(i)[c]^2 for c in [column0, column1), rows in order.
void add_squares(const RecordedRows& part, int64_t column0, int64_t column1, double* squares) {
  for (int64_t i = 0; i < part.n; ++i) {
    const float* row = part.x + (part.rows ? part.rows[i] : i) * part.stride;
    for (int64_t c = column0; c < column1; ++c) {
      const double value = row[c];
      squares[c] += value * value;
    }
  }
}

}  // namespace

void Recorder::add(const char* name, int64_t matrices, int64_t columns,
                   std::span<const RecordedRows> parts) {
  auto found = sums_.find(name);
  if (found == sums_.end()) {
    Sums empty{columns, std::vector<double>(static_cast<size_t>(matrices * columns)),
               std::vector<int64_t>(static_cast<size_t>(matrices))};
    found = sums_.emplace(name, std::move(empty)).first;
  }
  Sums& sums = found->second;
  if (sums.columns != columns || static_cast<int64_t>(sums.counts.size()) != matrices) {
    throw std::invalid_argument(std::string("recorder: input '") + name +
                                "' changed its shape; use one recorder per layer");
  }
  // A task owns some columns of a matrix: sums are taken in the order of the rows.
  constexpr int64_t kTaskColumns = 512;
  const int64_t blocks = (columns + kTaskColumns - 1) / kTaskColumns;
  auto task = [&](int64_t i, int) {
    const RecordedRows& part = parts[static_cast<size_t>(i / blocks)];
    const int64_t column0 = i % blocks * kTaskColumns;
    add_squares(part, column0, std::min(columns, column0 + kTaskColumns),
                sums.squares.data() + part.matrix * columns);
  };
  ThreadPool::instance().run(static_cast<int64_t>(parts.size()) * blocks, std::ref(task));
  for (const RecordedRows& part : parts) sums.counts[static_cast<size_t>(part.matrix)] += part.n;
}

void Recorder::add(const char* name, const Activations& x) {
  const RecordedRows part{0, x.f32, x.f32_stride, nullptr, x.rows};
  add(name, 1, x.cols, {&part, 1});
}

const Recorder::Sums* Recorder::find(const std::string& name) const {
  const auto found = sums_.find(name);
  return found == sums_.end() ? nullptr : &found->second;
}

}  // namespace localds

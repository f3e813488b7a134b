// Python's view of the decoders of checkpoints.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "sources.h"
#include "thread_pool.h"

using namespace nanobind::literals;

namespace localds {
namespace {

using ByteRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRowsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WordRows = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Enough work for a task that waking a thread for it pays.
constexpr int64_t kTaskElements = 1 << 16;

void require(bool condition, const std::string& problem) {
  if (!condition) throw std::invalid_argument(problem);
}

SourceFloat source_float(const std::string& name) {
  if (name == "F16") return SourceFloat::F16;
  if (name == "BF16") return SourceFloat::BF16;
  if (name == "F8_E4M3") return SourceFloat::F8_E4M3;
  if (name == "F8_E5M2") return SourceFloat::F8_E5M2;
  throw std::invalid_argument("widen: type '" + name +
                              "' is not one of F16, BF16, F8_E4M3, F8_E5M2");
}

// Calls run(first, last) for parts of `count` items of `size` elements, on all threads.
template <class Run>
void in_parts(int64_t count, int64_t size, Run run) {
  const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, size));
  ThreadPool::instance().run((count + step - 1) / step, [&](int64_t task, int) {
    run(task * step, std::min(count, (task + 1) * step));
  });
}

// The results go where the caller says: numpy's allocations take large pages, which first use
// makes several times cheaper than small ones.

void widen_bytes(const std::string& type_name, ByteArray data, FloatsOut out) {
  const SourceFloat type = source_float(type_name);
  const int64_t width = width_of(type), n = static_cast<int64_t>(out.size());
  require(static_cast<int64_t>(data.size()) == n * width,
          "widen: " + std::to_string(data.size()) + " bytes are not " + std::to_string(n) + " " +
              type_name + " values");
  const uint8_t* in = data.data();
  float* to = out.data();
  const nb::gil_scoped_release release;
  in_parts(n, 1, [&](int64_t first, int64_t last) {
    widen(type, in + first * width, last - first, to + first);
  });
}

void scale_fp8(const std::string& type_name, ByteRows data, FloatRows scales, int64_t block_rows,
               int64_t block_columns, int64_t first_row, FloatRowsOut out) {
  const SourceFloat type = source_float(type_name);
  require(width_of(type) == 1, "scale_fp8: " + type_name + " values are not 8 bits wide");
  const auto rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
  require(data.shape(0) == out.shape(0) && data.shape(1) == out.shape(1),
          "scale_fp8: data and out differ in shape");
  const auto grid_rows = static_cast<int64_t>(scales.shape(0));
  const auto grid_cols = static_cast<int64_t>(scales.shape(1));
  require(block_rows > 0 && block_columns > 0 && first_row >= 0,
          "scale_fp8: a block must hold at least one value, and rows count from 0");
  require((first_row + rows + block_rows - 1) / block_rows <= grid_rows &&
              (cols + block_columns - 1) / block_columns <= grid_cols,
          "scale_fp8: " + std::to_string(grid_rows) + " x " + std::to_string(grid_cols) +
              " scales do not cover rows up to " + std::to_string(first_row + rows) + " of " +
              std::to_string(cols) + " columns");
  const uint8_t* in = data.data();
  const float* grid = scales.data();
  float* to = out.data();
  const nb::gil_scoped_release release;
  in_parts(rows, cols, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      widen_scaled(type, in + r * cols, cols, grid + (first_row + r) / block_rows * grid_cols,
                   block_columns, to + r * cols);
    }
  });
}

void unpack_integers(int bits, WordRows packed, FloatRows scales, std::optional<ByteRows> zeros,
                     int64_t group, FloatRowsOut out) {
  require(bits == 4 || bits == 8,
          "unpack_integers: " + std::to_string(bits) + " bits; 4 and 8 can be unpacked");
  const auto rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
  const auto words = static_cast<int64_t>(packed.shape(1));
  require(packed.shape(0) == out.shape(0) && words == (cols * bits + 31) / 32,
          "unpack_integers: " + std::to_string(words) + " words a row do not hold " +
              std::to_string(cols) + " integers of " + std::to_string(bits) + " bits");
  require(group > 0, "unpack_integers: a group must hold at least one value");
  const int64_t groups = (cols + group - 1) / group;
  const auto covers = [&](const auto& grid) {
    return static_cast<int64_t>(grid.shape(0)) == rows &&
           static_cast<int64_t>(grid.shape(1)) == groups;
  };
  require(covers(scales) && (!zeros || covers(*zeros)),
          "unpack_integers: scales and zeros must be " + std::to_string(rows) + " x " +
              std::to_string(groups));
  const uint32_t* in = packed.data();
  const float* scale = scales.data();
  const uint8_t* zero = zeros ? zeros->data() : nullptr;
  float* to = out.data();
  const nb::gil_scoped_release release;
  in_parts(rows, cols, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      unpack(bits, in + r * words, cols, scale + r * groups, zero ? zero + r * groups : nullptr,
             group, to + r * cols);
    }
  });
}

}  // namespace

void bind_sources(nb::module_& m) {
  m.def("widen", widen_bytes, "type"_a, "data"_a, "out"_a);
  m.def("scale_fp8", scale_fp8, "type"_a, "data"_a, "scales"_a, "block_rows"_a, "block_columns"_a,
        "first_row"_a, "out"_a);
  m.def("unpack_integers", unpack_integers, "bits"_a, "packed"_a, "scales"_a, "zeros"_a, "group"_a,
        "out"_a);
}

}  // namespace localds

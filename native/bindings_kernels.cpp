// Python's view of weights and of the kernels alone (the fused operations are bound elsewhere).
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "default_threads.h"
#include "quantize/quantize.h"
#include "thread_pool.h"

using namespace nanobind::literals;

namespace localds {
namespace {

[[noreturn]] void fail(const std::string& operation, const std::string& problem) {
  throw std::invalid_argument(operation + ": " + problem);
}

void require(bool condition, const std::string& operation, const std::string& problem) {
  if (!condition) fail(operation, problem);
}

int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) fail("Matrix", "the size overflows 64 bits");
  return product;
}

BoundMatrix make_matrix(uint32_t type_id, int64_t rows, int64_t cols, int64_t batch, ByteArray data,
                        std::optional<int64_t> batch_bytes) {
  const Type type = static_cast<Type>(type_id);
  const TypeInfo& info = type_info(type);
  require(rows > 0 && cols > 0 && batch > 0, "Matrix",
          "rows, cols and batch must be positive, got " + std::to_string(rows) + ", " +
              std::to_string(cols) + ", " + std::to_string(batch));
  require(cols % info.block_elements == 0, "Matrix",
          std::to_string(cols) + " columns are not a multiple of the " +
              std::to_string(info.block_elements) + " elements of a " + info.name + " block");
  const int64_t row_bytes = checked_product(cols / info.block_elements, info.block_bytes);
  const int64_t matrix_bytes = checked_product(rows, row_bytes);
  const int64_t stride = batch_bytes.value_or(matrix_bytes);
  require(stride >= matrix_bytes, "Matrix",
          "batch_bytes " + std::to_string(stride) + " is less than one matrix, " +
              std::to_string(matrix_bytes));
  int64_t needed;
  if (__builtin_add_overflow(checked_product(batch - 1, stride), matrix_bytes, &needed)) {
    fail("Matrix", "the size overflows 64 bits");
  }
  const auto size = static_cast<int64_t>(data.size());
  require(batch_bytes ? size >= needed : size == needed, "Matrix",
          std::string(info.name) + " data of " + std::to_string(size) + " bytes, but " +
              std::to_string(batch) + " x " + std::to_string(rows) + " x " + std::to_string(cols) +
              " weights take " + std::to_string(needed));
  const uint8_t* bytes = data.data();
  return {{type, rows, cols, batch, row_bytes, stride, bytes}, std::move(data)};
}

using Product = decltype(Kernels::gemm_rows);

void gemv_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
               const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  kernels().gemv_rows({&w, batch, out, out_stride}, nullptr, row0, row1, x, tokens, n);
}

Product choose_product(const std::string& kernel) {
  if (kernel == "auto") return matmul_rows;
  if (kernel == "gemv") return gemv_rows;
  if (kernel == "gemm") return kernels().gemm_rows;
  fail("matmul", "kernel '" + kernel + "' is not one of auto, gemv, gemm");
}

nb::ndarray<nb::numpy, float> matmul(const BoundMatrix& bound, FloatRows x, int64_t batch,
                                     const std::string& kernel) {
  const Matrix& w = bound.matrix;
  const auto n = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
  require(cols == w.cols, "matmul",
          "x has " + std::to_string(cols) + " columns, the matrix has " + std::to_string(w.cols));
  require(batch >= 0 && batch < w.batch, "matmul",
          "batch " + std::to_string(batch) + " is outside [0, " + std::to_string(w.batch) + ")");
  const Product product = choose_product(kernel);
  float* out = new float[static_cast<size_t>(n * w.rows)];
  const auto result = to_numpy(out, {static_cast<size_t>(n), static_cast<size_t>(w.rows)});
  const nb::gil_scoped_release release;
  ActivationBuffer buffer;
  buffer.reserve(x.data(), n, cols, cols);
  buffer.quantize(0, n);
  ThreadPool& pool = ThreadPool::instance();
  const int64_t step = rows_per_task(w, n, pool.size());
  pool.run((w.rows + step - 1) / step, [&](int64_t task, int) {
    const int64_t row0 = task * step, row1 = std::min(row0 + step, w.rows);
    product(w, batch, row0, row1, buffer.view(), nullptr, n, out + row0, w.rows);
  });
  return result;
}

nb::ndarray<nb::numpy, float> dequantize(const BoundMatrix& bound) {
  const Matrix& w = bound.matrix;
  const size_t shape[3] = {static_cast<size_t>(w.batch), static_cast<size_t>(w.rows),
                           static_cast<size_t>(w.cols)};
  float* out = new float[shape[0] * shape[1] * shape[2]];
  const auto result = to_numpy(out, shape);
  const nb::gil_scoped_release release;
  constexpr int64_t kRows = 32;
  const int64_t tasks = (w.rows + kRows - 1) / kRows;
  ThreadPool::instance().run(w.batch * tasks, [&](int64_t task, int) {
    const int64_t b = task / tasks, first = task % tasks * kRows;
    for (int64_t r = first; r < std::min(first + kRows, w.rows); ++r) {
      dequantize_row(w.type, w.row(b, r), out + (b * w.rows + r) * w.cols, w.cols);
    }
  });
  return result;
}

nb::ndarray<nb::numpy, uint8_t> quantize(uint32_t type_id, FloatRows x,
                                         std::optional<FloatRow> importance) {
  const Type type = static_cast<Type>(type_id);
  const TypeInfo& info = type_info(type);
  const auto rows = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
  require(cols > 0 && cols % info.block_elements == 0, "quantize",
          std::to_string(cols) + " columns are not a multiple of the " +
              std::to_string(info.block_elements) + " elements of a " + info.name + " block");
  require(!importance || static_cast<int64_t>(importance->size()) == cols, "quantize",
          "importance must have one value for each of " + std::to_string(cols) + " columns");
  const auto row_bytes = static_cast<size_t>(cols / info.block_elements * info.block_bytes);
  uint8_t* out = new uint8_t[x.shape(0) * row_bytes];
  const auto result = to_numpy(out, {x.shape(0), row_bytes});
  std::optional<Position> bad;
  {
    const nb::gil_scoped_release release;
    bad =
        quantize_matrix(type, x.data(), rows, cols, importance ? importance->data() : nullptr, out);
  }
  require(!bad, "quantize",
          !bad ? ""
               : "row " + std::to_string(bad->row) + ", column " + std::to_string(bad->column) +
                     " is NaN, infinite or too large for " + info.name);
  return result;
}

// a [m, k] and b [n, k] -> a . b^T [m, n]
nb::ndarray<nb::numpy, float> gemm_nt(FloatRows a, FloatRows b, bool near) {
  require(a.shape(1) == b.shape(1), "gemm_nt", "the inner sizes differ");
  const size_t m = a.shape(0), n = b.shape(0), k = a.shape(1);
  float* out = new float[m * n];
  const auto multiply = near ? kernels().near_nt : kernels().gemm_nt;
  multiply(static_cast<int64_t>(m), static_cast<int64_t>(n), static_cast<int64_t>(k), a.data(),
           static_cast<int64_t>(k), b.data(), static_cast<int64_t>(k), out,
           static_cast<int64_t>(n));
  return to_numpy(out, {m, n});
}

// a [m, k], b [k, n] and c [m, n] -> c + a . b [m, n]
nb::ndarray<nb::numpy, float> gemm_nn(FloatRows a, FloatRows b, FloatRows c, bool near) {
  const size_t m = a.shape(0), n = b.shape(1), k = a.shape(1);
  require(b.shape(0) == k && c.shape(0) == m && c.shape(1) == n, "gemm_nn", "the sizes disagree");
  float* out = new float[m * n];
  std::memcpy(out, c.data(), m * n * sizeof(float));
  const auto multiply = near ? kernels().near_nn : kernels().gemm_nn;
  multiply(static_cast<int64_t>(m), static_cast<int64_t>(n), static_cast<int64_t>(k), a.data(),
           static_cast<int64_t>(k), b.data(), static_cast<int64_t>(n), out,
           static_cast<int64_t>(n));
  return to_numpy(out, {m, n});
}

nb::ndarray<nb::numpy, float> rms_norm(FloatRow x, FloatRow weight, float eps) {
  require(x.size() == weight.size(), "rms_norm", "x and weight differ in size");
  float* out = new float[x.size()];
  kernels().rms_norm(x.data(), weight.data(), eps, static_cast<int64_t>(x.size()), out);
  return to_numpy(out, {x.size()});
}

nb::ndarray<nb::numpy, float> swiglu(FloatRow gate, FloatRow up) {
  require(gate.size() == up.size(), "swiglu", "gate and up differ in size");
  float* out = new float[gate.size()];
  kernels().swiglu(gate.data(), up.data(), static_cast<int64_t>(gate.size()), out);
  return to_numpy(out, {gate.size()});
}

nb::tuple exp_sum(FloatRow x, float max) {
  float* out = new float[x.size()];
  std::memcpy(out, x.data(), x.size() * sizeof(float));
  const float sum = kernels().exp_sum(out, static_cast<int64_t>(x.size()), max);
  return nb::make_tuple(to_numpy(out, {x.size()}), sum);
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<BoundMatrix>(m, "Matrix")
      .def(
          "__init__",
          [](BoundMatrix* self, uint32_t type, int64_t rows, int64_t cols, int64_t batch,
             ByteArray data, std::optional<int64_t> batch_bytes) {
            new (self) BoundMatrix(make_matrix(type, rows, cols, batch, data, batch_bytes));
          },
          "type"_a, "rows"_a, "cols"_a, "batch"_a, "data"_a, "batch_bytes"_a = nb::none())
      .def_prop_ro("type",
                   [](const BoundMatrix& b) { return static_cast<uint32_t>(b.matrix.type); })
      .def_prop_ro("rows", [](const BoundMatrix& b) { return b.matrix.rows; })
      .def_prop_ro("cols", [](const BoundMatrix& b) { return b.matrix.cols; })
      .def_prop_ro("batch", [](const BoundMatrix& b) { return b.matrix.batch; })
      .def_prop_ro("nbytes", [](const BoundMatrix& b) {
        return (b.matrix.batch - 1) * b.matrix.batch_bytes + b.matrix.rows * b.matrix.row_bytes;
      });
  m.def("matmul", matmul, "matrix"_a, "x"_a, "batch"_a = 0, "kernel"_a = "auto");
  m.def("dequantize", dequantize, "matrix"_a);
  m.def("quantize", quantize, "type"_a, "x"_a, "importance"_a = nb::none());
  m.def("available_isas", available_isas);
  m.def("select_isa", select_isa, "name"_a);
  m.def("isa", [] { return kernels().isa; });
  m.def("gemm_nt", gemm_nt, "a"_a, "b"_a, "near"_a = false);
  m.def("gemm_nn", gemm_nn, "a"_a, "b"_a, "c"_a, "near"_a = false);
  m.def("rms_norm", rms_norm, "x"_a, "weight"_a, "eps"_a);
  m.def("swiglu", swiglu, "gate"_a, "up"_a);
  m.def("exp_sum", exp_sum, "x"_a, "max"_a);
  m.def("physical_cores", physical_cores, "root"_a);
  m.def("quota_cores", quota_cores, "root"_a);
}

}  // namespace localds

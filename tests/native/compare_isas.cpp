// Compares the kernels of every instruction set of this processor with the portable ones, without
// Python: for builds that run under an emulator, as run_neon.sh makes one for 64-bit Arm. Prints
// the worst error of each, fails above the bound. For this processor, from the root of the
// repository:
//
//   cmake -S tests/native -B /tmp/build -DCMAKE_BUILD_TYPE=Release && cmake --build /tmp/build -j2
//   /tmp/build/compare_isas
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "formats.h"
#include "kernels.h"

using namespace localds;

namespace {

constexpr double kBound = 4e-6;  // of the sum of the magnitudes of the terms
constexpr float kScale = 0.01f;  // of the blocks of random weights
std::mt19937 random_bits(1);

std::vector<float> random_floats(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = normal(random_bits);
  return values;
}

std::vector<float> evenly_spaced(float first, float last, int64_t n) {
  std::vector<float> values;
  for (int64_t i = 0; i < n; ++i) {
    values.push_back(first + (last - first) * static_cast<float>(i) / static_cast<float>(n));
  }
  return values;
}

// In multiples of `unit`; NaN and infinities must be the same.
double difference(float got, float expected, double unit) {
  if (got == expected || (std::isnan(got) && std::isnan(expected))) return 0;
  const double error = std::fabs(static_cast<double>(got) - expected) / unit;
  return std::isfinite(error) ? error : INFINITY;
}

// Raises `worst` to the largest difference of what `compute` gives on `isa` from what it gives on
// the portable kernels, relative to `floor` plus the magnitude.
template <class Compute>
void compare(const std::string& isa, double floor, double& worst, Compute compute) {
  select_isa("portable");
  const std::vector<float> expected = compute();
  select_isa(isa);
  const std::vector<float> got = compute();
  for (size_t i = 0; i < got.size(); ++i) {
    const double unit = floor + std::fabs(static_cast<double>(expected[i]));
    worst = std::max(worst, difference(got[i], expected[i], unit));
  }
}

void put_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, 2);
}

// Random bytes, or all `fill`, whose scales are ordinary numbers.
std::vector<uint8_t> random_rows(Type type, int64_t rows, int64_t cols,
                                 std::optional<uint8_t> fill = std::nullopt) {
  const TypeInfo& info = type_info(type);
  if (type == Type::F32) {
    const std::vector<float> values = random_floats(rows * cols);
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    return {bytes, bytes + values.size() * sizeof(float)};
  }
  std::vector<uint8_t> data(
      static_cast<size_t>(rows * cols / info.block_elements * info.block_bytes));
  for (uint8_t& byte : data) byte = fill.value_or(static_cast<uint8_t>(random_bits()));
  const auto scale_at = [&](std::vector<int> offsets) {
    for (size_t i = 0; i < data.size(); i += static_cast<size_t>(info.block_bytes)) {
      for (const int offset : offsets) put_half(&data[i + static_cast<size_t>(offset)], kScale);
    }
  };
  switch (type) {
    case Type::F16:
    case Type::BF16:
      for (size_t i = 1; i < data.size(); i += 2) data[i] = (data[i] & 0x83) | 0x38;
      break;
    case Type::MXFP4:
      for (size_t i = 0; i < data.size(); i += sizeof(BlockMXFP4)) data[i] = 120;
      break;
    case Type::Q2_K:
      scale_at({80, 82});
      break;
    case Type::Q3_K:
      scale_at({108});
      break;
    case Type::Q6_K:
      scale_at({208});
      break;
    case Type::Q4_1:
    case Type::Q5_1:
    case Type::Q4_K:
    case Type::Q5_K:
      scale_at({0, 2});
      break;
    default:
      scale_at({0});
  }
  return data;
}

using Product = decltype(Kernels::gemm_rows);

void gemv(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
          const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  kernels().gemv_rows({&w, batch, out, out_stride}, nullptr, row0, row1, x, tokens, n);
}

// As the second of two matrices; the first one's products are overwritten.
void second_of_two(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
                   const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  const RowsOf rows{&w, batch, out, out_stride};
  kernels().gemv_rows(rows, &rows, row0, row1, x, tokens, n);
}

void gemm(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
          const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  kernels().gemm_rows(w, batch, row0, row1, x, tokens, n, out, out_stride);
}

// The largest error of a product, relative to the sum of the magnitudes of its terms. With `fill`
// all weights have that bit pattern and all activations are as large as can be: no sum may
// overflow.
double product_error(const std::string& isa, Product product, Type type, int64_t cols, int64_t n,
                     std::optional<uint8_t> fill = std::nullopt) {
  constexpr int64_t kRows = 37, kCut = 16;
  const std::vector<uint8_t> data = random_rows(type, kRows, cols, fill);
  const auto row_bytes = static_cast<int64_t>(data.size()) / kRows;
  const Matrix w{type, kRows, cols, 1, row_bytes, kRows * row_bytes, data.data()};
  std::vector<float> x = random_floats(n * cols);
  if (fill) std::fill(x.begin(), x.end(), n % 2 ? 1.0f : -1.0f);
  // Half of the numbers of tokens come with a list of them, backwards.
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(n - 1 - i));
  const int32_t* list = n % 2 ? nullptr : tokens.data();

  const auto run = [&](const std::string& name, Product multiply) {
    select_isa(name);
    ActivationBuffer buffer;
    buffer.reserve(x.data(), n, cols, cols);
    buffer.quantize(0, n);
    std::vector<float> out(static_cast<size_t>(n * kRows));
    const auto rows = [&](int64_t row0, int64_t row1) {
      multiply(w, 0, row0, row1, buffer.view(), list, n, out.data() + row0, kRows);
    };
    rows(0, kCut);
    rows(kCut, kRows);
    return out;
  };
  const std::vector<float> expected = run("portable", gemv);
  const std::vector<float> got = run(isa, product);

  double worst = 0;
  std::vector<float> weights(static_cast<size_t>(cols));
  for (int64_t r = 0; r < kRows; ++r) {
    dequantize_row(type, w.row(0, r), weights.data(), cols);
    for (int64_t i = 0; i < n; ++i) {
      const float* activations = &x[static_cast<size_t>((list ? list[i] : i) * cols)];
      // Offsets are subtracted at the end, so small sums keep the error of large ones.
      double terms = fill ? 128 * kScale * static_cast<double>(cols) : 0;
      for (int64_t c = 0; c < cols; ++c) {
        terms += std::fabs(static_cast<double>(weights[static_cast<size_t>(c)]) * activations[c]);
      }
      const auto at = static_cast<size_t>(i * kRows + r);
      worst = std::max(worst, difference(got[at], expected[at], terms));
    }
  }
  return worst;
}

double products_error(const std::string& isa, Type type) {
  double worst = 0;
  for (const Product product : {gemv, second_of_two, gemm}) {
    for (const int64_t cols : {77, 96, 256, 1408, 1536}) {
      if (cols % type_info(type).block_elements) continue;
      for (const int64_t n : {1, 2, 3, 4, 7, 12, 29}) {
        worst = std::max(worst, product_error(isa, product, type, cols, n));
      }
    }
    for (const uint8_t fill : {0x00, 0x7f, 0x80, 0x81, 0xff}) {
      for (const int64_t n : {3, 12}) {
        worst = std::max(worst, product_error(isa, product, type, 256, n, fill));
      }
    }
  }
  return worst;
}

double dequantize_error(const std::string& isa, Type type) {
  const TypeInfo& info = type_info(type);
  double worst = 0;
  for (const int64_t cols : {int64_t{1536}, info.is_float ? 77 : info.block_elements}) {
    const std::vector<uint8_t> data = random_rows(type, 1, cols);
    compare(isa, kScale, worst, [&] {
      std::vector<float> out(static_cast<size_t>(cols));
      kernels().dequantize_row(type, data.data(), out.data(), cols);
      return out;
    });
  }
  return worst;
}

// Every pattern of two bytes as F16 and as BF16, infinities, NaN and subnormal numbers among them.
double half_patterns_error(const std::string& isa) {
  std::vector<uint8_t> bytes;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    bytes.push_back(static_cast<uint8_t>(bits));
    bytes.push_back(static_cast<uint8_t>(bits >> 8));
  }
  double worst = 0;
  for (const Type type : {Type::F16, Type::BF16}) {
    compare(isa, 0, worst, [&] {
      std::vector<float> out(bytes.size() / 2);
      kernels().dequantize_row(type, bytes.data(), out.data(), static_cast<int64_t>(out.size()));
      return out;
    });
  }
  return worst;
}

// Activations of all sizes: scales, integers and sums are the same on all processors.
double activations_error(const std::string& isa) {
  double worst = 0;
  for (const int64_t cols : {5, 256, 577}) {
    for (const float size : {0.0f, 1e-40f, 1e-31f, 1e-20f, 1.0f, 1e30f, INFINITY, NAN}) {
      std::vector<float> x = random_floats(cols);
      for (float& v : x) v *= size;
      compare(isa, 0, worst, [&] {
        ActivationBuffer buffer;
        buffer.reserve(x.data(), 1, cols, cols);
        buffer.quantize(0, 1);
        const Activations& made = buffer.view();
        std::vector<float> out(made.scale, made.scale + made.q_stride / kGroup);
        if (!std::isfinite(size)) return out;  // whatever the integers, products will not be finite
        out.insert(out.end(), made.q, made.q + made.q_stride);
        out.insert(out.end(), made.sum, made.sum + made.q_stride / kHalfGroup);
        return out;
      });
    }
  }
  return worst;
}

double gemm_error(const std::string& isa) {
  constexpr int64_t kSizes[][3] = {{1, 1, 1},   {3, 5, 7},    {7, 45, 83},
                                   {8, 64, 64}, {9, 77, 130}, {6, 512, 3}};
  double worst = 0;
  for (const auto& [m, n, k] : kSizes) {
    const std::vector<float> a = random_floats(m * k), b = random_floats(n * k);
    const std::vector<float> before = random_floats(m * n);
    const auto terms = static_cast<double>(k);  // each of magnitude 1 or so
    for (const auto gemm : {&Kernels::gemm_nt, &Kernels::gemm_nn}) {
      compare(isa, terms, worst, [&] {
        std::vector<float> c(before);
        const int64_t ldb = gemm == &Kernels::gemm_nt ? k : n;
        (kernels().*gemm)(m, n, k, a.data(), k, b.data(), ldb, c.data(), n);
        return c;
      });
    }
  }
  return worst;
}

double elementwise_error(const std::string& isa) {
  constexpr double kSubnormal = 1e-36;  // numbers 1e9 times smaller have hardly any bits left
  double worst = 0;
  // `compute` changes a copy of x.
  const auto compare_on = [&](const std::vector<float>& x, double floor, auto compute) {
    compare(isa, floor, worst, [&] {
      std::vector<float> copy(x);
      compute(copy);
      return copy;
    });
  };
  const auto exp_sum = [](auto& x) {
    x.push_back(kernels().exp_sum(x.data(), static_cast<int64_t>(x.size()), 3.0f));
  };
  for (const int64_t n : {1, 7, 64, 581, 7169}) {
    const std::vector<float> a = random_floats(n), b = random_floats(n);
    compare_on(a, 0, [&](auto& x) { kernels().rms_norm(x.data(), b.data(), 1e-6f, n, x.data()); });
    compare_on(a, 1, [&](auto& y) { kernels().axpy(0.3f, b.data(), n, y.data()); });
    compare_on(a, 0, [&](auto& x) { kernels().scale(0.3f, n, x.data()); });
    compare_on(evenly_spaced(-120, 120, n), kSubnormal,
               [&](auto& gate) { kernels().swiglu(gate.data(), b.data(), n, gate.data()); });
    compare_on(evenly_spaced(-87, 3, n), kSubnormal, exp_sum);
  }
  compare_on({-INFINITY, -1e30f, 3, NAN}, kSubnormal, exp_sum);
  return worst;
}

}  // namespace

int main() {
  const Type types[] = {Type::F32,  Type::F16,    Type::BF16,   Type::Q4_0, Type::Q4_1, Type::Q5_0,
                        Type::Q5_1, Type::Q8_0,   Type::Q2_K,   Type::Q3_K, Type::Q4_K, Type::Q5_K,
                        Type::Q6_K, Type::IQ4_NL, Type::IQ4_XS, Type::MXFP4};
  std::vector<std::string> isas = available_isas();
  isas.pop_back();  // the portable one
  bool good = !isas.empty();
  for (const std::string& isa : isas) {
    const auto report = [&](const char* what, double worst) {
      std::printf("%-8s %-20s %.1e\n", isa.c_str(), what, worst);
      good = good && worst < kBound;
    };
    for (const Type type : types) {
      report(type_info(type).name,
             std::max(products_error(isa, type), dequantize_error(isa, type)));
    }
    report("patterns of halves", half_patterns_error(isa));
    report("int8 activations", activations_error(isa));
    report("products of floats", gemm_error(isa));
    report("elementwise", elementwise_error(isa));
  }
  std::puts(good ? "all within the bound" : "FAILED");
  return good ? 0 : 1;
}

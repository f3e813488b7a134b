// Compares the kernels of every instruction set of this processor with the portable ones, without
// Python: for cross-compiled builds under an emulator. Prints the worst error of each, fails above
// the bound. For 64-bit Arm, from the folder native/:
//
//   g++="aarch64-linux-gnu-g++ -std=c++20 -O3 -static -I. -DLOCALDS_NEON"
//   $g++ -march=armv8.2-a+dotprod+fp16 -c isa/neon.cpp
//   $g++ ../tests/native/compare_isas.cpp kernels.cpp formats.cpp isa/portable.cpp neon.o -o
//   compare qemu-aarch64 ./compare
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "formats.h"
#include "kernels.h"

using namespace localds;

namespace {

constexpr double kBound = 4e-6;  // of the sum of the magnitudes of the terms
std::mt19937 random_bits(1);

std::vector<float> random_floats(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = normal(random_bits);
  return values;
}

void put_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, 2);
}

// Random bytes whose scales are ordinary numbers.
std::vector<uint8_t> random_rows(Type type, int64_t rows, int64_t cols) {
  const TypeInfo& info = type_info(type);
  if (type == Type::F32) {
    const std::vector<float> values = random_floats(rows * cols);
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    return {bytes, bytes + values.size() * sizeof(float)};
  }
  std::vector<uint8_t> data(
      static_cast<size_t>(rows * cols / info.block_elements * info.block_bytes));
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(random_bits());
  const auto scale_at = [&](std::vector<int> offsets) {
    for (size_t i = 0; i < data.size(); i += static_cast<size_t>(info.block_bytes)) {
      for (const int offset : offsets) put_half(&data[i + static_cast<size_t>(offset)], 0.01f);
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

using Product = decltype(Kernels::gemv_rows);

// The largest error of a product, relative to the sum of the magnitudes of its terms.
double product_error(const std::string& isa, Product Kernels::* member, Type type, int64_t cols,
                     int64_t n) {
  constexpr int64_t kRows = 37;
  const std::vector<uint8_t> data = random_rows(type, kRows, cols);
  const auto row_bytes = static_cast<int64_t>(data.size()) / kRows;
  const Matrix w{type, kRows, cols, 1, row_bytes, kRows * row_bytes, data.data()};
  const std::vector<float> x = random_floats(n * cols);

  const auto run = [&](const std::string& name, Product Kernels::* product) {
    select_isa(name);
    ActivationBuffer buffer;
    buffer.reserve(x.data(), n, cols, cols);
    buffer.quantize(0, n);
    std::vector<float> out(static_cast<size_t>(n * kRows));
    (kernels().*product)(w, 0, 0, kRows, buffer.view(), nullptr, n, out.data(), kRows);
    return out;
  };
  const std::vector<float> expected = run("portable", &Kernels::gemv_rows);
  const std::vector<float> got = run(isa, member);

  double worst = 0;
  std::vector<float> weights(static_cast<size_t>(cols));
  for (int64_t r = 0; r < kRows; ++r) {
    dequantize_row(type, w.row(0, r), weights.data(), cols);
    for (int64_t i = 0; i < n; ++i) {
      double terms = 0;
      for (int64_t c = 0; c < cols; ++c) {
        terms += std::fabs(static_cast<double>(weights[static_cast<size_t>(c)]) *
                           x[static_cast<size_t>(i * cols + c)]);
      }
      const auto at = static_cast<size_t>(i * kRows + r);
      const double error = std::fabs(static_cast<double>(got[at]) - expected[at]);
      worst = std::max(worst, std::isfinite(error) ? error / terms : INFINITY);
    }
  }
  return worst;
}

double float_kernels_error(const std::string& isa) {
  double worst = 0;
  const auto compare = [&](auto compute) {
    select_isa("portable");
    const std::vector<float> expected = compute();
    select_isa(isa);
    const std::vector<float> got = compute();
    for (size_t i = 0; i < got.size(); ++i) {
      const double error = std::fabs(static_cast<double>(got[i]) - expected[i]);
      worst = std::max(worst, error / (1 + std::fabs(static_cast<double>(expected[i]))));
    }
  };
  const int64_t m = 7, n = 45, k = 83;
  const std::vector<float> a = random_floats(m * k), b = random_floats(n * k);
  compare([&] {
    std::vector<float> c(static_cast<size_t>(m * n));
    kernels().gemm_nt(m, n, k, a.data(), k, b.data(), k, c.data(), n);
    return c;
  });
  compare([&] {
    std::vector<float> c(static_cast<size_t>(m * n), 1.0f);
    kernels().gemm_nn(m, n, k, a.data(), k, b.data(), n, c.data(), n);
    return c;
  });
  compare([&] {
    std::vector<float> out(a);
    const auto size = static_cast<int64_t>(a.size());
    kernels().rms_norm(a.data(), b.data(), 1e-6f, size, out.data());
    kernels().swiglu(out.data(), b.data(), size, out.data());
    kernels().axpy(0.5f, b.data(), size, out.data());
    kernels().scale(0.3f, size, out.data());
    out.push_back(kernels().exp_sum(out.data(), size, 3.0f) / static_cast<float>(size));
    return out;
  });
  return worst;
}

}  // namespace

int main() {
  const Type types[] = {Type::F32,  Type::F16,    Type::BF16,   Type::Q4_0, Type::Q4_1, Type::Q5_0,
                        Type::Q5_1, Type::Q8_0,   Type::Q2_K,   Type::Q3_K, Type::Q4_K, Type::Q5_K,
                        Type::Q6_K, Type::IQ4_NL, Type::IQ4_XS, Type::MXFP4};
  bool good = true;
  for (const std::string& isa : available_isas()) {
    for (const Type type : types) {
      double worst = 0;
      for (const int64_t cols : {96, 256, 1408, 1536}) {
        if (cols % type_info(type).block_elements) continue;
        for (const int64_t n : {1, 2, 3, 4, 7, 12, 29}) {
          worst = std::max({worst, product_error(isa, &Kernels::gemv_rows, type, cols, n),
                            product_error(isa, &Kernels::gemm_rows, type, cols, n)});
        }
      }
      std::printf("%-8s %-6s %.1e\n", isa.c_str(), type_info(type).name, worst);
      good = good && worst < kBound;
    }
    const double worst = float_kernels_error(isa);
    std::printf("%-8s floats %.1e\n", isa.c_str(), worst);
    good = good && worst < kBound;
  }
  std::puts(good ? "all within the bound" : "FAILED");
  return good ? 0 : 1;
}

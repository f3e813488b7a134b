#include "quantize/quantize.h"

#include <algorithm>
#include <atomic>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace localds {
namespace {

// About how many weights a task takes: they and their blocks stay in the second-level cache.
constexpr int64_t kTaskElements = 1 << 16;

// What unimportant columns still count for, next to the mean: a block of them must not be lost.
constexpr float kLeastImportance = 1e-6f;

QuantizeRows chosen_quantizer() {
  const std::string_view isa = kernels().isa;
#if defined(LOCALDS_X86)
  if (isa == "avx512") return avx512_quantizer();
  if (isa == "avx2") return avx2_quantizer();
#elif defined(LOCALDS_NEON)
  if (isa == "neon") return neon_quantizer();
#endif
  return portable_quantizer();
}

// Importance over its mean, so that sums of squares neither vanish nor overflow.
std::vector<float> column_weights(const float* importance, int64_t cols) {
  std::vector<float> weights(static_cast<size_t>(cols), 1.0f);
  if (!importance) return weights;
  double sum = 0;
  for (int64_t c = 0; c < cols; ++c) sum += importance[c];
  if (!(sum > 0)) return weights;
  const double mean = sum / static_cast<double>(cols);
  for (int64_t c = 0; c < cols; ++c) {
    weights[static_cast<size_t>(c)] =
        std::max(static_cast<float>(importance[c] / mean), kLeastImportance);
  }
  return weights;
}

// Whether the type can hold all values: NaN and infinities never, and F16 none that round to one.
bool is_storable(Type type, const float* x, int64_t n) {
  // 65520, which float16 rounds to infinity, times this overflows.
  const float factor = type == Type::F16 ? 0x1.001002p112f : 1.0f;
  float product = 0;  // NaN once any value is NaN or infinite
  for (int64_t i = 0; i < n; ++i) product += x[i] * factor * 0.0f;
  return product == 0;
}

Position find_not_storable(Type type, const float* x, int64_t rows, int64_t cols) {
  const float* found =
      std::find_if(x, x + rows * cols, [=](const float& v) { return !is_storable(type, &v, 1); });
  return {(found - x) / cols, (found - x) % cols};
}

}  // namespace

std::optional<Position> quantize_matrix(Type type, const float* x, int64_t rows, int64_t cols,
                                        const float* importance, uint8_t* out) {
  const TypeInfo& info = type_info(type);
  const int64_t row_bytes = cols / info.block_elements * info.block_bytes;
  const std::vector<float> weights = column_weights(importance, cols);
  const QuantizeRows quantize_rows = chosen_quantizer();
  const int64_t step = std::max<int64_t>(1, kTaskElements / cols);
  std::atomic<bool> storable = true;
  ThreadPool::instance().run((rows + step - 1) / step, [&](int64_t task, int) {
    const int64_t first = task * step, count = std::min(step, rows - first);
    const float* values = x + first * cols;
    uint8_t* blocks = out + first * row_bytes;
    if (!is_storable(type, values, count * cols)) {
      storable = false;
    } else {
      quantize_rows(type, values, count, cols, weights.data(), blocks);
    }
  });
  if (storable) return std::nullopt;
  return find_not_storable(type, x, rows, cols);
}

}  // namespace localds

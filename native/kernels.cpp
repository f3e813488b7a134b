#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "formats.h"
#include "isa/tables.h"

#if defined(LOCALDS_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace localds {
namespace {

constexpr size_t kAlignment = 64;

// More tokens than one pass over a row takes pay for repacking the rows.
constexpr int64_t kGemvTokens = 4;

#if defined(LOCALDS_NEON)
bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Apple processor with this architecture
#endif
}
#endif

// Best first; only what this processor has.
std::vector<const Kernels*> usable_tables() {
  std::vector<const Kernels*> tables;
#if defined(LOCALDS_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  const bool amx = avx512 && __builtin_cpu_supports("amx-tile") &&
                   __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
                   __builtin_cpu_supports("avx512bf16") && request_amx();
  if (amx) tables.push_back(&amx_kernels());
  if (avx512) tables.push_back(&avx512_kernels());
  if (avx2) tables.push_back(&avx2_kernels());
#elif defined(LOCALDS_NEON)
  if (has_dot_products()) tables.push_back(&neon_kernels());
#endif
  tables.push_back(&portable_kernels());
  return tables;
}

const Kernels* find_table(const std::string& name) {
  std::string names;
  for (const Kernels* table : usable_tables()) {
    if (table->isa == name) return table;
    names += names.empty() ? "" : ", ";
    names += table->isa;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not available; this processor has " + names);
}

const Kernels* initial_table() {
  const char* forced = std::getenv("LOCALDS_ISA");
  return forced && *forced ? find_table(forced) : usable_tables().front();
}

std::atomic<const Kernels*>& chosen_table() {
  static std::atomic<const Kernels*> table = initial_table();
  return table;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

void quantize_row_q8_0(const float* x, uint8_t* row, int64_t cols) {
  for (int64_t i = 0; i < cols; i += 32, row += sizeof(BlockQ8_0)) {
    float amax = 0;
    for (int j = 0; j < 32; ++j) amax = std::max(amax, std::fabs(x[i + j]));
    const float d = amax / 127;
    const float inverse = d != 0 ? 1 / d : 0;
    const uint16_t half = float_to_half(d);
    std::memcpy(row, &half, 2);
    for (int j = 0; j < 32; ++j) {
      const float q = std::fmin(std::fmax(std::round(x[i + j] * inverse), -127.0f), 127.0f);
      row[2 + j] = static_cast<uint8_t>(static_cast<int8_t>(q));
    }
  }
}

}  // namespace

const Kernels& kernels() { return *chosen_table().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : usable_tables()) names.emplace_back(table->isa);
  return names;
}

void select_isa(const std::string& name) { chosen_table().store(find_table(name)); }

void* thread_scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    const size_t size = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(64, size);
    if (!data) throw std::bad_alloc();
    std::free(buffer.data);
    buffer.data = data;
    buffer.size = size;
  }
  return buffer.data;
}

void ActivationBuffer::reserve(const float* x, int64_t rows, int64_t cols, int64_t stride) {
  const int64_t padded = round_up(cols, kSpan);
  const auto elements = static_cast<size_t>(rows * padded);
  if (scale_.size() < elements / kGroup) {
    // Vectors that cross cache lines would be loaded at half the speed.
    bytes_.resize(2 * elements + kAlignment);
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    q_ = bytes_.data() + (kAlignment - address % kAlignment) % kAlignment;
    scale_.resize(elements / kGroup);
    sum_.resize(elements / kHalfGroup);
  }
  arranged_ = q_ + elements;
  view_ = {rows, cols, x, stride, q_, arranged_, scale_.data(), sum_.data(), padded};
}

void ActivationBuffer::quantize(int64_t row0, int64_t row1) {
  const int64_t padded = view_.q_stride;
  for (int64_t r = row0; r < row1; ++r) {
    kernels().quantize_activations(view_.f32 + r * view_.f32_stride, view_.cols, padded,
                                   q_ + r * padded, arranged_ + r * padded,
                                   scale_.data() + r * padded / kGroup,
                                   sum_.data() + r * padded / kHalfGroup);
  }
}

void matmul_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
                 const int32_t* tokens, int64_t n, float* out, int64_t out_stride) {
  if (n <= kGemvTokens) {
    kernels().gemv_rows({&w, batch, out, out_stride}, nullptr, row0, row1, x, tokens, n);
  } else {
    kernels().gemm_rows(w, batch, row0, row1, x, tokens, n, out, out_stride);
  }
}

void matmul_two_rows(const RowsOf& a, const RowsOf& b, int64_t row0, int64_t row1,
                     const Activations& x, const int32_t* tokens, int64_t n) {
  if (n <= kGemvTokens && a.w->type == b.w->type) {
    return kernels().gemv_rows(a, &b, row0, row1, x, tokens, n);
  }
  for (const RowsOf& part : {a, b}) {
    matmul_rows(*part.w, part.batch, row0, row1, x, tokens, n, part.out, part.out_stride);
  }
}

int64_t rows_per_task(const Matrix& w, int64_t n_tokens, int n_threads) {
  constexpr int64_t kGemvBytes = 640 << 10;  // 40 us at 16 bytes a nanosecond
  constexpr int64_t kGemmRows = 128;         // so that packing the tokens costs 3% of a task
  const int64_t rows = n_tokens <= kGemvTokens ? kGemvBytes / w.row_bytes + 1 : kGemmRows;
  // Not so many that threads are left without a share.
  const int64_t share = (w.rows + 2 * n_threads - 1) / (2 * n_threads);
  return round_up(std::min(rows, share), kRowTile);
}

void dequantize_row(Type type, const uint8_t* row, float* out, int64_t cols) {
  kernels().dequantize_row(type, row, out, cols);
}

void quantize_row(Type type, const float* x, uint8_t* row, int64_t cols) {
  switch (type) {
    case Type::F32:
      std::memcpy(row, x, static_cast<size_t>(cols) * sizeof(float));
      return;
    case Type::F16:
      for (int64_t i = 0; i < cols; ++i) {
        const uint16_t half = float_to_half(x[i]);
        std::memcpy(row + 2 * i, &half, 2);
      }
      return;
    case Type::Q8_0:
      return quantize_row_q8_0(x, row, cols);
    default:
      throw std::invalid_argument(std::string("cannot quantize a row to ") + type_info(type).name +
                                  "; use F32, F16 or Q8_0");
  }
}

}  // namespace localds

// The kernels that exist once per instruction set, and the products built on them.
//
// `kernels()` is chosen once, from what the processor has (or LOCALDS_ISA); every fused operation
// goes through it. All functions are single-threaded and may run on any thread; parallelism is the
// caller's, by rows or by tokens. Results never depend on how the caller splits rows.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "matrix.h"

namespace localds {

// Activations are quantized to int8 in groups of 32 with one float scale per group. Weights whose
// value is s * u + m (u unsigned) also need the sums of the q; they are kept per 16 elements.
inline constexpr int64_t kGroup = 32;
inline constexpr int64_t kHalfGroup = 16;

// Rows of activations in both forms. Pointers belong to an ActivationBuffer (or to the caller).
struct Activations {
  int64_t rows = 0;
  int64_t cols = 0;
  const float* f32 = nullptr;  // [rows, f32_stride], first `cols` used
  int64_t f32_stride = 0;
  const int8_t* q = nullptr;  // [rows, cols rounded up to 256], zero padded; null if not made
  const int8_t* arranged = nullptr;  // the same, in the order of isa/decoders.h
  const float* scale = nullptr;      // [rows, padded / 32]
  const int16_t* sum = nullptr;      // [rows, padded / 16]: sums of 16 q
  int64_t q_stride = 0;              // padded cols
};

// Owns the int8 form. `reserve` once, then `quantize` row ranges from any threads.
class ActivationBuffer {
 public:
  ActivationBuffer() = default;
  ActivationBuffer(ActivationBuffer&&) = default;
  ActivationBuffer& operator=(ActivationBuffer&&) = default;

  // Prepares for `rows` x `cols` activations at `x` (row stride `stride` floats). Grows, never
  // shrinks.
  void reserve(const float* x, int64_t rows, int64_t cols, int64_t stride);
  void quantize(int64_t row0, int64_t row1);  // rows [row0, row1) to int8
  const Activations& view() const { return view_; }

 private:
  Activations view_;
  std::vector<int8_t> bytes_;
  int8_t* q_ = nullptr;
  int8_t* arranged_ = nullptr;
  std::vector<float> scale_;
  std::vector<int16_t> sum_;
};

// Rows of one of a matrix's batches, and where the product with token i and row r goes:
// out[i * out_stride + (r - row0)].
struct RowsOf {
  const Matrix* w;
  int64_t batch;
  float* out;
  int64_t out_stride;
};

// out[i * out_stride + (r - row0)] = w[batch, r, :] . x[t(i), :] for r in [row0, row1) and
// i in [0, n), where t(i) = tokens ? tokens[i] : i. Scratch memory is thread-local.
void matmul_rows(const Matrix& w, int64_t batch, int64_t row0, int64_t row1, const Activations& x,
                 const int32_t* tokens, int64_t n, float* out, int64_t out_stride);

// The same for two matrices of equal rows and columns. With few tokens they are read side by side.
void matmul_two_rows(const RowsOf& a, const RowsOf& b, int64_t row0, int64_t row1,
                     const Activations& x, const int32_t* tokens, int64_t n);

// Rows per task: some 40 us with few tokens, enough to pay for packing the tokens with many; a
// multiple of the panel width.
int64_t rows_per_task(const Matrix& w, int64_t n_tokens, int n_threads);

// Dequantizes one row of `cols` weights.
void dequantize_row(Type type, const uint8_t* row, float* out, int64_t cols);

// Quantizes one row to F16 or Q8_0 or F32 (cache rows); cols a multiple of 32 for Q8_0.
void quantize_row(Type type, const float* x, uint8_t* row, int64_t cols);

// Attention over F16 rows that are keys and, in their first columns, values, in blocks of up to 64,
// for query rows in multiples of 16. Packed forms belong to the caller, aligned to 64 bytes.
struct TiledAttention {
  int64_t (*query_bytes)(int64_t m, int64_t key_width);
  int64_t (*block_bytes)(int64_t key_width);
  // q [m, key_width]
  void (*pack_queries)(const float* q, int64_t m, int64_t key_width, void* queries);
  void (*pack_block)(const uint8_t* rows, int64_t row_bytes, int64_t n, int64_t key_width,
                     void* block);
  // c[m, n] = q . rows^T
  void (*scores)(const void* queries, int64_t m, void* block, int64_t n, int64_t key_width,
                 float* c, int64_t ldc);
  // context[m, value_width] += weights[m, n] . rows; value_width a multiple of 32
  void (*add_values)(const float* weights, int64_t ldw, int64_t m, void* block, int64_t n,
                     int64_t key_width, int64_t value_width, float* context);
};

struct Kernels {
  const char* isa;  // "portable", "avx2", "avx512", "amx", "neon"

  void (*quantize_activations)(const float* x, int64_t cols, int64_t padded, int8_t* q,
                               int8_t* arranged, float* scale, int16_t* sum);
  void (*dequantize_row)(Type type, const uint8_t* row, float* out, int64_t cols);

  // Few tokens: each row read once, used for all n tokens. `x` as in matmul_rows. With `b`, of a's
  // type and columns, the rows of both, alternating.
  void (*gemv_rows)(const RowsOf& a, const RowsOf* b, int64_t row0, int64_t row1,
                    const Activations& x, const int32_t* tokens, int64_t n);
  // Many tokens: rows unpacked once into a panel, then multiplied with every token.
  void (*gemm_rows)(const Matrix& w, int64_t batch, int64_t row0, int64_t row1,
                    const Activations& x, const int32_t* tokens, int64_t n, float* out,
                    int64_t out_stride);

  // Float tiles for attention, row-major; strides in floats.
  //
  // c[m, n] = a[m, k] . b[n, k]^T
  void (*gemm_nt)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);
  // c[m, n] += a[m, k] . b[k, n]
  void (*gemm_nn)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, float* c, int64_t ldc);
  // The same where a and b are rounded already, to 2^-11 or worse: each product to 2^-16.
  decltype(gemm_nt) near_nt;
  decltype(gemm_nn) near_nn;

  // out = x / rms(x) * weight, rms over n values, eps inside the root. out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  // out = silu(gate) * up. out may be gate.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // x = exp(x - max), returns the sum.
  float (*exp_sum)(float* x, int64_t n, float max);
  // y += a * x
  void (*axpy)(float a, const float* x, int64_t n, float* y);
  // x *= a
  void (*scale)(float a, int64_t n, float* x);

  // To measure the most there is: multiply-adds in vectors, which return how many they did, and a
  // read of `bytes` (a multiple of 256).
  int64_t (*int8_loop)(int64_t iterations);
  int64_t (*float_loop)(int64_t iterations);
  float (*read_loop)(const uint8_t* data, int64_t bytes);

  const TiledAttention* tiled_attention = nullptr;  // where there are matrix tiles
};

// The chosen table. LOCALDS_ISA=portable|avx2|avx512|amx|neon forces one; an instruction set that
// this processor lacks throws std::invalid_argument that names those it has.
const Kernels& kernels();
std::vector<std::string> available_isas();  // best first, "portable" last
void select_isa(const std::string& name);   // for tests

}  // namespace localds

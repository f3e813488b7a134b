// A weight as it lies in a GGUF file, and the types it can have.
//
// Ownership: a Matrix points into memory that somebody else keeps alive (the file map).
// Threading: immutable, so it may be read from any thread.
#pragma once

#include <cstdint>

namespace localds {

// GGUF type ids.
enum class Type : uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ4_NL = 20,
  IQ4_XS = 23,
  BF16 = 30,
  MXFP4 = 39,
};

struct TypeInfo {
  const char* name;
  int64_t block_elements;
  int64_t block_bytes;
  bool is_float;  // F32, F16, BF16: multiplied in float, the others in int8
};

// Facts of a type; throws std::invalid_argument for an id that the kernels do not know.
const TypeInfo& type_info(Type type);

// `batch` matrices of `rows` x `cols` weights, one after another: the experts of a layer, or its
// heads. Element (b, r, c) is column c of the row that starts at row(b, r).
struct Matrix {
  Type type;
  int64_t rows;
  int64_t cols;
  int64_t batch;
  int64_t row_bytes;
  int64_t batch_bytes;
  const uint8_t* data;

  const uint8_t* row(int64_t b, int64_t r) const { return data + b * batch_bytes + r * row_bytes; }
};

}  // namespace localds

// Float32 weights to the blocks of any GGUF type that the kernels read.
//
// Every weight type is found by least weighted squared error, `importance` being the weight of each
// column. The bits depend neither on the number of threads nor on the instruction set.
#pragma once

#include <cstdint>
#include <optional>

#include "matrix.h"

namespace localds {

struct Position {
  int64_t row, column;
};

// Quantizes x [rows, cols] on the thread pool into `out`, rows of type_info(type) blocks.
// `importance` [cols] may be null: then all columns weigh the same. F32, F16, BF16 and Q8_0 have
// nothing to choose and ignore it. Returns where the first value is that the type cannot hold (NaN,
// infinity, in F16 what rounds to infinity); `out` is then of no use.
std::optional<Position> quantize_matrix(Type type, const float* x, int64_t rows, int64_t cols,
                                        const float* importance, uint8_t* out);

using QuantizeRows = void (*)(Type type, const float* x, int64_t rows, int64_t cols,
                              const float* importance, uint8_t* out);

// One for each instruction set, on one thread; x is finite and importance given.
QuantizeRows portable_quantizer();
QuantizeRows avx2_quantizer();
QuantizeRows avx512_quantizer();
QuantizeRows neon_quantizer();

}  // namespace localds

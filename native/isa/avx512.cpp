// clang-format off: the vector wrapper comes first, the rest is compiled on it.
#include "isa/simd_avx512.h"
#include "isa/products.h"
// clang-format on

namespace localds {

const Kernels& avx512_kernels() {
  static constexpr Kernels table = avx512::make_kernels("avx512");
  return table;
}

}  // namespace localds

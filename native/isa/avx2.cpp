// clang-format off: the vector wrapper comes first, the rest is compiled on it.
#include "isa/simd_avx2.h"
#include "isa/products.h"
// clang-format on

namespace localds {

const Kernels& avx2_kernels() {
  static constexpr Kernels table = avx2::make_kernels("avx2");
  return table;
}

}  // namespace localds

// clang-format off: the vector wrapper comes first, the rest is compiled on it.
#include "isa/simd_neon.h"
#include "isa/products.h"
// clang-format on

namespace localds {

const Kernels& neon_kernels() {
  static constexpr Kernels table = neon::make_kernels("neon");
  return table;
}

}  // namespace localds

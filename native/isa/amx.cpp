// clang-format off: the vector wrapper comes first, the rest is compiled on it.
#define LOCALDS_ISA amx
#include "isa/simd_avx512.h"
#include "isa/amx_gemm.h"
#include "isa/amx_attention.h"
#include "isa/products.h"
// clang-format on

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace localds {
namespace amx {
namespace {

void gemm_rows_on_tiles(const Matrix& w, int64_t batch, int64_t row0, int64_t row1,
                        const Activations& x, const int32_t* tokens, int64_t n, float* out,
                        int64_t out_stride) {
  const auto elsewhere = avx512_kernels().gemm_rows;
  if (type_info(w.type).is_float) {
    return elsewhere(w, batch, row0, row1, x, tokens, n, out, out_stride);
  }
  with_decoder(w.type, [&]<class D>() {
    // Products of 16 columns are too short: adding them takes longer than on vectors.
    if constexpr (D::kHalves) {
      elsewhere(w, batch, row0, row1, x, tokens, n, out, out_stride);
    } else {
      for_packed(n, x, tokens,
                 [&](const Activations& part, const int32_t* list, int64_t first, int64_t count) {
                   gemm_tiles<D>(w, batch, row0, row1, part, list, count, out + first * out_stride,
                                 out_stride);
                 });
    }
  });
}

}  // namespace
}  // namespace amx

// Linux gives tiles to processes that ask for them: their state is large.
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& amx_kernels() {
  static const Kernels table = [] {
    Kernels kernels = avx512_kernels();
    kernels.isa = "amx";
    kernels.gemm_rows = amx::gemm_rows_on_tiles;
    kernels.near_nt = amx::near_nt;
    kernels.near_nn = amx::near_nn;
    kernels.tiled_attention = &amx::kTiledAttention;
    return kernels;
  }();
  return table;
}

}  // namespace localds

// What every instruction set's file shares with kernels.cpp: its table, scratch memory and the
// rules of quantized activations. Nothing here may be an external inline function (see formats.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace localds {

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
bool request_amx();  // whether this process may use tiles, from now on
const Kernels& neon_kernels();

// At least `bytes` of memory of this thread, aligned to 64; the next call may move it.
void* thread_scratch(size_t bytes);

// A group of activations below this is zero: 127 / amax would overflow.
inline constexpr float kSmallestActivation = 1e-30f;

// Rows of activations are padded to whole spans, eight groups.
inline constexpr int64_t kSpan = 256;

// Tasks get whole tiles of rows: the widest panel of any instruction set.
inline constexpr int64_t kRowTile = 16;

// Bytes to fetch ahead, into the second cache: the first one has too few outstanding misses to keep
// the memory busy (10 GB/s a core on Zen 4, instead of 20 and more).
inline constexpr int64_t kAhead = 3072;
// And from there into the first: where loads wait for the second cache, they keep the misses of
// `kAhead` waiting, too (Q4_K on a Xeon: 11.6 GB/s a core, 13.1 with this).
inline constexpr int64_t kNear = 1152;

}  // namespace localds

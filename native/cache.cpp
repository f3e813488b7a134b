#include "cache.h"

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace localds {

void check_cache(const CacheRows& cache, int64_t width, int64_t slice, int64_t past, int64_t n) {
  const auto fail = [](const std::string& text) { throw std::invalid_argument("cache: " + text); };
  if (cache.type != Type::F32 && cache.type != Type::F16 && cache.type != Type::Q8_0) {
    fail("type " + std::to_string(static_cast<uint32_t>(cache.type)) +
         " is not supported; use F32, F16 or Q8_0");
  }
  const TypeInfo& info = type_info(cache.type);
  if (cache.width != width) {
    fail("rows of " + std::to_string(cache.width) + " values, this layer needs " +
         std::to_string(width));
  }
  if (width % info.block_elements != 0 || slice % info.block_elements != 0) {
    fail(std::string(info.name) + " rows hold multiples of " + std::to_string(info.block_elements) +
         " values, this layer needs " + std::to_string(width) + " in slices of " +
         std::to_string(slice) + "; use F16");
  }
  const int64_t row_bytes = width / info.block_elements * info.block_bytes;
  if (cache.row_bytes != row_bytes) {
    fail("rows of " + std::to_string(cache.row_bytes) + " bytes, " + std::to_string(width) +
         " values in " + info.name + " need " + std::to_string(row_bytes));
  }
  if (past < 0 || past > cache.capacity || n > cache.capacity - past) {
    fail("no room for " + std::to_string(n) + " rows after " + std::to_string(past) +
         ", the capacity is " + std::to_string(cache.capacity));
  }
}

FloatTile read_cache(const CacheRows& cache, int64_t row0, int64_t row1, int64_t col, int64_t width,
                     float* buffer) {
  if (cache.type == Type::F32) {
    return {reinterpret_cast<const float*>(cache.row(row0)) + col, cache.width};
  }
  const TypeInfo& info = type_info(cache.type);
  const int64_t skip = col / info.block_elements * info.block_bytes;
  for (int64_t row = row0; row < row1; ++row) {
    dequantize_row(cache.type, cache.row(row) + skip, buffer + (row - row0) * width, width);
  }
  return {buffer, width};
}

}  // namespace localds

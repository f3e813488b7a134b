// Quantizes float32 rows from standard input to blocks on standard output, for comparisons with
// another processor (compare_quantizers.py): quantize_stream TYPE_ID COLUMNS. The first row is the
// importance.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "quantize/quantize.h"

using namespace localds;

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto type = static_cast<Type>(std::atoi(argv[1]));
  const int64_t cols = std::atoi(argv[2]);
  std::vector<float> values;
  for (float value; std::fread(&value, sizeof value, 1, stdin) == 1;) values.push_back(value);

  const TypeInfo& info = type_info(type);
  const int64_t rows = static_cast<int64_t>(values.size()) / cols - 1;
  std::vector<uint8_t> blocks(
      static_cast<size_t>(rows * cols / info.block_elements * info.block_bytes));
  quantize_matrix(type, values.data() + cols, rows, cols, values.data(), blocks.data());
  return std::fwrite(blocks.data(), 1, blocks.size(), stdout) == blocks.size() ? 0 : 1;
}

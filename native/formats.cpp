#include "formats.h"

#include <stdexcept>
#include <string>

namespace localds {

const TypeInfo& type_info(Type type) {
  static const struct {
    Type type;
    TypeInfo info;
  } table[] = {
      {Type::F32, {"F32", 1, 4, true}},
      {Type::F16, {"F16", 1, 2, true}},
      {Type::BF16, {"BF16", 1, 2, true}},
      {Type::Q4_0, {"Q4_0", 32, sizeof(BlockQ4_0), false}},
      {Type::Q4_1, {"Q4_1", 32, sizeof(BlockQ4_1), false}},
      {Type::Q5_0, {"Q5_0", 32, sizeof(BlockQ5_0), false}},
      {Type::Q5_1, {"Q5_1", 32, sizeof(BlockQ5_1), false}},
      {Type::Q8_0, {"Q8_0", 32, sizeof(BlockQ8_0), false}},
      {Type::IQ4_NL, {"IQ4_NL", 32, sizeof(BlockIQ4_NL), false}},
      {Type::MXFP4, {"MXFP4", 32, sizeof(BlockMXFP4), false}},
      {Type::Q2_K, {"Q2_K", 256, sizeof(BlockQ2_K), false}},
      {Type::Q3_K, {"Q3_K", 256, sizeof(BlockQ3_K), false}},
      {Type::Q4_K, {"Q4_K", 256, sizeof(BlockQ4_K), false}},
      {Type::Q5_K, {"Q5_K", 256, sizeof(BlockQ5_K), false}},
      {Type::Q6_K, {"Q6_K", 256, sizeof(BlockQ6_K), false}},
      {Type::IQ4_XS, {"IQ4_XS", 256, sizeof(BlockIQ4_XS), false}},
  };
  for (const auto& entry : table) {
    if (entry.type == type) return entry.info;
  }
  throw std::invalid_argument("type id " + std::to_string(static_cast<uint32_t>(type)) +
                              " has no kernel; convert the tensor to a supported GGUF type");
}

}  // namespace localds

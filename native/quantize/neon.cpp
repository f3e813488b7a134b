#define LOCALDS_QUANTIZE quantize_neon
#include "quantize/quantizer.h"

namespace localds {

QuantizeRows neon_quantizer() { return quantize_neon::quantize_rows; }

}  // namespace localds

#define LOCALDS_QUANTIZE quantize_avx2
#include "quantize/quantizer.h"

namespace localds {

QuantizeRows avx2_quantizer() { return quantize_avx2::quantize_rows; }

}  // namespace localds

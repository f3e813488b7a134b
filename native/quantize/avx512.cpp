#define LOCALDS_QUANTIZE quantize_avx512
#include "quantize/quantizer.h"

namespace localds {

QuantizeRows avx512_quantizer() { return quantize_avx512::quantize_rows; }

}  // namespace localds

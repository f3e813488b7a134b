// Experts out of the store as bytes, for whoever computes them elsewhere than here.
#pragma once

#include <cstdint>
#include <span>

#include "store.h"

namespace localds {

// Copies part p of expert uses[i] to outs[p] + i * the part's bytes, whatever arrives first; all
// that are missing are read at once, as far as there are slots. Counts as a part of a layer's call.
//
// Throws std::invalid_argument, before anything is read, for a layer or an expert that there is not
// and for experts that do not ascend; ReadError. Waits for an operation in progress, and keeps
// others waiting.
void fetch(ExpertStore& store, int64_t layer, std::span<const ExpertCall::Use> uses,
           std::span<uint8_t* const> outs);

}  // namespace localds

// The arithmetic of chosen experts, wherever their weights lie.
#pragma once

#include <cstdint>
#include <span>

#include "ffn.h"
#include "matrix.h"
#include "phases.h"
#include "scratch.h"

namespace localds {

// An expert and the tokens that chose it.
struct ActiveExpert {
  int32_t id;
  FfnWeights weights;          // of this expert alone: batch 0
  const int32_t* tokens;       // [count]
  const float* token_weights;  // [count]
  int64_t count;
  int64_t first;    // its pairs are [first, first + count) of the call's
  int64_t row = 0;  // its first row among those of the experts computed together
};

// The shared expert up to its down matrix, for all n tokens of a call.
struct SharedExpert {
  const Matrix* down;
  const Activations* gated;
};

// silu(gate(x)) * up(x) of every pair [pairs, ff], ready for `down`; sets the experts' `row`.
Activations gate_experts(std::span<ActiveExpert> experts, const Activations& x,
                         ActivationBuffer& buffer, Scratch& scratch);

// outputs[first + i] = down(gated) of every pair [pairs of the call, hidden], and of the shared
// expert, if there is one, [n, hidden].
void down_experts(std::span<const ActiveExpert> experts, const Activations& gated, float* outputs,
                  const SharedExpert* shared, float* shared_outputs, Scratch& scratch);

// x += weight * down(gated) for every pair, in the experts' order, then the shared expert's. A task
// owns a range of columns and walks through all experts: no output of a pair is kept.
void add_experts(std::span<const ActiveExpert> experts, const Activations& gated,
                 const SharedExpert* shared, float* x, int64_t width, Scratch& scratch);

}  // namespace localds

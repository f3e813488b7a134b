// The mixture-of-experts layer: route every token, then run every chosen expert once.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "ffn.h"
#include "matrix.h"
#include "phases.h"
#include "recorder.h"
#include "router.h"
#include "scratch.h"

namespace localds {

// The chosen (expert, token) pairs of a call, ordered by expert, then token.
struct ExpertPairs {
  struct Expert {
    int32_t id;
    int64_t first;  // its pairs are [first, first + count)
    int64_t count;
  };
  std::span<const Expert> experts;  // those with pairs, ascending id
  const int32_t* tokens;            // [pairs]
  const float* weights;             // [pairs]
  int64_t pairs;
};

class MoeLayer {
 public:
  // `router_weight` [experts, hidden] is F32; `experts` holds one matrix per expert. The shared
  // expert is optional. Throws std::invalid_argument where they do not fit together.
  MoeLayer(Norm norm, Matrix router_weight, Router router, FfnWeights experts,
           std::optional<FfnWeights> shared);

  // x [n, hidden] += moe(norm(x)). Each token's sum runs over its experts by ascending id, then the
  // shared expert, whatever the number of threads. Records hidden (router, the shared expert's gate
  // and up), shared_middle (its down), and for each expert, over the tokens that it was chosen for,
  // expert_hidden (gate, up) and expert_middle (down).
  void forward(float* x, int64_t n, Recorder* recorder) const;

  // What forward would choose for x: ids and weights [n, top_k], best first.
  void route(const float* x, int64_t n, int32_t* ids, float* weights) const;

  int64_t hidden() const { return norm_.width(); }
  int64_t top_k() const { return router_.top_k; }

 private:
  void score(const Activations& x, float* logits, float* shared_middle, Scratch& scratch) const;
  void choose(float* logits, int64_t n, int32_t* ids, float* weights, Scratch& scratch) const;
  ExpertPairs group(const int32_t* ids, const float* weights, int64_t n, Scratch& scratch) const;
  float* gate_experts(const Activations& x, const ExpertPairs& pairs, Scratch& scratch) const;
  void add_experts(const Activations& gated, const ExpertPairs& pairs,
                   const Activations* shared_gated, float* x, int64_t n, Scratch& scratch) const;
  void add_few(const Activations& gated, const ExpertPairs& pairs, const Activations* shared_gated,
               float* x, int64_t n, Scratch& scratch) const;
  void add_many(const Activations& gated, const ExpertPairs& pairs, const Activations* shared_gated,
                float* x, int64_t n, Scratch& scratch) const;

  void record(const Activations& x, const Activations& gated, const ExpertPairs& pairs,
              Scratch& scratch, Recorder& recorder) const;

  Norm norm_;
  Matrix router_weight_;
  Router router_;
  FfnWeights experts_;
  std::optional<FfnWeights> shared_;
};

}  // namespace localds

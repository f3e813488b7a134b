// Which experts a token goes to, and with what weights, given the router's logits.
#pragma once

#include <cstdint>
#include <vector>

namespace localds {

enum class Gating { kSoftmax, kSigmoid, kSoftmaxSelected };
enum class GroupScore { kMax, kTop2Sum };

struct Router {
  int64_t experts;
  int64_t top_k;
  Gating gating;
  bool normalize;
  float scale;
  int64_t groups;  // 1: no groups
  int64_t groups_used;
  GroupScore group_score;
  std::vector<float> bias;  // [experts], added for the choice only; may be empty

  // Throws std::invalid_argument for numbers that do not fit together.
  void check() const;
};

// Chooses for one token. logits [experts] are overwritten, work has room for twice as many values;
// ids and weights [top_k], best first; ties go to the lower id. Never fails, whatever the logits.
void choose_experts(const Router& router, float* logits, float* work, int32_t* ids, float* weights);

}  // namespace localds

#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace localds {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void softmax(float* x, int64_t n) {
  const float highest = *std::max_element(x, x + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - highest);
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// The ids of the k largest values of x, best first. Ties go to the lower id, so the result is k
// different ids even if all values are equal. x must not hold NaN.
void largest(const float* x, int64_t n, int64_t k, int32_t* ids) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (count == k && !(x[i] > x[ids[k - 1]])) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && x[i] > x[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = static_cast<int32_t>(i);
  }
}

float group_score(GroupScore kind, const float* choice, int64_t size) {
  float best = kNever;
  float second = kNever;
  for (int64_t i = 0; i < size; ++i) {
    if (choice[i] > best) {
      second = best;
      best = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return kind == GroupScore::kMax || size < 2 ? best : best + second;
}

// Leaves only the best groups in the choice. scores [groups] is work space.
void drop_groups(const Router& router, float* choice, float* scores) {
  const int64_t size = router.experts / router.groups;
  for (int64_t g = 0; g < router.groups; ++g) {
    scores[g] = group_score(router.group_score, choice + g * size, size);
    if (std::isnan(scores[g])) scores[g] = kNever;
  }
  for (int64_t g = 0; g < router.groups; ++g) {
    int64_t better = 0;
    for (int64_t other = 0; other < router.groups; ++other) {
      better += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
    }
    if (better >= router.groups_used) std::fill_n(choice + g * size, size, kNever);
  }
}

}  // namespace

void Router::check() const {
  const auto fail = [](const std::string& text) { throw std::invalid_argument("router: " + text); };
  if (experts < 1 || top_k < 1 || top_k > experts) {
    fail("cannot choose " + std::to_string(top_k) + " of " + std::to_string(experts) + " experts");
  }
  if (groups < 1 || experts % groups != 0) {
    fail(std::to_string(experts) + " experts do not make " + std::to_string(groups) + " groups");
  }
  if (groups_used < 1 || groups_used > groups || groups_used * (experts / groups) < top_k) {
    fail(std::to_string(groups_used) + " of " + std::to_string(groups) +
         " groups are not enough for " + std::to_string(top_k) + " experts");
  }
  if (!bias.empty() && static_cast<int64_t>(bias.size()) != experts) {
    fail("bias of " + std::to_string(bias.size()) + " values, expected " + std::to_string(experts));
  }
}

void choose_experts(const Router& router, float* logits, float* work, int32_t* ids,
                    float* weights) {
  const int64_t experts = router.experts;
  if (router.gating == Gating::kSoftmax) softmax(logits, experts);
  if (router.gating == Gating::kSigmoid) {
    for (int64_t e = 0; e < experts; ++e) logits[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  }

  float* choice = work;
  for (int64_t e = 0; e < experts; ++e) {
    choice[e] = logits[e] + (router.bias.empty() ? 0.0f : router.bias[e]);
    if (std::isnan(choice[e])) choice[e] = kNever;
  }
  if (router.groups > 1) drop_groups(router, choice, work + experts);
  largest(choice, experts, router.top_k, ids);

  float sum = 0;
  for (int64_t k = 0; k < router.top_k; ++k) weights[k] = logits[ids[k]];
  if (router.gating == Gating::kSoftmaxSelected) softmax(weights, router.top_k);
  for (int64_t k = 0; k < router.top_k; ++k) sum += weights[k];
  const float factor = router.normalize ? router.scale / (sum + 1e-20f) : router.scale;
  for (int64_t k = 0; k < router.top_k; ++k) weights[k] *= factor;
}

}  // namespace localds

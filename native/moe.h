// The mixture-of-experts layer: route every token, then run every chosen expert once.
//
// Where a GPU routes and holds some of the experts, `add_rest` runs those that lie elsewhere than
// there.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "expert_ffn.h"
#include "experts/store.h"
#include "ffn.h"
#include "matrix.h"
#include "phases.h"
#include "recorder.h"
#include "router.h"
#include "scratch.h"

namespace localds {

// Where the experts of a layer lie that are not in the file's map.
struct StoredExperts {
  ExpertStore* store;
  int64_t layer;  // of the store
  bool fused;     // gate and up are one part
};

class MoeLayer {
 public:
  // `router_weight` [experts, hidden] is F32; `experts` holds one matrix per expert. The shared
  // expert is optional. Throws std::invalid_argument where they do not fit together.
  MoeLayer(Norm norm, Matrix router_weight, Router router, FfnWeights experts,
           std::optional<FfnWeights> shared);
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  // From now on takes the experts from a store, whose parts are gate, up and down, or gate and up
  // fused and down. `next` is the layer whose choices are looked up ahead, null after the last; it
  // must be the one before in the store's order, and stay as long as this one.
  void read_from(StoredExperts stored) { stored_ = stored; }
  void look_ahead_to(const MoeLayer* next) { next_ = next; }

  // x [n, hidden] += moe(norm(x)). Each token's sum runs over its experts by ascending id, then the
  // shared expert, whatever the number of threads, and wherever the experts lie. Records hidden
  // (router, the shared expert's gate and up), shared_middle (its down), and for each expert, over
  // the tokens that it was chosen for, expert_hidden (gate, up) and expert_middle (down).
  // Runs all experts, whatever set_elsewhere said.
  void forward(float* x, int64_t n, Recorder* recorder) const;

  // out [n, hidden] += what the experts that are not elsewhere add to x [n, hidden] (not yet
  // normalized), for choices made by somebody else: ids and weights [n, top_k]. Neither routes nor
  // runs the shared expert; sums run by ascending id. out may be x. Throws std::invalid_argument
  // for ids that are no expert's.
  void add_rest(const float* x, int64_t n, const int32_t* ids, const float* weights,
                float* out) const;

  // Which experts, 1 in mask [experts], add_rest leaves out and the store is not told to expect;
  // at first none. Waits for an operation in progress.
  void set_elsewhere(std::span<const uint8_t> mask);

  // What forward would choose for x: ids and weights [n, top_k], best first.
  void route(const float* x, int64_t n, int32_t* ids, float* weights) const;

  // How many tokens forward and add_rest have sent to each expert so far, those elsewhere included,
  // to uses [experts]. From any thread, at any time.
  void uses(uint64_t* uses) const;

  int64_t hidden() const { return norm_.width(); }
  int64_t top_k() const { return router_.top_k; }
  int64_t experts() const { return router_.experts; }

 private:
  // One operation's choices.
  struct Routing {
    const float* residual;  // [n, hidden]
    const Activations* x;   // the same, normalized
    float* out;             // [n, hidden], is added to; where it is the residual, that is updated
    int64_t n;
    std::span<ActiveExpert> experts;  // to be run; ascending id
    int64_t pairs;                    // of a token and an expert to be run
    Recorder* recorder;
  };

  void route(const float* x, int64_t n, int32_t* ids, float* weights, Scratch& scratch) const;
  void score_and_share(const Activations& x, float* logits, float* shared_middle,
                       Scratch& scratch) const;
  void score(const Activations& x, float* logits, Scratch& scratch) const;
  Activations ready_shared(const float* shared_middle, int64_t n, Scratch& scratch) const;
  void choose(float* logits, int64_t n, int32_t* ids, float* weights, Scratch& scratch) const;
  void check_ids(std::span<const int32_t> ids) const;
  std::span<ActiveExpert> group(std::span<const int32_t> ids, const float* weights,
                                const uint8_t* left_out, Scratch& scratch) const;
  void count(std::span<const int32_t> ids) const;
  // Without a `shared_middle` the shared expert is not run.
  void add_resident(const Routing& routing, const float* shared_middle, Scratch& scratch) const;
  void add_stored(const Routing& routing, float* shared_middle, bool hurry, Scratch& scratch) const;
  void compute_arriving(const Routing& routing, ExpertCall& call, float* outputs,
                        const std::optional<SharedExpert>& shared, float* shared_outputs,
                        Scratch& scratch) const;
  void place(FfnWeights& weights, const ExpertCall& call, int64_t use) const;
  void sum(const Routing& routing, const float* outputs, const float* shared_outputs) const;
  void expect_next(const float* x, int64_t n, Scratch& scratch) const;
  void expect_all_of_next() const;
  void expect(std::vector<int32_t> ids) const;
  void record(const Routing& routing, std::span<const ActiveExpert> experts,
              const Activations& gated, const std::optional<SharedExpert>& shared,
              Scratch& scratch) const;

  Norm norm_;
  Matrix router_weight_;
  Router router_;
  FfnWeights experts_;
  std::optional<FfnWeights> shared_;
  std::optional<StoredExperts> stored_;
  const MoeLayer* next_ = nullptr;
  std::vector<uint8_t> elsewhere_;                   // [experts]
  mutable std::vector<std::atomic<uint64_t>> uses_;  // written by one forward at a time
};

}  // namespace localds

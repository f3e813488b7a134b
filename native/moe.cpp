#include "moe.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace localds {
namespace {

// Up to so many pairs of a token and an expert, reading weights takes the time.
constexpr int64_t kFewPairs = 64;

// With so many pairs for each expert, nearly all experts are chosen by somebody.
constexpr int64_t kPairsForAll = 4;

// Matrix `id` of a stack.
Matrix one_of(const Matrix& stack, int64_t id) {
  Matrix one = stack;
  one.batch = 1;
  one.data += id * stack.batch_bytes;
  return one;
}

int64_t count_pairs(std::span<const ActiveExpert> experts) {
  return experts.empty() ? 0 : experts.back().first + experts.back().count;
}

}  // namespace

MoeLayer::MoeLayer(Norm norm, Matrix router_weight, Router router, FfnWeights experts,
                   std::optional<FfnWeights> shared)
    : norm_(std::move(norm)),
      router_weight_(std::move(router_weight)),
      router_(std::move(router)),
      experts_(std::move(experts)),
      shared_(std::move(shared)),
      elsewhere_(static_cast<size_t>(router_.experts)),
      uses_(static_cast<size_t>(router_.experts)) {
  router_.check();
  if (needs_int8(router_weight_)) throw std::invalid_argument("moe: the router must be float");
  expect_shape("moe router", router_weight_, router_.experts, hidden());
  check_ffn("moe experts", experts_, hidden(), router_.experts);
  if (shared_) check_ffn("moe shared expert", *shared_, hidden());
}

void MoeLayer::route(const float* x, int64_t n, int32_t* ids, float* weights) const {
  if (n == 0) return;
  Scratch scratch;
  route(x, n, ids, weights, scratch);
}

void MoeLayer::route(const float* x, int64_t n, int32_t* ids, float* weights,
                     Scratch& scratch) const {
  float* hidden_rows = scratch.take<float>(n * hidden());
  float* logits = scratch.take<float>(n * router_.experts);
  const Activations in = normalized(scratch.activations(0), norm_, x, n, hidden_rows, false);
  score(in, logits, scratch);
  choose(logits, n, ids, weights, scratch);
}

void MoeLayer::forward(float* x, int64_t n, Recorder* recorder) const {
  if (n == 0) return;
  Scratch scratch;
  float* hidden_rows = scratch.take<float>(n * hidden());
  const bool int8 = needs_int8(experts_.gate) || needs_int8(experts_.up) ||
                    (shared_ && (needs_int8(shared_->gate) || needs_int8(shared_->up)));
  const Activations in = normalized(scratch.activations(0), norm_, x, n, hidden_rows, int8);

  float* logits = scratch.take<float>(n * router_.experts);
  float* shared_middle = shared_ ? scratch.take<float>(n * shared_->gate.rows) : nullptr;
  int32_t* ids = scratch.take<int32_t>(n * router_.top_k);
  float* weights = scratch.take<float>(n * router_.top_k);
  // Where experts will have to be read, the choice goes first.
  const bool hurry = stored_ && stored_->store->misses();
  if (hurry) {
    score(in, logits, scratch);
  } else {
    score_and_share(in, logits, shared_middle, scratch);
  }
  choose(logits, n, ids, weights, scratch);
  const std::span<const int32_t> chosen(ids, static_cast<size_t>(n * router_.top_k));
  count(chosen);
  const std::span<ActiveExpert> experts = group(chosen, weights, nullptr, scratch);
  const Routing routing{x, &in, x, n, experts, count_pairs(experts), recorder};
  if (recorder) recorder->add("hidden", in);
  if (stored_) {
    add_stored(routing, shared_middle, hurry, scratch);
  } else {
    add_resident(routing, shared_middle, scratch);
  }
}

void MoeLayer::add_rest(const float* x, int64_t n, const int32_t* ids, const float* weights,
                        float* out) const {
  if (n == 0) return;
  const std::span<const int32_t> chosen(ids, static_cast<size_t>(n * router_.top_k));
  check_ids(chosen);
  Scratch scratch;
  count(chosen);
  const std::span<ActiveExpert> experts = group(chosen, weights, elsewhere_.data(), scratch);
  float* hidden_rows = scratch.take<float>(n * hidden());
  const bool int8 = needs_int8(experts_.gate) || needs_int8(experts_.up);
  const Activations in = normalized(scratch.activations(0), norm_, x, n, hidden_rows, int8);
  const Routing routing{x, &in, out, n, experts, count_pairs(experts), nullptr};
  if (stored_) {
    add_stored(routing, nullptr, stored_->store->misses(), scratch);
  } else if (!experts.empty()) {
    add_resident(routing, nullptr, scratch);
  }
}

void MoeLayer::set_elsewhere(std::span<const uint8_t> mask) {
  if (static_cast<int64_t>(mask.size()) != router_.experts) {
    throw std::invalid_argument("moe: a mask of " + std::to_string(mask.size()) +
                                " experts, expected " + std::to_string(router_.experts));
  }
  const Scratch turn;
  elsewhere_.assign(mask.begin(), mask.end());
}

void MoeLayer::check_ids(std::span<const int32_t> ids) const {
  for (int32_t id : ids) {
    if (id >= 0 && id < router_.experts) continue;
    throw std::invalid_argument("moe: there is no expert " + std::to_string(id) + " among " +
                                std::to_string(router_.experts));
  }
}

// The router's logits, and the shared expert up to its down matrix: neither waits for a choice, so
// they make one run.
void MoeLayer::score_and_share(const Activations& x, float* logits, float* shared_middle,
                               Scratch& scratch) const {
  if (!shared_) return score(x, logits, scratch);
  const int64_t n = x.rows;
  const int threads = scratch.threads();
  const int64_t shared_ff = shared_->gate.rows;
  const int64_t all_rows = router_.experts + shared_ff;
  const int64_t row_bytes = shared_->gate.row_bytes + shared_->up.row_bytes;
  TiledRows work[2] = {{router_.experts, task_rows(router_weight_.row_bytes, n, all_rows, threads)},
                       {shared_ff, task_rows(row_bytes, n, all_rows, threads)}};
  float* tiles = scratch.take<float>(threads * n * work[1].tile);
  Work total = product_work(router_weight_, n);
  total += product_work(shared_->gate, n);
  total += product_work(shared_->up, n);
  const Timed timed("experts: router, shared gate, up", total);
  run_tiles(work, [&](int64_t i, int64_t row0, int64_t row1, int thread) {
    if (i == 0) {
      matmul_rows(router_weight_, 0, row0, row1, x, nullptr, n, logits + row0, router_.experts);
    } else {
      gated_tile(shared_->gate, shared_->up, 0, row0, row1, x, nullptr, n, shared_middle, shared_ff,
                 tiles + thread * n * work[1].tile);
    }
  });
}

void MoeLayer::score(const Activations& x, float* logits, Scratch& scratch) const {
  const Product product{&router_weight_, 0, &x, nullptr, x.rows, logits, router_.experts};
  run_products("experts: router", scratch, {&product, 1});
}

Activations MoeLayer::ready_shared(const float* shared_middle, int64_t n, Scratch& scratch) const {
  const int64_t ff = shared_->gate.rows;
  return activations(scratch.activations(2), shared_middle, n, ff, ff, needs_int8(shared_->down));
}

void MoeLayer::choose(float* logits, int64_t n, int32_t* ids, float* weights,
                      Scratch& scratch) const {
  const Timed timed("experts: choice");
  const int64_t experts = router_.experts;
  float* work = scratch.take<float>(scratch.threads() * 2 * experts);
  parallel_rows(n, 16 * experts, [&](int64_t t0, int64_t t1, int thread) {
    for (int64_t t = t0; t < t1; ++t) {
      choose_experts(router_, logits + t * experts, work + thread * 2 * experts,
                     ids + t * router_.top_k, weights + t * router_.top_k);
    }
  });
}

// Counting sort of the choices by expert, then token, without the experts where `left_out` has 1.
std::span<ActiveExpert> MoeLayer::group(std::span<const int32_t> ids, const float* weights,
                                        const uint8_t* left_out, Scratch& scratch) const {
  const auto pairs = static_cast<int64_t>(ids.size());
  const auto stays = [&](int64_t e) { return !left_out || !left_out[e]; };
  auto* experts = scratch.take<ActiveExpert>(router_.experts);
  auto* next = scratch.take<int64_t>(router_.experts);
  auto* tokens = scratch.take<int32_t>(pairs);
  auto* pair_weights = scratch.take<float>(pairs);
  std::fill(next, next + router_.experts, 0);
  for (int32_t id : ids) ++next[id];

  size_t active = 0;
  int64_t first = 0;
  for (int64_t e = 0; e < router_.experts; ++e) {
    const int64_t count = stays(e) ? next[e] : 0;
    if (count > 0) {
      const FfnWeights one{one_of(experts_.gate, e), one_of(experts_.up, e),
                           one_of(experts_.down, e)};
      experts[active++] = {static_cast<int32_t>(e), one,   tokens + first,
                           pair_weights + first,    count, first};
    }
    next[e] = first;
    first += count;
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t id = ids[static_cast<size_t>(i)];
    if (!stays(id)) continue;
    const int64_t at = next[id]++;
    tokens[at] = static_cast<int32_t>(i / router_.top_k);
    pair_weights[at] = weights[i];
  }
  return {experts, active};
}

void MoeLayer::count(std::span<const int32_t> ids) const {
  for (int32_t id : ids) uses_[static_cast<size_t>(id)].fetch_add(1, std::memory_order_relaxed);
}

void MoeLayer::uses(uint64_t* uses) const {
  for (const auto& count : uses_) *uses++ = count.load(std::memory_order_relaxed);
}

void MoeLayer::add_resident(const Routing& routing, const float* shared_middle,
                            Scratch& scratch) const {
  const Activations gated =
      gate_experts(routing.experts, *routing.x, scratch.activations(1), scratch);
  Activations shared_gated;
  std::optional<SharedExpert> shared;
  if (shared_middle) {
    shared_gated = ready_shared(shared_middle, routing.n, scratch);
    shared = {&shared_->down, &shared_gated};
  }
  if (routing.recorder) record(routing, routing.experts, gated, shared, scratch);
  const SharedExpert* with = shared ? &*shared : nullptr;
  if (routing.pairs > kFewPairs) {
    return add_experts(routing.experts, gated, with, routing.out, hidden(), scratch);
  }
  float* outputs = scratch.take<float>(routing.pairs * hidden());
  float* shared_outputs = with ? scratch.take<float>(routing.n * hidden()) : nullptr;
  down_experts(routing.experts, gated, outputs, with, shared_outputs, scratch);
  sum(routing, outputs, shared_outputs);
}

// The experts in memory, and the shared one, are computed while the others are being read. Of few
// pairs, outputs are kept and added in the end; of many, experts are taken in their order.
void MoeLayer::add_stored(const Routing& routing, float* shared_middle, bool hurry,
                          Scratch& scratch) const {
  auto* uses = scratch.take<ExpertCall::Use>(static_cast<int64_t>(routing.experts.size()));
  for (size_t i = 0; i < routing.experts.size(); ++i) {
    uses[i] = {routing.experts[i].id, routing.experts[i].count};
  }
  ExpertCall call(*stored_->store, stored_->layer, routing.n, {uses, routing.experts.size()});
  const bool few = routing.pairs <= kFewPairs;
  const bool ahead = next_ && hurry && stored_->store->looks_ahead();
  const int64_t choices = routing.n * router_.top_k;  // of experts elsewhere, too
  const bool ask_next = ahead && choices <= kFewPairs;
  if (ahead && !ask_next && choices >= kPairsForAll * next_->router_.experts) expect_all_of_next();

  float* outputs = few ? scratch.take<float>(routing.pairs * hidden()) : nullptr;
  float* shared_outputs =
      few && shared_middle ? scratch.take<float>(routing.n * hidden()) : nullptr;
  Activations shared_gated;
  std::optional<SharedExpert> shared;
  if (shared_middle) {
    if (hurry) {
      gated_rows("experts: shared gate, up", *shared_, *routing.x, shared_middle, scratch);
    }
    shared_gated = ready_shared(shared_middle, routing.n, scratch);
    shared = {&shared_->down, &shared_gated};
  }
  if (ask_next) expect_next(routing.residual, routing.n, scratch);
  compute_arriving(routing, call, outputs, shared, shared_outputs, scratch);
  if (few) {
    sum(routing, outputs, shared_outputs);
  } else if (shared) {
    add_experts({}, {}, &*shared, routing.out, hidden(), scratch);
  }
  const bool updated = routing.out == routing.residual;
  if (ask_next && updated) expect_next(routing.residual, routing.n, scratch);
}

void MoeLayer::compute_arriving(const Routing& routing, ExpertCall& call, float* outputs,
                                const std::optional<SharedExpert>& shared, float* shared_outputs,
                                Scratch& scratch) const {
  auto* batch = scratch.take<ActiveExpert>(static_cast<int64_t>(routing.experts.size()));
  bool first = true;
  while (true) {
    std::vector<int64_t> uses;
    {
      const Timed timed("experts: waiting for the disk");
      uses = call.next(outputs == nullptr);
    }
    if (uses.empty()) return;
    for (size_t i = 0; i < uses.size(); ++i) {
      batch[i] = routing.experts[static_cast<size_t>(uses[i])];
      place(batch[i].weights, call, uses[i]);
    }
    const std::span<ActiveExpert> experts(batch, uses.size());
    const Scratch::Mark mark = scratch.mark();
    const Activations gated = gate_experts(experts, *routing.x, scratch.activations(1), scratch);
    if (routing.recorder) {
      record(routing, experts, gated, first ? shared : std::nullopt, scratch);
    }
    if (outputs) {
      const SharedExpert* with = first && shared ? &*shared : nullptr;
      down_experts(experts, gated, outputs, with, shared_outputs, scratch);
    } else {
      add_experts(experts, gated, nullptr, routing.out, hidden(), scratch);
    }
    first = false;
    scratch.rewind(mark);
    call.done();
  }
}

// Points an expert's weights at where the store has them.
void MoeLayer::place(FfnWeights& weights, const ExpertCall& call, int64_t use) const {
  const bool fused = stored_->fused;
  weights.gate.data = call.data(use, 0);
  weights.up.data =
      fused ? call.data(use, 0) + weights.gate.rows * weights.gate.row_bytes : call.data(use, 1);
  weights.down.data = call.data(use, fused ? 1 : 2);
}

// out += weight * output for every pair, by ascending expert, then the shared expert's, if any.
void MoeLayer::sum(const Routing& routing, const float* outputs,
                   const float* shared_outputs) const {
  const Timed timed("experts: sum");
  for (const ActiveExpert& e : routing.experts) {
    for (int64_t i = 0; i < e.count; ++i) {
      kernels().axpy(e.token_weights[i], outputs + (e.first + i) * hidden(), hidden(),
                     routing.out + e.tokens[i] * hidden());
    }
  }
  if (shared_outputs) kernels().axpy(1.0f, shared_outputs, routing.n * hidden(), routing.out);
}

// What the next layer would choose if nothing were added before it is mostly what it will choose:
// before this layer's experts are added 3 of 4, after it 9 of 10.
void MoeLayer::expect_next(const float* x, int64_t n, Scratch& scratch) const {
  const int64_t pairs = n * next_->top_k();
  int32_t* ids = scratch.take<int32_t>(pairs);
  float* weights = scratch.take<float>(pairs);
  next_->route(x, n, ids, weights, scratch);
  next_->expect({ids, ids + pairs});
}

void MoeLayer::expect_all_of_next() const {
  std::vector<int32_t> all(static_cast<size_t>(next_->router_.experts));
  std::iota(all.begin(), all.end(), 0);
  next_->expect(std::move(all));
}

// Has the store read what is not elsewhere of this layer's experts.
void MoeLayer::expect(std::vector<int32_t> ids) const {
  std::erase_if(ids, [&](int32_t id) { return elsewhere_[static_cast<size_t>(id)] != 0; });
  stored_->store->expect(stored_->layer, ids);
}

void MoeLayer::record(const Routing& routing, std::span<const ActiveExpert> experts,
                      const Activations& gated, const std::optional<SharedExpert>& shared,
                      Scratch& scratch) const {
  const Activations& x = *routing.x;
  const size_t active = experts.size();
  auto* inputs = scratch.take<RecordedRows>(static_cast<int64_t>(active));
  auto* middles = scratch.take<RecordedRows>(static_cast<int64_t>(active));
  for (size_t i = 0; i < active; ++i) {
    const ActiveExpert& e = experts[i];
    inputs[i] = {e.id, x.f32, x.f32_stride, e.tokens, e.count};
    middles[i] = {e.id, gated.f32 + e.row * gated.f32_stride, gated.f32_stride, nullptr, e.count};
  }
  routing.recorder->add("expert_hidden", router_.experts, x.cols, {inputs, active});
  routing.recorder->add("expert_middle", router_.experts, gated.cols, {middles, active});
  if (shared) routing.recorder->add("shared_middle", *shared->gated);
}

}  // namespace localds

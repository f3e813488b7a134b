// Which experts stay in memory: the choice alone, without any memory.
//
// Most places are the main part, where frequently used experts stay. What is read enters a small
// window, least recently used first out; an expert that leaves it enters the main part only if it
// was used more often than the one there that was used least (then least recently), as in W-TinyLFU
// (arXiv:1512.00727). Uses count from the next pass through the model on: within a pass, layers
// that were there already must not seem more popular than those that are still to come. So a prompt
// that needs every expert once displaces nothing.
//
// Deterministic: a function of the calls alone, never of how fast a disk was.
// tests/expert_simulator.py does the same in Python.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <set>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

namespace localds {

class ExpertPolicy {
 public:
  static constexpr int32_t kNone = -1;

  // For keys [0, keys), of which `main` and `window` (1 or more) stay.
  ExpertPolicy(int64_t keys, int64_t main, int64_t window);

  // A layer's call with `tokens` tokens begins; none of its `keys` will leave the main part. Layers
  // come in ascending order; one that does not begins another pass through the model, when uses
  // long ago may be forgotten by half.
  void begin(int64_t layer, int64_t tokens, std::span<const int32_t> keys);

  bool stays(int32_t key) const { return where_[index(key)] != Where::kOut; }
  // Who will have to leave when `key` is used next; often kNone.
  int32_t leaver(int32_t key) const;
  // `uses` tokens use the key; it stays from now on, and leaver(key) no longer does.
  void use(int32_t key, int64_t uses);

  // Puts a key into the main part where there is room; says whether it stays.
  bool preload(int32_t key);
  // The least used key of the main part that `may` leave leaves; kNone if there is none.
  int32_t drop_least(const std::function<bool(int32_t)>& may);
  void set_main(int64_t main) { most_main_ = main; }
  int64_t main_size() const { return static_cast<int64_t>(main_.size()); }

  // How often each key was used, lately; `restore` what an earlier run counted.
  std::vector<uint32_t> counts() const;
  void restore(std::span<const uint32_t> counts);

 private:
  enum class Where : uint8_t { kOut, kMain, kWindow };
  using Rank = std::tuple<uint32_t, uint64_t, int32_t>;  // uses, the last one, key: least first

  static size_t index(int32_t key) { return static_cast<size_t>(key); }
  Rank rank(int32_t key) const { return {counts_[index(key)], last_[index(key)], key}; }
  int32_t least() const;
  bool promotes(int32_t candidate, int32_t victim) const;
  void begin_pass(int64_t tokens);
  void rank_again();

  int64_t most_main_;
  int64_t most_window_;
  std::vector<uint32_t> counts_;
  std::vector<std::pair<int32_t, int64_t>> uses_;  // of this pass
  std::vector<uint64_t> last_;
  std::vector<Where> where_;
  std::set<Rank> main_;
  std::deque<int32_t> window_;
  std::vector<bool> in_call_;
  std::vector<int32_t> call_;
  uint64_t clock_ = 0;
  int64_t last_layer_ = -1;
  int64_t tokens_ = 0;  // since uses were last forgotten by half
};

}  // namespace localds

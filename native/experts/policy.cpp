#include "policy.h"

#include <algorithm>
#include <limits>

namespace localds {

// Tokens after which earlier uses count half.
static constexpr int64_t kMemory = 1024;

static void add(uint32_t& count, int64_t uses) {
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
  count = static_cast<uint32_t>(std::min(kMost, count + uses));
}

ExpertPolicy::ExpertPolicy(int64_t keys, int64_t main, int64_t window)
    : most_main_(main),
      most_window_(window),
      counts_(static_cast<size_t>(keys)),
      last_(static_cast<size_t>(keys)),
      where_(static_cast<size_t>(keys), Where::kOut),
      in_call_(static_cast<size_t>(keys)) {}

void ExpertPolicy::begin(int64_t layer, int64_t tokens, std::span<const int32_t> keys) {
  if (last_layer_ < 0 || layer <= last_layer_) begin_pass(tokens);
  last_layer_ = layer;
  for (int32_t key : call_) in_call_[index(key)] = false;
  call_.assign(keys.begin(), keys.end());
  for (int32_t key : call_) in_call_[index(key)] = true;
}

int32_t ExpertPolicy::leaver(int32_t key) const {
  if (stays(key) || static_cast<int64_t>(window_.size()) < most_window_) return kNone;
  if (main_size() < most_main_) return kNone;
  const int32_t candidate = window_.front();
  const int32_t victim = least();
  return promotes(candidate, victim) ? victim : candidate;
}

void ExpertPolicy::use(int32_t key, int64_t uses) {
  const Where where = where_[index(key)];
  uses_.emplace_back(key, uses);
  if (where == Where::kMain) main_.erase(rank(key));
  last_[index(key)] = ++clock_;
  if (where == Where::kMain) {
    main_.insert(rank(key));
    return;
  }
  if (where == Where::kWindow) {
    window_.erase(std::find(window_.begin(), window_.end(), key));
  } else if (static_cast<int64_t>(window_.size()) >= most_window_) {
    const int32_t candidate = window_.front();
    window_.pop_front();
    where_[index(candidate)] = Where::kOut;
    const int32_t victim = main_size() < most_main_ ? kNone : least();
    const bool room = main_size() < most_main_;
    if (room || promotes(candidate, victim)) {
      if (!room) {
        main_.erase(rank(victim));
        where_[index(victim)] = Where::kOut;
      }
      main_.insert(rank(candidate));
      where_[index(candidate)] = Where::kMain;
    }
  }
  window_.push_back(key);
  where_[index(key)] = Where::kWindow;
}

bool ExpertPolicy::preload(int32_t key) {
  if (stays(key)) return true;
  if (main_size() >= most_main_) return false;
  main_.insert(rank(key));
  where_[index(key)] = Where::kMain;
  return true;
}

int32_t ExpertPolicy::drop_least(const std::function<bool(int32_t)>& may) {
  for (auto rank = main_.begin(); rank != main_.end(); ++rank) {
    const int32_t key = std::get<2>(*rank);
    if (!may(key)) continue;
    main_.erase(rank);
    where_[index(key)] = Where::kOut;
    return key;
  }
  return kNone;
}

std::vector<uint32_t> ExpertPolicy::counts() const {
  std::vector<uint32_t> all = counts_;
  for (const auto& [key, uses] : uses_) add(all[index(key)], uses);
  return all;
}

void ExpertPolicy::restore(std::span<const uint32_t> counts) {
  uses_.clear();
  std::copy(counts.begin(), counts.end(), counts_.begin());
  rank_again();
}

// The one to leave the main part first, not needed by the call in progress.
int32_t ExpertPolicy::least() const {
  for (const Rank& rank : main_) {
    const int32_t key = std::get<2>(rank);
    if (!in_call_[index(key)]) return key;
  }
  return kNone;
}

bool ExpertPolicy::promotes(int32_t candidate, int32_t victim) const {
  return victim != kNone && counts_[index(candidate)] > counts_[index(victim)];
}

void ExpertPolicy::begin_pass(int64_t tokens) {
  for (const auto& [key, uses] : uses_) {
    const bool main = where_[index(key)] == Where::kMain;
    if (main) main_.erase(rank(key));
    add(counts_[index(key)], uses);
    if (main) main_.insert(rank(key));
  }
  uses_.clear();
  if (tokens_ >= kMemory) {
    for (uint32_t& count : counts_) count /= 2;
    rank_again();
    tokens_ = 0;
  }
  tokens_ += tokens;
}

// After counts were changed behind the order's back.
void ExpertPolicy::rank_again() {
  std::set<Rank> main;
  for (const Rank& old : main_) main.insert(rank(std::get<2>(old)));
  main_ = std::move(main);
}

}  // namespace localds

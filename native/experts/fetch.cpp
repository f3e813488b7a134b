#include "fetch.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "scratch.h"
#include "thread_pool.h"

namespace localds {
namespace {

struct Copy {
  const uint8_t* from;
  uint8_t* to;
  int64_t bytes;
};

void check_uses(const ExpertStore& store, std::span<const ExpertCall::Use> uses) {
  int64_t before = -1;
  for (const ExpertCall::Use& use : uses) {
    if (use.expert < 0 || use.expert >= store.experts()) {
      throw std::invalid_argument("fetch: there is no expert " + std::to_string(use.expert) +
                                  " among " + std::to_string(store.experts()));
    }
    if (use.expert <= before) {
      throw std::invalid_argument("fetch: experts must ascend, but " + std::to_string(use.expert) +
                                  " follows " + std::to_string(before));
    }
    before = use.expert;
  }
}

// In pieces, so that all threads share in the copying of a single expert.
void add_copy(std::vector<Copy>& copies, Copy whole) {
  constexpr int64_t kPiece = int64_t{1} << 18;
  for (int64_t at = 0; at < whole.bytes; at += kPiece) {
    copies.push_back({whole.from + at, whole.to + at, std::min(kPiece, whole.bytes - at)});
  }
}

void run(const std::vector<Copy>& copies) {
  const auto task = [&](int64_t i, int) {
    const Copy& copy = copies[static_cast<size_t>(i)];
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  };
  ThreadPool::instance().run(static_cast<int64_t>(copies.size()), std::cref(task));
}

}  // namespace

void fetch(ExpertStore& store, int64_t layer, std::span<const ExpertCall::Use> uses,
           std::span<uint8_t* const> outs) {
  const std::vector<ExpertPart>& parts = store.layer(layer).parts;
  check_uses(store, uses);
  if (uses.empty()) return;
  int64_t tokens = 0;  // of the call: at least as many as of any expert
  for (const ExpertCall::Use& use : uses) tokens = std::max(tokens, use.tokens);

  const Scratch turn;  // calls of the store take turns, like all that computes
  ExpertCall call(store, layer, tokens, uses, ExpertCall::Extent::kPart);
  while (true) {
    const std::vector<int64_t> arrived = call.next(false);
    if (arrived.empty()) return;
    std::vector<Copy> copies;
    for (int64_t use : arrived) {
      for (size_t p = 0; p < parts.size(); ++p) {
        const int64_t bytes = parts[p].bytes;
        add_copy(copies, {call.data(use, p), outs[p] + use * bytes, bytes});
      }
    }
    run(copies);
    call.done();
  }
}

}  // namespace localds

#include "store.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace localds {
namespace {

// Large enough for the disk's full speed, small enough that what is urgent need not wait long.
constexpr int64_t kPieceBytes = int64_t{2} << 20;

// Pieces in flight that no call waits for.
constexpr int64_t kIdleInFlight = 2;

// How many expectations are judged together, and for how many calls there are none where they do
// not pay.
constexpr int64_t kJudged = 64;
constexpr int64_t kPaused = 1024;

// After so many calls without a miss, none is to be feared.
constexpr int64_t kQuietCalls = 64;

constexpr std::chrono::milliseconds kPoll{100};

double now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(time).count();
}

int64_t align_down(int64_t at) { return at / DirectFile::kAlignment * DirectFile::kAlignment; }
int64_t align_up(int64_t at) { return align_down(at + DirectFile::kAlignment - 1); }

// Gives the parts of each layer their places in a slot, with room for each wherever in a page it
// begins; returns the bytes of a slot.
int64_t lay_out(std::vector<StoredLayer>& layers) {
  int64_t most = 0;
  for (StoredLayer& layer : layers) {
    int64_t bytes = 0;
    for (ExpertPart& part : layer.parts) {
      part.at = bytes;
      bytes += align_up(part.bytes) + DirectFile::kAlignment;
    }
    most = std::max(most, bytes);
  }
  return most;
}

void check(const StoreSizes& sizes) {
  if (sizes.experts >= 1 && sizes.window >= 1 && sizes.ahead >= 0 && sizes.readers >= 1 &&
      sizes.slots >= sizes.window + sizes.ahead && sizes.most >= sizes.slots) {
    return;
  }
  throw std::invalid_argument("expert store: " + std::to_string(sizes.slots) +
                              " slots do not hold a window of " + std::to_string(sizes.window) +
                              " and " + std::to_string(sizes.ahead) + " reads ahead");
}

}  // namespace

StoreStats StoreStats::since(const StoreStats& earlier) const {
  return {uses - earlier.uses,
          hits - earlier.hits,
          early - earlier.early,
          read_bytes - earlier.read_bytes,
          wasted_bytes - earlier.wasted_bytes,
          stall_seconds - earlier.stall_seconds,
          read_seconds - earlier.read_seconds};
}

ExpertStore::ExpertStore(const std::vector<std::string>& files, std::vector<StoredLayer> layers,
                         StoreSizes sizes)
    : layers_(std::move(layers)),
      sizes_((check(sizes), sizes)),
      slots_(sizes.most, lay_out(layers_), sizes.slots),
      policy_(static_cast<int64_t>(layers_.size()) * sizes.experts,
              sizes.slots - sizes.window - sizes.ahead, sizes.window),
      entries_(layers_.size() * static_cast<size_t>(sizes.experts)) {
  for (const std::string& file : files) files_.push_back(std::make_unique<DirectFile>(file));
  for (int64_t i = 0; i < sizes.readers; ++i) readers_.emplace_back([this] { read_loop(); });
}

ExpertStore::~ExpertStore() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

// ---- reading ----

void ExpertStore::read_loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    Piece piece;
    work_.wait(lock, [&] { return stop_ || take_piece(&piece); });
    if (stop_) return;
    const std::string what = describe(piece.load->key);
    uint8_t* out = slots_.data(piece.load->slot) + piece.at;
    lock.unlock();
    std::string error;
    try {
      piece.file->read(piece.start, piece.bytes, out, what);
    } catch (const ReadError& failure) {
      error = failure.what();
    }
    lock.lock();
    finish(piece, error);
  }
}

// The most urgent piece. Those that nobody waits for leave room for those that somebody will.
bool ExpertStore::take_piece(Piece* piece) {
  for (auto& queue : queues_) skip_cancelled(queue);
  if (queues_[kNow].empty() && queues_[kAhead].empty() && queues_[kWarm].empty()) warm_next();
  for (auto& queue : queues_) {
    if (queue.empty()) continue;
    const bool idle = &queue != &queues_[kNow];
    if (idle && idle_in_flight_ >= kIdleInFlight) return false;
    *piece = std::move(queue.front());
    queue.pop_front();
    const double time = now();
    if (in_flight_++ == 0) busy_since_ = time;
    if (idle) ++idle_in_flight_;
    if (piece->load->started == 0) piece->load->started = time;
    return true;
  }
  return false;
}

void ExpertStore::skip_cancelled(std::deque<Piece>& queue) {
  while (!queue.empty() && queue.front().load->cancelled) {
    const std::shared_ptr<Load> load = std::move(queue.front().load);
    queue.pop_front();
    if (--load->pieces == 0) finish_load(*load);
  }
}

void ExpertStore::warm_next() {
  while (!to_warm_.empty()) {
    const int32_t key = to_warm_.front();
    const Entry& e = entry(key);
    const bool wanted = policy_.stays(key) && !e.load && !e.ready;
    if (wanted && !start(key, kWarm)) return;  // no slot yet
    to_warm_.pop_front();
    if (wanted) return;
  }
}

void ExpertStore::finish(const Piece& piece, const std::string& error) {
  const double time = now();
  if (--in_flight_ == 0) stats_.read_seconds += time - busy_since_;
  if (piece.urgency != kNow) --idle_in_flight_;
  Load& load = *piece.load;
  load.bytes += piece.bytes;
  stats_.read_bytes += piece.bytes;
  if (load.cancelled) stats_.wasted_bytes += piece.bytes;
  if (load.error.empty()) load.error = error;
  if (--load.pieces == 0) {
    finish_load(load);
    arrival_.notify_all();
  }
  work_.notify_one();  // another piece that nobody waits for may go
}

void ExpertStore::finish_load(Load& load) {
  load.finished = now();
  if (load.cancelled) {
    if (load.cancelled_at > 0) lost_ += load.finished - load.cancelled_at;
    slots_.give(load.slot);
    arrival_.notify_all();
  } else if (load.error.empty()) {
    Entry& e = entry(load.key);
    e.ready = true;
    e.seconds = load.finished - load.started;
    e.load.reset();  // `load` itself is the reader's, too
  }
}

// Queues the reads of an expert; false where there is no slot for it.
bool ExpertStore::start(int32_t key, Urgency urgency) {
  Entry& e = entry(key);
  if (e.slot == Slots::kNone) e.slot = slots_.take();
  if (e.slot == Slots::kNone) return false;
  e.ready = false;
  e.load = std::make_shared<Load>(key, e.slot);
  for (const ExpertPart& part : layer_of(key).parts) {
    const int64_t begin = part.begin(expert_of(key));
    const int64_t first = align_down(begin);
    const int64_t end = align_up(begin + part.bytes);
    for (int64_t at = first; at < end; at += kPieceBytes) {
      const DirectFile* file = files_[static_cast<size_t>(part.file)].get();
      queues_[urgency].push_back(
          {e.load, file, at, std::min(kPieceBytes, end - at), part.at + at - first, urgency});
      ++e.load->pieces;
    }
  }
  if (urgency == kNow) {
    work_.notify_all();
  } else {
    work_.notify_one();
  }
  return true;
}

// A call waits for it now: what is not yet being read goes before all that is less urgent.
void ExpertStore::hurry(const Load& load) {
  for (Urgency urgency : {kAhead, kWarm}) {
    auto& queue = queues_[urgency];
    for (auto piece = queue.begin(); piece != queue.end();) {
      if (piece->load.get() != &load) {
        ++piece;
        continue;
      }
      queues_[kNow].push_back(std::move(*piece));
      queues_[kNow].back().urgency = kNow;
      piece = queue.erase(piece);
    }
  }
  work_.notify_all();
}

// ---- what is in memory ----

// Takes an expert out of memory, in the middle of its reading, too.
void ExpertStore::let_go(int32_t key) {
  Entry& e = entry(key);
  if (e.load && !e.load->failed()) {
    e.load->cancelled = true;  // its slot is given back when the last read is over
    work_.notify_one();
  } else if (e.slot != Slots::kNone) {
    slots_.give(e.slot);
  }
  e = Entry{};
}

const StoredLayer& ExpertStore::layer(int64_t layer) const {
  const auto layers = static_cast<int64_t>(layers_.size());
  if (layer < 0 || layer >= layers) {
    throw std::invalid_argument("expert store: there is no layer " + std::to_string(layer) +
                                " among " + std::to_string(layers));
  }
  return layers_[static_cast<size_t>(layer)];
}

bool ExpertStore::misses() {
  const std::lock_guard lock(mutex_);
  return calls_without_miss_ < kQuietCalls;
}

bool ExpertStore::looks_ahead() {
  const std::lock_guard lock(mutex_);
  return look_ahead_ && sizes_.ahead > 0 && pause_ == 0;
}

void ExpertStore::expect(int64_t layer, std::span<const int32_t> experts) {
  const std::lock_guard lock(mutex_);
  expected_.clear();
  for (int32_t expert : experts) {
    expected_.push_back(key(layer, expert));
  }
  std::erase_if(ahead_, [&](int32_t key) {
    const Entry& e = entry(key);
    const bool wanted = std::find(expected_.begin(), expected_.end(), key) != expected_.end();
    if (wanted || !e.load || e.load->started > 0) return false;
    let_go(key);
    return true;
  });
  fill_ahead();
  if (++expectations_ >= kJudged) judge_look_ahead();
}

void ExpertStore::fill_ahead() {
  while (!expected_.empty() && static_cast<int64_t>(ahead_.size()) < sizes_.ahead) {
    const int32_t key = expected_.front();
    const Entry& e = entry(key);
    const bool missing = !policy_.stays(key) && e.slot == Slots::kNone;
    if (missing && !start(key, kAhead)) return;
    if (missing) ahead_.push_back(key);
    expected_.pop_front();
  }
}

// A call uses what was read ahead: it needs no place there any more.
bool ExpertStore::adopt(int32_t key) {
  const auto found = std::find(ahead_.begin(), ahead_.end(), key);
  if (found == ahead_.end()) return false;
  ahead_.erase(found);
  const Entry& e = entry(key);
  if (e.ready) gained_ += e.seconds;
  if (e.load && e.load->started > 0) gained_ += now() - e.load->started;
  if (e.load) hurry(*e.load);
  return true;
}

// Drops what was read ahead of a call that turns out not to need it.
void ExpertStore::expire(std::span<const int32_t> needed) {
  expected_.clear();
  std::erase_if(ahead_, [&](int32_t key) {
    if (std::find(needed.begin(), needed.end(), key) != needed.end()) return false;
    Entry& e = entry(key);
    if (e.load) {
      stats_.wasted_bytes += e.load->bytes;
      if (e.load->started > 0) e.load->cancelled_at = now();
    } else {
      for (const ExpertPart& part : layer_of(key).parts) stats_.wasted_bytes += part.bytes;
    }
    let_go(key);
    return true;
  });
}

// Reads ahead pay as long as what they save of later waiting is more than what they cost: a call's
// own reads wait for those under way in vain.
void ExpertStore::judge_look_ahead() {
  if (lost_ > gained_) pause_ = kPaused;
  gained_ = lost_ = 0;
  expectations_ = 0;
}

void ExpertStore::warm(std::span<const int32_t> keys) {
  const std::lock_guard lock(mutex_);
  for (int32_t key : keys) {
    if (!policy_.preload(key)) break;
    to_warm_.push_back(key);
  }
  work_.notify_all();
}

bool ExpertStore::is_warm() {
  const std::lock_guard lock(mutex_);
  return to_warm_.empty() && queues_[kWarm].empty() && in_flight_ == 0;
}

void ExpertStore::resize(int64_t slots) {
  const std::lock_guard lock(mutex_);
  slots = std::clamp(slots, sizes_.window + sizes_.ahead, sizes_.most);
  policy_.set_main(slots - sizes_.window - sizes_.ahead);
  slots_.set_wanted(slots);
  shrink();
  arrival_.notify_all();
  work_.notify_all();
}

// Lets go of what is too much, but for what the call in progress is using.
void ExpertStore::shrink() {
  const int64_t main = slots_.wanted() - sizes_.window - sizes_.ahead;
  while (policy_.main_size() > main) {
    const int32_t key = policy_.drop_least([&](int32_t key) { return !entry(key).in_use; });
    if (key == ExpertPolicy::kNone) return;
    let_go(key);
  }
}

int64_t ExpertStore::slots() {
  const std::lock_guard lock(mutex_);
  return slots_.wanted();
}

void ExpertStore::set_look_ahead(bool on) {
  const std::lock_guard lock(mutex_);
  look_ahead_ = on;
}

std::vector<uint32_t> ExpertStore::counts() {
  const std::lock_guard lock(mutex_);
  return policy_.counts();
}

void ExpertStore::restore(std::span<const uint32_t> counts) {
  if (counts.size() != entries_.size()) {
    throw std::invalid_argument("expert store: counts of " + std::to_string(counts.size()) +
                                " experts, expected " + std::to_string(entries_.size()));
  }
  const std::lock_guard lock(mutex_);
  policy_.restore(counts);
}

StoreStats ExpertStore::stats() {
  const std::lock_guard lock(mutex_);
  count_reading();
  return stats_;
}

StoreStats ExpertStore::take_stats() {
  const std::lock_guard lock(mutex_);
  count_reading();
  const StoreStats before = std::exchange(taken_, stats_);
  return stats_.since(before);
}

// Adds the time of reads that are under way.
void ExpertStore::count_reading() {
  if (in_flight_ == 0) return;
  const double time = now();
  stats_.read_seconds += time - busy_since_;
  busy_since_ = time;
}

std::vector<uint8_t> ExpertStore::resident() {
  std::vector<uint8_t> resident(entries_.size());
  const std::lock_guard lock(mutex_);
  std::transform(entries_.begin(), entries_.end(), resident.begin(),
                 [](const Entry& e) { return static_cast<uint8_t>(e.ready); });
  return resident;
}

std::string ExpertStore::describe(int32_t key) const {
  return "layer " + std::to_string(layer_of(key).block) + ", expert " +
         std::to_string(expert_of(key));
}

// ---- a layer's call ----

ExpertCall::ExpertCall(ExpertStore& store, int64_t layer, int64_t tokens, std::span<const Use> uses,
                       Extent extent)
    : store_(store), layer_(layer), uses_(uses), given_out_(uses.size()) {
  std::vector<int32_t> keys;
  for (const Use& use : uses) keys.push_back(store_.key(layer, use.expert));
  const bool whole = extent == Extent::kLayer;
  // To the policy, each part is a layer of its own between the call of its layer and the next one.
  const int64_t place = layer * (store_.sizes_.experts + 1);
  const int64_t part = whole || uses.empty() ? 0 : 1 + uses.front().expert;
  const std::lock_guard lock(store_.mutex_);
  ++store_.calls_without_miss_;
  if (store_.pause_ > 0) --store_.pause_;
  store_.policy_.begin(place + part, tokens, keys);
  if (whole) store_.expire(keys);
  pump();
}

ExpertCall::~ExpertCall() {
  const std::lock_guard lock(store_.mutex_);
  for (const Use& use : uses_) store_.entry(store_.key(layer_, use.expert)).in_use = false;
  store_.shrink();
}

int32_t ExpertCall::key(int64_t use) const {
  return store_.key(layer_, uses_[static_cast<size_t>(use)].expert);
}

// Issues as many uses, in their order, as there are slots for.
void ExpertCall::pump() {
  while (issued_ < static_cast<int64_t>(uses_.size())) {
    if (!used_ && !use(issued_)) break;
    used_ = true;
    if (!provide(issued_)) break;
    used_ = false;
    ++issued_;
  }
  store_.fill_ahead();
}

// Counts a use, and makes room; false while an expert that has to leave is not yet computed.
bool ExpertCall::use(int64_t use) {
  const int32_t wanted = key(use);
  const int32_t leaver = store_.policy_.leaver(wanted);
  if (leaver != ExpertPolicy::kNone && store_.entry(leaver).in_use) return false;
  const bool stayed = store_.policy_.stays(wanted);
  store_.policy_.use(wanted, uses_[static_cast<size_t>(use)].tokens);
  if (leaver != ExpertPolicy::kNone) store_.let_go(leaver);

  if (!stayed) store_.calls_without_miss_ = 0;
  ++store_.stats_.uses;
  const ExpertStore::Entry& e = store_.entry(wanted);
  const bool coming = e.ready || (e.load && !e.load->failed());
  if (stayed && coming) ++store_.stats_.hits;
  if (store_.adopt(wanted) && coming) ++store_.stats_.early;
  return true;
}

// Sees to it that the expert is in memory or being read; false where there is no slot for it.
bool ExpertCall::provide(int64_t use) {
  ExpertStore::Entry& e = store_.entry(key(use));
  if (e.load && e.load->failed()) e.load.reset();
  if (e.load) {
    store_.hurry(*e.load);
  } else if (!e.ready && !store_.start(key(use), ExpertStore::kNow)) {
    return false;
  }
  e.in_use = true;
  return true;
}

std::vector<int64_t> ExpertCall::next(bool in_order) {
  std::unique_lock lock(store_.mutex_);
  while (true) {
    pump();
    given_ = ready(in_order);
    for (int64_t use : given_) given_out_[static_cast<size_t>(use)] = true;
    while (open_ < issued_ && given_out_[static_cast<size_t>(open_)]) ++open_;
    if (!given_.empty() || open_ == static_cast<int64_t>(uses_.size())) return given_;
    check_failures();

    const double start = now();
    const bool idle = store_.arrival_.wait_for(lock, kPoll) == std::cv_status::timeout;
    store_.stats_.stall_seconds += now() - start;
    if (idle && store_.poll_) {
      lock.unlock();
      store_.poll_();
      lock.lock();
    }
  }
}

std::vector<int64_t> ExpertCall::ready(bool in_order) const {
  std::vector<int64_t> found;
  for (int64_t use = open_; use < issued_; ++use) {
    if (given_out_[static_cast<size_t>(use)]) continue;
    if (store_.entry(key(use)).ready) {
      found.push_back(use);
    } else if (in_order) {
      break;
    }
  }
  return found;
}

void ExpertCall::check_failures() {
  for (int64_t use = open_; use < issued_; ++use) {
    ExpertStore::Entry& e = store_.entry(key(use));
    if (!e.load || !e.load->failed()) continue;
    const std::string error = e.load->error;
    e.load.reset();  // the next call tries again
    throw ReadError(error);
  }
}

void ExpertCall::done() {
  const std::lock_guard lock(store_.mutex_);
  for (int64_t use : given_) store_.entry(key(use)).in_use = false;
  given_.clear();
  store_.shrink();
  pump();
}

const uint8_t* ExpertCall::data(int64_t use, size_t part) const {
  const ExpertPart& wanted = store_.layers_[static_cast<size_t>(layer_)].parts[part];
  const int64_t begin = wanted.begin(uses_[static_cast<size_t>(use)].expert);
  const int32_t slot = store_.entry(key(use)).slot;
  return store_.slots_.data(slot) + wanted.at + begin % DirectFile::kAlignment;
}

}  // namespace localds

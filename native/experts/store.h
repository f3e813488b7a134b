// The experts of a model that stays on disk: a bounded pool of slots, filled by explicit reads.
//
// A layer opens an `ExpertCall` for the experts that it needs. The call issues reads for all that
// are missing at once (as far as there are slots), and gives out experts as they become ready. What
// is kept is up to ExpertPolicy; reads ahead of any call have places of their own and never change
// its choices. So hits depend on the calls alone, and results on neither.
//
// Threading: one call at a time (the layers' Scratch sees to that); everything else from any
// thread.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "direct_file.h"
#include "policy.h"
#include "slots.h"

namespace localds {

// Expert e of a stacked tensor: `bytes` from byte offset + e * bytes of a file on.
struct ExpertPart {
  int32_t file;
  int64_t offset;
  int64_t bytes;
  int64_t at = 0;  // of its first page in a slot; filled in by the store

  int64_t begin(int64_t expert) const { return offset + expert * bytes; }
};

struct StoredLayer {
  int64_t block;                  // the layer's number in the model, for messages
  std::vector<ExpertPart> parts;  // read together
};

struct StoreSizes {
  int64_t experts;  // of a layer
  int64_t slots;    // in all; of these
  int64_t window;   // for what was read last (ExpertPolicy)
  int64_t ahead;    // for reads ahead
  int64_t most;     // slots that there may ever be
  int64_t readers;  // threads, so many reads in flight
};

struct StoreStats {
  int64_t uses = 0;          // of experts by calls
  int64_t hits = 0;          // of these, in memory or on their way without a call's asking
  int64_t early = 0;         // missing, but read ahead
  int64_t read_bytes = 0;    // all reads
  int64_t wasted_bytes = 0;  // read ahead in vain
  double stall_seconds = 0;  // that calls waited
  double read_seconds = 0;   // with a read in flight

  // What was done since `earlier`.
  StoreStats since(const StoreStats& earlier) const;
};

class ExpertCall;

class ExpertStore {
 public:
  // Throws ReadError for files that cannot be opened, std::invalid_argument for sizes that do not
  // fit together, std::bad_alloc.
  ExpertStore(const std::vector<std::string>& files, std::vector<StoredLayer> layers,
              StoreSizes sizes);
  ~ExpertStore();

  // Throws std::invalid_argument for a layer that there is not.
  const StoredLayer& layer(int64_t layer) const;
  int64_t experts() const { return sizes_.experts; }  // of a layer

  // Whether anything was missing of late.
  bool misses();
  // Whether it pays to say what to expect: reads ahead are judged by what they save and cost.
  bool looks_ahead();
  // Reads `experts` of a layer ahead of its next call; what that call does not use is dropped, and
  // what was expected before and is not yet being read.
  void expect(int64_t layer, std::span<const int32_t> experts);

  // Makes keys (layer * experts + expert) stay, most wanted first, as far as the main part has
  // room, and reads them in the background.
  void warm(std::span<const int32_t> keys);
  // Whether nothing of `warm` is left to read.
  bool is_warm();

  // The pool grows or shrinks; what a call is using stays until it is done.
  void resize(int64_t slots);
  int64_t slots();
  void set_look_ahead(bool on);

  std::vector<uint32_t> counts();
  void restore(std::span<const uint32_t> counts);
  // All that was done since the store was made, and what since the last take_stats.
  StoreStats stats();
  StoreStats take_stats();
  // For each key, 1 if the expert lies in memory now, else 0.
  std::vector<uint8_t> resident();

  // Called every 100 ms by a call that waits, without any lock; may throw.
  void set_poll(std::function<void()> poll) { poll_ = std::move(poll); }

 private:
  friend class ExpertCall;

  // One expert on its way from disk; with an error, it did not arrive.
  struct Load {
    Load(int32_t key, int32_t slot) : key(key), slot(slot) {}

    int32_t key;
    int32_t slot;
    int64_t pieces = 0;  // not yet read
    int64_t bytes = 0;   // read
    bool cancelled = false;
    std::string error;
    double started = 0, finished = 0, cancelled_at = 0;

    bool failed() const { return pieces == 0 && !error.empty(); }
  };
  enum Urgency { kNow, kAhead, kWarm, kUrgencies };
  struct Piece {
    std::shared_ptr<Load> load;
    const DirectFile* file;
    int64_t start, bytes;  // aligned
    int64_t at;            // in the slot
    Urgency urgency;
  };
  struct Entry {
    int32_t slot = Slots::kNone;
    std::shared_ptr<Load> load;  // while it is on its way
    bool ready = false;
    bool in_use = false;  // by the call in progress
    double seconds = 0;   // that reading it took
  };

  Entry& entry(int32_t key) { return entries_[static_cast<size_t>(key)]; }
  int32_t key(int64_t layer, int64_t expert) const {
    return static_cast<int32_t>(layer * sizes_.experts + expert);
  }
  int64_t expert_of(int32_t key) const { return key % sizes_.experts; }
  const StoredLayer& layer_of(int32_t key) const {
    return layers_[static_cast<size_t>(key / sizes_.experts)];
  }
  void read_loop();
  bool take_piece(Piece* piece);
  void skip_cancelled(std::deque<Piece>& queue);
  void warm_next();
  void finish(const Piece& piece, const std::string& error);
  void finish_load(Load& load);
  bool start(int32_t key, Urgency urgency);
  void hurry(const Load& load);
  void let_go(int32_t key);
  bool adopt(int32_t key);
  void expire(std::span<const int32_t> needed);
  void fill_ahead();
  void shrink();
  void judge_look_ahead();
  void count_reading();
  std::string describe(int32_t key) const;

  std::vector<std::unique_ptr<DirectFile>> files_;
  std::vector<StoredLayer> layers_;
  StoreSizes sizes_;
  Slots slots_;
  std::function<void()> poll_;

  std::mutex mutex_;
  std::condition_variable work_;     // for readers
  std::condition_variable arrival_;  // for calls
  ExpertPolicy policy_;
  std::vector<Entry> entries_;
  std::array<std::deque<Piece>, kUrgencies> queues_;
  std::deque<int32_t> to_warm_;
  std::vector<int32_t> ahead_;    // keys that have places for reads ahead
  std::deque<int32_t> expected_;  // keys that wait for such a place
  int64_t in_flight_ = 0;
  int64_t idle_in_flight_ = 0;  // of these, pieces that no call asked for
  double busy_since_ = 0;
  bool look_ahead_ = true;
  int64_t calls_without_miss_ = 0;
  double gained_ = 0, lost_ = 0;  // seconds, by reads ahead
  int64_t expectations_ = 0;      // since this was last judged
  int64_t pause_ = 0;             // calls without expectations
  StoreStats stats_;
  StoreStats taken_;  // at the last take_stats
  bool stop_ = false;
  std::vector<std::thread> readers_;
};

// The experts that one layer needs in one forward, or some of them.
class ExpertCall {
 public:
  struct Use {
    int32_t expert;
    int64_t tokens;
  };
  // A part does not tell which experts the layer does not need. Parts that follow each other by
  // ascending expert are of one pass through the model; the layer's own call goes before them.
  enum class Extent { kLayer, kPart };

  // `uses` by ascending expert; they must outlive the call.
  ExpertCall(ExpertStore& store, int64_t layer, int64_t tokens, std::span<const Use> uses,
             Extent extent = Extent::kLayer);
  ~ExpertCall();
  ExpertCall(const ExpertCall&) = delete;
  ExpertCall& operator=(const ExpertCall&) = delete;

  // Waits until there is something to compute and returns which uses: those that are ready, or if
  // `in_order` the next ones as far as they are ready. Empty when all were given out. Throws
  // ReadError.
  std::vector<int64_t> next(bool in_order);
  // What was given out by the last `next` is computed: its slots may be used again.
  void done();

  // Where part `part` of a use that was given out lies.
  const uint8_t* data(int64_t use, size_t part) const;

 private:
  int32_t key(int64_t use) const;
  void pump();
  bool use(int64_t use);
  bool provide(int64_t use);
  std::vector<int64_t> ready(bool in_order) const;
  void check_failures();

  ExpertStore& store_;
  int64_t layer_;
  std::span<const Use> uses_;
  std::vector<bool> given_out_;
  std::vector<int64_t> given_;  // by the last `next`
  int64_t issued_ = 0;          // uses that are in memory or on their way
  bool used_ = false;           // the next one is counted, but there was no slot for it
  int64_t open_ = 0;            // all before are given out
};

}  // namespace localds

#include "scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "thread_pool.h"

namespace localds {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPage = size_t{1} << 16;  // a multiple of every system's
constexpr size_t kSmallestBlock = size_t{1} << 20;

// Mapped, not allocated: what is given up goes back to the system, so that memory can be counted.
struct Block {
  explicit Block(size_t bytes) : size((bytes + kPage - 1) / kPage * kPage) {
    void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    data = static_cast<std::byte*>(address);
  }
  ~Block() { munmap(data, size); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  std::byte* data;
  size_t size;
  size_t used = 0;
};

// Blocks are added while an operation runs, so that pointers stay valid, and joined into one before
// the next.
struct Arena {
  std::mutex mutex;
  std::vector<std::unique_ptr<Block>> blocks;
  size_t current = 0;  // the block that is being handed out
  ActivationBuffer activations[3];

  void reset() {
    if (blocks.size() > 1) {
      size_t total = 0;
      for (const auto& block : blocks) total += block->size;
      blocks.clear();
      blocks.push_back(std::make_unique<Block>(total));
    }
    rewind({0, 0});
  }

  Scratch::Mark mark() const { return {current, blocks.empty() ? 0 : blocks[current]->used}; }

  void rewind(Scratch::Mark mark) {
    for (size_t i = mark.block; i < blocks.size(); ++i) blocks[i]->used = 0;
    if (mark.block < blocks.size()) blocks[mark.block]->used = mark.used;
    current = mark.block;
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    while (current < blocks.size() && blocks[current]->size - blocks[current]->used < bytes) {
      ++current;
    }
    if (current == blocks.size()) {
      blocks.push_back(std::make_unique<Block>(std::max(bytes, kSmallestBlock)));
    }
    Block& block = *blocks[current];
    block.used += bytes;
    return block.data + block.used - bytes;
  }
};

Arena& arena() {
  static Arena* instance = new Arena();  // outlives every thread, like the pool
  return *instance;
}

}  // namespace

Scratch::Scratch() : lock_(arena().mutex), threads_(ThreadPool::instance().size()) {
  arena().reset();
}

ActivationBuffer& Scratch::activations(int index) { return arena().activations[index]; }

Scratch::Mark Scratch::mark() const { return arena().mark(); }

void Scratch::rewind(Mark mark) { arena().rewind(mark); }

void* Scratch::take_bytes(size_t bytes) { return arena().take(bytes); }

void set_threads(int threads) {
  std::lock_guard lock(arena().mutex);
  ThreadPool::instance().resize(threads);
}

}  // namespace localds

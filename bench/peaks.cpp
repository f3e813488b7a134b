// What this processor can do at best: bytes read from memory, int8 multiply-adds. bench_kernels.py
// compiles it with -march=native and prints its lines beside the kernels' figures.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

// The best time of five, in seconds, of body(thread) on all threads.
template <class Body>
double best_seconds(int threads, Body body) {
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) workers.emplace_back(body, t);
    for (std::thread& worker : workers) worker.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

uint64_t sum_of(const uint64_t* data, size_t count) {
  uint64_t sum[8] = {};
  for (size_t i = 0; i < count; i += 8) {
    __builtin_prefetch(data + i + 1024, 0, 2);
    for (size_t j = 0; j < 8; ++j) sum[j] ^= data[i + j];
  }
  for (size_t j = 1; j < 8; ++j) sum[0] ^= sum[j];
  return sum[0];
}

constexpr int64_t kIterations = 20'000'000;

// Multiply-adds of a loop over independent sums in registers.
int64_t multiply_add_loop() {
#if defined(__AVX512VNNI__)
  __m512i sums[12] = {};
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m512i& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, ones, ones);
      asm volatile("" : "+v"(sum));
    }
  }
  return kIterations * 12 * 64;
#else
  __m256i sums[8] = {};
  const __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m256i& sum : sums) {
      const __m256i pairs = _mm256_maddubs_epi16(ones, ones);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, words));
      asm volatile("" : "+x"(sum));
    }
  }
  return kIterations * 8 * 32;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const size_t count = size_t{64} << 20;  // 512 MB
  const std::vector<uint64_t> data(count, 1);
  const size_t share = count / static_cast<size_t>(threads) / 8 * 8;
  std::vector<uint64_t> results(static_cast<size_t>(threads));
  const double read = best_seconds(threads, [&](int t) {
    const auto i = static_cast<size_t>(t);
    results[i] = sum_of(data.data() + i * share, share);
  });
  const double bytes = static_cast<double>(share) * threads * sizeof(uint64_t);
  std::vector<int64_t> products(static_cast<size_t>(threads));
  const double multiply =
      best_seconds(threads, [&](int t) { products[static_cast<size_t>(t)] = multiply_add_loop(); });
  const double total = static_cast<double>(products[0]) * threads;
  std::printf("%.1f %.0f\n", bytes / read / 1e9, total / multiply / 1e9);
}

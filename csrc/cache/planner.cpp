#include "cache/planner.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace nf {
namespace {

class Draws {
  public:
    explicit Draws(uint64_t key) : key_(key) {}

    // Uniform in [0, n) without bias: Lemire's multiplication, drawn again in the leftover of 2^64 / n.
    uint64_t below(uint64_t n) {
        const uint64_t leftover = (0 - n) % n;
        for (;;) {
            const auto product = static_cast<unsigned __int128>(mix(key_, count_++)) * n;
            if (static_cast<uint64_t>(product) >= leftover) return static_cast<uint64_t>(product >> 64);
        }
    }

  private:
    uint64_t key_;
    uint64_t count_ = 0;
};

}  // namespace

// SplitMix64 by its counter.
uint64_t mix(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

std::vector<int64_t> plan_order(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks) {
    if (n_samples < 0 || samples_per_chunk < 1 || window_chunks < 1)
        throw std::invalid_argument("expected n_samples >= 0, samples_per_chunk >= 1 and window_chunks >= 1, got " +
                                    std::to_string(n_samples) + ", " + std::to_string(samples_per_chunk) + ", " +
                                    std::to_string(window_chunks));
    Draws draws(key);
    const int64_t n_chunks = n_samples / samples_per_chunk + (n_samples % samples_per_chunk != 0);
    std::vector<int64_t> chunks(n_chunks);
    std::iota(chunks.begin(), chunks.end(), int64_t{0});
    for (int64_t j = n_chunks - 1; j > 0; --j) std::swap(chunks[j], chunks[draws.below(j + 1)]);

    std::vector<int64_t> left(n_chunks), pool, order;
    order.reserve(n_samples);
    auto next = chunks.begin();
    const auto load = [&] {
        if (next == chunks.end()) return;
        const int64_t begin = *next * samples_per_chunk, end = std::min(begin + samples_per_chunk, n_samples);
        left[*next++] = end - begin;
        for (int64_t position = begin; position < end; ++position) pool.push_back(position);
    };
    for (int64_t k = 0; k < std::min(window_chunks, n_chunks); ++k) load();
    while (!pool.empty()) {
        int64_t& drawn = pool[draws.below(pool.size())];
        const int64_t position = std::exchange(drawn, pool.back());
        pool.pop_back();
        order.push_back(position);
        if (--left[position / samples_per_chunk] == 0) load();
    }
    return order;
}

}  // namespace nf

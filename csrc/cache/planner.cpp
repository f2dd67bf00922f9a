#include "cache/planner.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace nf {

// SplitMix64 by its counter.
uint64_t mix(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

Planner::Planner(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks)
    : key_(key), n_samples_(n_samples), samples_per_chunk_(samples_per_chunk) {
    if (n_samples < 0 || samples_per_chunk < 1 || samples_per_chunk > INT32_MAX || window_chunks < 1)
        throw std::invalid_argument("expected n_samples >= 0, samples_per_chunk >= 1 and window_chunks >= 1, got " +
                                    std::to_string(n_samples) + ", " + std::to_string(samples_per_chunk) + ", " +
                                    std::to_string(window_chunks));
    const int64_t n_chunks = n_samples / samples_per_chunk + (n_samples % samples_per_chunk != 0);
    if (n_chunks > INT32_MAX)
        throw std::invalid_argument("expected at most 2147483647 chunks, got " + std::to_string(n_chunks));
    chunks_.resize(n_chunks);
    left_.resize(n_chunks);
    std::iota(chunks_.begin(), chunks_.end(), int64_t{0});
    for (int64_t j = n_chunks - 1; j > 0; --j) std::swap(chunks_[j], chunks_[below(j + 1)]);
    for (int64_t k = 0; k < std::min(window_chunks, n_chunks); ++k) load();
}

// Uniform in [0, n) without bias: Lemire's multiplication, drawn again in the leftover of 2^64 / n.
uint64_t Planner::below(uint64_t n) {
    const uint64_t leftover = (0 - n) % n;
    for (;;) {
        const auto product = static_cast<unsigned __int128>(mix(key_, count_++)) * n;
        if (static_cast<uint64_t>(product) >= leftover) return static_cast<uint64_t>(product >> 64);
    }
}

void Planner::load() {
    if (loaded_ == static_cast<int64_t>(chunks_.size())) return;
    const int64_t begin = chunks_[loaded_] * samples_per_chunk_;
    const int64_t end = std::min(begin + samples_per_chunk_, n_samples_);
    left_[loaded_] = static_cast<int32_t>(end - begin);
    for (int64_t position = begin; position < end; ++position)
        pool_.push_back({position, static_cast<int32_t>(loaded_)});
    ++loaded_;
}

Planner::Draw Planner::next() {
    Sample& drawn = pool_[below(pool_.size())];
    const Sample sample = std::exchange(drawn, pool_.back());
    pool_.pop_back();
    const bool last = --left_[sample.place] == 0;
    if (last) load();
    return {sample.position, sample.place, last};
}

std::vector<int64_t> plan_order(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks) {
    Planner planner(key, n_samples, samples_per_chunk, window_chunks);
    std::vector<int64_t> order(n_samples);
    for (int64_t& position : order) position = planner.next().position;
    return order;
}

}  // namespace nf

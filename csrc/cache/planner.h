// The order in which an epoch reads a cache: a pure function of key and geometry, part of the file format.
#pragma once

#include <cstdint>
#include <vector>

namespace nf {

// Positions 0..n_samples-1, shuffled within a window of `window_chunks` chunks that slides over the shuffled chunks: at
// most that many chunks are in use at any time.
std::vector<int64_t> plan_order(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks);

uint64_t mix(uint64_t key, uint64_t i);

}  // namespace nf

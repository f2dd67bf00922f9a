// The order in which an epoch reads a cache: a pure function of key and geometry, part of the file format.
#pragma once

#include <cstdint>
#include <vector>

namespace nf {

uint64_t mix(uint64_t key, uint64_t i);

// Positions 0..n_samples-1, shuffled within a window of chunks that slides over the shuffled chunks: at most
// `window_chunks` chunks are in use at any time.
class Planner {
  public:
    Planner(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks);

    struct Draw {
        int64_t position;
        int64_t place;  // of its chunk in chunks()
        bool last;      // of its chunk
    };
    // Call it n_samples times.
    Draw next();

    const std::vector<int64_t>& chunks() const { return chunks_; }   // in the order in which they are loaded
    int64_t loaded() const { return loaded_; }                       // how many of them the draws so far can come from
    bool drained(int64_t place) const { return left_[place] == 0; }  // of a loaded chunk

  private:
    uint64_t below(uint64_t n);
    void load();

    uint64_t key_, count_ = 0;
    int64_t n_samples_, samples_per_chunk_, loaded_ = 0;
    std::vector<int64_t> chunks_;
    std::vector<int32_t> left_;  // samples not yet drawn, by place
    struct Sample {
        int64_t position;
        int32_t place;
    };
    std::vector<Sample> pool_;
};

std::vector<int64_t> plan_order(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks);

}  // namespace nf

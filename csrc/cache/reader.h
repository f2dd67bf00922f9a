// Read-ahead: threads read and verify chunks in the order of the plan, one more gathers samples into the ring of
// batches.
//
// A Reader is one open, checked file; an Epoch is one pass over it. The window (chunks in use and a few ahead) is plain
// page-aligned memory; towards a device the batches pass through pinned pieces, so that pinned bytes do not grow with
// the batch. Batch i + 1 is gathered and copied while the caller computes on batch i.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cache/crew.h"
#include "cache/engine.h"
#include "cache/format.h"
#include "cache/planner.h"
#include "cache/stats.h"
#include "gpu/copy_queue.h"
#include "io/file.h"
#include "io/fork.h"

namespace nf {

// What the passes over one file share.
struct Source {
    std::unique_ptr<File> file;
    Header header{};
    std::vector<uint8_t> header_page;
    std::vector<uint8_t> table;  // CRC32C of each chunk, padded to a page
    Stats stats;
    std::mutex mutex;
    std::vector<std::string> notes;  // what a log should say
    std::atomic<bool> stuck{false};  // a thread is in a system call that does not end: the descriptor stays open
};

struct EpochOptions {
    uint64_t key = 0;
    size_t batch = 1;
    int64_t window_chunks = 2;
    uint64_t first = 0;  // number of the batch to begin with
    bool drop_last = false;
    std::vector<uint64_t> ring;  // addresses of slots for `batch` samples each
    bool on_device = false;
    gpu::Stream stream = nullptr;  // the ring's memory is free once the work on it so far is done
    int threads = 2;
};

class Epoch {
  public:
    Epoch(std::shared_ptr<Engine> engine, std::shared_ptr<Source> source, const EpochOptions& options);
    ~Epoch();
    Epoch(const Epoch&) = delete;
    Epoch& operator=(const Epoch&) = delete;

    struct Batch {
        size_t slot, count;  // count 0: the pass is over
        const Record* records;
    };
    // Takes the slot handed out before back, as the work on `stream` leaves it, and hands out the next one, which work
    // on `stream` may use.
    Batch next(gpu::Stream stream, const Interrupt& interrupt);
    void stop() noexcept;  // may be called from another thread, where next() then throws ClosedError

  private:
    struct State;
    static void read_chunks(const std::shared_ptr<State>& state, size_t thread);
    static void gather_batches(const std::shared_ptr<State>& state);

    const io::Origin origin_;
    std::shared_ptr<Engine> engine_;
    std::shared_ptr<State> state_;
    Crew crew_;
    uint64_t turn_ = 0;
    bool handed_ = false;
};

class Reader {
  public:
    // Checks length, header, table and footer; chunks are checked whenever they are read.
    Reader(std::shared_ptr<Engine> engine, Folder& folder, const std::string& name);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    std::shared_ptr<Epoch> start(const EpochOptions& options);
    void close();  // ends every pass
    const Source& source() const { return *source_; }
    std::vector<std::string> take_notes();

  private:
    const io::Origin origin_;
    std::shared_ptr<Engine> engine_;
    std::shared_ptr<Source> source_;
    std::mutex mutex_;  // start() and close() may come from two threads
    std::vector<std::weak_ptr<Epoch>> epochs_;
    bool closed_ = false;
};

}  // namespace nf

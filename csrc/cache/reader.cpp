#include "cache/reader.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "cache/error.h"
#include "io/error.h"

namespace nf {
namespace {

uint64_t batches_of(const Header& header, const EpochOptions& options) {
    const uint64_t whole = header.n_samples / options.batch;
    return whole + (!options.drop_last && header.n_samples % options.batch != 0);
}

}  // namespace

// Everything that the threads use: they hold it together, so that a stuck one can be left behind.
struct Epoch::State {
    enum class Slot { kFree, kReady };

    State(std::shared_ptr<Engine> engine_, std::shared_ptr<Source> source_, const EpochOptions& options_)
        : engine(std::move(engine_)),
          source(std::move(source_)),
          options(options_),
          planner(options.key, static_cast<int64_t>(source->header.n_samples), source->header.samples_per_chunk,
                  options.window_chunks),
          batches(batches_of(source->header, options)),
          slot(options.ring.size(), Slot::kFree),
          counts(options.ring.size()),
          records(options.ring.size(), std::vector<Record>(options.batch)) {}

    // Draws are replayed up to the first batch; chunks that it has drained already are not read.
    void skip() {
        const uint64_t skipped = std::min(options.first * options.batch, source->header.n_samples);
        for (uint64_t i = 0; i < skipped; ++i) planner.next();
        for (int64_t place = 0; place < static_cast<int64_t>(planner.chunks().size()); ++place)
            if (place >= planner.loaded() || !planner.drained(place)) to_read.push_back(place);
    }

    void make_window() {
        const size_t stride = source->header.chunk_stride;
        const auto wanted = static_cast<size_t>(options.window_chunks + kReadAhead);
        const size_t count = std::max<size_t>(1, std::min(wanted, to_read.size()));
        window = std::make_unique<AlignedBuffer>(count * stride);
        for (size_t i = count; i-- > 0;) free.push_back(window->data() + i * stride);
        slab_of = std::vector<std::atomic<uint8_t*>>(planner.chunks().size());
    }

    void make_pieces() {
        const Header& header = source->header;
        piece_samples = std::max<size_t>(1, kPieceBytes / header.sample_bytes);
        const size_t size = (piece_samples * header.sample_bytes + kPage - 1) / kPage * kPage;
        lease = engine->arena->lend(size, kPieces, kFewest, source->file->path());
        const std::shared_ptr<gpu::Gpu>& gpu = engine->gpu();
        copies = std::make_unique<gpu::CopyQueue>(gpu);
        copied = std::make_unique<gpu::Events>(gpu, lease->count());
        full = std::make_unique<gpu::Events>(gpu, options.ring.size());
        freed = std::make_unique<gpu::Events>(gpu, options.ring.size());
        const gpu::Scope scope(gpu.get());
        for (size_t i = 0; i < options.ring.size(); ++i) freed->record(i, options.stream);
    }

    uint8_t* wait_for_chunk(int64_t place) {
        uint8_t* slab = slab_of[place].load(std::memory_order_acquire);
        if (slab != nullptr) return slab;
        std::unique_lock<std::mutex> lock(work.mutex);
        loaded.wait(lock, [&] { return work.cancelled || slab_of[place].load(std::memory_order_relaxed) != nullptr; });
        return work.cancelled ? nullptr : slab_of[place].load(std::memory_order_relaxed);
    }

    void release(int64_t place) {
        const std::lock_guard<std::mutex> lock(work.mutex);
        free.push_back(slab_of[place].exchange(nullptr));
        poison(free.back(), source->header.chunk_stride);
        work.threads.notify_one();
    }

    bool wait_for_slot(size_t i) {
        std::unique_lock<std::mutex> lock(work.mutex);
        freed_slot.wait(lock, [&] { return work.cancelled || slot[i] == Slot::kFree; });
        return !work.cancelled;
    }

    void hand_over(size_t i, size_t count) {
        const std::lock_guard<std::mutex> lock(work.mutex);
        counts[i] = count;
        slot[i] = Slot::kReady;
        work.caller.notify_all();
    }

    void cancel() {
        work.cancel();
        loaded.notify_all();
        freed_slot.notify_all();
    }

    void fail(std::exception_ptr error) {
        work.fail(std::move(error));
        cancel();
    }

    bool gather(size_t i, size_t count);
    bool next_sample(uint8_t* to, Record* record);

    std::shared_ptr<Engine> engine;
    std::shared_ptr<Source> source;
    EpochOptions options;
    Planner planner;  // the gather thread's
    const uint64_t batches;
    Work work;                                   // threads: wait for a free slab of the window
    std::condition_variable loaded, freed_slot;  // the gather thread waits
    std::vector<int64_t> to_read;                // places in planner.chunks()
    size_t reading = 0;                          // how many of them have been taken on
    std::unique_ptr<AlignedBuffer> window;
    std::vector<uint8_t*> free;
    std::vector<std::atomic<uint8_t*>> slab_of;  // by place; null: not in memory
    std::vector<Slot> slot;
    std::vector<size_t> counts;
    std::vector<std::vector<Record>> records;

    std::unique_ptr<Lease> lease;  // pinned pieces, and the rest of the way to a device
    size_t piece_samples = 0, piece = 0;
    std::unique_ptr<gpu::CopyQueue> copies;
    std::unique_ptr<gpu::Events> copied, full, freed;
};

// One sample and its record, from the chunk that the plan says; false: cancelled.
bool Epoch::State::next_sample(uint8_t* to, Record* record) {
    const Header& header = source->header;
    const Planner::Draw draw = planner.next();
    const uint8_t* slab = wait_for_chunk(draw.place);
    if (slab == nullptr) return false;
    const auto at = static_cast<uint64_t>(draw.position) % header.samples_per_chunk;
    std::memcpy(to, slab + at * header.sample_bytes, header.sample_bytes);
    std::memcpy(record, slab + header.samples_per_chunk * header.sample_bytes + at * sizeof(Record), sizeof(Record));
    if (draw.last) release(draw.place);
    return true;
}

bool Epoch::State::gather(size_t i, size_t count) {
    const size_t size = source->header.sample_bytes;
    if (!options.on_device) {
        auto* to = reinterpret_cast<uint8_t*>(options.ring[i]);
        for (size_t k = 0; k < count; ++k)
            if (!next_sample(to + k * size, &records[i][k])) return false;
        return true;
    }
    freed->make_wait(i, copies->stream());
    for (size_t done = 0; done < count;) {
        const size_t take = std::min(piece_samples, count - done);
        piece = (piece + 1) % lease->count();
        copied->synchronize(piece);
        for (size_t k = 0; k < take; ++k)
            if (!next_sample(lease->piece(piece) + k * size, &records[i][done + k])) return false;
        copies->to_device(options.ring[i] + done * size, lease->piece(piece), take * size);
        copied->record(piece, copies->stream());
        done += take;
    }
    full->record(i, copies->stream());
    return true;
}

Epoch::Epoch(std::shared_ptr<Engine> engine, std::shared_ptr<Source> source, const EpochOptions& options)
    : engine_(engine), state_(std::make_shared<State>(engine, source, options)) {
    State& state = *state_;
    state.skip();
    state.make_window();
    state.work.requests.resize(static_cast<size_t>(options.threads));
    if (options.on_device) state.make_pieces();
    turn_ = options.first;
    try {
        for (int i = 0; i < options.threads; ++i)
            crew_.start("nf-read-" + std::to_string(i),
                        [held = state_, i] { read_chunks(held, static_cast<size_t>(i)); });
        crew_.start("nf-gather", [held = state_] { gather_batches(held); });
    } catch (...) {
        stop();
        throw;
    }
}

Epoch::~Epoch() {
    if (!origin_.here())
        io::leave_for_ever(state_);  // the threads and their locks are the parent's
    else
        stop();
}

void Epoch::read_chunks(const std::shared_ptr<State>& held, size_t thread) {
    State& state = *held;
    const Header& header = state.source->header;
    std::unique_lock<std::mutex> lock(state.work.mutex);
    try {
        for (;;) {
            state.work.threads.wait(lock, [&] {
                return state.work.cancelled || state.reading == state.to_read.size() || !state.free.empty();
            });
            if (state.work.cancelled || state.reading == state.to_read.size()) return;
            const int64_t place = state.to_read[state.reading++];
            uint8_t* slab = state.free.back();
            state.free.pop_back();
            const auto chunk = static_cast<uint64_t>(state.planner.chunks()[place]);
            const uint64_t offset = chunk_offset(header, chunk);
            state.work.requests[thread] = {static_cast<int64_t>(offset), std::chrono::steady_clock::now()};
            lock.unlock();
            uint32_t expected;
            std::memcpy(&expected, state.source->table.data() + 4 * chunk, sizeof expected);
            int rereads;
            {
                const Timed busy(state.source->stats.read_busy_ns);
                rereads = state.source->file->read_chunk(offset, slab, header.chunk_stride, expected);
            }
            state.source->stats.bytes_read += header.chunk_stride * static_cast<uint64_t>(1 + rereads);
            if (rereads > 0) {
                state.source->stats.rereads += static_cast<uint64_t>(rereads);
                const std::lock_guard<std::mutex> note(state.source->mutex);
                state.source->notes.push_back(state.source->file->path() + ": chunk " + std::to_string(chunk) +
                                              " had a wrong checksum, and the right one when read again");
            }
            lock.lock();
            state.work.requests[thread].offset = -1;
            state.slab_of[place].store(slab, std::memory_order_release);
            state.loaded.notify_one();
        }
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        state.work.requests[thread].offset = -1;
        state.fail(std::current_exception());
    }
}

void Epoch::gather_batches(const std::shared_ptr<State>& held) {
    State& state = *held;
    const Header& header = state.source->header;
    try {
        if (state.options.on_device) state.engine->gpu()->enter_thread();
        for (uint64_t number = state.options.first; number < state.batches; ++number) {
            const size_t i = number % state.options.ring.size();
            const size_t count =
                std::min<uint64_t>(state.options.batch, header.n_samples - number * state.options.batch);
            if (!state.wait_for_slot(i) || !state.gather(i, count)) return;
            state.hand_over(i, count);
        }
    } catch (...) {
        const std::lock_guard<std::mutex> lock(state.work.mutex);
        state.fail(std::current_exception());
    }
}

Epoch::Batch Epoch::next(gpu::Stream stream, const Interrupt& interrupt) {
    State& state = *state_;
    const std::string& path = state.source->file->path();
    if (!origin_.here()) throw ClosedError(path);
    const gpu::Scope scope(state.engine->gpu().get());
    try {
        std::unique_lock<std::mutex> lock(state.work.mutex);
        if (handed_) {
            const size_t before = (turn_ - 1) % state.slot.size();
            if (state.options.on_device && !state.work.cancelled) state.freed->record(before, stream);
            state.slot[before] = State::Slot::kFree;
            handed_ = false;
            state.freed_slot.notify_one();
        }
        if (turn_ >= state.batches && !state.work.error && !state.work.cancelled) return {0, 0, nullptr};
        const size_t i = turn_ % state.slot.size();
        const auto there = [&] { return state.slot[i] == State::Slot::kReady || state.work.cancelled; };
        if (!there()) {
            const Timed stall(state.source->stats.read_stall_ns);
            state.work.wait(lock, interrupt, "pread", path, engine_->io_timeout, there);
        }
        if (state.work.error) std::rethrow_exception(state.work.error);
        if (state.work.cancelled) throw ClosedError(path);
        if (state.options.on_device) state.full->make_wait(i, stream);
        ++turn_;
        handed_ = true;
        return {i, state.counts[i], state.records[i].data()};
    } catch (const gpu::DeviceError&) {
        const std::lock_guard<std::mutex> lock(state.work.mutex);
        state.fail(std::current_exception());
        throw;
    }
}

void Epoch::stop() noexcept {
    if (!origin_.here()) return;
    State& state = *state_;
    std::chrono::milliseconds patience;
    {
        const std::lock_guard<std::mutex> lock(state.work.mutex);
        state.cancel();
        patience = state.work.patience;
    }
    const bool all_ended = crew_.join(patience);
    if (state.copies) state.copies->drain();
    if (!all_ended) {  // what a stuck thread uses is left to it
        state.source->stuck = true;
        return;
    }
    const std::lock_guard<std::mutex> lock(state.work.mutex);
    state.lease.reset();
    state.window.reset();
}

Reader::Reader(std::shared_ptr<Engine> engine, Folder& folder, const std::string& name)
    : engine_(std::move(engine)), source_(std::make_shared<Source>()) {
    Source& source = *source_;
    source.file = folder.open(name);
    const std::string& path = source.file->path();
    const FileStatus status = source.file->stat();
    if (!status.regular || status.links != 1)
        throw FormatError(path + ": expected a regular file with one link, got " + std::to_string(status.links) +
                          " links; delete it");
    if (status.size < 4 * kPage)
        throw IncompleteError(path + ": expected at least 16384 bytes, got " + std::to_string(status.size) +
                              "; delete it to rebuild");
    AlignedBuffer page(kPage);
    source.file->read(0, page.data(), kPage);
    source.header = parse_header(page.data(), path);
    source.header_page.assign(page.data(), page.data() + kPage);
    check_length(source.header, status.size, path);
    source.file->read(source.header.footer_offset, page.data(), kPage);
    const uint32_t crc = parse_footer(page.data(), source.header, path);
    AlignedBuffer table(table_bytes(source.header));
    source.file->read(source.header.table_offset, table.data(), table.size());
    check_table(table.data(), table.size(), source.header, crc, path);
    source.table.assign(table.data(), table.data() + table.size());
}

Reader::~Reader() {
    try {
        close();
    } catch (const SystemError&) {
        return;  // nothing was written through it
    }
}

std::shared_ptr<Epoch> Reader::start(const EpochOptions& options) {
    if (!origin_.here()) throw ClosedError(source_->file->path());
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) throw ClosedError(source_->file->path());
    epochs_.erase(std::remove_if(epochs_.begin(), epochs_.end(), [](const auto& epoch) { return epoch.expired(); }),
                  epochs_.end());
    auto epoch = std::make_shared<Epoch>(engine_, source_, options);
    epochs_.push_back(epoch);
    return epoch;
}

void Reader::close() {
    if (!origin_.here()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(closed_, true)) return;
    for (const auto& weak : epochs_)
        if (const auto epoch = weak.lock()) epoch->stop();
    if (!source_->stuck) source_->file->close();
}

std::vector<std::string> Reader::take_notes() {
    if (!origin_.here()) return {};
    const std::lock_guard<std::mutex> lock(source_->mutex);
    return std::exchange(source_->notes, {});
}

}  // namespace nf

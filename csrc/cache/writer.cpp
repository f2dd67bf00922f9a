#include "cache/writer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cache/error.h"
#include "cache/samples.h"
#include "io/crc32c.h"
#include "io/error.h"

namespace nf {

struct Writer::Slab {
    uint8_t* data = nullptr;
    size_t ready = 0;  // its event
    uint64_t chunk = 0;
    uint32_t filled = 0;  // samples
    size_t summed = 0;    // leading bytes, copied by the host, that crc covers
    uint32_t crc = 0;
};

// Everything that the threads use: they hold it together, so that a stuck one can be left behind.
struct Writer::State {
    Work work;
    std::unique_ptr<File> file;
    Header header{};
    std::shared_ptr<gpu::Gpu> gpu;
    std::unique_ptr<Lease> lease;
    std::vector<Slab> slabs;
    std::unique_ptr<gpu::Events> ready;  // one a slab: its copies have ended
    std::vector<Slab*> free, full;       // full: the oldest first; both have room for every slab
    size_t writing = 0;
    std::vector<uint32_t> table;
    Stats stats;

    uint8_t* record_of(const Slab& slab, size_t i) const {
        return slab.data + header.samples_per_chunk * header.sample_bytes + i * sizeof(Record);
    }
    // Zeros where an earlier chunk may have left its bytes: unused samples, unused records, padding.
    void clear_rest(const Slab& slab) const {
        uint8_t* end = slab.data + header.samples_per_chunk * header.sample_bytes;
        uint8_t* unused = slab.data + slab.filled * header.sample_bytes;
        std::memset(unused, 0, static_cast<size_t>(end - unused));
        uint8_t* records = record_of(slab, slab.filled);
        std::memset(records, 0, static_cast<size_t>(slab.data + header.chunk_stride - records));
    }
    void write(Slab& slab) {
        if (gpu) ready->synchronize(slab.ready);
        clear_rest(slab);
        const uint64_t offset = chunk_offset(header, slab.chunk);
        table[slab.chunk] = crc32c(slab.data + slab.summed, header.chunk_stride - slab.summed, slab.crc);
        const Timed busy(stats.write_busy_ns);
        file->write(offset, slab.data, header.chunk_stride);
        stats.bytes_written += header.chunk_stride;
    }
};

Writer::Writer(std::shared_ptr<Engine> engine, std::shared_ptr<Folder> folder, const std::string& name,
               const uint8_t* header, int threads, size_t staging, bool durable)
    : engine_(std::move(engine)),
      folder_(std::move(folder)),
      name_(name),
      temporary_(name + ".tmp"),
      durable_(durable),
      state_(std::make_shared<State>()) {
    const std::string path = folder_->path() + "/" + name;
    State& state = *state_;
    state.header = parse_header(header, path);
    state.gpu = engine_->gpu();
    const size_t stride = state.header.chunk_stride, chunks = state.header.n_chunks;
    const size_t wanted = std::max(kSlabs, engine_->arena->size() / 2 / stride);
    state.lease = engine_->arena->lend(stride, std::min(wanted, chunks), std::min(kFewest, chunks), path);
    state.slabs.resize(state.lease->count());
    state.full.reserve(state.slabs.size());
    for (size_t i = 0; i < state.slabs.size(); ++i) {
        state.slabs[i].data = state.lease->piece(i);
        state.slabs[i].ready = i;
        state.free.push_back(&state.slabs[i]);
    }
    state.table.resize(table_bytes(state.header) / sizeof(uint32_t));
    state.work.requests.resize(static_cast<size_t>(threads));
    if (state.gpu) {
        copies_ = std::make_unique<gpu::CopyQueue>(state.gpu);
        produced_ = std::make_unique<gpu::Events>(state.gpu, 1);
        fences_ = std::make_unique<gpu::Events>(state.gpu, staging);
        state.ready = std::make_unique<gpu::Events>(state.gpu, state.slabs.size());
    }
    state.file = folder_->create(temporary_);
    unfinished_ = true;
    try {
        state.file->reserve(state.header.file_bytes);
        AlignedBuffer page(kPage);
        std::memcpy(page.data(), header, kPage);
        state.file->write(0, page.data(), kPage);
        for (int i = 0; i < threads; ++i)
            crew_.start("nf-write-" + std::to_string(i),
                        [state = state_, i] { write_slabs(state, static_cast<size_t>(i)); });
    } catch (...) {
        const std::exception_ptr error = std::current_exception();
        try {
            abort();
        } catch (const std::exception&) {
            std::rethrow_exception(error);  // the first error says more than a failed clean-up
        }
        throw;
    }
}

Writer::~Writer() {
    if (!origin_.here()) {
        io::leave_for_ever(state_);  // the threads and their locks are the parent's
        return;
    }
    try {
        abort();
    } catch (const std::exception&) {
        return;  // a .tmp that cannot be removed; who wants to know calls abort()
    }
}

void Writer::write_slabs(const std::shared_ptr<State>& state, size_t thread) {
    Work& work = state->work;
    std::unique_lock<std::mutex> lock(work.mutex);
    try {
        if (state->gpu) {
            lock.unlock();
            state->gpu->enter_thread();
            lock.lock();
        }
        for (;;) {
            work.threads.wait(lock, [&] { return work.cancelled || !state->full.empty(); });
            if (work.cancelled) return;
            Slab* slab = state->full.front();
            state->full.erase(state->full.begin());
            ++state->writing;
            work.requests[thread] = {static_cast<int64_t>(chunk_offset(state->header, slab->chunk)),
                                     std::chrono::steady_clock::now()};
            lock.unlock();
            state->write(*slab);
            lock.lock();
            work.requests[thread].offset = -1;
            --state->writing;
            state->free.push_back(slab);
            work.caller.notify_all();
        }
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        work.requests[thread].offset = -1;
        work.fail(std::current_exception());
    }
}

void Writer::usable() const {
    if (!origin_.here()) throw ClosedError(state_->file->path());
    const std::lock_guard<std::mutex> lock(state_->work.mutex);
    if (state_->work.error) std::rethrow_exception(state_->work.error);
    if (ended_) throw ClosedError(state_->file->path());
}

void Writer::check_room(size_t count) const {
    if (appended_ + count > state_->header.n_samples)
        throw CountError(folder_->path() + "/" + name_ + ": expected " + std::to_string(state_->header.n_samples) +
                         " samples, got " + std::to_string(appended_ + count) +
                         "; create the cache with the right number");
}

Writer::Slab& Writer::current(const Interrupt& interrupt) {
    if (filling_ != nullptr) return *filling_;
    State& state = *state_;
    std::unique_lock<std::mutex> lock(state.work.mutex);
    if (state.free.empty() && !state.work.error) {
        const Timed stall(state.stats.write_stall_ns);
        state.work.wait(lock, interrupt, "pwrite", state.file->path(), engine_->io_timeout,
                        [&] { return !state.free.empty() || state.work.cancelled; });
    }
    if (state.work.error) std::rethrow_exception(state.work.error);
    if (state.work.cancelled) throw ClosedError(state.file->path());
    filling_ = state.free.back();
    state.free.pop_back();
    filling_->chunk = appended_ / state.header.samples_per_chunk;
    filling_->filled = 0;
    filling_->summed = 0;
    filling_->crc = 0;
    const uint64_t used = state.slabs.size() - state.free.size();
    if (used > state.stats.peak_slabs) state.stats.peak_slabs = used;
    return *filling_;
}

void Writer::enqueue() {
    if (state_->gpu) state_->ready->record(filling_->ready, copies_->stream());
    const std::lock_guard<std::mutex> lock(state_->work.mutex);
    state_->full.push_back(std::exchange(filling_, nullptr));
    state_->work.threads.notify_one();
}

template <typename Copy>
void Writer::fill(size_t count, const Record* records, const Interrupt& interrupt, Copy copy) {
    const uint32_t spc = state_->header.samples_per_chunk;
    for (size_t done = 0; done < count;) {
        Slab& slab = current(interrupt);
        const size_t take = std::min<size_t>(spc - slab.filled, count - done);
        copy(slab, slab.data + slab.filled * state_->header.sample_bytes, done, take);
        std::memcpy(state_->record_of(slab, slab.filled), records + done, take * sizeof(Record));
        slab.filled += static_cast<uint32_t>(take);
        appended_ += take;
        done += take;
        if (slab.filled == spc) enqueue();
    }
}

void Writer::append(const uint8_t* samples, size_t count, const Record* records, const Interrupt& interrupt) {
    usable();
    check_room(count);
    const gpu::Scope scope(state_->gpu.get());  // a full slab records its event
    const Header& header = state_->header;
    fill(count, records, interrupt, [&](Slab& slab, uint8_t* to, size_t first, size_t take) {
        const bool in_order = slab.summed == slab.filled * header.sample_bytes;
        if (in_order) slab.summed += take * header.sample_bytes;
        uint32_t* crc = in_order ? &slab.crc : nullptr;
        if (!copy_finite(to, samples + first * header.sample_bytes, take, header, crc)) {
            const std::lock_guard<std::mutex> lock(state_->work.mutex);
            try {
                throw NonFinite("a stored value is NaN or infinite");
            } catch (const std::exception&) {  // where memory has run out, that
                state_->work.fail(std::current_exception());
                throw;
            }
        }
    });
}

void Writer::append_device(gpu::DevicePointer samples, size_t count, const Record* records, gpu::Stream stream,
                           size_t slot, const Interrupt& interrupt) {
    usable();
    check_room(count);
    const gpu::Scope scope(state_->gpu.get());
    try {
        produced_->record(0, stream);
        produced_->make_wait(0, copies_->stream());
        const uint64_t size = state_->header.sample_bytes;
        fill(count, records, interrupt, [&](Slab&, uint8_t* to, size_t first, size_t take) {
            copies_->to_host(to, samples + first * size, take * size);
        });
        fences_->record(slot, copies_->stream());
    } catch (const gpu::DeviceError&) {
        const std::lock_guard<std::mutex> lock(state_->work.mutex);
        state_->work.fail(std::current_exception());
        throw;
    }
}

void Writer::fence(size_t slot, gpu::Stream stream) {
    usable();
    const gpu::Scope scope(state_->gpu.get());
    fences_->make_wait(slot, stream);
}

std::vector<uint8_t> Writer::finish(const Interrupt& interrupt) {
    usable();
    State& state = *state_;
    if (appended_ != state.header.n_samples)
        throw CountError(folder_->path() + "/" + name_ + ": expected " + std::to_string(state.header.n_samples) +
                         " samples, got " + std::to_string(appended_) + "; append the rest");
    const gpu::Scope scope(state.gpu.get());
    if (filling_ != nullptr) enqueue();
    {
        std::unique_lock<std::mutex> lock(state.work.mutex);
        state.work.wait(lock, interrupt, "pwrite", state.file->path(), engine_->io_timeout,
                        [&] { return (state.full.empty() && state.writing == 0) || state.work.cancelled; });
        if (state.work.cancelled) throw ClosedError(state.file->path());
    }
    try {
        const size_t bytes = table_bytes(state.header);
        AlignedBuffer tail(bytes + kPage);
        std::memcpy(tail.data(), state.table.data(), bytes);
        const uint32_t crc = state.file->write_chunk(state.header.table_offset, tail.data(), bytes);
        const auto footer = pack_footer(state.header, crc);
        std::memcpy(tail.data() + bytes, footer.data(), kPage);
        state.file->write(state.header.footer_offset, tail.data() + bytes, kPage);
        std::vector<uint8_t> table(tail.data(), tail.data() + bytes);  // while there is a .tmp to give up
        if (durable_) state.file->fsync();
        ended_ = true;
        release();
        state.file->close();  // may report a failed write
        folder_->rename(temporary_, name_);
        unfinished_ = false;
        if (durable_) folder_->fsync();
        return table;
    } catch (...) {
        const std::lock_guard<std::mutex> lock(state.work.mutex);
        state.work.fail(std::current_exception());
        throw;
    }
}

// Queued work is dropped, running system calls end, copies end; then the memory can go back. False: a thread is stuck,
// and keeps the memory and the descriptor.
bool Writer::release() noexcept {
    std::chrono::milliseconds patience;
    {
        const std::lock_guard<std::mutex> lock(state_->work.mutex);
        state_->work.cancel();
        state_->full.clear();
        patience = state_->work.patience;
    }
    if (copies_) copies_->drain();
    if (!crew_.join(patience)) return false;
    const std::lock_guard<std::mutex> lock(state_->work.mutex);
    state_->lease.reset();
    return true;
}

void Writer::abort() {
    if (!origin_.here() || (ended_ && !unfinished_)) return;
    ended_ = true;
    const bool all_ended = release();
    if (!std::exchange(unfinished_, false)) return;
    try {
        if (all_ended) state_->file->close();  // it would wait for a stuck thread
    } catch (const SystemError&) {
        folder_->unlink(temporary_);
        throw;
    }
    folder_->unlink(temporary_);
}

const Stats& Writer::stats() const { return state_->stats; }
bool Writer::direct() const { return state_->file->direct(); }
uint64_t Writer::appended() const { return appended_; }

}  // namespace nf

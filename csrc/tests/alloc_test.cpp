// Memory that runs out: allocation N fails, once or with all that follow, for N = 1, 2, ... until a run ends unhit.
//
//   alloc_test [--folder DIR]
//
// Counted is every form of operator new and every mapping, of all threads. Each run is a forked child, so that the
// first use of what a process makes once is reached, too, and an end by std::terminate or a hang is seen. It must end
// with std::bad_alloc or an error of the engine's, leave no file and no descriptor, and then do the same work without a
// failure; what is allocated after that must be what it is without the failed run.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cache/engine.h"
#include "cache/error.h"
#include "cache/planner.h"
#include "cache/reader.h"
#include "cache/writer.h"
#include "cache_data.h"
#include "io/error.h"
#include "io/file.h"
#include "io/io_vtable.h"

// --- Counting

namespace {

struct Memory {
    std::atomic<long> live{0};   // allocations and mappings
    std::atomic<long> asked{0};  // since arm()
    std::atomic<long> fails{0};  // which of them; 0: none
    std::atomic<bool> sticky{false};
    std::atomic<long> hits{0};
} memory;

bool refused() {
    const long number = ++memory.asked, fails = memory.fails;
    const bool hit = fails > 0 && (memory.sticky ? number >= fails : number == fails);
    memory.hits += hit;
    return hit;
}

void arm(long number, bool sticky) {
    memory.sticky = sticky;
    memory.asked = memory.hits = 0;
    memory.fails = number;
}

void disarm() { memory.fails = 0; }

void* allocate(size_t bytes, size_t alignment) noexcept {
    void* made = nullptr;
    if (refused() || ::posix_memalign(&made, std::max(alignment, sizeof(void*)), bytes) != 0) return nullptr;
    ++memory.live;
    return made;
}

void* allocate_or_throw(size_t bytes, size_t alignment) {
    void* made = allocate(bytes, alignment);
    if (made == nullptr) throw std::bad_alloc();
    return made;
}

void give_back(void* made) noexcept {
    memory.live -= made != nullptr;
    std::free(made);
}

constexpr size_t kPlain = alignof(std::max_align_t);
size_t number(std::align_val_t alignment) { return static_cast<size_t>(alignment); }

}  // namespace

void* operator new(size_t n) { return allocate_or_throw(n, kPlain); }
void* operator new[](size_t n) { return allocate_or_throw(n, kPlain); }
void* operator new(size_t n, std::align_val_t a) { return allocate_or_throw(n, number(a)); }
void* operator new[](size_t n, std::align_val_t a) { return allocate_or_throw(n, number(a)); }
void* operator new(size_t n, const std::nothrow_t&) noexcept { return allocate(n, kPlain); }
void* operator new[](size_t n, const std::nothrow_t&) noexcept { return allocate(n, kPlain); }
void* operator new(size_t n, std::align_val_t a, const std::nothrow_t&) noexcept { return allocate(n, number(a)); }
void* operator new[](size_t n, std::align_val_t a, const std::nothrow_t&) noexcept { return allocate(n, number(a)); }
void operator delete(void* p) noexcept { give_back(p); }
void operator delete[](void* p) noexcept { give_back(p); }
void operator delete(void* p, size_t) noexcept { give_back(p); }
void operator delete[](void* p, size_t) noexcept { give_back(p); }
void operator delete(void* p, std::align_val_t) noexcept { give_back(p); }
void operator delete[](void* p, std::align_val_t) noexcept { give_back(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { give_back(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { give_back(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { give_back(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { give_back(p); }
void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept { give_back(p); }
void operator delete[](void* p, std::align_val_t, const std::nothrow_t&) noexcept { give_back(p); }

// The engine's own calls come by here; hidden, so that those of the C library and of the sanitizers do not. The engine
// is compiled with _FILE_OFFSET_BITS=64, by which mmap is mmap64.
extern "C" __attribute__((visibility("hidden"))) void* mmap64(void* at, size_t bytes, int protection, int flags, int fd,
                                                              off64_t offset) noexcept {
    using Call = void* (*)(void*, size_t, int, int, int, off64_t);
    static const auto real = reinterpret_cast<Call>(::dlsym(RTLD_NEXT, "mmap64"));
    if (refused()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    ++memory.live;
    return real(at, bytes, protection, flags, fd, offset);
}

extern "C" __attribute__((visibility("hidden"))) int munmap(void* at, size_t bytes) noexcept {
    static const auto real = reinterpret_cast<int (*)(void*, size_t)>(::dlsym(RTLD_NEXT, "munmap"));
    --memory.live;
    return real(at, bytes);
}

// --- What is done while memory runs out. Names are longer than what a std::string holds without an allocation.

namespace {

using std::chrono::milliseconds;

std::string folder_path = "/dev/shm";
const std::string kLock = "LOCK.of.this.test", kTemporary = "a-file-of-this-test.tmp", kFinal = "a-file-of-this-test",
                  kLog = "a-log-file-of-this-test.jsonl", kCache = "x000-g0001-of-this-test.nfc";

void require(bool good, const char* what) {
    if (!good) throw std::logic_error(what);
}

// What every user of a file does when an error passes: it must work without memory.
struct Removed {
    nf::Folder& folder;
    const std::string& name;
    ~Removed() { folder.unlink(name); }
};

void use_files(bool direct) {
    nf::Folder folder(folder_path, false);
    const auto lock = folder.lock(kLock);
    nf::AlignedBuffer page(nf::kPage);
    std::memset(page.data(), 7, nf::kPage);
    {
        const auto file = folder.create(kTemporary, direct);
        const Removed removed{folder, kTemporary};
        file->reserve(nf::kPage);
        file->write(0, page.data(), nf::kPage);
        file->fsync();
        file->close();
        const auto other = folder.append(kLog);
        const Removed log_removed{folder, kLog};
        other->write(0, page.data(), 11);
        other->truncate(5);
        const auto names = folder.list();
        require(std::count(names.begin(), names.end(), kLog) == 1 && names.size() == 3, "the names");
        require(folder.lstat(kLog).size == 5, "the length");
    }
    {
        const auto file = folder.create(kTemporary, direct);
        Removed removed{folder, kTemporary};
        file->write_chunk(0, page.data(), nf::kPage);
        file->close();
    }
    const auto file = folder.create(kTemporary, direct);
    const Removed removed{folder, kTemporary};
    // More than is left behind in the page cache.
    nf::AlignedBuffer large(3 << 20);
    std::memset(large.data(), 9, large.size());
    for (uint64_t i = 0; i < 4; ++i) file->write(i * large.size(), large.data(), large.size());
    const auto again = folder.open(kTemporary, direct);
    again->read(3 * large.size(), page.data(), nf::kPage);
    require(std::memcmp(page.data(), large.data(), nf::kPage) == 0, "what was written");
}

const Data& content() {
    static const Data data(Random(3), 5000, 60, 40000);
    return data;
}

nf::EpochOptions options_of(std::vector<uint8_t>& ring, size_t batch) {
    nf::EpochOptions options;
    options.key = 5;
    options.batch = batch;
    options.ring = {reinterpret_cast<uint64_t>(ring.data()),
                    reinterpret_cast<uint64_t>(ring.data() + batch * content().size)};
    return options;
}

void use_cache() {
    constexpr size_t kBatch = 7;
    const Data& data = content();
    const auto folder = std::make_shared<nf::Folder>(folder_path);
    const auto engine = std::make_shared<nf::Engine>(size_t{1} << 20, -1, 30.0);
    nf::Writer writer(engine, folder, kCache, data.header.data(), 2, 0, true);
    for (size_t at = 0; at < data.samples; at += 20)
        writer.append(&data.truth[at * data.size], 20, &data.records[at], {});
    writer.finish({});
    const Removed removed{*folder, kCache};

    std::vector<uint8_t> ring(2 * kBatch * data.size);
    const auto order = nf::plan_order(5, static_cast<int64_t>(data.samples), static_cast<int64_t>(data.per_chunk), 2);
    nf::Reader reader(engine, *folder, kCache);
    const auto epoch = reader.start(options_of(ring, kBatch));
    size_t seen = 0;
    for (auto batch = epoch->next(nullptr, {}); batch.count > 0; batch = epoch->next(nullptr, {})) {
        const size_t bad = data.compare(&ring[batch.slot * kBatch * data.size], &order[seen], batch.count);
        require(bad == 0, "the samples");
        seen += batch.count;
    }
    require(seen == data.samples, "the number of samples");
}

// --- Sweeps

long* kept = nullptr;  // allocations that a process makes once and keeps; shared with the children

enum Outcome { kUnhit, kGood, kWrong };

int complain(const std::string& what) {
    std::fprintf(stderr, "  %s\n", what.c_str());
    return kWrong;
}

size_t descriptors() {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return static_cast<size_t>(std::distance(begin(entries), end(entries)));
}

// What threads that have just ended hold they give back at once.
long settled(long expected) {
    for (int i = 0; i < 500 && memory.live != expected; ++i) std::this_thread::sleep_for(milliseconds(1));
    return memory.live;
}

std::string left_files() {
    std::string names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_path))
        if (entry.path().filename() != kLock) names += " " + entry.path().filename().string();
    return names;
}

// In the child. Allocation `number` fails, 0: none does.
int run(const std::function<void()>& body, long number, bool sticky) {
    const size_t open_before = descriptors();
    const long live_before = memory.live;
    std::string error;
    arm(number, sticky);
    try {
        body();
        disarm();
    } catch (const std::bad_alloc&) {
        disarm();
        error = "bad_alloc";
    } catch (const nf::SystemError& system) {
        disarm();
        error = system.code == ENOMEM ? "ENOMEM" : "";
        if (error.empty()) return complain(system.what());
    } catch (const std::exception& other) {
        disarm();
        return complain(other.what());
    }
    const long hits = memory.hits;
    if ((hits > 0) == error.empty())
        return complain(std::to_string(hits) + " failures, the error is \"" + error + "\"");
    if (!left_files().empty()) return complain("left behind:" + left_files());
    if (descriptors() != open_before) return complain("a descriptor is left open");
    body();
    const long live = settled(live_before + *kept) - live_before;
    if (number == 0) *kept = live;
    if (live != *kept) return complain(std::to_string(live - *kept) + " allocations are left");
    return hits > 0 ? kGood : kUnhit;
}

int run_child(const std::function<int()>& body) {
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(60);
        int outcome = kWrong;
        try {
            outcome = body();
        } catch (const std::exception& error) {
            complain(std::string("without a failure: ") + error.what());
        }
        ::_exit(outcome);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    if (WIFEXITED(status)) return WEXITSTATUS(status);
    return complain(std::string("ended by ") + ::strsignal(WTERMSIG(status)));
}

struct Tally {
    long good = 0, all = 0;
};

void sweep(const std::string& name, const std::function<void()>& body, bool sticky, Tally& total) {
    Tally tally;
    *kept = -1;
    if (run_child([&] { return run(body, 0, false); }) != kUnhit) {
        std::fprintf(stderr, "%s: fails without any fault\n", name.c_str());
        std::exit(1);
    }
    for (long number = 1;; ++number) {
        const int outcome = run_child([&] { return run(body, number, sticky); });
        if (outcome == kUnhit) break;
        ++tally.all;
        tally.good += outcome == kGood;
        if (outcome == kGood) continue;
        std::fprintf(stderr, "%s: allocation %ld, %s\n", name.c_str(), number, sticky ? "sticky" : "once");
        for (const auto& entry : std::filesystem::directory_iterator(folder_path)) std::filesystem::remove(entry);
    }
    std::printf("%s, %s: %ld/%ld\n", name.c_str(), sticky ? "sticky" : "once", tally.good, tally.all);
    std::fflush(stdout);
    total.good += tally.good;
    total.all += tally.all;
}

// A forked child drops its parent's objects, whose threads it does not have, without asking for memory.
int drop_in_child() {
    const auto folder = std::make_shared<nf::Folder>(folder_path);
    const auto engine = std::make_shared<nf::Engine>(size_t{1} << 20, -1, 30.0);
    const Data& data = content();
    {
        nf::Writer first(engine, folder, kCache, data.header.data(), 2, 0, false);
        first.append(data.truth.data(), data.samples, data.records.data(), {});
        first.finish({});
    }
    const Removed removed{*folder, kCache};
    std::vector<uint8_t> ring(2 * data.size);
    nf::Reader reader(engine, *folder, kCache);
    auto epoch = reader.start(options_of(ring, 1));
    auto writer = std::make_unique<nf::Writer>(engine, folder, kFinal, data.header.data(), 2, 0, false);
    return run_child([&] {
        arm(1, true);
        epoch.reset();
        writer.reset();
        disarm();
        return memory.hits == 0 ? kGood : complain("a child of a fork asked for memory");
    });
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 3 && std::strcmp(arguments[1], "--folder") == 0) {
        folder_path = arguments[2];
    } else if (count != 1) {
        std::fprintf(stderr, "usage: alloc_test [--folder DIR]\n");
        return 2;
    }
    folder_path += "/alloc_test-XXXXXX";
    if (::mkdtemp(folder_path.data()) == nullptr) {
        std::perror(folder_path.c_str());
        return 2;
    }
    void* page = ::mmap(nullptr, nf::kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return complain("no shared memory");
    kept = static_cast<long*>(page);
    nf::io::configure();
    content();

    Tally once, sticky;
    const auto both = [&](const std::string& name, const std::function<void()>& body) {
        sweep(name, body, false, once);
        sweep(name, body, true, sticky);
    };
    both("files", [] { use_files(true); });
    both("files, buffered", [] { use_files(false); });
    both("cache", use_cache);
    ::setenv("NF_TESTING", "1", 1);
    ::setenv("NF_DIRECT", "0", 1);
    nf::io::configure();
    both("files without O_DIRECT", [] { use_files(true); });
    both("cache without O_DIRECT", use_cache);
    const bool dropped = run_child(drop_in_child) == kGood;
    std::printf("dropped in a forked child: %d/1\n", dropped);
    std::printf("alloc: %ld/%ld once, %ld/%ld sticky\n", once.good, once.all, sticky.good, sticky.all);
    ::unlink((folder_path + "/" + kLock).c_str());
    const bool empty = ::rmdir(folder_path.c_str()) == 0;
    if (!empty) std::fprintf(stderr, "something was left in %s\n", folder_path.c_str());
    return empty && dropped && once.good == once.all && sticky.good == sticky.all ? 0 : 1;
}

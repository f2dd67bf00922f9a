#include "cache/aligned_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace nf {

AlignedBuffer::AlignedBuffer(size_t bytes) : data_(nullptr), size_(bytes), owner_(::getpid()) {
    if (bytes == 0) throw std::invalid_argument("expected a buffer of at least 1 byte, got 0");
    void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(mapped);
    // A fork during O_DIRECT into private memory loses data (open(2)): the child gets no copy of these pages.
    ::madvise(mapped, bytes, MADV_DONTFORK);
    ::madvise(mapped, bytes, MADV_HUGEPAGE);  // a hint: without huge pages it is only slower
}

void AlignedBuffer::touch() {
    for (size_t at = 0; at < size_; at += 4096) static_cast<volatile uint8_t*>(data_)[at] = 0;
}

AlignedBuffer::~AlignedBuffer() {
    // In a forked child the range was never mapped and may by now be someone else's.
    if (::getpid() == owner_) ::munmap(data_, size_);
}

void poison(uint8_t* data, size_t bytes) {
    static const bool wanted = [] {
        const char* text = std::getenv("NF_DEBUG_POISON");
        return text != nullptr && std::strcmp(text, "1") == 0;
    }();
    if (wanted) std::memset(data, 0xA5, bytes);
}

}  // namespace nf

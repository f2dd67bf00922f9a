#include "io/error.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

namespace nf {
namespace {

std::string hex(uint32_t value) {
    char text[9];
    std::snprintf(text, sizeof text, "%08x", static_cast<unsigned>(value));
    return text;
}

// What to do next, where the number alone says it.
const char* advice(int code) {
    if (code == EEXIST) return "; left by a run that was killed, or of one that goes on: if none does, delete it";
    if (code == ETIMEDOUT) return "; the disk does not answer: look at it, or raise io_timeout";
    return "";
}

std::string describe(const std::string& op, const std::string& path, int64_t offset, int code) {
    return path + ": " + op + (offset < 0 ? "" : " at byte " + std::to_string(offset)) +
           " failed: " + std::strerror(code) + " (errno " + std::to_string(code) + ")" + advice(code);
}

}  // namespace

SystemError::SystemError(std::string op_, std::string path_, int64_t offset_, int code_, uint64_t needed_,
                         uint64_t free_)
    : std::runtime_error(describe(op_, path_, offset_, code_)),
      op(std::move(op_)),
      path(std::move(path_)),
      offset(offset_),
      code(code_),
      needed(needed_),
      free(free_) {}

CorruptError::CorruptError(const std::string& path, uint64_t offset, uint32_t expected, uint32_t got)
    : std::runtime_error(path + ": the chunk at byte " + std::to_string(offset) + " has CRC32C " + hex(got) +
                         ", expected " + hex(expected) + ", twice; delete the file so that it is rebuilt") {}

TruncatedError::TruncatedError(const std::string& path, uint64_t expected_end, uint64_t end)
    : std::runtime_error(path + ": ends at byte " + std::to_string(end) + ", expected at least " +
                         std::to_string(expected_end) + "; delete the file so that it is rebuilt") {}

ClosedError::ClosedError(const std::string& path) : std::runtime_error(path + ": used after close; open it again") {}

}  // namespace nf

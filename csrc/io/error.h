// What can go wrong in I/O, as plain records; bindings.cpp turns each into the class of the same meaning in
// nf_engine/errors.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nf {

struct SystemError : std::runtime_error {
    SystemError(std::string op, std::string path, int64_t offset, int code, uint64_t needed, uint64_t free);
    std::string op, path;
    int64_t offset;  // -1: the request has none
    int code;        // errno
    uint64_t needed, free;
};

struct CorruptError : std::runtime_error {
    CorruptError(const std::string& path, uint64_t offset, uint32_t expected, uint32_t got);
};

struct TruncatedError : std::runtime_error {
    TruncatedError(const std::string& path, uint64_t expected_end, uint64_t end);
};

struct ClosedError : std::runtime_error {
    explicit ClosedError(const std::string& path);
};

}  // namespace nf

// What can go wrong in the engine beside I/O, as plain records; bindings.cpp turns each into its class in errors.py.
#pragma once

#include <stdexcept>
#include <string>

namespace nf {

// The host memory that was allowed does not hold what the cache needs: CacheError.
struct MemoryError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Fewer or more samples than the header promises: CacheIncompleteError.
struct CountError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A stored value is NaN or infinite: NonFiniteError.
struct NonFinite : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace nf

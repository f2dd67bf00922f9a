// What the parts of the Python module share, and _cache.io.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

namespace nf {

// Contiguous bytes of any Python buffer; holds the buffer until it goes out of scope, which needs the GIL.
class Bytes {
  public:
    Bytes(const pybind11::object& object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw pybind11::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }

  private:
    Py_buffer view_{};
};

template <typename Call>
auto without_gil(Call call) {
    const pybind11::gil_scoped_release release;
    return call();
}

}  // namespace nf

void bind_io(pybind11::module_& module);  // adds the submodule io

// nf_engine._cache: the Python face of csrc/. Buffers, ints and plain records cross; the GIL is released wherever bytes
// move. nf_engine/_cache.pyi has the signatures.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <exception>
#include <utility>

#include "cache/aligned_buffer.h"
#include "cache/planner.h"
#include "cache/samples.h"
#include "io/crc32c.h"
#include "io/error.h"
#include "io/file.h"

namespace py = pybind11;

namespace {

// Contiguous bytes of any Python buffer; holds the buffer until it goes out of scope, which needs the GIL.
class Bytes {
  public:
    Bytes(const py::object& object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
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
    const py::gil_scoped_release release;
    return call();
}

void raise(const char* name, const std::string& message, const py::dict& attributes) {
    const py::object type = py::module_::import("nf_engine.errors").attr(name);
    const py::object error = type(message, **attributes);
    PyErr_SetObject(type.ptr(), error.ptr());
}

// ENOSPC, EDQUOT and EFBIG ask the user for room; any other error is the system's.
void raise(const nf::SystemError& error) {
    using namespace pybind11::literals;
    if (error.code == ENOSPC || error.code == EDQUOT || error.code == EFBIG) {
        const std::string numbers = "; " + std::to_string(error.needed) + " bytes needed, " +
                                    std::to_string(error.free) + " free; make room or choose another folder";
        raise("DiskFullError", error.what() + numbers,
              py::dict("path"_a = error.path, "needed"_a = error.needed, "free"_a = error.free));
    } else {
        raise("StorageError", error.what(),
              py::dict("op"_a = error.op, "path"_a = error.path, "offset"_a = error.offset, "errno"_a = error.code));
    }
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const nf::SystemError& error) {
        raise(error);
    } catch (const nf::CorruptError& error) {
        raise("CacheCorruptError", error.what(), {});
    } catch (const nf::TruncatedError& error) {
        raise("CacheIncompleteError", error.what(), {});
    } catch (const nf::ClosedError& error) {
        raise("CacheClosedError", error.what(), {});
    }
}

bool all_finite(const py::object& buffer, const std::string& dtype) {
    const Bytes bytes(buffer, PyBUF_SIMPLE);
    return without_gil([&] {
        if (dtype == "fp16") return nf::all_finite16(bytes.data(), bytes.size() / 2, 0x7C00);
        if (dtype == "bf16") return nf::all_finite16(bytes.data(), bytes.size() / 2, 0x7F80);
        if (dtype == "fp32") return nf::all_finite32(bytes.data(), bytes.size() / 4, 0x7F800000);
        throw std::invalid_argument("expected dtype fp32, fp16 or bf16, got " + dtype);
    });
}

void gather(const py::object& source, const py::array_t<int64_t, py::array::c_style>& offsets, const py::object& out) {
    const Bytes from(source, PyBUF_SIMPLE), to(out, PyBUF_WRITABLE);
    const auto count = static_cast<size_t>(offsets.size());
    if (count == 0 || to.size() % count)
        throw std::invalid_argument("expected out to hold the same bytes for each of " + std::to_string(count) +
                                    " offsets, got " + std::to_string(to.size()) + " bytes");
    const int64_t* at = offsets.data();
    without_gil([&] { nf::gather(from.data(), from.size(), at, count, to.data(), to.size() / count); });
}

py::array_t<int64_t> plan_order(uint64_t key, int64_t n_samples, int64_t samples_per_chunk, int64_t window_chunks) {
    const auto order = without_gil([&] { return nf::plan_order(key, n_samples, samples_per_chunk, window_chunks); });
    return py::array_t<int64_t>(static_cast<py::ssize_t>(order.size()), order.data());
}

uint32_t crc32c(const py::object& buffer, uint32_t crc, bool portable) {
    const Bytes bytes(buffer, PyBUF_SIMPLE);
    return without_gil([&] {
        return portable ? nf::crc32c_table(bytes.data(), bytes.size(), crc)
                        : nf::crc32c(bytes.data(), bytes.size(), crc);
    });
}

py::dict build_info() {
    using namespace pybind11::literals;
#ifdef NDEBUG
    const char* type = "release";
#else
    const char* type = "debug";
#endif
    return py::dict("compiler"_a = NF_COMPILER, "build"_a = type, "crc32c"_a = nf::crc32c_path());
}

void bind_files(py::module_& module) {
    using nf::File;
    using nf::Folder;
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<File>(module, "File")
        .def_property_readonly("direct", &File::direct)
        .def_property_readonly("path", &File::path)
        .def("reserve", &File::reserve, py::arg("bytes"), Release())
        .def(
            "write_chunk",
            [](File& file, uint64_t offset, const py::object& buffer) {
                const Bytes bytes(buffer, PyBUF_SIMPLE);
                return without_gil([&] { return file.write_chunk(offset, bytes.data(), bytes.size()); });
            },
            py::arg("offset"), py::arg("buffer"))
        .def(
            "read",
            [](File& file, uint64_t offset, const py::object& buffer) {
                const Bytes bytes(buffer, PyBUF_WRITABLE);
                without_gil([&] { file.read(offset, bytes.data(), bytes.size()); });
            },
            py::arg("offset"), py::arg("buffer"))
        .def(
            "read_chunk",
            [](File& file, uint64_t offset, const py::object& buffer, uint32_t expected_crc) {
                const Bytes bytes(buffer, PyBUF_WRITABLE);
                return without_gil([&] { return file.read_chunk(offset, bytes.data(), bytes.size(), expected_crc); });
            },
            py::arg("offset"), py::arg("buffer"), py::arg("expected_crc"))
        .def("fsync", &File::fsync, Release())
        .def("close", &File::close, Release())
        .def("stat", [](File& file) {
            const auto status = without_gil([&] { return file.stat(); });
            return py::make_tuple(status.size, status.links, status.regular);
        });
    py::class_<Folder>(module, "Folder")
        .def(py::init<std::string>(), py::arg("path"))
        .def_property_readonly("path", &Folder::path)
        .def("create", &Folder::create, py::arg("name"))
        .def("open", &Folder::open, py::arg("name"))
        .def("rename", &Folder::rename, py::arg("old"), py::arg("new"))
        .def("unlink", &Folder::unlink, py::arg("name"))
        .def("free_bytes", &Folder::free_bytes)
        .def("close", &Folder::close);
}

}  // namespace

PYBIND11_MODULE(_cache, module) {
    module.doc() = "Checked, page-aligned file I/O and the arithmetic of the activation cache.";
    py::register_local_exception_translator(translate);
    py::class_<nf::AlignedBuffer>(module, "AlignedBuffer", py::buffer_protocol())
        .def(py::init<size_t>(), py::arg("bytes"))
        .def("__len__", &nf::AlignedBuffer::size)
        .def_buffer([](nf::AlignedBuffer& buffer) {
            return py::buffer_info(buffer.data(), static_cast<py::ssize_t>(buffer.size()), false);
        });
    bind_files(module);
    module.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0, py::kw_only(), py::arg("portable") = false);
    module.def("mix", &nf::mix, py::arg("key"), py::arg("i"));
    module.def("plan_order", &plan_order, py::arg("key"), py::arg("n_samples"), py::arg("samples_per_chunk"),
               py::arg("window_chunks"));
    module.def("gather", &gather, py::arg("source"), py::arg("offsets"), py::arg("out"));
    module.def("all_finite", &all_finite, py::arg("buffer"), py::arg("dtype"));
    module.def("build_info", &build_info);
}

// nf_engine._cache: the Python face of csrc/. Ints (addresses, stream handles), buffers and plain records cross; the
// engine holds no Python object, and the GIL is released wherever bytes move or somebody waits. nf_engine/_cache/
// has the signatures.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <exception>
#include <utility>

#include "bindings_io.h"
#include "cache/aligned_buffer.h"
#include "cache/error.h"
#include "cache/planner.h"
#include "cache/reader.h"
#include "cache/samples.h"
#include "cache/writer.h"
#include "io/crc32c.h"
#include "io/error.h"
#include "io/file.h"
#include "io/io_vtable.h"

namespace py = pybind11;

namespace {

using nf::Bytes;
using nf::without_gil;

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
    using namespace pybind11::literals;
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const nf::SystemError& error) {
        raise(error);
    } catch (const nf::CorruptError& error) {
        raise("CacheCorruptError", error.what(), {});
    } catch (const nf::FormatError& error) {
        raise("CacheCorruptError", error.what(), {});
    } catch (const nf::TruncatedError& error) {
        raise("CacheIncompleteError", error.what(), {});
    } catch (const nf::IncompleteError& error) {
        raise("CacheIncompleteError", error.what(), {});
    } catch (const nf::CountError& error) {
        raise("CacheIncompleteError", error.what(), {});
    } catch (const nf::ClosedError& error) {
        raise("CacheClosedError", error.what(), {});
    } catch (const nf::MemoryError& error) {
        raise("CacheError", error.what(), {});
    } catch (const nf::NonFinite& error) {
        raise("NonFiniteError", error.what(), {});
    } catch (const nf::gpu::DeviceError& error) {
        raise("DeviceLostError", error.what(), py::dict("call"_a = error.call, "code"_a = error.code));
    }
}

// Between two slices of a wait: Ctrl-C is raised here.
void look_at_signals() {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

const nf::Record* records_of(const Bytes& bytes, size_t count) {
    if (bytes.size() != count * sizeof(nf::Record))
        throw std::invalid_argument("expected " + std::to_string(count) + " records of 16 bytes, got " +
                                    std::to_string(bytes.size()) + " bytes");
    return reinterpret_cast<const nf::Record*>(bytes.data());
}

nf::gpu::Stream stream_of(uint64_t handle) { return reinterpret_cast<nf::gpu::Stream>(handle); }

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

// Raises NonFiniteError as an append does, for tiers that keep their chunks themselves.
void copy_finite(const py::object& out, uint64_t address, size_t samples, const py::bytes& header) {
    const Bytes to(out, PyBUF_WRITABLE), page(header, PyBUF_SIMPLE);
    const nf::Header parsed = nf::parse_header(page.data(), "header");
    if (to.size() != samples * parsed.sample_bytes)
        throw std::invalid_argument("expected out of " + std::to_string(samples * parsed.sample_bytes) +
                                    " bytes, got " + std::to_string(to.size()));
    const auto* from = reinterpret_cast<const uint8_t*>(address);
    if (!without_gil([&] { return nf::copy_finite(to.data(), from, samples, parsed); }))
        throw nf::NonFinite("a stored value is NaN or infinite");
}

uint32_t crc32c(const py::object& buffer, uint32_t crc, const std::string& code) {
    const Bytes bytes(buffer, PyBUF_SIMPLE);
    return without_gil([&] {
        return code == "auto" ? nf::crc32c(bytes.data(), bytes.size(), crc)
                              : nf::crc32c_by(code, bytes.data(), bytes.size(), crc);
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

py::dict stats_of(const nf::Stats& stats) {
    using namespace pybind11::literals;
    const auto seconds = [](const std::atomic<uint64_t>& ns) { return static_cast<double>(ns.load()) * 1e-9; };
    return py::dict("bytes_written"_a = stats.bytes_written.load(), "bytes_read"_a = stats.bytes_read.load(),
                    "rereads"_a = stats.rereads.load(), "write_busy"_a = seconds(stats.write_busy_ns),
                    "read_busy"_a = seconds(stats.read_busy_ns), "write_stall"_a = seconds(stats.write_stall_ns),
                    "read_stall"_a = seconds(stats.read_stall_ns), "peak_slabs"_a = stats.peak_slabs.load());
}

std::unique_ptr<nf::Writer> create(const std::shared_ptr<nf::Engine>& engine, const std::shared_ptr<nf::Folder>& folder,
                                   const std::string& name, const py::bytes& header, int threads, size_t staging,
                                   bool durable) {
    const Bytes page(header, PyBUF_SIMPLE);
    if (page.size() != nf::kPage || threads < 1 || threads > 64)
        throw std::invalid_argument("expected a header of 4096 bytes and 1..64 threads, got " +
                                    std::to_string(page.size()) + " and " + std::to_string(threads));
    return without_gil(
        [&] { return std::make_unique<nf::Writer>(engine, folder, name, page.data(), threads, staging, durable); });
}

std::shared_ptr<nf::Epoch> start(nf::Reader& reader, uint64_t key, size_t batch, int64_t window_chunks, uint64_t first,
                                 bool drop_last, std::vector<uint64_t> ring, bool on_device, uint64_t stream,
                                 int threads) {
    if (batch < 1 || ring.size() < 2 || threads < 1 || threads > 64)
        throw std::invalid_argument("expected batch >= 1, a ring of 2 slots or more and 1..64 threads, got " +
                                    std::to_string(batch) + ", " + std::to_string(ring.size()) + " and " +
                                    std::to_string(threads));
    nf::EpochOptions options;
    options.key = key;
    options.batch = batch;
    options.window_chunks = window_chunks;
    options.first = first;
    options.drop_last = drop_last;
    options.ring = std::move(ring);
    options.on_device = on_device;
    options.stream = stream_of(stream);
    options.threads = threads;
    return without_gil([&] { return reader.start(options); });
}

// (slot, count, records); a count of 0 is the end. The records are copied out.
py::tuple next(nf::Epoch& epoch, uint64_t stream) {
    const auto batch = without_gil([&] { return epoch.next(stream_of(stream), look_at_signals); });
    return py::make_tuple(batch.slot, batch.count,
                          py::bytes(reinterpret_cast<const char*>(batch.records), batch.count * sizeof(nf::Record)));
}

py::bytes as_bytes(const std::vector<uint8_t>& data) {
    return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

void bind_engine(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<nf::Engine, std::shared_ptr<nf::Engine>>(module, "Engine")
        .def(py::init<size_t, int, double>(), py::arg("pinned_bytes"), py::arg("device"), py::arg("io_timeout"),
             Release())
        .def_property_readonly("memory", [](const nf::Engine& engine) { return engine.arena->size(); })
        .def_property_readonly("pinned", [](const nf::Engine& engine) { return engine.arena->pinned(); })
        .def_property_readonly("note", [](const nf::Engine& engine) { return engine.arena->note(); })
        .def("create", &create, py::arg("folder"), py::arg("name"), py::arg("header"), py::arg("threads"),
             py::arg("staging"), py::arg("durable"))
        .def(
            "open",
            [](const std::shared_ptr<nf::Engine>& engine, nf::Folder& folder, const std::string& name) {
                return without_gil([&] { return std::make_unique<nf::Reader>(engine, folder, name); });
            },
            py::arg("folder"), py::arg("name"));
    py::class_<nf::Writer>(module, "Writer")
        .def(
            "append",
            [](nf::Writer& writer, uint64_t address, size_t count, const py::object& records) {
                const Bytes bytes(records, PyBUF_SIMPLE);
                const nf::Record* members = records_of(bytes, count);
                without_gil(
                    [&] { writer.append(reinterpret_cast<const uint8_t*>(address), count, members, look_at_signals); });
            },
            py::arg("address"), py::arg("count"), py::arg("records"))
        .def(
            "append_device",
            [](nf::Writer& writer, uint64_t address, size_t count, const py::object& records, uint64_t stream,
               size_t slot) {
                const Bytes bytes(records, PyBUF_SIMPLE);
                const nf::Record* members = records_of(bytes, count);
                without_gil(
                    [&] { writer.append_device(address, count, members, stream_of(stream), slot, look_at_signals); });
            },
            py::arg("address"), py::arg("count"), py::arg("records"), py::arg("stream"), py::arg("slot"))
        .def(
            "fence",
            [](nf::Writer& writer, size_t slot, uint64_t stream) {
                without_gil([&] { writer.fence(slot, stream_of(stream)); });
            },
            py::arg("slot"), py::arg("stream"))
        .def("finish",
             [](nf::Writer& writer) { return as_bytes(without_gil([&] { return writer.finish(look_at_signals); })); })
        .def("abort", &nf::Writer::abort, Release())
        .def_property_readonly("direct", &nf::Writer::direct)
        .def("stats", [](const nf::Writer& writer) { return stats_of(writer.stats()); });
    py::class_<nf::Epoch, std::shared_ptr<nf::Epoch>>(module, "Epoch")
        .def("next", &next, py::arg("stream") = 0)
        .def("stop", &nf::Epoch::stop, Release());
    py::class_<nf::Reader>(module, "Reader")
        .def("start", &start, py::arg("key"), py::arg("batch"), py::arg("window_chunks"), py::arg("first"),
             py::arg("drop_last"), py::arg("ring"), py::arg("on_device"), py::arg("stream"), py::arg("threads"))
        .def("close", &nf::Reader::close, Release())
        .def("take_notes", &nf::Reader::take_notes)
        .def_property_readonly("header", [](const nf::Reader& reader) { return as_bytes(reader.source().header_page); })
        .def_property_readonly("table", [](const nf::Reader& reader) { return as_bytes(reader.source().table); })
        .def_property_readonly("path", [](const nf::Reader& reader) { return reader.source().file->path(); })
        .def_property_readonly("direct", [](const nf::Reader& reader) { return reader.source().file->direct(); })
        .def("stats", [](const nf::Reader& reader) { return stats_of(reader.source().stats); });
    module.def("cuda_status", [] {
        const auto status = without_gil([] { return nf::gpu::status(); });
        return py::make_tuple(status.available, status.reason);
    });
}

}  // namespace

PYBIND11_MODULE(_cache, module) {
    module.doc() = "The activation cache's engine, checked page-aligned file I/O, and their arithmetic.";
    py::register_local_exception_translator(translate);
    nf::io::configure();
    py::class_<nf::AlignedBuffer>(module, "AlignedBuffer", py::buffer_protocol())
        .def(py::init<size_t>(), py::arg("bytes"))
        .def("__len__", &nf::AlignedBuffer::size)
        .def_buffer([](nf::AlignedBuffer& buffer) {
            return py::buffer_info(buffer.data(), static_cast<py::ssize_t>(buffer.size()), false);
        });
    bind_io(module);
    bind_engine(module);
    module.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0, py::kw_only(), py::arg("code") = "auto");
    module.def("mix", &nf::mix, py::arg("key"), py::arg("i"));
    module.def("plan_order", &plan_order, py::arg("key"), py::arg("n_samples"), py::arg("samples_per_chunk"),
               py::arg("window_chunks"));
    module.def("gather", &gather, py::arg("source"), py::arg("offsets"), py::arg("out"));
    module.def("copy_finite", &copy_finite, py::arg("out"), py::arg("address"), py::arg("samples"), py::arg("header"));
    module.def("build_info", &build_info);
}

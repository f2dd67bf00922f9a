// nf_engine._cache.io: files of one folder, through the one table of system calls. nf_engine/_cache/io.pyi has the
// signatures.
#include "bindings_io.h"

#include <string>
#include <vector>

#include "io/direct_probe.h"
#include "io/file.h"

namespace py = pybind11;

namespace {

using nf::Bytes;
using nf::File;
using nf::FileStatus;
using nf::Folder;
using nf::without_gil;
using nf::io::Direct;

using Release = py::call_guard<py::gil_scoped_release>;

void bind_status(py::module_& module) {
    py::class_<FileStatus>(module, "Status")
        .def_readonly("size", &FileStatus::size)
        .def_readonly("links", &FileStatus::links)
        .def_readonly("regular", &FileStatus::regular)
        .def_readonly("link", &FileStatus::link)
        .def_readonly("owner", &FileStatus::owner)
        .def_readonly("mode", &FileStatus::mode);
}

void bind_file(py::module_& module) {
    const auto write = [](File& file, uint64_t offset, const py::object& buffer) {
        const Bytes bytes(buffer, PyBUF_SIMPLE);
        without_gil([&] { file.write(offset, bytes.data(), bytes.size()); });
    };
    const auto write_chunk = [](File& file, uint64_t offset, const py::object& buffer) {
        const Bytes bytes(buffer, PyBUF_SIMPLE);
        return without_gil([&] { return file.write_chunk(offset, bytes.data(), bytes.size()); });
    };
    const auto read = [](File& file, uint64_t offset, const py::object& buffer) {
        const Bytes bytes(buffer, PyBUF_WRITABLE);
        without_gil([&] { file.read(offset, bytes.data(), bytes.size()); });
    };
    const auto read_chunk = [](File& file, uint64_t offset, const py::object& buffer, uint32_t expected_crc) {
        const Bytes bytes(buffer, PyBUF_WRITABLE);
        return without_gil([&] { return file.read_chunk(offset, bytes.data(), bytes.size(), expected_crc); });
    };
    py::class_<File>(module, "File")
        .def_property_readonly("direct", &File::direct)
        .def_property_readonly("path", &File::path)
        .def("reserve", &File::reserve, py::arg("bytes"), Release())
        .def("truncate", &File::truncate, py::arg("bytes"), Release())
        .def("write", write, py::arg("offset"), py::arg("buffer"))
        .def("write_chunk", write_chunk, py::arg("offset"), py::arg("buffer"))
        .def("read", read, py::arg("offset"), py::arg("buffer"))
        .def("read_chunk", read_chunk, py::arg("offset"), py::arg("buffer"), py::arg("expected_crc"))
        .def("fsync", &File::fsync, Release())
        .def("close", &File::close, Release())
        .def("stat", &File::stat, Release());
}

// Names are bytes to the kernel; Python has them as os.fsdecode gives them and takes them as os.fsencode does.
std::string encoded(const py::object& name) {
    PyObject* bytes = nullptr;
    if (!PyUnicode_FSConverter(name.ptr(), &bytes)) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(bytes);
}

py::list decoded(const std::vector<std::string>& names) {
    py::list list;
    for (const std::string& name : names) {
        PyObject* text = PyUnicode_DecodeFSDefaultAndSize(name.data(), static_cast<py::ssize_t>(name.size()));
        if (text == nullptr) throw py::error_already_set();
        list.append(py::reinterpret_steal<py::str>(text));
    }
    list.attr("sort")();
    return list;
}

void bind_folder(py::module_& module) {
    const auto list = [](Folder& folder) { return decoded(without_gil([&] { return folder.list(); })); };
    const auto lstat = [](Folder& folder, const py::object& name) {
        const std::string bytes = encoded(name);
        return without_gil([&] { return folder.lstat(bytes); });
    };
    py::class_<nf::FolderLock>(module, "FolderLock").def("release", &nf::FolderLock::release, Release());
    py::class_<Direct>(module, "Direct")
        .def_readonly("direct", &Direct::direct)
        .def_readonly("reason", &Direct::reason)
        .def_readonly("mem_align", &Direct::mem_align)
        .def_readonly("offset_align", &Direct::offset_align)
        .def_readonly("in_ram", &Direct::in_ram);
    py::class_<Folder, std::shared_ptr<Folder>>(module, "Folder")
        .def(py::init<std::string, bool>(), py::arg("path"), py::kw_only(), py::arg("follow") = true, Release())
        .def_property_readonly("path", &Folder::path)
        .def("create", &Folder::create, py::arg("name"), py::kw_only(), py::arg("direct") = true, Release())
        .def("open", &Folder::open, py::arg("name"), py::kw_only(), py::arg("direct") = true, Release())
        .def("append", &Folder::append, py::arg("name"), Release())
        .def("lock", &Folder::lock, py::arg("name"), Release())
        .def("make_folder", &Folder::make_folder, py::arg("name"), Release())
        .def("rename", &Folder::rename, py::arg("old"), py::arg("new"), Release())
        .def("unlink", &Folder::unlink, py::arg("name"), Release())
        .def("fsync", &Folder::fsync, Release())
        .def("stat", &Folder::stat, Release())
        .def("lstat", lstat, py::arg("name"))
        .def("list", list)
        .def("free_bytes", &Folder::free_bytes, Release())
        .def("probe", &Folder::probe, Release())
        .def("close", &Folder::close, Release());
}

}  // namespace

void bind_io(py::module_& module) {
    py::module_ io = module.def_submodule("io", "Files of one folder, through the one table of system calls.");
    bind_status(io);
    bind_file(io);
    bind_folder(io);
}

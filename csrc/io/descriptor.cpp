#include "io/descriptor.h"

#include <mutex>
#include <utility>

#include "io/error.h"
#include "io/io_vtable.h"

namespace nf::io {

Descriptor::Descriptor(int fd, std::string path, std::string name) noexcept
    : fd_(fd), path_(std::move(path)), name_(std::move(name)) {}

Descriptor::~Descriptor() { close(); }  // unchecked: who needs the bytes has called close()

Descriptor::Use::Use(Descriptor& descriptor) {
    if (!descriptor.origin_.here()) throw ClosedError(descriptor.path_);
    lock_ = std::shared_lock<std::shared_mutex>(descriptor.closing_);
    fd_ = descriptor.fd_;
    if (fd_ < 0) throw ClosedError(descriptor.path_);
}

bool Descriptor::close() {
    std::unique_lock<std::shared_mutex> lock(closing_, std::defer_lock);
    if (origin_.here()) lock.lock();  // in a child, a thread that is no more may hold it
    const int fd = std::exchange(fd_, -1);
    if (fd < 0) return true;
    return io::close(fd, name()) == 0 || !origin_.here();
}

}  // namespace nf::io

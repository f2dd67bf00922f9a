// Whether a file system takes O_DIRECT: asked once for each (by st_dev), by what the kernel says of a file there and by
// a page written and read back.
#pragma once

#include <cstdint>
#include <string>

namespace nf::io {

struct Direct {
    bool direct;
    std::string reason;  // why not, or why it could not be found out; empty where a page came back
    uint32_t mem_align, offset_align;
    bool in_ram;  // tmpfs takes O_DIRECT, but what it holds is memory
};

// `folder` is an open descriptor. Never fails: where no file can be made there, O_DIRECT is worth an attempt.
Direct probe_direct(int folder);

}  // namespace nf::io

// Injected faults, for tests: the operations of io_vtable with one of them failing, lying, late or the last.
//
//   NF_TESTING=1 NF_FAULT='op=pwrite; path=x*.nfc; n=17; sticky=0; rank=0; mode=errno:28'
//   op    open pread pwrite fsync fsyncdir close rename unlink fallocate ftruncate any (each that the mode fits)
//   path  glob on the file's name, "." for the folder itself, either name of a rename; default *
//   n     the n-th match in this process, from 1, the default      sticky  1: from the n-th on; default 0
//   rank  only where the environment's RANK (default 0) is this; default: every rank
//   mode  errno:E   not done (a close is), fails with E            short:B     only the first B bytes
//         kill      SIGKILL before the call                        kill_after  the call, then SIGKILL
//         torn:B    writes B bytes, then SIGKILL                   delay:MS    sleeps, then the call
//         flip:BIT  reads, then flips bit BIT modulo those read    lie_write   returns the full length, writes nothing
//         drop_fsync  returns 0, syncs nothing
//
// NF_FAULT_COUNT=1 prints at exit how often each operation matched; NF_FAULT_LOG=FD writes a line for each that did:
// op, path (from>to of a rename), offset (flags of an open), length, result (or -errno). With either nothing fails:
// NF_FAULT, its mode left out if you like, only says what matches.
#pragma once

#include <string>

namespace nf::io {

struct Operations;

// Throws std::invalid_argument that names the field, what was expected and what came.
const Operations* faulty(const std::string& fault, const std::string& rank, const std::string& count,
                         const std::string& log);

}  // namespace nf::io

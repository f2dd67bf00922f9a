"""Removes one wait, record, fence or context of the GPU path at a time and expects engine_test to notice.

    python csrc/tests/mutants.py [--seeds N] [--name PART_OF_A_NAME]

Works on a copy of csrc in a temporary folder, so that each mutant compiles one file. Prints `mutants detected: k/k`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    name: str
    file: str
    text: str  # occurs once
    instead: str = ";"
    part: str = "device"


WRITER, READER = "cache/writer.cpp", "cache/reader.cpp"
QUEUE, DRIVER, ARENA = "gpu/copy_queue.cpp", "gpu/driver.cpp", "cache/arena.cpp"

# Not here: blocking streams instead of non-blocking ones add an order and lose none, which costs time only.
MUTANTS = [
    Mutant("producer record", WRITER, "produced_->record(0, stream);"),
    Mutant("producer wait", WRITER, "produced_->make_wait(0, copies_->stream());"),
    Mutant("fence record", WRITER, "fences_->record(slot, copies_->stream());"),
    Mutant("fence wait", WRITER, "fences_->make_wait(slot, stream);"),
    Mutant("slab-ready record", WRITER, "if (state_->gpu) state_->ready->record(filling_->ready, copies_->stream());"),
    Mutant("slab-ready synchronize", WRITER, "if (gpu) ready->synchronize(slab.ready);"),
    Mutant("writer's drain before memory goes back", WRITER, "if (copies_) copies_->drain();"),
    Mutant("context of a writing thread", WRITER, "state->gpu->enter_thread();"),
    Mutant("initial freed record of the ring", READER, "freed->record(i, options.stream);"),
    Mutant("freed record", READER, "state.freed->record(before, stream);", ";"),
    Mutant("freed wait", READER, "freed->make_wait(i, copies->stream());"),
    Mutant("full record", READER, "full->record(i, copies->stream());"),
    Mutant("full wait", READER, "if (state.options.on_device) state.full->make_wait(i, stream);"),
    Mutant("piece record", READER, "copied->record(piece, copies->stream());"),
    Mutant("piece synchronize", READER, "copied->synchronize(piece);"),
    Mutant("reader's drain before memory goes back", READER, "if (state.copies) state.copies->drain();"),
    Mutant("context of the gather thread", READER, "if (state.options.on_device) state.engine->gpu()->enter_thread();"),
    Mutant("drain without its record", QUEUE, "end_.record(0, stream_);"),
    Mutant("drain without its synchronize", QUEUE, "end_.synchronize(0);"),
    Mutant("context of our threads", DRIVER, 'check("cuCtxSetCurrent", api_.set_context(context_));'),
    Mutant(
        "relaxed capture mode",
        DRIVER,
        "constexpr int kCaptureRelaxed = 2;",
        "constexpr int kCaptureRelaxed = 0;",
        "capture",
    ),
    Mutant(
        "context on the caller's thread",
        DRIVER,
        'gpu_->check("cuCtxSetCurrent", gpu_->api_.set_context(gpu_->context_));',
    ),
    Mutant("the caller's context put back", DRIVER, "gpu_->api_.set_context(before_) != 0", "false"),
    Mutant("unregister", ARENA, "gpu_->unregister_memory(memory_->data());"),
]


def run(command: list[str | Path], log: Path, timeout: float) -> int:
    """The exit status; output goes to `log`, a hang counts as 124."""
    with log.open("wb") as out:
        try:
            return subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="of engine_test (default: %(default)s)")
    parser.add_argument("--name", default="", help="only mutants whose name holds this")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.name in mutant.name]
    for mutant in mutants:
        found = (SOURCE / mutant.file).read_text().count(mutant.text)
        if found != 1:
            raise SystemExit(f"{mutant.name}: expected the text once in {mutant.file}, found it {found} times")

    ram = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="nf-mutants-") as scratch_name,
        tempfile.TemporaryDirectory(prefix="nf-mutants-", dir=ram) as files,  # a mutant that crashes leaves its own
    ):
        scratch = Path(scratch_name)
        source, build, log = scratch / "csrc", scratch / "build", scratch / "log"
        shutil.copytree(SOURCE, source)
        ninja: list[str | Path] = ["ninja", "-C", build, "engine_test"]

        def detected(part: str) -> bool:
            if run(ninja, log, 600) != 0:
                raise SystemExit(log.read_text())
            seeds = str(arguments.seeds)
            test: list[str | Path] = [build / "engine_test", "--part", part, "--seeds", seeds, "--folder", files]
            return run(test, log, 300) != 0

        subprocess.run(
            ["cmake", "-S", source, "-B", build, "-G", "Ninja", "-DNF_TESTS=ON"], check=True, stdout=subprocess.DEVNULL
        )
        for part in sorted({mutant.part for mutant in mutants}):
            if detected(part):
                raise SystemExit(f"part {part} fails without any mutant:\n{log.read_text()}")
        count = 0
        for mutant in mutants:
            file = source / mutant.file
            sound = file.read_text()
            file.write_text(sound.replace(mutant.text, mutant.instead))
            noticed = detected(mutant.part)
            file.write_text(sound)
            count += noticed
            print(f"{'detected' if noticed else 'MISSED'}: {mutant.name}", flush=True)
    print(f"mutants detected: {count}/{len(mutants)}")
    return 0 if count == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())

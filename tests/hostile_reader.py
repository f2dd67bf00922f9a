"""Reads every case of a hostile corpus through each door that takes it; a line of JSON for each case and door.

python hostile_reader.py CORPUS

A hook of the interpreter refuses to compile, run, import, unpickle or start anything while a reader is at work. All
that the readers need is loaded and used once before, on the sound twins.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nf_engine
from nf_engine import checkpoint
from nf_engine.committed import go_back, read_run
from nf_engine.config import TrainConfig
from nf_engine.errors import NFError
from nf_engine.manifest import Manifest
from nf_engine.run_folder import RunFolder
from nf_engine.storage import ActivationCache, CacheGeometry, CacheRecord

FORBIDDEN = ("compile", "exec", "import", "pickle.find_class", "marshal.loads", "code.__new__", "ctypes.dlopen")
FORBIDDEN += ("subprocess.Popen", "os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
FORBIDDEN += ("socket.connect", "socket.__new__", "shutil.rmtree", "os.remove", "os.rename", "os.chmod")
EVENTS: list[str] = []
armed = False


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    if armed and (event in FORBIDDEN or (event == "open" and writes(arguments))):
        EVENTS.append(f"{event} {str(arguments)[:80]}")
        raise RuntimeError(f"forbidden while reading: {EVENTS[-1]}")


def writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.ones(4))


MODEL = Model()


def open_run(path: Path) -> None:
    with RunFolder(path) as run:
        assert run.manifest is not None
        for entry in run.manifest.files:
            run.read(entry)


def read_state(path: Path) -> None:
    file = path / "state.safetensors"
    checkpoint.fill({"m": MODEL}, checkpoint.parse(file.read_bytes(), str(file)), str(file))


def read_cache(path: Path) -> None:
    with ActivationCache.open(path, RECORD) as cache:
        for _ in cache.batches(0, 5, key=0):
            pass


def parse_manifest(path: Path) -> None:
    """In memory, where the file is one that can be read at all."""
    file = path / "MANIFEST.json"
    if file.is_symlink() or not file.is_file() or file.stat().st_size > 1 << 25:
        raise NFError(f"{file}: not tried")
    found = Manifest.parse(file.read_bytes(), str(file))
    if found.to_bytes() == file.read_bytes():  # the manifest is sound; it is a file of it that is not
        raise NFError(f"{file}: sound")


GEOMETRY = CacheGeometry(sample_shape=(2, 3), dtype="fp32", samples=5, chunk_bytes=128)
DOORS: dict[str, dict[str, Callable[[Path], object]]] = {
    "run": {
        "read_run": lambda path: read_run(path, ["config", "plan", "train", "metrics"]),
        "Manifest.parse": parse_manifest,
        "nf_engine.load": nf_engine.load,
        "RunFolder": open_run,
        "go_back": go_back,
    },
    "model": {"nf_engine.load": nf_engine.load},
    "state": {"checkpoint.fill": read_state},
    "cache": {"ActivationCache": read_cache},
    "config": {"TrainConfig": lambda path: TrainConfig.load(path / "config.toml")},
}


def record(path: Path) -> CacheRecord:
    table = (path / "x000-g0001.nfc").read_bytes()[16384:20480]
    return CacheRecord(
        name="x000-g0001.nfc",
        tier="disk",
        geometry=GEOMETRY,
        block=0,
        generation=1,
        fingerprint="00" * 32,
        order_key=0,
        seed_key=0,
        table_sha256=hashlib.sha256(table).hexdigest(),
    )


def state_of(path: Path) -> list[Any]:
    """Names, sizes and times of all but LOCK, which a start writes."""
    found = [(p.name, p.lstat().st_size, p.lstat().st_mtime_ns, p.lstat().st_mode) for p in path.iterdir()]
    return sorted(f for f in found if f[0] != "LOCK")


def children() -> int:
    return len(Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split())


def attempt(path: Path, read: Callable[[Path], object]) -> dict[str, Any]:
    global armed
    before, memory, begun = state_of(path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    EVENTS.clear()
    MODEL.x.fill_(1)
    error: BaseException | None = None
    armed = True
    try:
        read(path)
    except BaseException as caught:
        error = caught
    finally:
        armed = False
    return {
        "error": type(error).__name__ if error else "",
        "family": isinstance(error, NFError),
        "named": path.name in str(error),
        "printable": str(error).replace("\n", "").isprintable(),
        "message": str(error)[:200],
        "length": len(str(error)),
        "seconds": time.monotonic() - begun,
        "memory": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory),
        "unchanged": state_of(path) == before,
        "untouched": bool(MODEL.x.all()),
        "children": children(),
        "events": list(EVENTS),
    }


def main(corpus: Path) -> None:
    global RECORD
    RECORD = record(corpus / "sound-cache")
    sys.addaudithook(guard)
    for kind, doors in DOORS.items():
        for door, read in doors.items():
            for _ in range(2):
                try:
                    read(corpus / f"sound-{kind}")
                    error = ""
                except NFError as caught:
                    error = type(caught).__name__
            print(json.dumps({"case": f"sound-{kind}", "door": door, "error": error}), flush=True)
    for path in sorted(p for p in corpus.iterdir() if not p.name.startswith("sound-")):
        for door, read in DOORS[path.name.partition("-")[0]].items():
            print(json.dumps({"case": path.name, "door": door, **attempt(path, read)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

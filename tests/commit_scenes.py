"""A run of eight commits as a small program without torch: what the tests of faults, crashes and power cuts let happen.

Each case is a child that `Program`, this file, forks (fork_server.py). Every content is a function of what it is (role,
block, epoch), so that a test knows what each commit must hold, by `expected`, whatever happened before.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_server import LOG, ForkServer, serve

SIZES = {"train": 5_000, "block": 9_000, "initial": 6_000, "x": 8_192, "v": 4_096}
BALLAST = 20_000
FIXED = {"LOCK", "log.jsonl", "MANIFEST.json", "MANIFEST.prev.json"}
Contents = dict[tuple[str, int], bytes]  # of each (role, block); a cache's role is the first letter of its name


def content(role: str, block: int, epoch: int) -> bytes:
    """What a file of the run holds; nothing but its arguments decides it."""
    return random.Random(f"{role} {block} {epoch}").randbytes(SIZES.get(role, 300))


def line(block: int, epoch: int) -> dict[str, int]:
    return {"block": block, "epoch": epoch, "loss": random.Random(f"loss {block} {epoch}").randrange(10**9)}


@dataclass(frozen=True)
class Step:
    """What one commit adds to a run: after it all blocks before `block` and `epoch` epochs of it are trained."""

    block: int
    epoch: int
    new: tuple[tuple[str, int], ...] = ()  # role, block
    line: tuple[int, int] | None = None  # of metrics.jsonl: block, epoch
    caches: int = 0  # the block whose inputs are cached before the commit
    drop: tuple[str, ...] = ()
    done: bool = False


STEPS = (
    Step(0, 0, (("config", 0), ("plan", 0), ("profile", 0), ("initial", 0))),
    Step(0, 1, (("train", 0),), (0, 0)),
    Step(1, 0, (("block", 0),), (0, 1), drop=("train",)),
    Step(1, 0, caches=1),
    Step(1, 1, (("train", 1),), (1, 0)),
    Step(2, 0, (("block", 1),), (1, 1), drop=("train",)),
    Step(2, 0, caches=2, drop=("cache",)),
    Step(3, 0, (("block", 2), ("exits", 0), ("model", 0)), (2, 0), drop=("train", "cache"), done=True),
)


def data_of(role: str, block: int, step: Step) -> bytes:
    return content(role, block, step.epoch if role == "train" else 0)


def expected(steps: int) -> Contents:
    """What the first so many commits leave."""
    contents: Contents = {("metrics", 0): b""}
    for step in STEPS[:steps]:
        gone = {"x" if role == "cache" else role for role in step.drop} | ({"v"} if "cache" in step.drop else set())
        contents = {key: data for key, data in contents.items() if key[0] not in gone}
        contents |= {(role, block): data_of(role, block, step) for role, block in step.new}
        contents |= {(kind, step.caches): content(kind, step.caches, 0) for kind in "xv" if step.caches}
        if step.line:
            contents["metrics", 0] += json.dumps(line(*step.line)).encode() + b"\n"
    return contents


def found(folder: Path, name: str = "MANIFEST.json") -> tuple[dict[str, Any], Contents]:
    """A manifest and what it lists, read without the code under test; a file that is not as listed fails the test."""
    manifest = json.loads((folder / name).read_bytes())
    contents: Contents = {}
    for entry in manifest["files"]:
        cache = entry["role"] == "cache"
        if cache and name != "MANIFEST.json":
            continue  # caches of the commit before are deleted
        data = (folder / entry["name"]).read_bytes()
        data = data[: entry["bytes"]] if entry["role"] == "metrics" else data
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], f"{entry['name']} is not what {name} lists"
        contents[entry["name"][0] if cache else entry["role"], entry["block"]] = data
    return manifest, contents


def listed(folder: Path) -> set[str]:
    """All names that may be in a run folder after a start or an end without a crash."""
    names = set(FIXED)
    for name in ("MANIFEST.json", "MANIFEST.prev.json"):
        if (folder / name).exists():
            files = json.loads((folder / name).read_bytes())["files"]
            names |= {e["name"] for e in files if name == "MANIFEST.json" or e["role"] != "cache"}
    return names


def without_caches(contents: Contents) -> Contents:
    return {key: data for key, data in contents.items() if key[0] not in "xv"}


def opened(folder: Path) -> tuple[int, bool]:
    """The generation that a start finds, and whether a cache must be built again; anything else fails.

    Every file is what that generation lists, so are those of the way back, and nothing stray is left.
    """
    from nf_engine.run_folder import RunFolder

    with RunFolder(folder) as run:
        if run.manifest is None:
            assert {*os.listdir(folder)} == {"LOCK"}  # noqa: PTH208
            return 0, False
        manifest = run.manifest
        files = [entry for entry in manifest.files if entry.role != "cache"]
        contents = {(entry.role, entry.block): run.read(entry) for entry in files}
        assert contents == without_caches(expected(steps_of(manifest)))
        rebuild = not all(is_whole(run, entry) for entry in manifest.of_role("cache"))
    if (folder / "MANIFEST.prev.json").exists():
        before, contents = found(folder, "MANIFEST.prev.json")
        assert contents == without_caches(expected(before["generation"] - (manifest.generation - steps_of(manifest))))
    assert {*os.listdir(folder)} - {"log.jsonl"} <= listed(folder)  # noqa: PTH208
    return manifest.generation, rebuild


# ---- The child ---------------------------------------------------------------------------------------------------


def steps_of(manifest: Any) -> int:
    """How many of STEPS a manifest holds; its generation is more where a cache was built again."""
    caches = {e.block for e in manifest.of_role("cache")}
    cached = 0
    for i, step in enumerate(STEPS):
        cached = step.caches or (0 if "cache" in step.drop else cached)
        position = (manifest.position.block, manifest.position.epoch)
        if (step.block, step.epoch, step.done) == (*position, manifest.done) and caches == ({cached} - {0}):
            return i + 1
    raise AssertionError(f"no step leaves {manifest}")


def write_caches(folder: Any, block: int) -> list[Any]:
    """As the cache engine does: whole pages under another name, renamed, never synced."""
    from nf_engine.errors import NFError
    from nf_engine.manifest import FileEntry

    entries = []
    for kind in "xv":
        name, data = f"{kind}{block:03d}-g{folder.next_generation:04d}.nfc", content(kind, block, 0)
        file = folder.files.create(f"{name}.tmp", direct=False)
        try:
            file.reserve(len(data))
            for offset in range(0, len(data), 4096):
                file.write(offset, data[offset : offset + 4096])
            file.close()
            folder.files.rename(f"{name}.tmp", name)
        except NFError:
            folder.remove(f"{name}.tmp")
            raise
        entries.append(FileEntry(name, "cache", block, len(data), hashlib.sha256(data).hexdigest()))
    return entries


def is_whole(folder: Any, entry: Any) -> bool:
    from nf_engine.errors import CorruptFileError

    try:
        return bool(folder.read(entry))
    except CorruptFileError:
        return False


def take(folder: Any, step: Step) -> None:
    """One step of a run and its commit."""
    from nf_engine.manifest import Position
    from nf_engine.run_folder import NewFile

    new = [NewFile(role, data_of(role, block, step), block) for role, block in step.new]
    if folder.manifest is None:
        folder.begin("c" * 64, "d" * 64, {"torch": "none"}, new)
        return
    if step.line:
        folder.reserve(BALLAST)
        folder.add_metrics(line(*step.line))
    there = write_caches(folder, step.caches) if step.caches else []
    folder.commit(Position(step.block, step.epoch), new, there=there, drop=step.drop, done=step.done)
    if any(role == "block" for role, _ in step.new):
        folder.drop_ballast()


def play(path: str, report: Callable[[int], None]) -> None:
    """The run from whatever the folder holds to its end; `report` is told each generation once it is committed."""
    from nf_engine.run_folder import RunFolder

    with RunFolder(path) as folder:
        try:
            entries = folder.manifest.of_role("cache") if folder.manifest else []
            if not all(is_whole(folder, entry) for entry in entries):
                there = write_caches(folder, entries[0].block)
                folder.commit(folder.manifest.position, there=there, drop=("cache",))
                report(folder.manifest.generation)
            while folder.manifest is None or not folder.manifest.done:
                take(folder, STEPS[steps_of(folder.manifest) if folder.manifest else 0])
                report(folder.manifest.generation)
                folder.log("committed", generation=folder.manifest.generation)
        finally:
            folder.drop_ballast()


def recorded(path: str, report: Callable[[int], None], n: int = 0, code: int = 0, full: bool = False) -> dict[str, Any]:
    """`play`; the bytes of each write, which the log of operations leaves out, are told in their order.

    The n-th fsync of a file fails with `code` and loses what was written, which the log says as "lost NAME"; with
    `full` the first write after it finds no room, either.
    """
    from nf_engine import _cache
    from nf_engine.errors import DiskFullError, NFError, StorageError

    writes: list[str] = []
    write, fsync, calls = _cache.io.File.write, _cache.io.File.fsync, 0

    def noting(file: Any, offset: int, data: Any) -> None:
        nonlocal full
        if full and calls >= n:
            full = False
            raise DiskFullError("write", path=file.path, needed=len(data), free=0)
        write(file, offset, data)
        if len(data):
            writes.append(bytes(data).hex())

    def losing(file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != n:
            fsync(file)
            return
        os.write(LOG, f"lost {Path(file.path).name}\n".encode())
        if code == errno.EIO:
            raise StorageError("fsync", op="fsync", path=file.path, offset=-1, errno=code)
        raise DiskFullError("fsync", path=file.path, needed=0, free=0)

    def reporting(generation: int) -> None:
        os.write(LOG, f"committed {generation}\n".encode())
        report(generation)

    _cache.io.File.write, _cache.io.File.fsync = noting, losing  # type: ignore[method-assign]
    try:
        play(path, reporting)
    except NFError as error:
        return {"writes": writes, "error": type(error).__name__}
    return {"writes": writes, "error": ""}


def two_faults(path: str, report: Callable[[int], None], n: int) -> dict[str, Any]:
    """`play` where the n-th fsync, of a file or the folder, fails with EIO and no write after it finds room."""
    from nf_engine import _cache
    from nf_engine.errors import DiskFullError, StorageError

    calls, file_fsync, folder_fsync, write = 0, _cache.io.File.fsync, _cache.io.Folder.fsync, _cache.io.File.write

    def failing(this: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            raise StorageError("no", op="fsync", path=this.path, offset=-1, errno=errno.EIO)
        (file_fsync if isinstance(this, _cache.io.File) else folder_fsync)(this)

    def full(this: Any, offset: int, data: Any) -> None:
        if calls >= n:
            raise DiskFullError(f"{this.path}: no room", path=this.path, needed=len(data), free=0)
        write(this, offset, data)

    _cache.io.File.fsync = _cache.io.Folder.fsync = failing  # type: ignore[method-assign,assignment]
    _cache.io.File.write = full  # type: ignore[method-assign]
    play(path, report)
    return {"hit": calls >= n}


SCENES: dict[str, Callable[..., dict[str, Any] | None]] = {
    "play": play,
    "recorded": recorded,
    "two_faults": two_faults,
}


def answer(case: dict[str, Any], out: int) -> dict[str, Any]:
    """One case in this process, which loads the module with its faults here; each generation is a line to `out`."""
    importlib.import_module("nf_engine._cache")
    importlib.import_module("nf_engine.run_folder")
    from nf_engine.errors import NFError

    def report(generation: int) -> None:
        os.write(out, f"{generation}\n".encode())

    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    try:
        facts = {"result": "done", **(SCENES[case["scene"]](case["folder"], report, *case["more"]) or {})}
    except NFError as error:
        names = [name for name in ("op", "path", "errno", "needed", "free") if hasattr(error, name)]
        facts = {name: getattr(error, name) for name in names}
        facts |= {"result": type(error).__name__, "text": str(error), "exit_code": error.exit_code}
    return {**facts, "leaked": len(os.listdir("/proc/self/fd")) - before}  # noqa: PTH208


# ---- The tests' side ---------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a child ended: "done", a signal's name or an error's; the last generation that it reported as committed."""

    result: str
    committed: int
    told: str
    facts: dict[str, Any] = field(default_factory=dict)


class Program(ForkServer):
    """This file as a program, asked one case after the other."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def __call__(self, folder: Path, fault: str = "", *more: Any, scene: str = "play", log: str = "") -> Ended:
        facts = self.ask(fault, log, scene=scene, folder=str(folder), more=more)
        committed = max(map(int, facts.pop("said")), default=0)
        return Ended(facts.pop("result"), committed, facts.pop("told"), facts)


def programs() -> Iterator[Program]:
    """For a fixture."""
    program = Program()
    yield program
    program.close()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "play":
        play(sys.argv[2], lambda generation: print("committed", generation, flush=True))
    else:
        for name in ("datetime", "logging", "platform", "secrets", "shutil", "nf_engine.manifest"):
            importlib.import_module(name)  # what each child would load anyway, but for the module that is under test
        serve(answer)

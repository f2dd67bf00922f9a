"""The one table of system calls: what its users make of every injected fault, and the faults against their description.

Faults are read from the environment when the module is loaded, so each case is a forked child that loads it: `run`
starts this file as a small program without torch or threads, which forks once a case and reports what came of it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPS = ["open", "pread", "pwrite", "fsync", "fsyncdir", "close", "rename", "unlink", "fallocate", "ftruncate"]
PAGE, MIB = 4096, 1 << 20
CHUNKS = [bytes((7 * i + j) % 251 for j in range(2 * PAGE)) for i in (1, 2)]
LAST = bytes(j % 241 for j in range(PAGE))
LOG = bytes(j % 239 + 1 for j in range(100))

# ---- The child: one scene, which returns what it saw -------------------------------------------------------------


def story(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """Each operation at least once, and every byte that is read is checked."""
    rereads = 0

    def page_aligned(data: bytes) -> memoryview:
        buffer = memoryview(cache.AlignedBuffer(len(data)))
        buffer[:] = data
        return buffer

    folder = cache.io.Folder(path)
    file = folder.create("x.tmp")
    file.reserve(5 * PAGE)
    sums = [file.write_chunk(i * 2 * PAGE, page_aligned(data)) for i, data in enumerate(CHUNKS)]
    file.write(4 * PAGE, page_aligned(LAST))
    file.fsync()
    file.close()
    folder.rename("x.tmp", "x.nfc")
    folder.fsync()
    log = folder.append("log.jsonl")
    log.write(0, LOG)
    log.truncate(60)
    log.close()
    folder.create("gone", direct=False).close()
    folder.unlink("gone")

    file = folder.open("x.nfc")
    buffer = memoryview(cache.AlignedBuffer(2 * PAGE))
    for i, data in enumerate(CHUNKS):
        rereads += file.read_chunk(i * 2 * PAGE, buffer, sums[i])
        assert buffer == data
    file.read(4 * PAGE, buffer[:PAGE])
    assert buffer[:PAGE] == LAST
    file.close()
    log = folder.open("log.jsonl", direct=False)
    text = bytearray(60)
    log.read(0, text)
    assert text == LOG[:60]
    log.close()
    folder.close()
    return {"rereads": rereads, "direct": file.direct}


def many_threads(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """200 pages by 4 threads; how many of the requests failed."""
    file = cache.io.Folder(path).create("many")
    page = memoryview(cache.AlignedBuffer(PAGE))
    failed = []

    def write(first: int) -> None:
        for i in range(first, 200, 4):
            try:
                file.write(i * PAGE, page)
            except OSError:
                failed.append(i)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"failed": len(failed)}


def closing(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """A file closed while a slow request is under way, its number taken by the next file at once."""
    file = cache.io.Folder(path).create("mine")
    page = memoryview(cache.AlignedBuffer(PAGE))
    thread = threading.Thread(target=file.write, args=(0, page))
    thread.start()
    time.sleep(0.1)  # the request sleeps in front of its pwrite
    begun = time.monotonic()
    file.close()
    waited = time.monotonic() - begun
    with Path(path, "stranger").open("wb"):
        thread.join()
    try:
        file.write(0, page)
        later = "written"
    except Exception as error:
        later = type(error).__name__
    return {"waited": waited, "later": later}


def transfer(cache: types.ModuleType, path: str, size: int = 64 * MIB) -> dict[str, Any]:
    """A file written and read in chunks of 1 MiB and one page; its SHA-256 both ways, and what stays in memory."""
    folder = cache.io.Folder(path)
    file = folder.create("big")
    piece = MIB + PAGE
    buffer = memoryview(cache.AlignedBuffer(piece))
    pattern = random.Random(5).randbytes(2 * piece)
    sent, received, sums = hashlib.sha256(), hashlib.sha256(), []
    offsets = range(0, size, piece)
    for i, offset in enumerate(offsets):
        buffer[:] = pattern[i : i + piece]
        sent.update(buffer)
        sums.append(file.write_chunk(offset, buffer))
    resident = [resident_bytes(Path(path) / "big")]
    file.close()
    file = folder.open("big")
    for offset, crc in zip(offsets, sums, strict=True):
        file.read_chunk(offset, buffer, crc)
        received.update(buffer)
    resident.append(resident_bytes(Path(path) / "big"))
    probe = folder.probe()
    return {
        "same": sent.digest() == received.digest(),
        "digest": sent.hexdigest(),
        "resident": resident,
        "direct": [file.direct, probe.direct],
        "reason": probe.reason,
        "in_ram": probe.in_ram,
    }


def storm(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """The same under a signal every 100 microseconds, whose handler interrupts system calls."""
    hits = 0

    def count(*_: object) -> None:
        nonlocal hits
        hits += 1

    signal.signal(signal.SIGALRM, count)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        return {**transfer(cache, path), "hits": hits}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fork(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """Names of the errors that a forked child gets from its parent's objects, while threads of the parent use them."""
    from nf_engine.errors import CacheClosedError

    folder = cache.io.Folder(path)
    file = folder.create("a")
    lock = folder.lock("LOCK")
    page = memoryview(cache.AlignedBuffer(PAGE))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            file.write(0, page)
            folder.free_bytes()

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    good, rounds = 0, 50
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # a child that waits for a lost lock ends here
            try:
                dead = 0
                for use in (file.stat, file.fsync, lambda: file.write(0, page), folder.fsync, lambda: folder.open("a")):
                    try:
                        use()
                    except CacheClosedError:
                        dead += 1
                held = descriptors()
                lock.release()
                file.close()
                folder.close()
                closed = held - descriptors()
                other = cache.io.Folder(path)
                other.open("a").stat()
                try:
                    other.lock("LOCK")
                except OSError as error:
                    dead += error.errno == errno.EWOULDBLOCK
                os._exit(0 if (dead, closed) == (6, 2) else 1)  # the lock's descriptor was closed by the fork
            finally:
                os._exit(2)
        good += os.waitpid(child, 0)[1] == 0
    alive, says = os.pipe()
    sleeper = os.fork()
    if sleeper == 0:
        os.write(says, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(alive, 1)
    lock.release()  # the child, which lives, has no copy of it
    folder.lock("LOCK").release()
    os.kill(sleeper, signal.SIGKILL)
    os.waitpid(sleeper, 0)
    os.close(alive)
    os.close(says)
    stop.set()
    for thread in threads:
        thread.join()
    file.write(0, page)
    return {"good": good, "rounds": rounds}


def hold_lock(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """Held by this process, whose own child, which outlives it, has no copy; `held` says the child's number."""
    folder = cache.io.Folder(path)
    lock = folder.lock("LOCK")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    Path(path, "held.tmp").write_text(str(child))
    Path(path, "held.tmp").rename(Path(path, "held"))
    time.sleep(60)
    lock.release()
    return {}


def race(cache: types.ModuleType, path: str, rounds: int = 200, racers: int = 4) -> dict[str, Any]:
    """Processes that ask for the lock at the same moment; the winner is killed while it holds it."""

    def ask(start: int, says: int) -> None:
        folder = cache.io.Folder(path)
        os.read(start, 1)
        try:
            lock = folder.lock("LOCK")
        except OSError as error:
            os.write(says, b"%d loses \n" % os.getpid() if error.errno == errno.EWOULDBLOCK else b"0 fails\n")
            os._exit(0)
        os.write(says, b"%d wins \n" % os.getpid())
        time.sleep(60)
        lock.release()

    seen: Counter[str] = Counter()
    for _ in range(rounds):
        start, go = os.pipe()
        hears, says = os.pipe()
        children = []
        for _ in range(racers):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(go)
                ask(start, says)
        os.close(start)
        os.close(go)  # every racer's read ends
        os.close(says)
        answers = ""
        while answers.count("\n") < racers and (more := os.read(hears, 4096)):
            answers += more.decode()
        os.close(hears)
        numbers = dict(line.split()[::-1] for line in answers.splitlines())
        results = Counter(line.split()[1] for line in answers.splitlines())
        seen["one winner"] += results == {"wins": 1, "loses": racers - 1}
        for child in children:
            if str(child) == numbers.get("wins"):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        folder = cache.io.Folder(path)
        folder.lock("LOCK").release()
        folder.close()
        seen["free after the kill"] += 1
    return {**seen, "rounds": rounds, "racers": racers}


def odd_sizes(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """The buffered path alone: pieces of odd sizes written, appended and read back at odd offsets."""
    folder = cache.io.Folder(path)
    file = folder.create("odd.tmp", direct=False)
    file.reserve(len(ODD))
    for begin, end in itertools.pairwise(ODD_CUTS):
        file.write(begin, ODD[begin:end])
    file.fsync()
    file.close()
    folder.rename("odd.tmp", "odd.json")
    file = folder.append("odd.json")
    file.write(len(ODD), b"tail that goes")
    file.truncate(len(ODD) + 4)
    back = bytearray(len(ODD) + 4)
    for begin, end in ((0, 1), (1, 4098), (4098, len(back))):
        file.read(begin, memoryview(back)[begin:end])
    assert back == ODD + b"tail"
    file.close()
    folder.create("gone", direct=False).close()
    folder.unlink("gone")
    folder.fsync()
    file = folder.open("odd.json", direct=False)
    last = bytearray(7)
    file.read(len(ODD) - 3, last)
    assert last == ODD[-3:] + b"tail"
    file.close()
    folder.close()
    return {}


def filtered(cache: types.ModuleType, path: str) -> dict[str, Any]:
    """The story where a seccomp filter answers every openat2 with the errno that NF_TEST_OPENAT2 says."""

    class Filter(ctypes.Structure):
        _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_char_p))

    # Classic BPF: load the number of the call; unless it is openat2, skip the next; refuse; allow.
    refuse = 0x50000 | int(os.environ["NF_TEST_OPENAT2"])
    code = b"".join(
        struct.pack("HBBI", *line)
        for line in ((0x20, 0, 0, 0), (0x15, 0, 1, 437), (0x06, 0, 0, refuse), (0x06, 0, 0, 0x7FFF0000))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    program = Filter(4, code)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        return {"skipped": os.strerror(ctypes.get_errno())}
    return story(cache, path)


def checksum(cache: types.ModuleType, path: str) -> dict[str, Any]:
    return {"code": cache.build_info()["crc32c"], "crc": cache.crc32c(b"123456789")}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def resident_bytes(path: Path) -> int:
    """Bytes of a file in the page cache, as mincore(2) counts them."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // PAGE)
        flags = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(mapped)
        try:
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), flags) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del first
        return sum(flag & 1 for flag in flags) * PAGE


def play(package: str, case: dict[str, Any]) -> dict[str, Any]:
    """One case in this process: the module is loaded here, from its folder, without the package's own imports."""
    for name in list(os.environ):
        if name.startswith("NF_") or name == "RANK":
            del os.environ[name]
    os.environ.update(case["env"])
    parent = types.ModuleType("nf_engine")
    parent.__path__ = [package]
    sys.modules["nf_engine"] = parent
    from nf_engine.errors import NFError

    try:
        cache = importlib.import_module("nf_engine._cache")
        before = descriptors()
        try:
            facts = {"result": "done", **globals()[case["scene"]](cache, case["folder"])}
        except (NFError, AssertionError) as error:
            names = [name for name in ("op", "path", "errno") if hasattr(error, name)]
            facts = {"result": type(error).__name__, **{name: getattr(error, name) for name in names}}
        return {**facts, "leaked": descriptors() - before}
    except ImportError as error:
        return {"result": "ImportError", "text": str(error)}


def zygote(package: str) -> None:
    for line in sys.stdin:
        case = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(err.fileno(), 2)
                if case.get("log"):
                    os.dup2(os.open(case["log"], os.O_WRONLY | os.O_CREAT, 0o600), 9)
                signal.alarm(60)
                os.write(out.fileno(), json.dumps(play(package, case)).encode())
                # Exits as a program does, so that the counts are printed, but without the zygote's own clean-up.
                ctypes.CDLL(None).exit(0)
            status = os.waitpid(child, 0)[1]
            out.seek(0)
            err.seek(0)
            text = out.read()
            seen = json.loads(text) if text else {"result": signal.Signals(os.WTERMSIG(status)).name}
            print(json.dumps({**seen, "stderr": err.read().decode()}), flush=True)


# ---- The tests ---------------------------------------------------------------------------------------------------


class Program:
    """This file as a program, asked one case after the other."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nf_engine")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        self.package = spec.submodule_search_locations[0]
        command = [sys.executable, __file__, self.package]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, scene: str, folder: Path, log: Path | None = None, **env: str) -> None:
        folder.mkdir(exist_ok=True)
        case = {"scene": scene, "folder": str(folder), "env": env, "log": str(log) if log else ""}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()

    def __call__(self, scene: str, folder: Path, log: Path | None = None, **env: str) -> dict[str, Any]:
        self.send(scene, folder, log, **env)
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def fault(self, folder: Path, text: str, scene: str = "story", **env: str) -> dict[str, Any]:
        return self(scene, folder, NF_TESTING="1", NF_FAULT=text, **env)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture(scope="module")
def run() -> Iterator[Program]:
    program = Program()
    yield program
    program.close()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of cases would each wait for the disk."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


Operation = tuple[str, str, int, int, int]


def operations(run: Program, folder: Path) -> list[Operation]:
    """What the story asks of the kernel, by the log."""
    log = folder.parent / f"{folder.name}.log"
    assert run("story", folder, log, NF_TESTING="1", NF_FAULT_LOG="9")["result"] == "done"
    lines = [line.split(" ") for line in log.read_text().splitlines()]
    return [(op, path, int(offset), int(length), int(result)) for op, path, offset, length, result in lines]


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


ODD = random.Random(9).randbytes(12_301)
ODD_CUTS = (0, 1, 4096, 8193, 8200, 12_301)
FINISHED = {"x.nfc": b"".join(CHUNKS) + LAST, "log.jsonl": LOG[:60]}


def test_log_and_counts_are_the_operations_that_the_story_makes(run, tmp_path):
    seen = operations(run, tmp_path / "a")
    create, update = os.O_CREAT | os.O_EXCL | os.O_RDWR, os.O_CREAT | os.O_RDWR
    always = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    expected: list[tuple[str, str, int | None, int]] = [
        ("open", ".", os.O_DIRECTORY | os.O_CLOEXEC, 0),
        ("open", "x.tmp", create | always, 0),
        ("fallocate", "x.tmp", 0, 5 * PAGE),
        ("pwrite", "x.tmp", 0, 2 * PAGE),
        ("pwrite", "x.tmp", 2 * PAGE, 2 * PAGE),
        ("pwrite", "x.tmp", 4 * PAGE, PAGE),
        ("fsync", "x.tmp", 0, 0),
        ("close", "x.tmp", 0, 0),
        ("rename", "x.tmp>x.nfc", 0, 0),
        ("fsyncdir", ".", 0, 0),
        ("open", "log.jsonl", update | always, 0),
        ("pwrite", "log.jsonl", 0, 100),
        ("ftruncate", "log.jsonl", 0, 60),
        ("close", "log.jsonl", 0, 0),
        ("open", "gone", create | always, 0),
        ("close", "gone", 0, 0),
        ("unlink", "gone", 0, 0),
        ("open", "x.nfc", always, 0),
        ("pread", "x.nfc", 0, 2 * PAGE),
        ("pread", "x.nfc", 2 * PAGE, 2 * PAGE),
        ("pread", "x.nfc", 4 * PAGE, PAGE),
        ("close", "x.nfc", 0, 0),
        ("open", "log.jsonl", always, 0),
        ("pread", "log.jsonl", 0, 60),
        ("close", "log.jsonl", 0, 0),
        ("close", ".", 0, 0),
    ]
    assert [operation[:4] for operation in seen] == expected
    for op, _, _, length, result in seen:
        assert result > 2 if op == "open" else result == (length if op in ("pread", "pwrite") else 0)

    counted = run("story", tmp_path / "b", NF_TESTING="1", NF_FAULT_COUNT="1")["stderr"]
    counts = Counter(op for op, *_ in expected)
    assert counted == "NF_FAULT_COUNT " + " ".join(f"{op}={counts[op]}" for op in OPS) + "\n"
    # A fault only says what is counted.
    env = {"NF_TESTING": "1", "NF_FAULT_COUNT": "1", "NF_FAULT": "path=x*; op=pwrite; mode=kill"}
    counted = run("story", tmp_path / "c", **env)["stderr"]
    assert counted == "NF_FAULT_COUNT " + " ".join(f"{op}={3 * (op == 'pwrite')}" for op in OPS) + "\n"
    env["NF_FAULT"] = "path=x.nfc"  # the new name of a rename counts, too
    assert "rename=1 unlink=0" in run("story", tmp_path / "d", **env)["stderr"]


def expected_outcomes(op: str, mode: str, path: str, sticky: bool) -> set[str]:
    """What may come of a fault at one operation, from the description of the modes alone."""
    kind, _, value = mode.partition(":")
    if kind in ("kill", "kill_after", "torn"):
        return {"SIGKILL"}
    if kind in ("delay", "drop_fsync"):
        return {"done"}
    if kind == "errno":
        if op == "close" and (path == "." or int(value) == errno.EINTR):
            return {"done"}  # nothing of a folder is lost; the descriptor of an interrupted close is gone
        if int(value) == errno.EINTR or (op == "fallocate" and int(value) == errno.EOPNOTSUPP):
            return {"done"}
        if op in ("pread", "pwrite") and int(value) == errno.EINVAL and path.startswith("x") and not sticky:
            return {"done"}  # goes on without O_DIRECT
        return {"DiskFullError" if int(value) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "StorageError"}
    if kind == "short":
        return {"done"} if value != "0" else {"StorageError" if op == "pwrite" else "CacheIncompleteError"}
    if kind == "flip":
        return {"done"} if path == "x.nfc" and not sticky else {"CacheCorruptError", "AssertionError"}
    assert kind == "lie_write"
    return {"CacheCorruptError", "CacheIncompleteError", "AssertionError"}


def modes_of(op: str) -> list[str]:
    every = ["errno:5", "errno:28", "errno:4", "delay:1", "kill", "kill_after"]
    own = {
        "pread": ["errno:22", "short:0", "short:1", "short:4096", "flip:0", "flip:32767"],
        "pwrite": ["errno:22", "errno:122", "errno:27", "short:0", "short:1", "short:4096", "torn:100", "lie_write"],
        "fallocate": ["errno:95"],
        "fsync": ["drop_fsync"],
        "fsyncdir": ["drop_fsync"],
    }
    return every + own.get(op, [])


def test_every_fault_at_every_operation_is_a_named_error_or_no_harm(run, memory):
    story_of = operations(run, memory / "plain")
    good = total = 0
    for op in OPS:
        at = [path for name, path, *_ in story_of if name == op]
        for mode in modes_of(op):
            for sticky in (0, 1):
                if sticky and mode in ("errno:4", "short:1"):
                    continue  # interrupted for ever is for ever; single bytes have their own test
                for n, path in enumerate(at, 1):
                    folder = memory / f"case{total}"
                    seen = run.fault(folder, f"op={op}; n={n}; sticky={sticky}; mode={mode}")
                    case = (op, mode, sticky, n, path, seen)
                    # The chunks of x.nfc are checked by CRC32C; the last page, read without one, by the story.
                    outcomes = expected_outcomes(op, mode, path, bool(sticky))
                    if mode.startswith("flip") and n == 3:
                        outcomes = {"AssertionError"}
                    assert seen["result"] in outcomes, case
                    assert seen.get("leaked", 0) == 0, case
                    if seen["result"] == "done":
                        assert state(folder) == FINISHED, case
                        assert seen["rereads"] == (mode.startswith("flip") and n < 3), case
                    if seen["result"] == "StorageError":
                        number = 5 if mode == "short:0" else int(mode[6:])
                        assert (seen["op"], seen["errno"]) == (op, number), case
                    if seen["result"] in ("StorageError", "DiskFullError"):
                        where = folder if path == "." else folder / path.split(">")[0]
                        assert seen["path"] == str(where), case
                    total += 1
                    good += 1
    print(f"faults: {good}/{total} a named error, or the right bytes")
    assert total > 250


def test_killing_before_an_operation_is_killing_after_the_one_before(run, tmp_path):
    story_of = operations(run, tmp_path / "plain")
    before, after = [], []
    for n in range(1, len(story_of) + 1):
        for mode, states in (("kill", before), ("kill_after", after)):
            folder = tmp_path / f"{mode}{n}"
            assert run.fault(folder, f"op=any; n={n}; mode={mode}")["result"] == "SIGKILL"
            states.append(state(folder))
    assert before[0] == {}
    assert after[-1] == FINISHED
    assert after[:-1] == before[1:]
    for (op, _, flags, _, _), old, new in zip(story_of, before, after, strict=True):
        new_name = op == "open" and flags & os.O_CREAT
        changes = new_name or op in ("pwrite", "rename", "unlink", "fallocate", "ftruncate")
        assert (old != new) == bool(changes), op
    print(f"kills: {2 * len(story_of)}/{2 * len(story_of)} leave what the operations before them left")


def test_a_torn_write_leaves_its_first_bytes(run, tmp_path):
    for size in (0, 1, 100, 4096, 8000):
        folder = tmp_path / str(size)
        assert run.fault(folder, f"op=pwrite; n=2; mode=torn:{size}")["result"] == "SIGKILL"
        data = CHUNKS[0] + CHUNKS[1][:size]
        assert state(folder) == {"x.tmp": data.ljust(5 * PAGE, b"\0")}


def test_one_byte_at_a_time_is_invisible(run, tmp_path):
    for op in ("pread", "pwrite"):
        log = tmp_path / f"{op}.log"
        seen = run.fault(tmp_path / op, f"op={op}; sticky=1; mode=short:1")
        assert seen["result"] == "done"
        assert state(tmp_path / op) == FINISHED
        assert not log.exists()


def test_short_and_interrupted_transfers_of_a_buffered_file_are_invisible(run, memory):
    expected = {"odd.json": ODD + b"tail"}
    log = memory / "odd.log"
    assert run("odd_sizes", memory / "plain", log, NF_TESTING="1", NF_FAULT_LOG="9")["result"] == "done"
    done = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert set(done) == set(OPS)
    faults = [f"op={op}; sticky=1; mode=short:1" for op in ("pread", "pwrite")]
    for op in ("pread", "pwrite"):
        faults += [f"op={op}; n={n + 1}; mode=short:{b}" for n in range(done[op]) for b in (1, 6, 4095, 4096, 4097)]
    for op in OPS:
        # The descriptor of a close that fails is gone, so that only EINTR, which loses nothing, is no error there.
        codes = (errno.EINTR,) if op == "close" else (errno.EINTR, errno.EAGAIN)
        faults += [f"op={op}; n={n + 1}; mode=errno:{code}" for n in range(done[op]) for code in codes]
    good = 0
    for i, fault in enumerate(faults):
        seen = run.fault(memory / str(i), fault, scene="odd_sizes")
        assert (seen["result"], seen["leaked"]) == ("done", 0), (fault, seen)
        assert state(memory / str(i)) == expected, fault
        good += 1
    print(f"short and interrupted transfers, buffered: {good}/{len(faults)} byte-identical")


def test_openat2_opens_what_lies_below_a_folder_or_else_openat(run, tmp_path):
    blocked = run("filtered", tmp_path / "used", NF_TEST_OPENAT2=str(errno.EXDEV))
    if "skipped" in blocked:
        pytest.skip(f"no system call filter here: {blocked['skipped']}")
    assert (blocked["result"], blocked["op"], blocked["errno"]) == ("StorageError", "open", errno.EXDEV)
    for code in (errno.ENOSYS, errno.EPERM, errno.E2BIG):
        folder = tmp_path / str(code)
        assert run("filtered", folder, NF_TEST_OPENAT2=str(code))["result"] == "done"
        assert state(folder) == FINISHED


def test_a_delay_delays(run, tmp_path):
    def seconds(text: str) -> float:
        begun = time.monotonic()
        assert run.fault(tmp_path / text[-4:], text)["result"] == "done"
        return time.monotonic() - begun

    assert seconds("op=pread; n=2; mode=delay:400") >= 0.4


def test_faults_find_their_file_rank_and_turn(run, tmp_path):
    def result(text: str, **env: str) -> tuple[str, str]:
        seen = run.fault(Path(tempfile.mkdtemp(dir=tmp_path)), text, **env)
        return seen["result"], Path(seen.get("path", "")).name

    assert result("op=close; path=lo?.json[l]; mode=errno:5") == ("StorageError", "log.jsonl")
    assert result("op=any; path=gone; n=2; mode=errno:5") == ("StorageError", "gone")
    assert result("mode=errno:5;op=rename;path=*.nfc;") == ("StorageError", "x.tmp")
    assert result("op=pwrite; path=none*; mode=kill") == ("done", "")
    assert result("op=pwrite; n=5; mode=kill") == ("done", "")
    assert result("op=any; mode=drop_fsync; sticky=1") == ("done", "")
    assert result("op=pwrite; rank=0; mode=errno:5") == ("StorageError", "x.tmp")
    assert result("op=pwrite; rank=0; mode=errno:5", RANK="1") == ("done", "")
    assert result("op=pwrite; rank=1; mode=errno:5", RANK="1") == ("StorageError", "x.tmp")
    assert result("op=pwrite; mode=errno:5", RANK="3") == ("StorageError", "x.tmp")


def test_the_nth_match_of_many_threads_is_one(run, tmp_path):
    for n, sticky, failed in ((1, 0, 1), (150, 0, 1), (150, 1, 51), (201, 1, 0)):
        text = f"op=pwrite; path=many; n={n}; sticky={sticky}; mode=errno:5"
        assert run.fault(tmp_path / f"{n}-{sticky}", text, scene="many_threads")["failed"] == failed


WRONG = {
    "NF_FAULT=op=pwritev; mode=kill": ("NF_FAULT, op", "pwritev", "fallocate"),
    "NF_FAULT=mode=kill": ("NF_FAULT, op", "this field"),
    "NF_FAULT=op=pwrite": ("NF_FAULT, mode", "errno:E"),
    "NF_FAULT=op=pwrite; mode=explode": ("NF_FAULT, mode", "explode", "lie_write"),
    "NF_FAULT=op=pwrite; mode=errno": ("NF_FAULT, mode", "errno:E"),
    "NF_FAULT=op=pwrite; mode=kill:1": ("NF_FAULT, mode", "expected kill,"),
    "NF_FAULT=op=pwrite; mode=errno:0": ("NF_FAULT, mode", "from 1 to 4095"),
    "NF_FAULT=op=pwrite; mode=errno:ENOSPC": ("NF_FAULT, mode", "ENOSPC"),
    "NF_FAULT=op=pwrite; mode=short:-1": ("NF_FAULT, mode", "-1"),
    "NF_FAULT=op=pwrite; mode=delay:99999999999999999999": ("NF_FAULT, mode", "integer"),
    "NF_FAULT=op=pread; mode=lie_write": ("NF_FAULT, mode", "op=pread"),
    "NF_FAULT=op=fsync; mode=flip:3": ("NF_FAULT, mode", "op=fsync"),
    "NF_FAULT=op=pwrite; n=0; mode=kill": ("NF_FAULT, n", "from 1"),
    "NF_FAULT=op=pwrite; n= ; mode=kill": ("NF_FAULT, n", "integer"),
    "NF_FAULT=op=pwrite; sticky=2; mode=kill": ("NF_FAULT, sticky", "from 0 to 1"),
    "NF_FAULT=op=pwrite; rank=x; mode=kill": ("NF_FAULT, rank", "integer"),
    "NF_FAULT=op=pwrite; path=; mode=kill": ("NF_FAULT, path", "glob"),
    "NF_FAULT=op=pwrite; op=pread; mode=kill": ("NF_FAULT, op", "once"),
    "NF_FAULT=op=pwrite; when=1; mode=kill": ("NF_FAULT", "when=1", "sticky"),
    "NF_FAULT=pwrite": ("NF_FAULT", "field=value"),
    "NF_FAULT_COUNT=yes": ("NF_FAULT_COUNT", "yes"),
    "NF_FAULT_LOG=77": ("NF_FAULT_LOG", "open descriptor"),
    "NF_FAULT_LOG=log.txt": ("NF_FAULT_LOG", "log.txt"),
    "NF_DIRECT=off": ("NF_DIRECT", "off"),
    "NF_CRC=fast": ("CRC32C", "fast", "table"),
    "RANK=two": ("RANK", "two"),
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_refused_on_import(run, tmp_path, setting):
    name, _, value = setting.partition("=")
    seen = run("story", tmp_path / "a", NF_TESTING="1", **{name: value})
    assert seen["result"] == "ImportError"
    for words in WRONG[setting]:
        assert words in seen["text"]
    assert state(tmp_path / "a") == {}


def test_faults_need_nf_testing(run, tmp_path):
    for i, testing in enumerate(("", "0", "yes")):
        env = {"NF_TESTING": testing} if testing else {}
        env |= {"NF_FAULT": "op=any; sticky=1; mode=kill", "NF_FAULT_COUNT": "1", "NF_FAULT_LOG": "x", "NF_DIRECT": "0"}
        seen = run("story", tmp_path / str(i), **env)
        assert seen["result"] == "done"
        assert seen["stderr"] == ""
        assert state(tmp_path / str(i)) == FINISHED


def test_a_storm_of_signals_breaks_no_transfer(run, tmp_path):
    seen = run("storm", tmp_path / "a")
    assert seen["result"] == "done"
    assert seen["same"]
    assert seen["hits"] > 20


def test_the_buffered_path_moves_the_same_bytes_and_leaves_the_page_cache(run, tmp_path):
    direct = run("transfer", tmp_path / "direct")
    buffered = run("transfer", tmp_path / "buffered", NF_TESTING="1", NF_DIRECT="0")
    assert direct["same"]
    assert buffered["same"]
    assert direct["digest"] == buffered["digest"]
    assert buffered["direct"] == [False, False]
    assert buffered["reason"] == "NF_DIRECT=0"
    if direct["in_ram"]:
        pytest.skip("the temporary folder is memory: nothing of it leaves the page cache")
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(64 * MIB))
    print(
        f"resident of 64 MiB: ordinary {resident_bytes(copy)}, buffered {buffered['resident']}, "
        f"direct {direct['resident'] if direct['direct'][0] else 'refused'}"
    )
    assert resident_bytes(copy) == 64 * MIB  # mincore sees what an ordinary write leaves
    assert max(buffered["resident"]) <= 12 * MIB  # 8 MiB behind, a chunk, and what the kernel reads ahead
    if direct["direct"][0]:
        assert max(direct["resident"]) <= MIB


def test_the_probe_knows_memory_from_disk(tmp_path):
    from nf_engine import _cache

    probe = _cache.io.Folder(str(tmp_path)).probe()
    assert probe.direct == (probe.reason == "")
    assert list(tmp_path.iterdir()) == []
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    if kinds.get("/dev/shm") != "tmpfs" or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    assert _cache.io.Folder("/dev/shm").probe().in_ram


PROBE_RAMFS = """
import sys, types
package = types.ModuleType("nf_engine")
package.__path__ = [sys.argv[1]]
sys.modules["nf_engine"] = package
from nf_engine import _cache
folder = _cache.io.Folder(sys.argv[2])
buffer = memoryview(_cache.AlignedBuffer(8192))
buffer[:] = b"ab" * 4096
file = folder.create("a")
crc = file.write_chunk(0, buffer)
buffer[:] = bytes(8192)
assert file.read_chunk(0, buffer, crc) == 0
print(file.direct, folder.probe().direct, folder.probe().in_ram, folder.probe().reason, sep="|")
"""


def test_a_file_system_without_direct_io_is_found_out(run, tmp_path):
    script = f'mount -t ramfs none "$2" && exec "{sys.executable}" -c "$3" "$1" "$2"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", run.package, str(tmp_path), PROBE_RAMFS]
    if (
        not shutil.which("unshare")
        or subprocess.run([*command[:4], 'mount -t ramfs none "$2"', *command[5:]]).returncode
    ):
        pytest.skip("no file system may be mounted here")
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert seen == f"False|False|True|O_DIRECT failed: {os.strerror(errno.EINVAL)}\n"


def test_a_lock_has_one_holder_and_ends_with_its_process(run, tmp_path):
    from nf_engine import _cache
    from nf_engine.errors import StorageError

    folder = _cache.io.Folder(str(tmp_path))
    lock = folder.lock("LOCK")
    with pytest.raises(StorageError) as refused:
        folder.lock("LOCK")
    assert (refused.value.op, refused.value.errno) == ("flock", errno.EWOULDBLOCK)
    assert run("hold_lock", tmp_path)["errno"] == errno.EWOULDBLOCK
    lock.release()
    lock.release()

    run.send("hold_lock", tmp_path)
    limit = time.monotonic() + 30
    while not (tmp_path / "held").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    with pytest.raises(StorageError):
        folder.lock("LOCK")
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert run.process.stdout is not None
    assert json.loads(run.process.stdout.readline())["result"] == "SIGKILL"
    grandchild = int((tmp_path / "held").read_text())
    try:
        lock = folder.lock("LOCK")
        os.kill(grandchild, 0)  # it lives, and holds nothing
    finally:
        os.kill(grandchild, signal.SIGKILL)
    del lock
    folder.lock("LOCK").release()
    assert (tmp_path / "LOCK").stat().st_mode & 0o777 == 0o600


def test_of_many_starts_at_once_one_has_the_lock(run, tmp_path):
    seen = run("race", tmp_path / "a")
    assert seen["result"] == "done", seen
    rounds = seen["rounds"]
    print(
        f"start races of {seen['racers']}: one winner {seen['one winner']}/{rounds}, "
        f"free after kill -9 of it {seen['free after the kill']}/{rounds}"
    )
    assert (seen["one winner"], seen["free after the kill"]) == (rounds, rounds)


def test_a_forked_child_has_no_use_of_its_parents_objects(run, tmp_path):
    seen = run("fork", tmp_path / "a")
    assert seen["result"] == "done", seen
    print(f"forks while writing: {seen['good']}/{seen['rounds']}")
    assert seen["good"] == seen["rounds"]


def test_close_waits_for_requests_under_way(run, tmp_path):
    seen = run.fault(tmp_path / "a", "op=pwrite; mode=delay:400", scene="closing")
    assert seen["result"] == "done"
    assert seen["waited"] > 0.2
    assert seen["later"] == "CacheClosedError"
    assert state(tmp_path / "a") == {"mine": bytes(PAGE), "stranger": b""}


def test_names_stay_inside_the_folder(tmp_path):
    from nf_engine import _cache
    from nf_engine.errors import StorageError

    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "victim").write_bytes(b"kept")
    (inside / "link").symlink_to(outside / "victim")
    folder = _cache.io.Folder(str(inside))
    hostile = ["", ".", "..", "../out/victim", "/etc/passwd", "a/b", "a\0b", "a\nb", "-rf", "_x", ".hidden", "a b", "ä"]
    hostile += ["a" * 65, "proc:self", "a*", "X", "Manifest", "LOCK/a", "MANIFEST.JSON", "\u2024\u2024", "\\x"]
    for name in hostile:
        for call in (folder.create, folder.open, folder.append, folder.lock, folder.unlink):
            with pytest.raises(ValueError, match="expected a file name"):
                call(name)
        with pytest.raises(ValueError, match="expected a file name"):
            folder.rename("link", name)
        with pytest.raises(ValueError, match="expected a file name"):
            folder.rename(name, "link")
    for call in (folder.create, folder.open, folder.append, folder.lock):
        with pytest.raises(StorageError):
            call("link")
    for name in ("", ".", "..", "a/b", "/a", "a\0b"):
        with pytest.raises(ValueError, match="name of one folder"):
            folder.make_folder(name)
    assert (outside / "victim").read_bytes() == b"kept"
    assert sorted(p.name for p in inside.iterdir()) == ["link"]
    folder.create("MANIFEST.tmp", direct=False).close()
    folder.rename("MANIFEST.tmp", "MANIFEST.json")
    folder.make_folder("Run 1")
    assert (inside / "Run 1").stat().st_mode & 0o777 == 0o700
    with pytest.raises(StorageError, match="exists"):
        folder.make_folder("Run 1")


def test_a_folder_lists_and_describes_whatever_lies_in_it(tmp_path):
    from nf_engine import _cache
    from nf_engine.errors import CacheClosedError, StorageError

    inside = tmp_path / "in"
    inside.mkdir(mode=0o750)
    names = ["b", "a file", "\u00e4", "\udcff\udcfe", "\U0001f600", ".hidden", "X" * 255]
    for i, name in enumerate(names):
        (inside / name).write_bytes(b"1" * i)
    (inside / "link").symlink_to("b")
    (inside / "twice").hardlink_to(inside / "a file")
    os.mkfifo(inside / "pipe", 0o600)
    (inside / "folder").mkdir()
    (inside / "b").chmod(0o4640)
    folder = _cache.io.Folder(str(inside))
    for _ in range(2):  # each list begins at the start
        assert folder.list() == sorted(os.listdir(inside))  # noqa: PTH208
    for name in folder.list():
        seen, true = folder.lstat(name), (inside / name).lstat()
        facts = (seen.size, seen.links, seen.owner, seen.mode, seen.regular, seen.link)
        kinds = (stat.S_ISREG(true.st_mode), stat.S_ISLNK(true.st_mode))
        assert facts == (true.st_size, true.st_nlink, true.st_uid, stat.S_IMODE(true.st_mode), *kinds), name
    seen = folder.open("b", direct=False).stat()
    assert (seen.size, seen.links, seen.regular, seen.link, seen.mode) == (0, 1, True, False, 0o4640)
    seen = folder.stat()
    assert (seen.regular, seen.link, seen.owner, seen.mode) == (False, False, os.geteuid(), 0o750)
    with pytest.raises(StorageError) as missing:
        folder.lstat("missing")
    assert (missing.value.op, missing.value.errno) == ("lstat", errno.ENOENT)
    for name in ("", ".", "..", "folder/x", "/etc", "../out"):
        with pytest.raises(ValueError, match="name of one file"):
            folder.lstat(name)
    folder.close()
    for call in (folder.list, folder.stat, lambda: folder.lstat("b")):
        with pytest.raises(CacheClosedError):
            call()


def test_a_folder_behind_a_link_is_refused_on_request(tmp_path):
    from nf_engine import _cache
    from nf_engine.errors import StorageError

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    _cache.io.Folder(str(tmp_path / "link")).close()
    _cache.io.Folder(str(tmp_path / "real"), follow=False).close()
    _cache.io.Folder(f"{tmp_path / 'real'}//", follow=False).close()
    for path in (f"{tmp_path}/link", f"{tmp_path}/link/", f"{tmp_path}/link//"):
        with pytest.raises(StorageError) as refused:
            _cache.io.Folder(path, follow=False)
        assert refused.value.errno in (errno.ELOOP, errno.ENOTDIR)
    _cache.io.Folder("/", follow=False).close()


def test_a_buffered_file_takes_any_length(tmp_path):
    from nf_engine import _cache
    from nf_engine.errors import CacheIncompleteError

    folder = _cache.io.Folder(str(tmp_path))
    data = random.Random(1).randbytes(100_003)
    file = folder.create("manifest.json", direct=False)
    assert not file.direct
    file.write(0, data[:70_001])
    file.write(70_001, data[70_001:])
    file.write(len(data), b"")
    file.close()
    assert (tmp_path / "manifest.json").read_bytes() == data
    file = folder.append("manifest.json")
    file.write(file.stat().size, b"more")
    file.truncate(len(data) + 2)
    file.close()
    file = folder.open("manifest.json", direct=False)
    back = bytearray(file.stat().size)
    file.read(0, back)
    assert back == data + b"mo"
    with pytest.raises(CacheIncompleteError, match="ends at byte 100005"):
        file.read(1, back)
    with pytest.raises(ValueError, match="below 2\\^63"):
        file.read((1 << 63) - 5, back)


# ---- CRC32C ------------------------------------------------------------------------------------------------------

CODES = ["table", "serial", "streams"]


def supported(code: str) -> bool:
    from nf_engine import _cache

    try:
        return _cache.crc32c(b"", code=code) == 0
    except ValueError:
        return False


def test_every_code_agrees_with_google_crc32c():
    google = pytest.importorskip("google_crc32c")
    from nf_engine import _cache

    codes = [code for code in CODES if supported(code)]
    generator = random.Random(3)
    pool = generator.randbytes(1 << 17)
    good = total = 0
    for i in range(30_000):
        longest = 40 if i % 3 == 0 else 2_000 if i % 3 == 1 else 60_000 if i % 30 == 2 else 9_000
        size, at, before = generator.randrange(longest), generator.randrange(1 << 16), generator.randrange(1 << 32)
        data = pool[at : at + size]
        expected = google.extend(before, data)
        good += all(_cache.crc32c(data, before, code=code) == expected for code in (*codes, "auto"))
        total += 1
    print(f"CRC32C, {', '.join(codes)}: {good:,}/{total:,} equal google-crc32c")
    assert good == total


def test_nf_crc_forces_a_code(run, tmp_path):
    for code in CODES:
        seen = run("checksum", tmp_path / "a", NF_CRC=code)
        if supported(code):
            assert (seen["code"], seen["crc"]) == (code, 0xE3069283)
        else:
            assert seen["result"] == "ImportError"
    fastest = [code for code in CODES if supported(code)][-1]
    assert run("checksum", tmp_path / "a")["code"] == fastest


if __name__ == "__main__":
    zygote(sys.argv[1])

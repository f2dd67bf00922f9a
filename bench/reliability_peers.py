"""What bench_reliability compares: one state in torch.save, safetensors, torch.distributed.checkpoint and nf_engine;
and what becomes of it when its bytes change, its writer is killed, or its disk is full.

Every candidate writes over the checkpoint that is there, as a training does that keeps its last one. To be fair:
safetensors promises memory safety, not integrity, and torch.distributed.checkpoint is documented for a new folder each
time. What is made to fail runs in forks of this process, one thread each.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as distributed_load
from torch.distributed.checkpoint.state_dict_saver import save as distributed_save

from nf_engine.checkpoint import parse, to_bytes
from nf_engine.committed import read_run
from nf_engine.manifest import Position
from nf_engine.run_folder import NewFile, RunFolder

ROOT = Path(__file__).parents[1]
State = dict[str, Tensor]
Save = Callable[[State], None]
LAYERS = 4
PATIENCE = 20  # seconds that one load or save may take before it counts as hung
MOST = 4 << 30  # bytes of memory more that a process may take for changed bytes
FAILURES = (Exception, CheckpointException)  # the latter is a BaseException
CALLS = (  # ?: not on every architecture
    "?open,openat,?creat,write,writev,pwrite64,?rename,renameat,renameat2,fsync,fdatasync,?unlink,unlinkat,ftruncate,"
    "?mkdir,mkdirat"
)


def state_of_size(size: int, seed: int) -> State:
    """`size` bytes, a multiple of 1024, of weights and biases of four layers."""
    rng = torch.Generator().manual_seed(seed)
    rows = size // (LAYERS * 64 * 4)
    state = {f"layer{i}.weight": torch.rand(rows, 63, generator=rng) for i in range(LAYERS)}
    return state | {f"layer{i}.bias": torch.rand(rows, generator=rng) for i in range(LAYERS)}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- candidates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A way to keep a state in a folder.

    Attributes:
        opened: what a training opens once; it gives the function that saves.
        load: the saved state; it is told which tensors to expect.
        keeps: which files of the folder hold the state, and nothing older.
    """

    name: str
    opened: Callable[[Path], AbstractContextManager[Save]]
    load: Callable[[State, Path], State]
    keeps: Callable[[str], bool] = lambda name: True

    def save(self, state: State, folder: Path) -> None:
        with self.opened(folder) as save:
            save(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, as that there is one process, and without a traceback in the root log for each changed byte."""
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def torch_opened(folder: Path) -> Iterator[Save]:
    yield lambda state: torch.save(state, folder / "state.pt")


def load_torch(_: State, folder: Path) -> State:
    with quiet():
        return dict(torch.load(folder / "state.pt", weights_only=True))


@contextmanager
def safetensors_opened(folder: Path) -> Iterator[Save]:
    yield lambda state: safetensors.torch.save_file(state, folder / "state.safetensors")


def load_safetensors(_: State, folder: Path) -> State:
    return safetensors.torch.load_file(folder / "state.safetensors")


@contextmanager
def distributed_opened(folder: Path) -> Iterator[Save]:
    def save(state: State) -> None:
        with quiet():
            distributed_save(state, checkpoint_id=folder, no_dist=True)

    yield save


def load_distributed(expected: State, folder: Path) -> State:
    found = {key: torch.full_like(tensor, -1) for key, tensor in expected.items()}
    with quiet():
        distributed_load(found, checkpoint_id=folder, no_dist=True)
    return found


@contextmanager
def ours_opened(folder: Path) -> Iterator[Save]:
    with RunFolder(folder) as run:

        def save(state: State) -> None:
            new = [NewFile("train", to_bytes(state, {"format": "nf-train/1"}))]
            if run.manifest is None:
                run.begin("c" * 64, "d" * 64, {"torch": str(torch.__version__)}, new)
            else:
                run.commit(Position(0, 0, run.manifest.generation), new)

        yield save


def load_ours(_: State, folder: Path) -> State:
    ((name, data),) = read_run(folder, ["train"])[1].items()
    return parse(data, name)


OURS = Candidate("nf_engine", ours_opened, load_ours, lambda name: name == "MANIFEST.json" or name[0] == "c")
CANDIDATES = (
    Candidate("torch.save", torch_opened, load_torch),
    Candidate("safetensors", safetensors_opened, load_safetensors),
    Candidate("torch.distributed.checkpoint", distributed_opened, load_distributed),
    OURS,
)


def look(candidate: Candidate, folder: Path, states: Mapping[str, State]) -> tuple[str, str]:
    """Which of some states a folder holds; "wrong" for none of them, without an error; "error" and its class."""
    try:
        found = candidate.load(next(iter(states.values())), folder)
    except FAILURES as error:
        return "error", type(error).__name__
    return next((name for name, state in states.items() if same(found, state)), "wrong"), ""


@contextmanager
def memory_folder() -> Iterator[Path]:
    """In memory where that is to be had: thousands of cases would each wait for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def in_child(call: Callable[[Connection], None]) -> tuple[list[Any], int]:
    """Runs `call` in a fork; returns all that it has sent, and its exit code (below 0: the signal that ended it)."""
    end, other = get_context("fork").Pipe(duplex=False)
    child = get_context("fork").Process(target=call, args=(other,))
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # on forks of threads; none is needed
        child.start()
    other.close()
    sent = []
    try:
        while True:
            sent.append(end.recv())
    except EOFError:
        child.join()
    assert child.exitcode is not None
    return sent, child.exitcode


# --- changed bytes --------------------------------------------------------------------------------------------------


def byte_changes(candidate: Candidate, state: State, folder: Path, step: int) -> dict[str, Any]:
    """Each step-th byte of the files that hold a state becomes another, one at a time: what the load makes of it."""
    candidate.save(state, folder)
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir()) if candidate.keeps(path.name)}
    places = [(path, offset) for path, data in whole.items() for offset in range(len(data))][::step]
    found: list[tuple[str, str]] = []
    while len(found) < len(places):
        sent, code = in_child(functools.partial(_change_each, candidate, state, folder, places[len(found) :]))
        found += sent
        if code:  # the load of the next one has ended the process
            found.append(("error", signal.Signals(-code).name if code < 0 else f"exit {code}"))
        for path, data in whole.items():
            path.write_bytes(data)
    kinds = Counter(kind for kind, _ in found)
    return {
        "changes": len(found),
        **{kind: kinds[kind] for kind in ("error", "wrong", "no effect")},
        "errors": dict(Counter(name for _, name in found if name).most_common()),
    }


def _change_each(
    candidate: Candidate, state: State, folder: Path, places: Sequence[tuple[Path, int]], end: Connection
) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST, used + MOST))
    for path, offset in places:
        with path.open("r+b", buffering=0) as file:
            (byte,) = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte ^ 0xFF]), offset)
            signal.alarm(PATIENCE)  # ends the process
            found = look(candidate, folder, {"no effect": state})
            signal.alarm(0)
            os.pwrite(file.fileno(), bytes([byte]), offset)
        end.send(found)


# --- kills ----------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A checkpoint of `old` in a folder, over which `new` is saved, again and again."""

    candidate: Candidate
    old: State
    new: State
    place: Path

    def __post_init__(self) -> None:
        self.folder, self._kept = self.place / "now", self.place / "kept"
        self._kept.mkdir(mode=0o700)
        with self.candidate.opened(self._kept) as save:
            save(self.old)
            save(self.old)  # so that the next one has something to delete

    def begin(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._kept, self.folder)
        return self.folder

    def left(self) -> str:
        """old, new, wrong; or lost: neither can be read."""
        kind, _ = look(self.candidate, self.folder, {"old": self.old, "new": self.new})
        return "lost" if kind == "error" else kind


def kills(scene: Scene) -> dict[str, Any]:
    """A save is killed before each of its system calls that change files; strace counts them and kills."""
    log = scene.place / "calls"
    code = None if shutil.which("strace") is None else traced_save(scene, log)
    if code is None:
        return {"kills": None, "why": "strace is not installed, or may not trace"}
    assert code == 0, f"a save of {scene.candidate.name} under strace ended with {code}"
    calls = parse_calls(log.read_text(encoding="utf-8"))
    assert scene.left() == "new", "a save under strace that nothing disturbs"
    found = Counter[str]()
    for name, n in calls:
        code = traced_save(scene, log, f"inject={name}:signal=SIGKILL:when={n}")
        assert code == -signal.SIGKILL, f"{scene.candidate.name} was not killed at {name} {n}: {code}"
        found[scene.left()] += 1
    return {"kills": len(calls), **{k: found[k] for k in ("old", "new", "lost", "wrong")},
            "calls": dict(Counter(name for name, _ in calls))}  # fmt: skip


def parse_calls(log: str) -> list[tuple[str, int]]:
    """The calls of a log of strace -f: name, and which of its kind in its thread, from 1."""
    seen = Counter[tuple[str, str]]()
    calls = []
    for thread, name in re.findall(r"^(\d+) +(\w+)\(", log, re.MULTILINE):
        seen[thread, name] += 1
        calls.append((name, seen[thread, name]))
    return calls


def traced_save(scene: Scene, log: Path, *expressions: str) -> int | None:
    """The exit code of a save in a fork under strace, below 0 for a signal; None: it cannot be traced."""
    folder = scene.begin()
    go, start = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(start)
            if os.read(go, 1):  # nothing is traced before: here strace takes hold
                signal.alarm(PATIENCE)
                scene.candidate.save(scene.new, folder)
                code = 0
        finally:
            os._exit(code)
    os.close(go)
    words = [w for e in (f"trace={CALLS}", *expressions) for w in ("-e", e)]
    with subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-o", str(log), *words], stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr is not None
        attached = "attached" in tracer.stderr.readline()
        if attached:
            os.write(start, b".")
        os.close(start)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if attached else None


COMMIT = """
import sys
from nf_engine.manifest import Position
from nf_engine.run_folder import NewFile, RunFolder
with RunFolder(sys.argv[1]) as run:
    run.commit(Position(0, 0, run.manifest.generation), [NewFile("train", open(sys.argv[2], "rb").read())])
"""


def hook_kills(scene: Scene, modes: Sequence[str]) -> dict[str, Any]:
    """As `kills`, of ours, by its own fault hook: before or after each operation, until a commit is not hit."""
    data = scene.place / "new"
    data.write_bytes(to_bytes(scene.new, {"format": "nf-train/1"}))
    found = Counter[str]()
    for mode in modes:
        n, hit = 0, True
        while hit:
            n += 1
            fault = {"NF_TESTING": "1", "NF_FAULT": f"op=any; n={n}; mode={mode}"}
            command = [sys.executable, "-c", COMMIT, str(scene.begin()), str(data)]
            code = subprocess.run(command, cwd=ROOT, env=os.environ | fault, check=False).returncode
            assert code in (0, -signal.SIGKILL), f"operation {n}, {mode}: exit {code}"
            hit = code != 0
            left = scene.left()
            assert hit or left == "new", f"a commit that nothing disturbs left {left}"
            found[left] += hit
    return {"kills": found.total(), **{k: found[k] for k in ("old", "new", "lost", "wrong")}}


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(size: int) -> Iterator[tuple[Path, bool]]:
    """A tmpfs of `size` bytes; where none may be mounted a plain folder, and False."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, check=False) if shutil.which("mount") else None
        mounted = done is not None and done.returncode == 0
        try:
            yield Path(folder), mounted
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


def full_disk(candidate: Candidate, old: State, new: State, size: int) -> dict[str, Any]:
    """A state that does not fit is saved over one that does: what the error says, and what is left."""
    with small_disk(size) as (disk, mounted):
        folder = disk / "run"
        folder.mkdir(mode=0o700)
        candidate.save(old, folder)

        def attempt(end: Connection) -> None:
            if not mounted:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                candidate.save(new, folder)
                end.send(("no error", ""))
            except FAILURES as error:
                end.send((type(error).__name__, str(error).replace(str(folder), "DIR")))

        ((name, text),), _ = in_child(attempt)
        left = look(candidate, folder, {"old": old, "new": new})[0]
    why = {os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)}
    return {
        "by": "tmpfs" if mounted else "RLIMIT_FSIZE",
        "error": name,
        "text": text.strip().rpartition("\n")[2],  # of a traceback its last line
        "says why": any(reason in text for reason in why),
        "left": "lost" if left == "error" else left,
    }

"""The commit against faults: each operation of a run fails, is cut short or is the last, and the run goes on.

The run and its contents: commit_scenes.py. Whatever happens, the folder holds the last commit that was reported or the
next one, whole; the same call without a fault then ends as an undisturbed run does, and leaves no stray file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commit_scenes as scenes
import pytest

from nf_engine.run_folder import RunFolder

Figure = Callable[[str, str, int, int], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
END = len(scenes.STEPS)

# What the manual pages of Linux give for each call, less EINTR and EAGAIN, which are asked again.
MANUAL = {
    "open": "EACCES EDQUOT EEXIST EINVAL EISDIR ELOOP EMFILE ENAMETOOLONG ENFILE ENODEV ENOENT ENOMEM ENOSPC ENOTDIR "
    "ENXIO EOVERFLOW EPERM EROFS ETXTBSY EBUSY",
    "pread": "EBADF EFAULT EINVAL EIO EISDIR ENXIO EOVERFLOW ESPIPE",
    "pwrite": "EBADF EDESTADDRREQ EDQUOT EFAULT EFBIG EINVAL EIO ENOSPC ENXIO EOVERFLOW EPERM EPIPE ESPIPE",
    "fsync": "EBADF EIO ENOSPC EROFS EINVAL EDQUOT",
    "fsyncdir": "EBADF EIO ENOSPC EROFS EINVAL EDQUOT",
    "close": "EBADF EIO ENOSPC EDQUOT",
    "rename": "EACCES EBUSY EDQUOT EFAULT EINVAL EISDIR ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOTDIR "
    "ENOTEMPTY EEXIST EPERM EROFS EXDEV",
    "unlink": "EACCES EBUSY EFAULT EIO EISDIR ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EPERM EROFS",
    "fallocate": "EBADF EFBIG EINVAL EIO ENODEV ENOSPC ENOSYS EOPNOTSUPP EPERM ESPIPE ETXTBSY",
    "ftruncate": "EACCES EBADF EFBIG EINVAL EIO EISDIR EPERM EROFS ETXTBSY",
}


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    yield from scenes.programs()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of cases would each wait for the disk."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def sample(whole: int, part: int) -> str:
    return "" if part == 1 else f", 1 in {part}"


def in_parts(part: int) -> pytest.MarkDecorator:
    """Each part-th case, and all of them in the long run."""
    return pytest.mark.parametrize("part", [part, pytest.param(1, marks=pytest.mark.slow)])


@dataclass(frozen=True)
class Operation:
    """n: which of all; of_kind: which of its kind; both from 1."""

    op: str
    name: str
    flags: int
    n: int
    of_kind: int

    @property
    def creates(self) -> bool:
        return self.op == "open" and bool(self.flags & os.O_CREAT)


def operations(program: Any, folder: Path, start: Path | None = None) -> list[Operation]:
    """What a run asks of the kernel, from the beginning or from where `start` has come to."""
    if start is not None:
        shutil.copytree(start, folder)
    log = folder.with_name(f"{folder.name}.log")
    assert program(folder, log=str(log)).result == "done"
    made: list[Operation] = []
    for n, text in enumerate(log.read_text().splitlines(), 1):
        op, name, flags, *_ = text.split()
        made.append(Operation(op, name, int(flags), n, 1 + sum(other.op == op for other in made)))
    shutil.rmtree(folder)
    log.unlink()
    return made


def check_whole(folder: Path, committed: int) -> int:
    """The folder holds the commit that was reported, or the next, and a way back; returns its generation."""
    if not (folder / "MANIFEST.json").exists():
        assert committed == 0, f"{committed} was reported, and there is no manifest"
        return 0
    manifest, contents = scenes.found(folder)
    generation = int(manifest["generation"])
    assert committed <= generation <= committed + 1, f"{committed} was reported, {generation} is there"
    assert contents == scenes.expected(generation)
    if (folder / "MANIFEST.prev.json").exists():
        before, contents = scenes.found(folder, "MANIFEST.prev.json")
        assert generation - 1 <= before["generation"] <= generation
        assert contents == scenes.without_caches(scenes.expected(before["generation"]))
    return generation


def check_end(folder: Path) -> None:
    """The folder is what an undisturbed run leaves, and holds no stray file."""
    manifest, contents = scenes.found(folder)
    assert manifest["done"]
    assert manifest["position"] == {"block": 3, "epoch": 0, "step": 0}
    assert contents == scenes.expected(END)
    assert set(os.listdir(folder)) == scenes.listed(folder)  # noqa: PTH208


class Sweep:
    """Counts cases; the first few that went wrong are shown at the end."""

    def __init__(self, program: Any, memory: Path, start: Path | None = None) -> None:
        self.program, self.folder, self.start = program, memory / "run", start
        begun = start is not None and (start / "MANIFEST.json").exists()
        self.committed = scenes.found(start)[0]["generation"] if begun else 0
        self.good = self.total = 0
        self.wrong: list[str] = []

    def case(
        self,
        fault: str,
        results: set[str] | None,
        *more: Any,
        scene: str = "play",
        clean: bool = True,
        rebuilt: bool = False,
    ) -> Any:
        """One fault, what it left, and the run without it; `results` None: done or any error of ours.

        rebuilt: a cache may be made again, by a commit more, so that generations say less.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, self.folder)
        ended = self.program(self.folder, fault, *more, scene=scene)
        self.total += 1
        try:
            self._check(ended, results, clean, rebuilt)
        except (AssertionError, OSError, ValueError) as error:
            self.wrong.append(f"{scene} {fault} {more}: {ended}\n    {type(error).__name__}: {str(error)[:300]}")
        else:
            self.good += 1
        return ended

    def _check(self, ended: Any, results: set[str] | None, clean: bool, rebuilt: bool) -> None:
        if results is None:
            assert ended.result == "done" or ended.result.endswith("Error"), "neither done nor an error of ours"
        else:
            assert ended.result in results, f"expected one of {results}"
        if ended.result != "SIGKILL":
            assert ended.facts.get("leaked", 0) == 0
        if ended.result == "DiskFullError":
            facts = ended.facts
            assert facts["exit_code"] == 75
            assert facts["path"] in facts["text"]
            assert facts["path"].startswith(str(self.folder.parent))
            assert facts["needed"] >= 0
            assert facts["free"] >= 0
        if self.folder.exists():
            if not rebuilt:
                check_whole(self.folder, max(ended.committed, self.committed))
            if clean and ended.result != "SIGKILL":
                before = set(os.listdir(self.start)) if self.start else set()  # noqa: PTH208
                assert not [name for name in {*os.listdir(self.folder)} - before if name.endswith(".tmp")]  # noqa: PTH208
        else:
            assert ended.committed == 0
        if ended.result == "done":
            assert scenes.found(self.folder)[0]["done"], "it returned, and the work is not there"
        scenes.play(str(self.folder), lambda _: None)
        check_end(self.folder)

    def close(self, figure: Figure, promise: str, what: str) -> None:
        figure(promise, what, self.good, self.total)
        assert not self.wrong, f"{len(self.wrong)} of {self.total}:\n" + "\n".join(self.wrong[:5])
        assert self.total


@pytest.fixture(scope="module")
def fresh(program: Any) -> list[Operation]:
    with tempfile.TemporaryDirectory() as folder:
        return operations(program, Path(folder) / "run")


def test_an_undisturbed_run_is_what_the_tests_expect(program, memory):
    ended = program(memory / "run")
    assert (ended.result, ended.committed, ended.facts["leaked"], ended.told) == ("done", END, 0, "")
    check_end(memory / "run")
    roles = {key[0] for key in scenes.expected(END)}
    assert roles == {"config", "plan", "profile", "initial", "block", "exits", "model", "metrics"}
    assert len(scenes.expected(END)["metrics", 0].splitlines()) == 5


# ---- P2


@pytest.mark.parametrize(
    ("mode", "part"),
    [("kill", 1), ("kill_after", 9), pytest.param("kill_after", 1, marks=pytest.mark.slow)],
)
def test_a_run_killed_at_any_operation_ends_as_if_never_killed(program, memory, fresh, figure, mode, part):
    sweep = Sweep(program, memory)
    for n in range(1, len(fresh) + 1, part):
        sweep.case(f"op=any; n={n}; mode={mode}", {"SIGKILL"})
    assert program(memory / "beyond", f"op=any; n={len(fresh) + 1}; mode={mode}").result == "done"
    sweep.close(figure, "P2", f"{mode} at an operation of a run{sample(1, part)}, then goes on")


@in_parts(5)
def test_a_run_killed_inside_any_write_ends_as_if_never_killed(program, memory, fresh, figure, part):
    sweep = Sweep(program, memory)
    writes = sum(o.op == "pwrite" for o in fresh)
    for first in (0, 1, 100, 4096):
        for n in range(1 + first % part, writes + 1, part):
            sweep.case(f"op=pwrite; n={n}; mode=torn:{first}", {"SIGKILL"})
    sweep.close(figure, "P2", f"torn at a write of a run{sample(1, part)}, then goes on")


# ---- P4


def test_a_failed_fsync_is_never_asked_again(program, memory, fresh, figure):
    """Once, a file is written anew; for ever, or of the folder, it is an error and the last commit is there."""
    sweep = Sweep(program, memory)
    for op in ("fsync", "fsyncdir"):
        for o in (o for o in fresh if o.op == op):
            once = {"done"} if op == "fsync" else {"StorageError"}
            ended = sweep.case(f"op={op}; n={o.of_kind}; mode=errno:{errno.EIO}", once)
            assert op == "fsyncdir" or "is written again, once" in ended.told
            sweep.case(f"op={op}; n={o.of_kind}; sticky=1; mode=errno:{errno.EIO}", {"StorageError"})
    sweep.close(figure, "P4", "fsync fails with EIO, once and for ever")


# ---- P5


@in_parts(11)
def test_a_full_disk_is_a_named_error_and_the_run_goes_on_later(program, memory, fresh, figure, part):
    sweep = Sweep(program, memory)
    cases = [
        (o, code, sticky)
        for o in fresh
        if o.creates or o.op in ("pwrite", "fallocate", "fsync", "fsyncdir", "close", "rename")
        for code in FULL
        for sticky in (0, 1)
        if code != errno.EFBIG or o.op in ("pwrite", "fallocate")
    ]
    for o, code, sticky in cases[::part]:
        # log.jsonl may miss lines; a ballast that is there is given up for a commit, which then ends well.
        quiet = not sticky or o.op == "rename" or o.name == "log.jsonl"
        results = {"DiskFullError", "done"} if quiet or o.op in ("close", "fallocate") else {"DiskFullError"}
        # Where the folder cannot be listed, the ballast is not found.
        clean = not (o.op == "open" and sticky)
        sweep.case(f"op={o.op}; n={o.of_kind}; sticky={sticky}; mode=errno:{code}", results, clean=clean)
    sweep.close(figure, "P5", f"no room at a write, a file, a name, once and for ever{sample(1, part)}")


def test_a_ballast_makes_room_for_the_commit_that_finds_none(program, memory, fresh):
    """Once ENOSPC at a write of a commit in training: it ends well, for its room was kept."""
    write = next(o for o in fresh if o.op == "pwrite" and o.name == "c0000005.safetensors.tmp")
    ended = program(memory / "run", f"op=pwrite; n={write.of_kind}; mode=errno:{errno.ENOSPC}")
    assert (ended.result, ended.committed) == ("done", END)
    assert '"event": "ballast_dropped"' in (memory / "run" / "log.jsonl").read_text()
    check_end(memory / "run")


# ---- P6


@in_parts(9)
def test_short_and_interrupted_calls_are_invisible(program, memory, fresh, figure, part):
    half = memory / "half"
    assert program(half, "op=pwrite; path=b001*; n=1; mode=kill").result == "SIGKILL"
    total = good = 0
    for start in (None, half):
        sweep = Sweep(program, memory, start)
        for op in ("pwrite", "pread"):
            if part == 1 or start:
                sweep.case(f"op={op}; sticky=1; mode=short:1", {"done"})
        for o in operations(program, memory / "log", start)[::part]:
            sweep.case(f"op=any; n={o.n}; mode=errno:{errno.EINTR}", {"done"})
            if o.op in ("pwrite", "pread"):
                sweep.case(f"op={o.op}; n={o.of_kind}; mode=short:1", {"done"})
        assert not sweep.wrong, sweep.wrong[:5]
        total, good = total + sweep.total, good + sweep.good
    figure("P6", f"interrupted and short transfers of a run{sample(1, part)}", good, total)


# ---- P7


def halves(program: Any, memory: Path) -> dict[str, Path]:
    """Folders that a kill left in the middle of something."""
    moments = {
        "begin": "op=rename; path=plan*; mode=kill_after",
        "renames": "op=rename; path=b000*; mode=kill_after",
        "manifest": "op=rename; path=MANIFEST.json.tmp; n=5; mode=kill_after",
        "cache": "op=pwrite; path=x002*; n=2; mode=torn:100",
        "clean": "op=unlink; path=x001*; mode=kill",
        "end": "op=fsyncdir; n=18; mode=kill",
    }
    for name, fault in moments.items():
        assert program(memory / name, fault).result == "SIGKILL"
    return {name: memory / name for name in moments}


@in_parts(17)
def test_a_kill_while_a_killed_run_goes_on(program, memory, figure, part):
    total = good = 0
    for name, start in halves(program, memory).items():
        sweep = Sweep(program, memory, start)
        many = len(operations(program, memory / "log", start))
        for n in range(1, many + 1, part):
            sweep.case(f"op=any; n={n}; mode=kill", {"SIGKILL"})
        assert not sweep.wrong, (name, sweep.wrong[:5])
        total, good = total + sweep.total, good + sweep.good
    figure("P7", f"kill, then kill at an operation of going on{sample(1, part)}", good, total)


@in_parts(4)
def test_no_room_while_a_failed_fsync_is_handled(program, memory, fresh, figure, part):
    sweep = Sweep(program, memory)
    syncs = sum(o.op in ("fsync", "fsyncdir") for o in fresh)
    for n in range(2, syncs + 1, part):  # the first is of the folder above, before any file of the run
        # The rewrite finds no room; after a failure of the folder nothing more is written.
        sweep.case("", {"DiskFullError", "StorageError"}, n, scene="two_faults")
    sweep.close(figure, "P7", f"fsync fails with EIO, then there is no room{sample(1, part)}")


# ---- P8


@in_parts(23)
def test_a_call_that_returns_has_written(program, memory, figure, part):
    """Each operation of a run that goes on, each error of its manual page: an error of ours, or the work is there."""
    half = memory / "half"
    assert program(half, "op=pwrite; path=x002*; n=1; mode=kill").result == "SIGKILL"
    total = good = 0
    for start in (None, half):
        sweep = Sweep(program, memory, start)
        cases = [(o, name) for o in operations(program, memory / "log", start) for name in MANUAL[o.op].split()]
        for o, name in cases[::part]:
            # A file that cannot be deleted, or a ballast that cannot be listed, stays until the next start.
            clean = o.op != "unlink" and o.name != "."
            rebuilt = start is not None and o.op in ("open", "pread", "close") and o.name.endswith(".nfc")
            fault = f"op={o.op}; n={o.of_kind}; mode=errno:{getattr(errno, name)}"
            sweep.case(fault, None, clean=clean, rebuilt=rebuilt)
        assert not sweep.wrong, sweep.wrong[:5]
        total, good = total + sweep.total, good + sweep.good
    figure("P8", f"each errno of an operation's manual page{sample(1, part)}", good, total)
    assert total > 100


# ---- In one process: what a caller may do after an error


@pytest.mark.parametrize(("n", "code"), [(6, errno.ENOSPC), (6, errno.EIO)], ids=["full", "broken"])
def test_after_a_failure_past_the_rename_nothing_more_is_written(program, memory, n, code):
    """The manifest may be on the disk or not: neither a second attempt nor a clean-up may touch what it lists."""
    # The folder's fsyncs: 1 above it, 2 for LOCK, 3 and 4 of the first commit, 5 and 6 of the second, with a ballast.
    ended = program(memory / "run", f"op=fsyncdir; n={n}; sticky=1; mode=errno:{code}")
    assert ended.result == ("StorageError" if code == errno.EIO else "DiskFullError")
    assert check_whole(memory / "run", ended.committed) == 2
    with RunFolder(memory / "run") as folder:
        assert folder.manifest is not None
        assert folder.manifest.generation == 2


# ---- A second opinion, from outside


def fsyncs_between_commits(program: Any, folder: Path) -> Sequence[list[str]]:
    """Kinds of the descriptors that strace sees synced before each report of a commit."""
    strace = shutil.which("strace")
    trace = folder.with_name("trace")
    command = [strace or "", "-qq", "-y", "-o", str(trace), "-e", "trace=fsync,fdatasync,write,unlinkat,renameat"]
    play = [sys.executable, scenes.__file__, "play", str(folder)]
    seen = subprocess.run([*command, *play], env={**os.environ, "PYTHONPATH": program.path}, capture_output=True)
    if strace is None or seen.returncode:
        pytest.skip(f"strace cannot trace here, 0/{END} commits looked at: {seen.stderr.decode()[:200]}")
    commits: list[list[str]] = [[]]
    for text in trace.read_text().splitlines():
        if text.startswith("write(1<") and '"committed' in text:
            commits.append([])
        elif match := re.match(r"(?:fsync|fdatasync)\(\d+<(.*)>\) += 0", text):
            path = Path(match[1])
            commits[-1].append("folder" if path == folder else path.name)
        elif text.startswith("renameat"):
            commits[-1].append("rename")
        elif text.startswith("unlinkat"):
            commits[-1].append("unlink")
    return commits


def test_strace_sees_four_barriers_in_each_commit(program, tmp_path, figure):
    if not shutil.which("strace"):
        pytest.skip(f"no strace, 0/{END} commits looked at")
    *commits, rest = fsyncs_between_commits(program, tmp_path / "run")
    assert len(commits) == END
    commits[0].remove(tmp_path.name)  # a new folder's name, in the one above it
    commits[0].remove("folder")  # LOCK's
    assert not [what for what in rest if what != "unlink"]
    for made, step in zip(commits, scenes.STEPS, strict=True):
        publish = [what for what in made if what != "unlink"]
        publish = publish[publish.count("rename") and 2 * bool(step.caches) :]  # those of the caches
        files = len(step.new) + (step is not scenes.STEPS[0])  # and the copy of the manifest before
        first, second = publish[: files + 1], publish[files + 1 :]
        assert "rename" not in first
        assert "folder" not in first
        assert first.count("metrics.jsonl") == 1
        assert second == ["rename"] * files + ["folder", "MANIFEST.json.tmp", "rename", "folder"]
        if "unlink" in made:
            # Deleting is the last thing, or it is the ballast's before all others.
            last = len(made) - 1 - made[::-1].index("folder")
            assert all(what == "unlink" for what in made[last + 1 :])
    figure("P3", "commits in which strace sees the four barriers in order", len(commits), END)


# ---- The checks notice what is wrong


def test_a_commit_without_a_clean_up_is_noticed(memory, monkeypatch):
    monkeypatch.setattr(RunFolder, "_clean", lambda *_: None)
    scenes.play(str(memory / "run"), lambda _: None)
    with pytest.raises(AssertionError):
        check_end(memory / "run")


def test_a_changed_bit_is_noticed(memory):
    scenes.play(str(memory / "run"), lambda _: None)
    block = next((memory / "run").glob("b001*"))
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(data)
    with pytest.raises(AssertionError, match="is not what"):
        check_whole(memory / "run", END)

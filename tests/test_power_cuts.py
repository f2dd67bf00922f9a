"""The commit on real file systems: power cuts by image copy, a disk that loses writes, and one that is full.

A loop ext4 whose image is copied at each operation of a run: what the image holds is what a power cut leaves, of the
block layer; a disk that reorders its own cache is not modelled. Needs root and loop devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commit_scenes as scenes
import pytest

from nf_engine.errors import NFError

pytestmark = pytest.mark.slow
KIB, MIB = 1 << 10, 1 << 20

END = len(scenes.STEPS)


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    yield from scenes.programs()


def call(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


@contextmanager
def mounted(target: Path, *how: str | Path) -> Iterator[Path]:
    """A file system on `target`, which is gone afterwards in any case."""
    target.mkdir(exist_ok=True)
    call("mount", *how, target)
    try:
        yield target
    finally:
        if subprocess.run(["umount", str(target)], capture_output=True).returncode:
            call("umount", "-l", target)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, for images and mounts; a skip where nothing can be mounted."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("0 states looked at: no memory file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        try:
            with mounted(folder / "try", "-t", "tmpfs", "-o", "size=1m", "none"):
                image(folder / "try" / "image", MIB)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"0 states looked at: no file system can be made and mounted here: {error}")
        yield folder


def image(path: Path, size: int) -> Path:
    """An ext4 that takes room only where it is written."""
    with path.open("wb") as file:
        file.truncate(size)
    call("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
    return path


def begin(program: Any, folder: Path, fault: str) -> int:
    """A run up to a fault, where there is one; returns the generation it has come to."""
    if not fault:
        return 0
    assert program(folder, fault).result == "SIGKILL"
    return int(scenes.found(folder)[0]["generation"])


def recover(folder: Path, least: int, most: int) -> bool:
    """A start finds a commit from `least` to `most`, and the run goes on to its end; whether a cache was lost."""
    generation, rebuild = scenes.opened(folder) if folder.exists() else (0, False)
    assert least <= generation <= most, f"{least} was reported, {generation} is there"
    scenes.play(str(folder), lambda _: None)
    manifest, contents = scenes.found(folder)
    assert manifest["done"]
    assert contents == scenes.expected(END)
    assert {*os.listdir(folder)} - {"log.jsonl"} <= scenes.listed(folder)  # noqa: PTH208
    return rebuild


BEGUN = {"run": "", "resumed": "op=pwrite; path=x001*; n=1; mode=kill", "late": "op=unlink; path=x001*; mode=kill"}


@pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)
def test_a_power_cut_at_any_operation_leaves_the_old_commit_or_the_new_one(program, memory, figure, begun):
    """The process is killed at its n-th operation, and what the image holds then is mounted."""
    good = total = rebuilds = 0
    wrong = []
    with mounted(memory / "live", "-o", "loop,commit=300", image(memory / "live.img", 8 * MIB)) as live:
        for n in range(1, 1000):
            folder = live / "run"
            before = begin(program, folder, begun)
            call("sync", "-f", live)
            ended = program(folder, f"op=any; n={n}; mode=kill")
            if ended.result == "done":
                break
            assert ended.result == "SIGKILL"
            call("cp", "--sparse=always", memory / "live.img", memory / "cut.img")
            least = max(before, ended.committed)
            with mounted(memory / "cut", "-o", "loop", memory / "cut.img") as cut:
                total += 1
                try:
                    rebuilds += recover(cut / "run", least, least + 1)
                    good += 1
                except (NFError, AssertionError, OSError, ValueError) as error:
                    wrong.append(f"cut before operation {n}: {type(error).__name__}: {str(error)[:300]}")
            shutil.rmtree(folder, ignore_errors=True)
    print(f"power cuts: {good}/{total}, {rebuilds} with caches to build again")
    figure("P3", "power cuts on ext4, by image copy at each operation", good, total)
    assert not wrong, wrong[:5]
    assert total > 50
    assert rebuilds > 5 or begun == BEGUN["late"]  # whose caches are on the disk from before


def fill(path: Path, leaving: int) -> None:
    """Takes all room of a file system but so many bytes."""
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
        file.truncate(status.f_bavail * status.f_frsize - leaving)


def test_writes_that_the_disk_loses_are_errors_and_the_last_checkpoint_loads(program, memory, figure):
    """An ext4 of 256 MiB on a disk of 24 MiB that fills up underneath: fsync fails, the journal gives up."""
    good = total = 0
    seen: dict[str, int] = {}
    begun = "op=rename; path=x001*; mode=kill"
    with mounted(memory / "thin", "-t", "tmpfs", "-o", "size=24m", "none") as thin:
        for leaving in range(0, 160 * KIB, 8 * KIB):
            disk = image(thin / "disk.img", 256 * MIB)
            with mounted(memory / "live", "-o", "loop", disk) as live:
                before = begin(program, live / "run", begun)
                call("sync", "-f", live)
                fill(thin / "filler", leaving)
                ended = program(live / "run")
                seen[ended.result] = seen.get(ended.result, 0) + 1
                assert ended.result in ("done", "StorageError", "DiskFullError"), ended
                (thin / "filler").unlink()
            with mounted(memory / "live", "-o", "loop", disk) as live:
                total += 1
                least = max(before, ended.committed)
                recover(live / "run", least, least + 1)
                good += 1
            disk.unlink()
    print(f"thin image: {seen}")
    figure("P4", "sizes of a thin image that fills up under a run, then goes on", good, total)
    assert good == total
    assert seen.get("StorageError", 0) + seen.get("DiskFullError", 0) > 5


def test_a_full_disk_of_every_size_is_a_named_error_and_the_run_goes_on(program, memory, figure):
    good = total = 0
    seen: dict[str, int] = {}
    with mounted(memory / "small", "-t", "tmpfs", "-o", "size=4m", "none") as small:
        for begun in ("", "op=rename; path=x001*; mode=kill"):
            for leaving in range(0, 100 * KIB, 4 * KIB):
                folder = small / "run"
                before = begin(program, folder, begun)
                fill(small / "filler", leaving)
                ended = program(folder)
                assert ended.result in ("done", "DiskFullError"), ended
                seen[ended.result] = seen.get(ended.result, 0) + 1
                if ended.result == "DiskFullError":
                    assert ended.facts["exit_code"] == 75
                    assert ended.facts["needed"] > 0 or "fsync" in ended.facts["text"] or "open" in ended.facts["text"]
                    assert 0 <= ended.facts["free"] <= leaving + 64 * KIB
                    assert str(folder) in ended.facts["path"]
                    assert str(folder) in ended.facts["text"]
                (small / "filler").unlink()
                total += 1
                recover(folder, max(before, ended.committed), max(before, ended.committed) + 1)
                good += 1
                shutil.rmtree(folder)
    print(f"full disk: {seen}")
    figure("P5", "disks of 4 MiB with 0, 4, 8 .. KiB free under a run, then with room", good, total)
    assert good == total
    assert seen["DiskFullError"] > 20

"""The cache under failing, lying, full and slow disks and under kills: a named error or the right bytes, nothing left.

Each case is a child of `cache_scripts.py`, because faults are read when the module is loaded.
"""

from __future__ import annotations

import errno
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nf_engine.errors import StorageError
from nf_engine.storage import ActivationCache, CacheRecord

spec = importlib.util.spec_from_file_location("cache_scripts", Path(__file__).with_name("cache_scripts.py"))
assert spec is not None
assert spec.loader is not None
scripts = importlib.util.module_from_spec(spec)
sys.modules["cache_scripts"] = scripts
spec.loader.exec_module(scripts)
NAME = scripts.NAME
PAGE = 4096

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    with scripts.program() as program:
        yield program


@pytest.fixture
def memory() -> Iterator[Path]:
    with scripts.folder_in_memory() as folder:
        yield folder


def check_named(seen: dict[str, Any], code: int, folder: Path) -> None:
    """The error names the file, and the numbers that its kind has."""
    assert seen["result"] == ("DiskFullError" if code in FULL else "StorageError"), seen
    assert seen["path"].startswith(str(folder)), seen
    assert seen["text"].startswith(seen["path"]), seen
    if code in FULL:
        assert seen["free"] >= 0
        assert f"{seen['needed']} bytes needed, {seen['free']} free; make room" in seen["text"], seen
    else:
        assert seen["errno"] == code, seen
        assert f"{seen['op']}" in seen["text"]
        assert f"(errno {code})" in seen["text"]


# ---- Injected faults ---------------------------------------------------------------------------------------------


def expected_outcomes(op: str, mode: str, sticky: bool) -> set[str]:
    """What may come of a fault at one operation, from the description of the modes alone."""
    kind, _, value = mode.partition(":")
    if kind == "delay":
        return {"done"}
    if kind == "errno":
        error = {"DiskFullError" if int(value) in FULL else "StorageError"}
        return error | {"done"} if op == "close" else error  # nothing is lost with a folder's descriptor
    if kind == "short":
        return {"done"} if value != "0" else {"StorageError" if op == "pwrite" else "CacheIncompleteError"}
    if kind == "flip":
        return {"CacheCorruptError"} if sticky else {"CacheCorruptError", "done"}
    assert kind == "lie_write"
    return {"CacheCorruptError", "CacheIncompleteError"}


MODES = {
    "pread": ["short:0", "short:1", "short:4096", "flip:0", "flip:32767"],
    "pwrite": ["short:0", "short:1", "short:4096", "lie_write"],
}


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_fault_at_every_operation_is_a_named_error_or_no_harm(run, memory, step):
    cases = []
    for scene, some in (("story", None), ("aborted", ["unlink", "close"])):
        counts = run.counts(scene, memory / "plain")
        shutil.rmtree(memory / "plain")
        for op, count in counts.items():
            for mode in ["errno:5", "errno:28", "delay:1", *MODES.get(op, [])]:
                if some is None or op in some:
                    cases += [(scene, op, n, mode, sticky) for n in range(1, count + 1) for sticky in (False, True)]
    cases = cases[::step]
    good, outcomes = 0, Counter[str]()
    for i, (scene, op, n, mode, sticky) in enumerate(cases):
        folder = memory / str(i)
        seen = run(scene, folder, fault=f"op={op}; n={n}; sticky={int(sticky)}; mode={mode}")
        assert seen["result"] in expected_outcomes(op, mode, sticky), (scene, op, n, mode, sticky, seen)
        outcomes[seen["result"]] += 1
        if mode.startswith("errno") and seen["result"] != "done":
            code = int(mode.partition(":")[2])
            check_named(seen, code, memory)
            assert code in FULL or seen["op"] == op
            assert code in FULL or op not in ("pread", "pwrite") or seen["offset"] % PAGE == 0
        if mode.startswith("flip") and seen["result"] == "done":
            assert seen["rereads"] == 1, seen
        assert seen["leaked"] == [0, 0], seen
        assert seen["status"] == 0
        left = [name for name in seen["left"] if name.endswith(".tmp")]
        assert left == ([f"{NAME}.tmp"] if op == "unlink" and mode.startswith("errno") else []), (op, n, mode, seen)
        shutil.rmtree(folder)
        good += 1
    print(f"faults, raised or right, nothing left: {good}/{len(cases)} {dict(outcomes)}")


def test_the_first_error_wins_over_a_clean_up_that_fails_too(run, memory):
    # From the third chunk on nothing works: the .tmp cannot be removed, and a warning says so.
    seen = run("write", memory / "a", fault="op=any; path=*.tmp; n=5; sticky=1; mode=errno:5")
    assert (seen["result"], seen["op"], seen["errno"]) == ("StorageError", "pwrite", errno.EIO)
    assert any("not cleaned up" in note and "unlink" in note for note in seen["log"])


# ---- Full disks and failing ones, without the hook ---------------------------------------------------------------


def check_full(seen: dict[str, Any]) -> int:
    """Each cache fitted, or was refused with the numbers; how many."""
    for case in seen["results"]:
        assert case["left"] == [], case
        if case["result"] != "done":
            check_named(case, errno.ENOSPC, Path("/"))
            assert case["needed"] == case["file"]
    return len(seen["results"])


def test_a_small_tmpfs_is_full_where_it_is_full(run, tmp_path):
    tmpfs = ["-t", "tmpfs", "-o", "size=4m", "none"]
    spare = 4 * 2**20 - scripts.large(20).file_bytes
    cases = [[1, 0], [58, 0], [59, 0], [60, 0], [400, 0], [20, spare], [20, spare + PAGE], [1, 4 * 2**20 - PAGE]]
    seen = run("on_a_small_disk", tmp_path / "disk", mount=tmpfs, cases=cases)
    if seen["result"] == "skip":
        pytest.skip(f"no file system may be mounted here: {seen['text']}")
    assert seen["result"] == "done", seen
    n = check_full(seen)
    for case in seen["results"]:
        assert (case["result"] == "done") == (case["file"] <= case["space"]), case
    assert {case["result"] for case in seen["results"]} == {"done", "DiskFullError"}
    print(f"ENOSPC on a tmpfs of 4 MiB, named with path and bytes: {n}/{len(cases)}")


@pytest.mark.slow
def test_a_small_ext4_is_full_where_it_is_full(run, tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(24 * 2**20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    cases = [[samples, taken] for samples in (10, 100, 200, 300, 1000) for taken in (0, 4 * 2**20)]
    seen = run("on_a_small_disk", tmp_path / "disk", mount=["-o", "loop", str(image)], cases=cases)
    if seen["result"] == "skip":
        pytest.skip(f"no file system may be mounted here: {seen['text']}")
    assert seen["result"] == "done", seen
    n = check_full(seen)
    assert {case["result"] for case in seen["results"]} == {"done", "DiskFullError"}
    print(f"ENOSPC on ext4, named with path and bytes: {n}/{len(cases)}")


def test_a_disk_that_fills_up_under_way_is_found_by_the_write(run, tmp_path):
    mount = ["-t", "tmpfs", "-o", "size=4m", "none"]
    # Where no space can be reserved, as on some network file systems.
    seen = run("filled_under_way", tmp_path / "disk", mount=mount, fault="op=fallocate; mode=errno:95")
    if seen["result"] == "skip":
        pytest.skip(f"no file system may be mounted here: {seen['text']}")
    check_named(seen, errno.ENOSPC, tmp_path)
    assert (seen["left"], seen["free"]) == (["other"], 0)
    assert "pwrite at byte" in seen["text"]


@pytest.mark.parametrize("fault", ["", "op=fallocate; mode=errno:95"], ids=["reserved", "not reserved"])
def test_a_limit_on_the_size_of_files_is_a_full_disk(run, memory, fault):
    size = scripts.small().file_bytes
    limits = list(range(0, size + 2 * PAGE, PAGE))
    seen = run("with_size_limits", memory / "a", limits=limits, fault=fault)
    assert seen["result"] == "done", seen
    for limit, case in zip(limits, seen["results"], strict=True):
        if limit >= size:
            assert (case["result"], case["left"]) == ("done", [NAME])
        else:
            check_named(case, errno.EFBIG, memory)
            assert case["needed"] == size
            assert "left" not in case
    print(f"EFBIG under RLIMIT_FSIZE, named with path and bytes: {len(limits)}/{len(limits)}")


INJECTED = [  # the first pread and pwrite of a process belong to the probe of the folder
    *(f"pwrite64:error=EIO:when={n}" for n in (2, 3, 4)),
    *(f"pread64:error=EIO:when={n}" for n in (2, 3, 4)),
    *("fallocate:error=EIO", "/^rename:error=EIO", "fsync:error=EIO:when=1", "fsync:error=EIO:when=2"),
    *("pwrite64:error=ENOSPC:when=3", "fallocate:error=EDQUOT"),
]


def test_what_strace_injects_is_named_too(run, memory):
    for i, inject in enumerate(INJECTED):
        seen = run("under_strace", memory / str(i), inject=inject, durable=True)
        if seen["result"] == "skip":
            pytest.skip(f"strace cannot be used here: {seen['text']}")
        call, error = inject.split(":")[:2]
        check_named(seen, getattr(errno, error.removeprefix("error=")), memory)
        if "op" in seen:
            names = {
                "pwrite64": ["pwrite"],
                "pread64": ["pread"],
                "/^rename": ["rename"],
                "fsync": ["fsync", "fsyncdir"],
            }
            assert seen["op"] in names.get(call, [call]), (inject, seen)
        assert not any(name.endswith(".tmp") for name in seen["left"])
    print(f"errors by strace, named with path and bytes: {len(INJECTED)}/{len(INJECTED)}")


# ---- Kills -------------------------------------------------------------------------------------------------------


def state_after_kill(folder: Path, record: CacheRecord) -> str:
    """ "complete" where the file is there, which is then read in full, else "none"; a .tmp is refused by create."""
    x = scripts.samples_of(record.geometry)
    if (folder / f"{record.name}.tmp").exists():
        with pytest.raises(StorageError, match=r"File exists.*left by a run that was killed.*delete it") as caught:
            ActivationCache.create(folder, record.name, record.geometry)
        assert caught.value.path == str(folder / f"{record.name}.tmp")
    if not (folder / record.name).exists():
        return "none"
    with ActivationCache.open(folder, record) as cache:
        assert scripts.check(cache, x, window=1 << 22) == record.geometry.samples
    return "complete"


def test_a_kill_at_any_operation_leaves_the_whole_file_or_none(run, memory):
    record = CacheRecord.from_json(run("write", memory / "plain")["record"])
    total = sum(run.counts("write", memory / "counted").values())
    before_rename = 1 + sum(run.counts("write", memory / "tmp", path="*.tmp").values())  # and the folder's open
    states = []
    for mode in ("kill", "kill_after"):
        for n in range(1, total + 1):
            folder = memory / f"{mode}{n}"
            seen = run("write", folder, fault=f"op=any; n={n}; mode={mode}")
            assert seen["status"] == -9
            assert set(seen["left"]) <= {NAME, f"{NAME}.tmp"}
            states.append(state_after_kill(folder, record))
            done = n > before_rename or (n == before_rename and mode == "kill_after")
            assert states[-1] == ("complete" if done else "none"), (mode, n)
    print(f"kill -9 at each operation, the whole file or none: {len(states)}/{2 * total} {dict(Counter(states))}")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_time_leaves_whole_files_or_none(run, kills):
    rng = random.Random(kills)
    with tempfile.TemporaryDirectory() as name:
        memory = Path(name)
        plain = [run("write_three", memory / f"plain{i}") for i in range(3)]
        seconds = 1.5 * sorted(seen["seconds"] for seen in plain)[1]
        records = [CacheRecord.from_json(text) for text in plain[0]["records"]]
        states = Counter[tuple[str, ...]]()
        for i in range(kills):
            folder = memory / str(i)
            seen = run("write_three", folder, kill_after=rng.uniform(0, seconds))
            assert seen["status"] in (-9, 0)
            found = tuple(state_after_kill(folder, record) for record in records)
            assert sorted(found) == list(found)  # one after the other
            states[found] += 1
            shutil.rmtree(folder)
    assert len(states) > 1
    whole = {sum(state == "complete" for state in found): count for found, count in states.items()}
    print(f"kill -9 at random times, whole files or none: {sum(states.values())}/{kills}, by files complete {whole}")


# ---- A whole run -------------------------------------------------------------------------------------------------

TRAINING = ["torch._dynamo", "torch.export", "torch._subclasses.fake_tensor", "torch.fx", "typer", "rich.table"]


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("op=pwrite; path=x*.nfc.tmp; n=3; mode=errno:28", 75, r"bytes needed, \d+ free; make room"),
        pytest.param(
            *("op=pwrite; path=x*.nfc.tmp; n=3; mode=errno:5", 74, r"pwrite at byte \d+ failed: Input/output error"),
            marks=pytest.mark.slow,
        ),
        (
            "op=pread; path=x*.nfc; n=4; sticky=1; mode=flip:5",
            74,
            r"(has CRC32C \w+, expected \w+, twice|expected the magic bytes .*); delete",
        ),
    ],
    ids=["full", "failing", "flipping"],
)
def test_training_ends_with_the_code_of_the_error_and_leaves_nothing(run, memory, fault, code, says):
    seen = run("train", memory / "a", fault=fault, limit=240, preload=TRAINING)
    assert (seen["result"], seen["code"]) == ("done", code), seen["stderr"]
    text = " ".join(seen["stderr"].split())
    assert re.search(r"x001-g\d{4}\.nfc", text), text
    assert re.search(says, text), text
    assert [path.name for path in (memory / "a").rglob("*.tmp")] == []

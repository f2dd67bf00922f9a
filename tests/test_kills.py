"""Whole runs against kills and faults: whatever happens, the same call ends as a run that nothing happened to.

Compared bit for bit: weights and buffers, block files, the scores of the exits, metrics.jsonl, and in the middle of a
block the optimiser's state. The runs: run_scenes.py.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_scenes as scenes
import torch

from nf_engine import engine, progress, worker

Scene = scenes.Scene
Figure = Callable[[str, str, int, int], None]
KILL = int(signal.SIGKILL)


class Runs:
    """Runs of scenes in folders of their own, and what each scene ends as when nothing happens to it."""

    def __init__(self, program: Any, where: Path) -> None:
        self.program, self.where = program, where
        self.numbers = itertools.count()
        self.whole: dict[str, tuple[dict[str, Any], float]] = {}

    def folder(self) -> Path:
        return self.where / f"run{next(self.numbers)}"

    def undisturbed(self, scene: Any) -> tuple[dict[str, Any], float]:
        """What the scene ends as, with no commit inside a block; seconds with those that it asks for."""
        if repr(scene) not in self.whole:
            folder = self.folder()
            expected = scenes.result_of(folder, self.program(folder, scene.with_fields(checkpoint_minutes=10.0)))
            shutil.rmtree(folder)
            took = self.program(folder, scene).facts["took"]
            shutil.rmtree(folder)
            self.whole[repr(scene)] = expected, took
        return self.whole[repr(scene)]

    def operations(self, path: str) -> int:
        """How many a run asks for on files like this."""
        folder = self.folder()
        log = folder.with_suffix(".log")
        assert self.program(folder, SWEPT, fault=f"path={path}", log=str(log)).result == "completed"
        shutil.rmtree(folder)
        return len(log.read_text().splitlines())

    def check_end(self, folder: Path, scene: Any) -> None:
        """The same call, undisturbed, ends as if it had never been disturbed; the folder is removed."""
        ended = self.program(folder, scene)
        assert scenes.result_of(folder, ended) == self.undisturbed(scene)[0]
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """In memory where there is one: kills do not wait for a disk."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        for program in scenes.programs():
            yield Runs(program, Path(folder))


# ---- P1: at any time ---------------------------------------------------------------------------------------------

SCENES = [
    Scene(tier, units, fields={"checkpoint_minutes": minutes, "optimizer": optimizer, **augmented})
    for tier in ("disk", "ram", "recompute")
    for units in (1, 2)
    for minutes in (0.0, 0.002)
    for optimizer in ("sgd", "adamw")
    for augmented in ({}, {"augment": "crop-flip", "augment_copies": 2})
]


@pytest.mark.parametrize("kills", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_time_ends_as_if_it_never_was(runs: Runs, figure: Figure, kills: int) -> None:
    draw = random.Random(1)
    order = draw.sample(SCENES, len(SCENES) if kills > 50 else 6)
    killed = ended = 0
    for scene in itertools.cycle(order):
        folder, seconds = runs.folder(), runs.undisturbed(scene)[1]
        for _ in range(4):
            delay = draw.uniform(0, 0.6 * seconds)
            result = runs.program(folder, scene, signals=[(delay, KILL)]).result
            assert result in ("SIGKILL", "completed")
            killed += result == "SIGKILL"
        runs.check_end(folder, scene)
        ended += 1
        if killed >= kills:
            break
    figure("P1", "kill -9 at any time, whose runs end bit for bit as if undisturbed", killed, killed)
    figure("P1", "runs of these kills", ended, ended)


@pytest.mark.parametrize(
    "scene",
    [
        Scene(fields={"optimizer": "adamw", "precision": "16-mixed", "checkpoint_minutes": 0.002}),
        *(pytest.param(scene, marks=pytest.mark.slow) for scene in SCENES[::5]),
    ],
    ids=str,
)
def test_a_killed_run_comes_to_the_same_optimizer_state(runs: Runs, scene: Any) -> None:
    draw = random.Random(str(scene))
    for stop in ((0, 3), (1, 5), (2, 7)):
        folders = runs.folder(), runs.folder()
        for folder, kills in zip(folders, (0, 3), strict=True):
            for _ in range(kills):
                delay = draw.uniform(0, 0.5 * runs.undisturbed(scene)[1])
                runs.program(folder, scene, stop=stop, signals=[(delay, KILL)])
            assert runs.program(folder, scene, stop=stop).result == "interrupted"
            assert scenes.position(folder) == (stop[0], stop[1] // 4, stop[1] % 4)
        states = [scenes.contents(folder) for folder in folders]
        assert states[0] == states[1]
        assert f"train {stop[0]}" in states[0]
        for folder in folders:
            runs.check_end(folder, scene)


# ---- P2, P7: at every operation ----------------------------------------------------------------------------------

SWEPT = Scene(threads=1, batch=16, fields={"epochs": 1})  # ten commits, three of them inside a block
OTHERS, CACHES = "[!xv]*", "[xv]*"  # of each kind one thread asks for operations: they come in one order
KILLS = ("kill", "kill_after")
TORN = ("torn:1", "torn:200")


def in_parts(part: int) -> pytest.MarkDecorator:
    """Each part-th case, and all of them in the long run."""
    return pytest.mark.parametrize("part", [part, pytest.param(1, marks=pytest.mark.slow)])


def sample(part: int) -> str:
    return "" if part == 1 else f", 1 in {part}"


def sweep(runs: Runs, path: str, mode: str, part: int, start: Path | None = None, sticky: int = 0) -> Iterator[Any]:
    """The run with a fault at operation n = 1, 1 + part .. until one ends without it; the caller removes the folders.

    start: a folder that the run goes on from.
    """
    op = "pwrite" if mode.startswith("torn") else "any"
    for n in itertools.count(1, part):
        folder = runs.folder()
        if start is not None:
            shutil.copytree(start, folder)
        ended = runs.program(folder, SWEPT, fault=f"op={op}; path={path}; n={n}; sticky={sticky}; mode={mode}")
        if (folder / "MANIFEST.json").exists():
            scenes.contents(folder)  # whole, before anything is mended
        yield folder, ended


def killed_everywhere(runs: Runs, path: str, mode: str, part: int, start: Path | None = None) -> int:
    """Resumes each run of a sweep of kills; how many there were."""
    for n, (folder, ended) in enumerate(sweep(runs, path, mode, part, start)):
        runs.check_end(folder, SWEPT)
        if ended.result != "SIGKILL":
            assert ended.result == "completed", ended
            return n
    raise AssertionError("a sweep has an end")


@pytest.mark.parametrize("mode", KILLS + TORN)
@in_parts(32)
def test_a_run_killed_at_any_operation_ends_as_if_it_never_was(
    runs: Runs, figure: Figure, mode: str, part: int
) -> None:
    killed = sum(killed_everywhere(runs, path, mode, part) for path in (OTHERS, CACHES))
    assert killed * part >= (250 if mode in KILLS else 60)
    figure("P2", f"operations of a whole run, {mode}{sample(part)}", killed, killed)


STARTS = {  # where the run was killed first
    "training": "op=pwrite; path=c0000005.safetensors.tmp; n=1; mode=kill_after",
    "commit of a block": "op=rename; path=b001*; n=1; mode=kill_after",
    "cache": "op=pwrite; path=x002*; n=2; mode=kill_after",
    "last commit": "op=rename; path=exits.json*; n=1; mode=kill_after",
}


@pytest.mark.parametrize("first", STARTS)
@in_parts(64)
def test_a_resume_killed_at_any_operation_is_resumed(runs: Runs, figure: Figure, first: str, part: int) -> None:
    start = runs.folder()
    assert runs.program(start, SWEPT, fault=STARTS[first]).result == "SIGKILL"
    killed = sum(killed_everywhere(runs, path, "kill", part, start) for path in (OTHERS, CACHES))
    figure("P7", f"operations of a resume, {first}, killed{sample(part)}", killed, killed)


@pytest.mark.parametrize(
    ("code", "sticky", "error"), [(28, 1, "DiskFullError"), (5, 0, "StorageError"), (5, 1, "StorageError")]
)
@in_parts(64)
def test_a_disk_that_fails_at_any_operation_loses_nothing(
    runs: Runs, figure: Figure, code: int, sticky: int, error: str, part: int
) -> None:
    failed = 0
    for path in (OTHERS, CACHES):
        cases = len(range(0, runs.operations(path), part))
        for folder, ended in itertools.islice(sweep(runs, path, f"errno:{code}", part, sticky=sticky), cases):
            assert ended.result in (error, "completed"), ended
            assert ended.facts["left"] == {}
            runs.check_end(folder, SWEPT)
            failed += 1
    figure("P7", f"operations, errno {code}, {'from it on' if sticky else 'once'}{sample(part)}", failed, failed)


# ---- Each step of the way from block to block --------------------------------------------------------------------

STEPS = {  # what a kill there leaves: position; names beside the listed ones
    "training, between two commits": ("op=pwrite; path=log.jsonl; n=4; mode=kill", (0, 0, 1), {"ballast.tmp"}),
    "writing a checkpoint": (
        "op=fsync; path=c0000005*; n=1; mode=kill", (1, 0, 0), {"ballast.tmp", "c0000005.safetensors.tmp"}
    ),
    "a checkpoint in no manifest": (
        "op=rename; path=c0000005*; n=1; mode=kill_after", (1, 0, 0),
        {"ballast.tmp", "c0000005.safetensors", "MANIFEST.prev.json.tmp"},
    ),
    "writing a block": (
        "op=fsync; path=b001-*; n=1; mode=kill", (1, 0, 1), {"b001-g0006.safetensors.tmp"}
    ),
    "block committed, no cache begun": ("op=open; path=v002*; n=1; mode=kill", (2, 0, 0), set()),
    "writing the first cache": ("op=pwrite; path=v002*; n=2; mode=torn:9", (2, 0, 0), {"v002-g0007.nfc.tmp"}),
    "writing the second cache": (
        "op=pwrite; path=x002*; n=2; mode=torn:9", (2, 0, 0), {"v002-g0007.nfc", "x002-g0007.nfc.tmp"}
    ),
    "caches in no manifest": (
        "op=open; path=MANIFEST.json.tmp; n=7; mode=kill", (2, 0, 0),
        {"v002-g0007.nfc", "x002-g0007.nfc", "c0000005.safetensors"},  # the last one is of two commits before
    ),
    "old caches not deleted": (
        "op=unlink; path=?001-*; n=1; mode=kill", (2, 0, 0), {"v001-g0004.nfc", "x001-g0004.nfc"}
    ),
    "last commit": ("op=fsync; path=exits.json.tmp; n=1; mode=kill", (3, 0, 0), {"exits.json.tmp"}),
    "last commit, renamed": ("op=rename; path=MANIFEST.json*; n=10; mode=kill_after", (3, 0, 0), None),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_on_the_way_from_block_to_block_leaves_what_is_said_and_is_resumed(runs: Runs, step: str) -> None:
    fault, position, beside = STEPS[step]
    folder = runs.folder()
    assert runs.program(folder, SWEPT, fault=fault).result == "SIGKILL"
    assert scenes.position(folder) == position
    scenes.contents(folder)
    strangers = scenes.names_in(folder) - scenes.listed(folder)
    if beside is not None:
        assert strangers == beside
    else:
        assert scenes.manifest_of(folder)["done"]
    before = len(scenes.events(folder, "cache_written"))
    runs.program(folder, SWEPT, stop=(2, 1))
    assert not scenes.events(folder, "cache_refused"), "a cache of the last commit is sound"
    made = [event["name"] for event in scenes.events(folder, "cache_written")[before:]]
    assert len(made) == len(set(made))
    if position[0] == 2:  # from block 1 and the cache before it, which is not made again
        assert [name[:4] for name in made] == ([] if step == "old caches not deleted" else ["v002", "x002"])
    runs.check_end(folder, SWEPT)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "zeros in the samples": lambda data: data[:4096] + bytes(8192) + data[12288:],
    "a bit of its last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("prefix", ["x", pytest.param("v", marks=pytest.mark.slow)])
def test_a_power_cut_that_loses_a_cache_costs_a_rebuild(runs: Runs, block: int, damage: str, prefix: str) -> None:
    folder = runs.folder()
    assert runs.program(folder, SWEPT, stop=(block, 1)).result == "interrupted"
    (path,) = folder.glob(f"{prefix}{block:03d}-*.nfc")
    data = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    ended = runs.program(folder, SWEPT)
    assert [event["number"] for event in scenes.events(folder, "cache_refused")] == [block]
    assert "made again" in ended.told
    assert scenes.result_of(folder, ended) == runs.undisturbed(SWEPT)[0]


@pytest.mark.parametrize("damage", ["deleted", "zeros in the samples"])
@pytest.mark.parametrize("fault", ["", STEPS["block committed, no cache begun"][0]], ids=["later", "at once"])
def test_a_run_that_lost_all_caches_makes_them_again_from_the_images(runs: Runs, fault: str, damage: str) -> None:
    scene = SWEPT.with_fields(augment="crop-flip", augment_copies=2)
    folder = runs.folder()
    assert runs.program(folder, scene, fault=fault, stop=None if fault else (2, 1)).result in ("SIGKILL", "interrupted")
    for path in folder.glob("*.nfc"):
        data = DAMAGES[damage](path.read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    ended = runs.program(folder, scene)
    assert scenes.events(folder, "cache_refused")
    made = [event["name"][:4] for event in scenes.events(folder, "cache_written")]
    assert made[-4:] == ["v001", "x001", "v002", "x002"]
    assert scenes.result_of(folder, ended) == runs.undisturbed(scene)[0]


@pytest.mark.parametrize("minutes", [0.0, 10.0])
def test_a_cache_that_goes_bad_after_an_epoch_costs_that_block(runs: Runs, minutes: float) -> None:
    scene, folder = SWEPT.with_fields(epochs=2, checkpoint_minutes=minutes), runs.folder()
    assert runs.program(folder, scene).result == "completed"
    name = scenes.events(folder, "cache_written")[-1]["name"]
    shutil.rmtree(folder)
    fault = f"op=pread; path={name}; n=5; sticky=1; mode=flip:100"  # header, end and table; an epoch; the second one
    ended = runs.program(folder, scene, fault=fault)
    assert [event["number"] for event in scenes.events(folder, "cache_refused")] == [2]
    assert scenes.result_of(folder, ended) == runs.undisturbed(scene)[0]
    shutil.rmtree(folder)


# ---- P26: the order of the samples -------------------------------------------------------------------------------

Steps = list[tuple[int, int, int, list[int]]]  # block, epoch, step, ids


@pytest.fixture
def steps_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Steps]]:
    """What a run in this process trains on, step by step; each image has a label of its own, which is its id."""
    seen: Steps = []
    for inputs in (worker.ImageInputs, worker.CacheInputs):

        def noting(self: Any, epoch: int, batch: int, start: int = 0, train: Any = inputs.train) -> Iterator[Any]:
            for step, (x, labels) in enumerate(train(self, epoch, batch, start), start):
                seen.append((self.block, epoch, step, labels.tolist()))
                yield x, labels

        monkeypatch.setattr(inputs, "train", noting)
    threads, numbers = torch.get_num_threads(), itertools.count()
    torch.set_num_threads(1)

    def steps(scene: Any, stops: Sequence[tuple[int, int]] = ()) -> Steps:
        seen.clear()
        folder = str(tmp_path / f"run{next(numbers)}")
        with Path(os.devnull).open("wb") as nobody:
            for stop in stops:
                observer = scenes.stop_at(*stop, signal.SIGTERM, nobody.fileno())
                monkeypatch.setattr(engine, "make_observer", lambda _, observer=observer: observer)
                assert scenes.train(folder, scene).status == "interrupted"
        monkeypatch.setattr(engine, "make_observer", lambda _: progress.Silent())
        assert scenes.train(folder, scene).status == "completed"
        return list(seen)

    yield steps
    torch.set_num_threads(threads)


ORDERED = Scene(images=32, classes=32, fields={"checkpoint_minutes": 10.0})
PLACES = [(block, epoch, step) for block in range(3) for epoch in range(2) for step in range(4)]
TWICE = {"augment": "flip", "augment_copies": 2}


@pytest.mark.parametrize("scene", [ORDERED, ORDERED.with_fields(**TWICE), replace(ORDERED, tier="recompute")], ids=str)
def test_the_order_of_samples_is_the_same_wherever_a_run_was_resumed(
    steps_of: Callable[..., Steps], figure: Figure, scene: Any
) -> None:
    whole = steps_of(scene)
    assert [step[:3] for step in whole] == PLACES
    copies = scene.fields.get("augment_copies", 1)
    for block in range(3):
        parts = 1 if block == 0 else copies  # a pass over two copies is two epochs
        for epoch in range(0, 2, parts):
            ids = [i for b, e, _, ids in whole if b == block and epoch <= e < epoch + parts for i in ids]
            assert sorted(ids) == sorted(list(range(32)) * parts), "each once"
    orders = [tuple(i for b, e, _, ids in whole if (b, e) == place for i in ids) for place in {p[:2] for p in PLACES}]
    assert len(set(orders)) == len(orders), "an order of its own in each epoch of each block"
    resumed = steps_of(scene, [(block, 4 * epoch + step) for block, epoch, step in PLACES])
    assert resumed == whole
    figure("P26", "steps whose samples are the same after a stop before each of them", len(resumed), len(PLACES))


@pytest.mark.parametrize("threads", [1, 4, 8])
@pytest.mark.parametrize("feed", ["gathered", "prefetched", "resident"])
def test_the_order_of_samples_is_the_same_for_every_feed_and_any_number_of_threads(
    steps_of: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch, figure: Figure, feed: str, threads: int
) -> None:
    import test_feed as feeds

    make = {"gathered": feeds.Gathered, **feeds.FEEDS}[feed]
    whole = steps_of(replace(ORDERED, threads=2))
    monkeypatch.setattr(worker, "feed_to", lambda _, data: make(data))
    assert steps_of(replace(ORDERED, threads=threads)) == whole
    figure("P26", "feeds and numbers of threads with the same order", 1, 1)

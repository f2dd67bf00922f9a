"""What a checkpoint survives and costs, beside three other ways to write the same tensors; and what a resume costs.

    python -m bench.bench_reliability --data idx:DIR --json bench/results/reliability.json

    changed byte   every byte of the files of a 64 KiB state xor 0xFF, one at a time (--quick: every 64th), then a load:
                   an error, a silently wrong value, or no effect
    kill           a save over a good checkpoint, killed before each system call that changes files (strace), and ours
                   also at each operation of its fault hook: the old state is left, the new one, none, or another
    full disk      a save that does not fit: the error, and what is left
    commit         milliseconds a save, the candidates in turn; "+ fsync": files and folder synced after it
    training       one plan trained with commits by default, one a second, and none inside blocks, in turn, and the
                   seconds inside commits, serialisation included. The default is 10 minutes: short runs as these commit
                   at their start and their end and after each block alone, hence more often than a long one
    resume         seconds from the call to the first step of a training that was stopped half-way

Weights have to be the same, bit for bit, in every training and in the resumed one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import nf_engine
from bench.reliability_peers import (
    CANDIDATES,
    OURS,
    Save,
    Scene,
    State,
    byte_changes,
    full_disk,
    hook_kills,
    kills,
    memory_folder,
    state_of_size,
)
from bench.timing import arguments, check, finish, images
from nf_engine import controller, engine, trainer
from nf_engine.checkpoint import state_of
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.models import build
from nf_engine.progress import Silent
from nf_engine.records import Plan
from nf_engine.run_folder import RunFolder

MIB = 1 << 20
SMALL = 64 << 10
MINUTES = {"default": TrainConfig().checkpoint_minutes, "one a second": 1 / 60, "none inside blocks": 1e6}

Row = dict[str, Any]


# --- damage ---------------------------------------------------------------------------------------------------------


def damage(quick: bool) -> Iterator[Row]:
    old, new = state_of_size(SMALL, 1), state_of_size(SMALL, 2)
    for candidate in CANDIDATES:
        with memory_folder() as place:
            (place / "run").mkdir(mode=0o700)
            found = byte_changes(candidate, old, place / "run", 64 if quick else 1)
            yield {"what": "changed byte", "candidate": candidate.name, **found}
    for candidate in CANDIDATES:
        with memory_folder() as place:
            yield {
                "what": "kill",
                "by": "strace",
                "candidate": candidate.name,
                **kills(Scene(candidate, old, new, place)),
            }
    with memory_folder() as place:
        modes = ["kill"] if quick else ["kill", "kill_after"]
        found = hook_kills(Scene(OURS, old, new, place), modes)
        yield {"what": "kill", "by": "hook", "candidate": OURS.name, **found}
    for candidate in CANDIDATES:
        found = full_disk(candidate, state_of_size(MIB, 1), state_of_size(16 * MIB, 2), 12 * MIB)
        yield {"what": "full disk", "candidate": candidate.name, **found}


# --- milliseconds ---------------------------------------------------------------------------------------------------


def sync(folder: Path) -> None:
    """fsync of every file of a folder, and of the folder."""
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_and_sync(save: Save, folder: Path, state: State) -> None:
    save(state)
    sync(folder)


def times(size: int, repeats: int, place: Path) -> Iterator[Row]:
    """A row for each candidate, and for each peer with an fsync."""
    states = [state_of_size(size, seed) for seed in (1, 2)]
    with ExitStack() as stack:
        arms: dict[str, Callable[[State], None]] = {}
        for candidate in CANDIDATES:
            for ending in ("",) if candidate is OURS else ("", " + fsync"):
                name = candidate.name + ending
                folder = place / name.replace(" ", "")
                folder.mkdir(mode=0o700)
                save = stack.enter_context(candidate.opened(folder))
                arms[name] = functools.partial(save_and_sync, save, folder) if ending else save
        found: dict[str, list[float]] = {name: [] for name in arms}
        for k in range(repeats + 1):  # the first one warms up
            for name, run in arms.items():
                started = time.perf_counter()
                run(states[k % 2])
                found[name].append(1e3 * (time.perf_counter() - started))
    for name, all_ms in found.items():
        ms = all_ms[1:]
        yield {"what": "commit", "candidate": name, "mib": size // MIB, "median_ms": statistics.median(ms),
               "low_ms": min(ms), "high_ms": max(ms)}  # fmt: skip


# --- trainings ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds inside some functions, and calls of each; none of them calls another."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: dict[str, int] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                self.seconds += time.perf_counter() - started
                self.calls[name] = self.calls.get(name, 0) + 1

        return run


@contextmanager
def clocked_commits() -> Iterator[Clock]:
    """All commits of a training, and what makes bytes of tensors for them."""
    clock = Clock()
    with ExitStack() as stack:
        for owner, name in (
            (RunFolder, "begin"),
            (RunFolder, "commit"),
            (engine, "to_bytes"),
            (trainer, "to_bytes"),
            (controller, "to_bytes"),
        ):
            call = clock.timed(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, call))
        yield clock


class FirstStep(Silent):
    """Notes when the first step of a training began."""

    def __init__(self) -> None:
        self.at: float | None = None

    def step(self, done: int, total: int) -> None:
        if self.at is None:
            self.at = time.perf_counter()


class Training:
    """One plan and the trainings of it."""

    def __init__(self, data: ImageData, test: ImageData, epochs: int) -> None:
        self.data, self.test = data, test
        self.config = TrainConfig(epochs=epochs, batch_size=64, partition="layerwise", device="cpu")
        asked: dict[str, Any] = {"config": self.config, "samples": len(data)}
        whole = nf_engine.plan(self.network(), data.shape, **asked).bounds.backpropagation
        self.config = self.config.with_fields({"memory_budget": int(0.75 * whole)})
        self.plan: Plan = nf_engine.plan(self.network(), data.shape, **asked | {"config": self.config})

    def network(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return build("vgg11", width=0.25)

    def run(self, folder: Path, minutes: float, max_time: float | None = None) -> tuple[Row, dict[str, torch.Tensor]]:
        watch = FirstStep()
        started = time.perf_counter()
        with clocked_commits() as clock, mock.patch.object(engine, "make_observer", return_value=watch):
            result = nf_engine.train(
                self.network(),
                self.data,
                self.test,
                config=self.config,
                plan=self.plan,
                checkpoint_minutes=minutes,
                output_dir=folder,
                max_time=max_time,
            )
        seconds = time.perf_counter() - started
        assert watch.at is not None
        row = {
            "status": result.status,
            "seconds": seconds,
            "commits": clock.calls["commit"] + clock.calls.get("begin", 0),
            "commit_seconds": clock.seconds,
            "share": clock.seconds / seconds,
            "first_step_seconds": watch.at - started,
            "blocks": len(result.plan.blocks),
        }
        return row, state_of({"model": result.model})


def trainings(training: Training, rounds: int, place: Path) -> Iterator[Row]:
    """The arms in turn, then trainings that are stopped half-way and go on."""
    _, expected = training.run(place / "warm-up", MINUTES["default"])
    seconds = []
    for number in range(rounds):
        for arm, minutes in MINUTES.items():
            row, weights = training.run(place / f"{number}-{arm.replace(' ', '-')}", minutes)
            seconds.append(row["seconds"])
            yield {"what": "training", "arm": arm, "round": number, **row, "same": equal(expected, weights)}
    for number in range(rounds):
        folder = place / f"resume-{number}"
        length = statistics.median(seconds)
        stopped, _ = training.run(folder, MINUTES["default"], max_time=length / 2)
        row, weights = training.run(folder, MINUTES["default"])
        assert (stopped["status"], row["status"]) == ("interrupted", "completed")
        row["first_step_share"] = row["first_step_seconds"] / length
        yield {"what": "resume", "round": number, **row, "same": equal(expected, weights)}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- report ---------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row as a person reads it."""
    name = row.get("candidate") or row.get("arm") or ""
    said = ", ".join(
        f"{key} {f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in row.items()
        if key not in ("what", "candidate", "arm")
    )
    return f"{row['what']:<14}{name:<37}{said}"


def of_kind(rows: list[Row], what: str, **wanted: Any) -> list[Row]:
    return [r for r in rows if r["what"] == what and all(r[key] == value for key, value in wanted.items())]


def summary(rows: list[Row]) -> Iterator[Row]:
    """Of each arm the share of its commits, and its time to that without commits inside blocks: medians of rounds."""
    off = {r["round"]: r["seconds"] for r in of_kind(rows, "training", arm="none inside blocks")}
    for arm in MINUTES:
        runs = of_kind(rows, "training", arm=arm)
        yield {
            "what": "commit share",
            "arm": arm,
            "share": statistics.median(r["share"] for r in runs),
            "to none inside blocks": statistics.median(r["seconds"] / off[r["round"]] for r in runs),
        }


def checks(rows: list[Row]) -> dict[str, Any]:
    ours = [r for r in rows if r.get("candidate") == "nf_engine"]
    killed = {r["by"]: r["lost"] + r["wrong"] if r["kills"] else None for r in of_kind(ours, "kill")}
    (full,) = of_kind(ours, "full disk")
    (default,) = of_kind(rows, "commit share", arm="default")
    return {
        "changed bytes of ours silently wrong": check(sum(r["wrong"] for r in of_kind(ours, "changed byte")), "== 0"),
        "kills of ours at a system call after which neither state is left": check(killed["strace"], "== 0"),
        "kills of ours at an operation of the hook after which neither state is left": check(killed["hook"], "== 0"),
        "full disks of ours after which the last state is not left": check(full["left"] != "old", "== 0"),
        "commits / run time, default": check(default["share"], "<= 0.035"),
        "trainings with other weights": check(sum(not r["same"] for r in rows if "same" in r), "== 0"),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=20, help="commits of each candidate and size")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="where timed files go; /tmp may be memory")
    args = parser.parse_args()
    sizes = [1, 16, 64]
    if args.quick:
        args.repeats, args.rounds, sizes = min(args.repeats, 5), 1, sizes[:2]
        args.images, args.epochs = min(args.images, 2000), min(args.epochs, 2)
    rows: list[Row] = []

    def add(made: Iterator[Row]) -> None:
        for row in made:
            rows.append(row)
            print(line(row), flush=True)

    torch.set_num_threads(1)  # what is killed and damaged runs in forks, which have no threads of ours
    add(damage(args.quick))
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_reliability_") as folder:
        for mib in sizes:
            place = Path(folder) / f"{mib}MiB"
            place.mkdir()
            add(times(mib * MIB, args.repeats, place))
        data, test = images(args.data, args.images, 500)
        add(trainings(Training(data, test, args.epochs), args.rounds, Path(folder)))
    add(summary(list(rows)))
    args.folder = None  # of this machine
    args.peers = {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
    finish(args, rows, checks(rows))


if __name__ == "__main__":
    main()

"""One training of a peer, or of nf_engine, on one workload under one budget, as a row of bench_peers.

Batches of the peers are the largest that fit by measurement: a few updates of each size that is tried, under the meter
of the CPU or the allocator of a GPU.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import nn

import nf_engine
from nf_engine import controller
from nf_engine.compare import Arm, largest_batch, train_peer
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData, fit_to
from nf_engine.device import capped, free_bytes, pick
from nf_engine.errors import BudgetError
from nf_engine.exits import throughput
from nf_engine.models import build
from nf_engine.recovery import is_out_of_memory
from nf_engine.stages import split
from nf_engine.step_graph import WARM_UP
from nf_engine.trainer import Trainer
from nf_engine.worker import forward_block

BASE = "backpropagation"
NONE, TIGHT = "none", "tight"
TIGHT_BATCH = 8
EXIT_BATCH = 32
SHARES = ("1", "0.5", "0.3", "0.1")
COMPILED = tuple(f"compiled {share}" for share in SHARES)
PEERS = (BASE, "accumulated", "checkpointed", *COMPILED, "compiled accumulated", "offloaded", "local")


@dataclass(frozen=True)
class Recipe:
    """How much training a run is; lr is meant at batch 128."""

    device: str
    images: int
    test: int
    epochs: int
    batch: int
    lr: float
    width: float
    precision: str


class Curve:
    """Seconds since it was made, without those spent in `score`, and the best accuracy after each score."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.points: list[tuple[float, float]] = []
        self.scoring = 0.0  # seconds

    def score(self, accuracy: Callable[[], float]) -> None:
        paused = time.perf_counter()
        best = max([accuracy(), *(a for _, a in self.points)])
        self.points.append((paused - self._started, best))
        spent = time.perf_counter() - paused
        self._started, self.scoring = self._started + spent, self.scoring + spent

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


class _Scoring:
    """An observer that also scores the block on all held-out images after each epoch; the rest is the observer's."""

    def __init__(self, observer: Any, score: Callable[[], None]) -> None:
        self._observer, self._score = observer, score

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer, name)

    def epoch_ended(self, *report: Any) -> None:
        self._observer.epoch_ended(*report)
        self._score()


def scoring_trainer(curve: Curve) -> type[Trainer]:
    """The engine's trainer, with a curve."""

    class Scored(Trainer):
        def _train(self, number: int, block: Any, units: Any, inputs: Any, held: Any, *rest: Any) -> None:
            def accuracy() -> float:
                sums = forward_block(
                    units, held.once(block.batch, None), score=True, write=None, device=self._job.device
                )
                for module in (m for unit in units for m in unit.modules()):
                    module.train()
                return max(s.accuracy for s in sums.scores())

            observer = self._job.observer
            self._job.observer = _Scoring(observer, lambda: curve.score(accuracy))
            before = len(curve.points)
            try:
                super()._train(number, block, units, inputs, held, *rest)
            except BaseException:
                del curve.points[before:]  # a block that runs out of memory starts again
                raise
            finally:
                self._job.observer = observer

    return Scored


class Workload:
    """One model and its images: what it needs, what fits, and one training of an arm."""

    def __init__(self, part: str, recipe: Recipe, data: ImageData, test: ImageData) -> None:
        self.model, pixels, outputs = part.split("-")
        self.pixels, self.outputs, self.recipe = int(pixels), int(outputs), recipe
        self.data, self.test = (fit_to(d, size=self.pixels, channels=3) for d in (data, test))
        self.device = pick(recipe.device)
        self.used = cache(self._used)

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build(self.model, classes=self.outputs, width=self.recipe.width, input_size=self.pixels)

    def config(self, seed: int, **fields: Any) -> TrainConfig:
        r = self.recipe
        base = TrainConfig(epochs=r.epochs, lr=r.lr, augment="crop-flip", device=r.device, seed=seed)
        return base.with_fields({"precision": r.precision} | fields)

    def _used(self, arm: Arm) -> tuple[float, int]:
        """Most bytes of a few updates of an arm: of tensors, infinite where they do not fit the device; reserved."""
        updates = WARM_UP + 2 if self.device.type == "cuda" else 3  # on a GPU recorded ones, too
        few = self.data.subset(torch.arange(min(updates * arm.batch, len(self.data))))
        one = self.test.subset(torch.arange(1))
        cut = split(self.network(0), self.data.shape)
        try:
            with capped(self.device, free_bytes(self.device)):
                done = train_peer(cut, few, one, self.config(0, epochs=1), arm, device=self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf, 0
        finally:
            release(self.device)
        return done.peak, done.reserved

    def peak(self, arm: Arm) -> float:
        """What an arm must find: what the allocator reserves, or the tensors of the CPU."""
        return max(self.used(arm))

    def bytes(self, budget: str) -> int | None:
        """A budget in bytes: a share of what the allocator reserves for backpropagation, or the tensors of the CPU."""
        if budget == NONE:
            return None
        peak, reserved = self.used(Arm(BASE, TIGHT_BATCH if budget == TIGHT else self.recipe.batch))
        return int((1 if budget == TIGHT else float(budget)) * (reserved or peak))

    def largest(self, kind: str, share: float, budget: int) -> int:
        return largest_batch(lambda b: self.peak(Arm(kind, b, 1, share)), budget, self.recipe.batch)

    def arm(self, name: str, budget: int | None) -> Arm | None:
        """A peer as it fits the budget; None where it does not."""
        kind, _, detail = name.partition(" ")
        whole, allowed = self.recipe.batch, math.inf if budget is None else budget
        share = float(detail) if name in COMPILED else 1.0
        if name == "compiled accumulated":
            share = min(map(float, SHARES), key=lambda s: self.peak(Arm(kind, whole, 1, s)))
        if "accumulated" in name:
            kind = BASE if kind == "accumulated" else kind
            arms = (Arm(kind, whole, 2**k, share) for k in range(whole.bit_length()) if whole % 2**k == 0)
            return next((arm for arm in arms if self.peak(arm) <= allowed), None)
        batch = whole if budget is None else self.largest(kind, share, budget)
        return Arm(kind, batch, 1, share) if batch else None

    def run_peer(self, arm: Arm | None, budget: int | None, seed: int) -> dict[str, Any]:
        """The row of a peer; its batch shrinks until it runs, as fragments of the allocator are in no measurement."""
        while arm is not None:
            try:
                return self._train_peer(arm, budget, seed)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            release(self.device)
            arm = smaller(arm)
        return {"fits": False}

    def _train_peer(self, arm: Arm, budget: int | None, seed: int) -> dict[str, Any]:
        network = self.network(seed)
        cut = split(network, self.data.shape)
        config = self.config(seed)
        with capped(self.device, free_bytes(self.device) if budget is None else budget):
            done = train_peer(
                cut, self.data, self.test, config, arm, device=self.device, budget=budget, every_epoch=True
            )
            process = process_bytes(self.device)
        seconds, accuracies = done.epoch_seconds, done.accuracies
        ends = [sum(seconds[: k + 1]) for k in range(len(seconds))]
        best = [max(accuracies[: k + 1]) for k in range(len(seconds))]
        network.cpu().eval()
        alone: Any = lambda x, exit: network(x)  # noqa: E731
        return {
            "fits": True,
            "how": asdict(arm),
            "batches": [arm.batch],
            "epoch_seconds": ends[-1] / len(seconds),
            "images_per_second": len(self.data) // arm.batch * arm.batch / steady(seconds),
            "seconds": ends[-1],
            "plan_seconds": 0.0,
            "curve": list(zip(ends, best, strict=True)),
            "accuracy": done.accuracy,
            "peak": done.peak,
            "reserved": done.reserved,
            "eager": done.eager,
            "process": process,
            "exit_parameters": sum(p.numel() for p in network.parameters()),
            "exit_images_per_second": throughput(alone, 0, self.data.shape, EXIT_BATCH, torch.device("cpu")),
            "cache_bytes": 0,
        }

    def run_ours(self, fields: dict[str, Any], budget: int | None, seed: int) -> dict[str, Any]:
        """The row of nf_engine with these settings."""
        network, curve = self.network(seed), Curve()
        config = self.config(seed, **fields, memory_budget="auto" if budget is None else budget)
        scored = scoring_trainer(curve)
        with tempfile.TemporaryDirectory() as folder, patch.object(controller, "Trainer", scored):
            try:
                done = nf_engine.train(
                    network, self.data, self.test, config=config, progress="none", output_dir=Path(folder) / "run"
                )
            except BudgetError as error:
                return {"fits": False, "why": str(error)}
        plan, times, exit = done.plan, done.timings, done.exits[done.select_exit(max_drop=0.01)]
        blocks = [[h["seconds"] for h in done.history if h["block"] == k] for k in range(len(plan.blocks))]
        stored = [b.cache.bytes for b in plan.blocks if b.cache.tier in ("device", "ram", "disk")]
        steps = [len(self.data) // b.batch * b.batch for b in plan.blocks]
        per_sample = [steady(seconds) / n for seconds, n in zip(blocks, steps, strict=True)]
        per_sample.append(times["cache_write"] / config.epochs / len(self.data))
        training = times["train"] + times["score"] + times["cache_write"] - curve.scoring
        return {
            "fits": True,
            "how": [[[u.first, u.last, list(u.starts), u.head.kind] for u in b.units] for b in plan.blocks],
            "tiers": [b.cache.tier for b in plan.blocks],
            "batches": [b.batch for b in plan.blocks],
            "epoch_seconds": training / config.epochs,
            "images_per_second": 1 / sum(per_sample),
            "seconds": times["plan"] + training,
            "plan_seconds": times["plan"],
            "curve": curve.points,
            "accuracy": done.exits[-1].accuracy,
            "peak": max(m.allocated for m in done.memory),
            "reserved": max(m.reserved for m in done.memory),
            "process": max(m.process for m in done.memory),
            "exit_parameters": exit.parameters,
            "exit_images_per_second": exit.images_per_second,
            "cache_bytes": sum(stored),
        }


def steady(seconds: Sequence[float]) -> float:
    """Median epoch, the first apart where there are more: it is watched by the meter, and may compile."""
    return statistics.median(seconds[1:] or seconds)


def smaller(arm: Arm) -> Arm | None:
    """The next arm to try where this one ran out of memory."""
    if arm.parts > 1:
        return Arm(arm.kind, arm.batch, 2 * arm.parts, arm.share) if arm.batch % (2 * arm.parts) == 0 else None
    batch = min(arm.batch - 1, int(0.9 * arm.batch))
    return Arm(arm.kind, batch, 1, arm.share) if batch else None


def release(device: torch.device) -> None:
    """Leaves nothing on a GPU, so that the next run's reserved bytes are its own."""
    torch._dynamo.reset()  # whose entries hold the compiled network
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def process_bytes(device: torch.device) -> int:
    """Of the whole process: resident memory, or what is taken of a GPU that nothing else uses."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    free, total = torch.cuda.mem_get_info(device)
    return total - free

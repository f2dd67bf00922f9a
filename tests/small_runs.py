"""Small whole runs in this process: cut between two steps, gone on with, compared. The plan is written by hand.

A run of three blocks of two epochs of four steps takes a fifth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nf_engine import engine, worker
from nf_engine.engine import TrainResult
from nf_engine.interrupt import Interrupt
from nf_engine.records import BlockPlan, Bounds, CachePlan, HeadSpec, Plan, TierProbe, UnitPlan

SIDE, CLASSES, IMAGES, HELD = 8, 4, 34, 20
BLOCKS, EPOCHS, PER_EPOCH = 3, 2, 4
STEPS = BLOCKS * EPOCHS * PER_EPOCH
STAGES = ("features.0", "features.1", "features.2")
BUDGET = 1 << 26  # which nothing here reaches
SETTINGS = {
    "memory_budget": BUDGET,
    "split_points": STAGES[:-1],
    "device": "cpu",
    "epochs": EPOCHS,
    "checkpoint_minutes": 1e6,  # inside a block no commit but where a run is cut
}


class Net(nn.Module):
    """Each stage has weights, buffers and random numbers, so that all of them have to be right."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
                for c in (3, 8, 8)
            )
        )
        self.classifier = nn.Linear(8, CLASSES)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x).mean((2, 3)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, and labels that a corner's brightness decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 200, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    x[:, :, :4, :4] += (labels * 13).to(torch.uint8)[:, None, None, None]
    return x, labels


def training_images() -> tuple[Tensor, Tensor]:
    return images(IMAGES, 1)


def held_out_images() -> tuple[Tensor, Tensor]:
    return images(HELD, 2)


def plan(tier: str = "disk", copies: int = 1) -> Plan:
    """Three blocks of one stage."""

    def block(number: int) -> BlockPlan:
        last = number == BLOCKS - 1
        head = HeadSpec("classifier") if last else HeadSpec("linear", 2)
        unit = UnitPlan(number, number, head, "autograd" if last else "reference", BUDGET // 2)
        cache = CachePlan(tier if number else "images", "fp16", copies, 0, {}, "by hand", forward_batch=16, window=8192)
        return BlockPlan((unit,), IMAGES // PER_EPOCH, 0.2, BUDGET // 2, None, cache)

    return Plan(
        model="Net",
        strategy="layerwise",
        device="cpu",
        budget=BUDGET,
        allowed=BUDGET,
        overhead=1,
        samples=IMAGES,
        epochs=EPOCHS,
        stages=STAGES,
        blocks=tuple(block(k) for k in range(BLOCKS)),
        bounds=Bounds(IMAGES // PER_EPOCH, BUDGET, BUDGET, BUDGET, 1),
        host_bytes=0,
        epoch_seconds=None,
        warnings=(),
        probe=TierProbe(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, {"disk": BUDGET}, 2, 2),
    )


def go(folder: Path, tier: str = "disk", *, network: nn.Module | None = None, **given: Any) -> TrainResult:
    """A run, from whatever the folder holds to its end. given: arguments of train, settings among them."""
    settings = {
        "cache": tier,
        "plan": plan(tier),
        "val_data": held_out_images(),
        "progress": "none",
        **SETTINGS,
        **given,
    }
    data = settings.pop("train_data", None) or training_images()
    return engine.train(network or Net(), data, output_dir=folder, **settings)


Position = tuple[int, int, int]  # block, epoch, step


@contextmanager
def before_steps(do: Callable[[Position], None]) -> Iterator[None]:
    """Calls `do` before each step, after the commit that may be made there."""
    plain = worker.seed_step

    def seed_step(device: Any, seed: int, block: int, epoch: int, step: int) -> None:
        do((block, epoch, step))
        plain(device, seed, block, epoch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "seed_step", seed_step)
        yield


@contextmanager
def cut_after(steps: int) -> Iterator[None]:
    """Asks a run to end once it has done so many steps."""
    done = 0

    def count(_: Position) -> None:
        nonlocal done
        done += 1

    class Cut(Interrupt):
        reason = property(lambda _: "cut" if done >= steps else None)  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch, before_steps(count):
        patch.setattr(engine, "Interrupt", Cut)
        yield


def outcome(result: TrainResult) -> dict[str, Any]:
    """All that a cut and resumed run must have in common with one that was left alone, bit for bit."""
    assert result.status == "completed"
    return {
        "weights": {name: t.numpy().tobytes() for name, t in result.model.state_dict().items()},
        "exits": [(e.accuracy, e.loss) for e in result.exits],
        "best_exit": result.best_exit,
        "blocks": {e["block"]: e["sha256"] for e in manifest(result.run_dir)["files"] if e["role"] == "block"},
        "metrics": (result.run_dir / "metrics.jsonl").read_bytes(),
    }


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "MANIFEST.json").read_bytes()))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]

"""A run that is cut every few steps against one that is not, on a device, as a program of its own.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python tests/gpu_resume.py FOLDER DEVICE PRECISION

cuBLAS has to be told before it starts. Prints the digests of weights, scores and metrics of both runs, and the starts.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import nf_engine
from nf_engine import engine, worker
from nf_engine.interrupt import Interrupt
from nf_engine.models import build
from nf_engine.sources import load_split

STEPS = 7  # between two cuts: past the warm-up of a CUDA graph, and no divisor of an epoch


def train(folder: Path, device: str, precision: str) -> Any:
    torch.manual_seed(0)
    data, held_out = load_split("synthetic:600")
    return nf_engine.train(
        build("vgg11", width=0.125),
        data,
        held_out,
        memory_budget="48MiB",
        partition="layerwise",
        grouping_threshold=0.0,
        split_points=("features.4",),
        batch_size=32,
        epochs=2,
        cache="disk",
        augment="flip",
        device=device,
        precision=precision,
        deterministic=True,
        progress="none",
        output_dir=folder,
    )


def digest(result: Any) -> list[str]:
    weights = hashlib.sha256()
    for name, tensor in result.model.state_dict().items():
        weights.update(name.encode() + tensor.contiguous().numpy().tobytes())
    scores = [[e.accuracy, e.loss] for e in result.exits]
    metrics = (result.run_dir / "metrics.jsonl").read_bytes()
    return [weights.hexdigest(), str(scores), hashlib.sha256(metrics).hexdigest()]


def cut_every(steps: int) -> None:
    """From here on each run is asked to end after so many steps."""
    plain, made = worker.seed_step, Interrupt.__init__
    current: list[Any] = []

    def seed_step(*counters: Any) -> None:
        current[1] += 1
        if current[1] == steps:
            current[0]._signal = signal.SIGTERM
        plain(*counters)

    def begin(interrupt: Interrupt, max_time: float | None = None) -> None:
        made(interrupt, max_time)
        current[:] = [interrupt, 0]

    worker.seed_step = seed_step
    Interrupt.__init__ = begin  # type: ignore[method-assign]


def main(folder: Path, device: str, precision: str) -> None:
    assert engine.Interrupt is Interrupt
    whole = digest(train(folder / "whole", device, precision))
    cut_every(STEPS)
    starts = 1
    while (result := train(folder / "cut", device, precision)).status == "interrupted":
        starts += 1
    print(json.dumps({"whole": whole, "cut": digest(result), "starts": starts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

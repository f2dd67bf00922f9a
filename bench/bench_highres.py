"""The largest images that can be trained on inside a budget: backpropagation, checkpointing and nf_engine, resnet18.

    python -m bench.bench_highres --json bench/results/highres.json
    python -m bench.bench_highres --width 1 --budget 8GiB --step 64 --most 8192 --json FILE       on a GPU

For batch 1 and 8 each: square images, pixels a multiple of --step; the size is searched on fake tensors (nf_engine: by
its planner), then proved by a few real updates under the budget, of the meter on the CPU, of the allocator on a GPU.
Where those do not fit the next smaller size is tried. Checkpointing runs each residual block again.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nf_engine
from bench.timing import arguments, check, finish
from nf_engine.compare import Arm, Peer, train_peer
from nf_engine.config import TrainConfig, parse_bytes
from nf_engine.data import ImageData
from nf_engine.device import capped, pick
from nf_engine.errors import BudgetError
from nf_engine.instruments import copies_of
from nf_engine.models import build
from nf_engine.recovery import is_out_of_memory
from nf_engine.sources import as_image_data
from nf_engine.stages import split

PEERS = ("backpropagation", "checkpointed")
OURS = "nf_engine"
UPDATES = 2  # of the proof; the second one finds the optimizer's state there
CLASSES = 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What all rows have in common; budget in bytes."""

    model: str
    width: float
    budget: int
    device: torch.device

    def network(self, pixels: int) -> nn.Module:
        torch.manual_seed(0)
        return build(self.model, classes=CLASSES, width=self.width, input_size=pixels)

    def config(self, batch: int) -> TrainConfig:
        return TrainConfig(epochs=1, batch_size=batch, memory_budget=self.budget, device=self.device.type)


def predicted(setting: Setting, arm: str, batch: int, pixels: int) -> int | None:
    """Peak bytes without a device; None where nf_engine has no plan."""
    if arm in PEERS:
        return fake_peak(setting, Arm(arm, batch), pixels)
    shape = (3, pixels, pixels)
    try:
        made = nf_engine.plan(setting.network(pixels), shape, samples=UPDATES * batch, config=setting.config(batch))
    except BudgetError:
        return None
    return made.peak


def fake_peak(setting: Setting, arm: Arm, pixels: int) -> int:
    """Peak of two updates of a peer, on fake tensors."""
    cut = split(setting.network(pixels), (3, pixels, pixels))
    with copies_of([*(s.module for s in cut.stages), cut.classifier], CPU) as (modules, counter):
        stages = tuple(replace(s, module=m) for s, m in zip(cut.stages, modules, strict=False))
        peer = Peer(replace(cut, stages=stages, classifier=modules[-1]), arm, setting.config(arm.batch), CPU)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                x = torch.empty(arm.batch, 3, pixels, pixels, memory_format=torch.channels_last)
                yield x, torch.zeros(arm.batch, dtype=torch.int64)

        source = batches()
        for _ in range(UPDATES):
            peer.step(source)
        return counter.peak


def largest_size(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, 0 if none; what is larger needs more."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def random_images(count: int, pixels: int) -> ImageData:
    draw = np.random.default_rng(0)
    return as_image_data((draw.integers(0, 256, (count, 3, pixels, pixels), np.uint8), np.arange(count) % CLASSES))


def proved(setting: Setting, arm: str, batch: int, pixels: int) -> dict[str, Any] | None:
    """A few real updates under the budget: their bytes and seconds; None where they do not fit."""
    data = random_images(max(UPDATES * batch, CLASSES), pixels)
    network, config = setting.network(pixels), setting.config(batch)
    started = time.perf_counter()
    if arm in PEERS:
        cut = split(network, data.shape)
        try:
            with capped(setting.device, setting.budget):
                done = train_peer(
                    cut, data, data, config, Arm(arm, batch), device=setting.device, budget=setting.budget
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        how = {"units": 1, "blocks": 1, "peak": done.peak, "reserved": done.reserved}
    else:
        with tempfile.TemporaryDirectory() as folder:
            try:
                ours = nf_engine.train(
                    network, data, data, config=config, progress="none", output_dir=Path(folder) / "run"
                )
            except BudgetError:
                return None
        how = {
            "units": len(ours.plan.units),
            "blocks": len(ours.plan.blocks),
            "peak": max(m.allocated for m in ours.memory),
            "reserved": max(m.reserved for m in ours.memory),
        }
    return how | {"seconds": time.perf_counter() - started}


def run(setting: Setting, arm: str, batch: int, step: int, most: int) -> dict[str, Any]:
    """One row: the largest size that is predicted to fit and does."""

    def fits(pixels: int) -> bool:
        peak = predicted(setting, arm, batch, pixels)
        return peak is not None and peak <= setting.budget

    found = largest_size(fits, step, most)
    for pixels in range(found, 0, -step):
        gc.collect()
        result = proved(setting, arm, batch, pixels)
        if result is not None:
            return {"pixels": pixels, "searched": found} | result
    return {"pixels": 0, "searched": found, "peak": 0, "reserved": 0, "seconds": 0.0, "units": 0, "blocks": 0}


def checks(rows: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Sizes against checkpointing's, and the budget."""
    size = {(r["batch"], r["arm"]): r["pixels"] for r in rows}
    made = {
        f"pixels a side / {peer}'s, batch {batch}": check(
            size[batch, OURS] / size[batch, peer] if size[batch, peer] else None, ">= 1"
        )
        for batch, peer in itertools.product(dict.fromkeys(b for b, _ in size), PEERS)
    }
    over = sum(max(r["peak"], r["reserved"]) > budget for r in rows)
    return made | {"runs over budget": check(over, "== 0")}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--budget", default="64MiB")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--step", type=int, default=32)
    parser.add_argument("--most", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.budget, args.batches, args.most = "24MiB", "1", 1024
    device = pick(args.device)
    args.device = device.type
    setting = Setting(args.model, args.width, parse_bytes(args.budget, "--budget"), device)
    rows: list[dict[str, Any]] = []
    print(f"{'batch':>5}  {'arm':<17}{'pixels':>7}{'peak':>15}{'/budget':>9}{'seconds':>9}  units/blocks")
    for batch, arm in itertools.product(map(int, args.batches.split(",")), (*PEERS, OURS)):
        row = {"batch": batch, "arm": arm} | run(setting, arm, batch, args.step, args.most)
        rows.append(row)
        used = row["reserved"] or row["peak"]
        print(
            f"{batch:>5}  {arm:<17}{row['pixels']:>7}{row['peak']:>15,}{used / setting.budget:>9.3f}"
            f"{row['seconds']:>9.1f}  {row['units']}/{row['blocks']}",
            flush=True,
        )
    finish(args, rows, checks(rows, setting.budget))


if __name__ == "__main__":
    main()

"""Which auxiliary head: accuracy of every exit, cost of the head, against backpropagation at equal epochs.

    python -m bench.bench_head_kinds --cifar10 cifar10:DIR --fashion idx:DIR --threads 1 --json FILE

The candidates are plain modules h (N, C, H, W) -> logits (N, K) that step under autograd, so that only their shape
differs. All kinds see the same images in the same order; crop-flip augmentation, SGD, a cosine for each block. The
learning rate, 0.1 at batch 128, is backpropagation's: 0.05 gave it the same accuracy on CIFAR-10.
Models at width 1/4. Units end after these stages (1-based; the last unit ends with the model's own classifier):
    vgg16     13 stages (a convolution each)      K=2: 4       K=4: 1, 2, 4
    resnet18  9 stages (stem, 8 residual blocks)  K=2: 4       K=4: 1, 3, 5
Modes: `together`, all units step on the same batch; `block after block`, one unit a block, equal epochs for each, its
inputs recomputed from the frozen prefix with fresh augmentation; `layerwise`, one unit a stage, together.
Costs: FLOPs of one sample's forward and parameters are sums over a run's heads; bytes are the peak live bytes of the
largest head's step beyond its input and weights; share is CPU time of the heads in the CPU time of the local steps.

A long run is resumable: FILE is replaced after each run, and runs found in it are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.head_kinds import KINDS
from bench.timing import arguments, check, finish, images
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes
from nf_engine.heads import ModuleHead
from nf_engine.instruments import flops_of
from nf_engine.local_step import Unit, local_step, make_optimizer
from nf_engine.models import build
from nf_engine.partitioner import scaled_lr
from nf_engine.preprocess import Preprocess
from nf_engine.stages import Cut, split
from nf_engine.worker import ImageInputs, learning_rate

CPU = torch.device("cpu")
BACKPROPAGATION = "backpropagation"
TOGETHER, BLOCKS, LAYERWISE = "together", "block after block", "layerwise"
CUTS = {("vgg16", 2): (4,), ("vgg16", 4): (1, 2, 4), ("resnet18", 2): (4,), ("resnet18", 4): (1, 3, 5)}
TIMED_STEPS = 4

# --- what is run ----------------------------------------------------------------------------------------------------

DEFAULT = "deep d=1 pool 4 width 4"  # of the package, as this bench decided ...
NARROW = "deep d=1 pool 4 width 2"  # ... and what a small budget falls back to
FINALISTS = (DEFAULT, NARROW, "linear q=4", "deep d=1 pool 4", "deep d=2 pool 2", "deep d=2 pool 4")
LONGER = (DEFAULT, NARROW, "deep d=1 pool 4", "deep d=2", "deep d=2 width 4 pool 2", "linear q=4")
LOSERS = ("conv1x1", "conv3x3", "deep d=1 pool 4 no norm", "pool first")
FEW = (DEFAULT, "linear q=4")


class Case(NamedTuple):
    """One run: units K is 1 for backpropagation and 0 for one a stage; its fields open its row."""

    data: str
    model: str
    mode: str
    units: int
    kind: str
    seed: int


def group(data: str, model: str, mode: str, units: int, kinds: Iterable[str], seed: int) -> list[Case]:
    return [Case(data, model, mode, units, kind, seed) for kind in kinds]


def screen(data: str, seed: int) -> list[Case]:
    """Backpropagation and all kinds, vgg16."""
    base = Case(data, "vgg16", TOGETHER, 1, BACKPROPAGATION, seed)
    return [base, *group(data, "vgg16", TOGETHER, 4, KINDS, seed)]


def finalists(data: str, seed: int) -> list[Case]:
    """Backpropagation and the best kinds, vgg16."""
    base = Case(data, "vgg16", TOGETHER, 1, BACKPROPAGATION, seed)
    return [base, *group(data, "vgg16", TOGETHER, 4, FINALISTS, seed)]


def confirm(data: str, seed: int) -> list[Case]:
    """Backpropagation and what was close, for a longer training."""
    base = Case(data, "vgg16", TOGETHER, 1, BACKPROPAGATION, seed)
    return [base, *group(data, "vgg16", TOGETHER, 4, LONGER if seed == 0 else (DEFAULT, NARROW), seed)]


def losers(data: str, seed: int) -> list[Case]:
    """What the package does not have, and why."""
    return group(data, "vgg16", TOGETHER, 4, LOSERS, seed)


def few(data: str, seed: int) -> list[Case]:
    """Some kinds in other modes, and on resnet18."""
    bases = [Case(data, model, TOGETHER, 1, BACKPROPAGATION, seed) for model in ("vgg16", "resnet18")]
    return [
        bases[0],
        *group(data, "vgg16", TOGETHER, 2, FEW, seed),
        *group(data, "vgg16", BLOCKS, 4, FEW, seed),
        *group(data, "vgg16", LAYERWISE, 0, FEW, seed),
        bases[1],
        *group(data, "resnet18", TOGETHER, 4, FEW, seed),
    ]


def quick(data: str, seed: int) -> list[Case]:
    """A look at the bench itself: the accuracies of so short a training say nothing."""
    base = Case(data, "vgg16", TOGETHER, 1, BACKPROPAGATION, seed)
    return [base, *group(data, "vgg16", TOGETHER, 4, FEW, seed), Case(data, "vgg16", BLOCKS, 4, FEW[0], seed)]


PARTS: dict[str, tuple[Callable[[str, int], list[Case]], str, int]] = {  # cases, data set, number of seeds
    "screen-cifar": (screen, "cifar10", 1),
    "finalists-cifar": (finalists, "cifar10", 3),
    "finalists-fashion": (finalists, "fashion", 3),
    "few": (few, "cifar10", 3),
    "screen-fashion": (screen, "fashion", 1),
    "few-fashion": (few, "fashion", 3),
    "confirm-cifar": (confirm, "cifar10", 3),
    "confirm-fashion": (confirm, "fashion", 3),
    "losers-cifar": (losers, "cifar10", 1),
    "quick": (quick, "data", 1),
}


def cases(parts: Iterable[str]) -> list[Case]:
    """All runs in order, each once: the parts one after another, in each the first seed of everything first."""
    chosen = (PARTS[part] for part in parts)
    return list(dict.fromkeys(c for make, data, seeds in chosen for seed in range(seeds) for c in make(data, seed)))


# --- one run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How much training a run is; lr is meant at batch 128."""

    images: int
    epochs: int
    batch: int
    lr: float
    width: float = 0.25
    test: int = 4000


class ClockedHead(ModuleHead):
    """Adds up the CPU time of its steps, of all threads."""

    seconds = 0.0

    def step(self, h: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        started = time.process_time()
        result = super().step(h, labels, scale)
        self.seconds += time.process_time() - started
        return result


def unit_ends(case: Case, stages: int) -> tuple[int, ...]:
    """Numbers of stages after which a unit other than the last ends."""
    if case.kind == BACKPROPAGATION:
        return ()
    return tuple(range(1, stages)) if case.mode == LAYERWISE else CUTS[case.model, case.units]


def make_units(cut: Cut, case: Case, config: TrainConfig) -> list[Unit]:
    """The units in order; a head's weights are a function of (seed, stage)."""
    ends = (*unit_ends(case, len(cut.stages)), len(cut.stages))
    units = []
    for first, end in zip((0, *ends), ends, strict=False):
        module = cut.classifier
        if end < len(cut.stages):
            generator = torch.Generator().manual_seed(1000 * case.seed + end)
            module = KINDS[case.kind](cut.stages[end - 1].output_shape, cut.classes, generator)
        module = module.to(memory_format=torch.channels_last)
        head = ClockedHead(module, smoothing=config.label_smoothing)
        unit = Unit(f"{first + 1}-{end}", [s.module for s in cut.stages[first:end]], head)
        unit.optimizer = make_optimizer(unit.parameters(), config)
        units.append(unit)
    return units


def train_units(units: Sequence[Unit], inputs: ImageInputs, config: TrainConfig, batch: int) -> None:
    """Some epochs of one block; the units' learning rate warms up for one epoch, then falls by a cosine."""
    per_epoch = inputs.samples // batch
    warmup = round(per_epoch * min(config.warmup_epochs, config.epochs / 2))
    peak = scaled_lr(config, batch)
    for epoch in range(config.epochs):
        for k, (x, labels) in enumerate(inputs.train(epoch, batch)):
            step = epoch * per_epoch + k
            rate = learning_rate(step, config.epochs * per_epoch, warmup, peak)
            for unit in units:
                unit.set_rate(rate, peak)
                x, _ = local_step(unit, x, labels)


def exit_accuracies(units: Sequence[Unit], test: ImageData) -> list[float]:
    """Share of right answers of each exit."""
    for unit in units:
        unit.body.eval()
        unit.head.eval()
    plain, right = Preprocess(test.normalisation), [0] * len(units)
    with torch.no_grad():
        for ids in torch.arange(len(test)).split(200):
            pixels, labels = test.batch(ids)
            x = plain(pixels, None, stream=0)
            for k, unit in enumerate(units):
                x = unit.body(x)
                right[k] += int((unit.head(x).argmax(1) == labels).sum())
    return [count / len(test) for count in right]


def head_costs(units: Sequence[Unit], x: Tensor, labels: Tensor) -> dict[str, Any]:
    """FLOPs, parameters and step bytes of each auxiliary head, and their share of the time; trains the units on."""
    flops, peaks, total = [], [], 0.0
    for unit in units:
        unit.body.train()
        unit.head.train()
        with torch.no_grad():
            h = unit.body(x)
        if unit is not units[-1]:
            flops.append(flops_of(unit.head, tuple(h.shape[1:])))
            peaks.append(step_bytes(unit.head, h, labels))
        local_step(unit, x, labels)  # warms up, and drops the gradients of the step that was measured
        unit.head.seconds = 0.0
        started = time.process_time()
        for _ in range(TIMED_STEPS):
            local_step(unit, x, labels)
        total += time.process_time() - started
        x = h
    parameters = [sum(p.numel() for p in unit.head.parameters()) for unit in units[:-1]]
    share = sum(unit.head.seconds for unit in units[:-1]) / total
    return {"head_flops": flops, "head_parameters": parameters, "head_bytes": peaks, "head_share": round(share, 4)}


def step_bytes(head: nn.Module, h: Tensor, labels: Tensor) -> int:
    """Most bytes alive in a head's step beyond what it is given: maps, dh, gradients of the weights."""
    with TensorBytes([h, labels, *head.parameters(), *head.buffers()]) as counter:
        before = counter.now
        head.step(h, labels)
        return counter.peak - before


def train(case: Case, recipe: Recipe, data: ImageData) -> list[Unit]:
    """The units of a new network, trained in the case's mode."""
    config = TrainConfig(epochs=recipe.epochs, lr=recipe.lr, augment="crop-flip", device="cpu", seed=case.seed)
    torch.manual_seed(case.seed)
    network = build(case.model, classes=data.classes, width=recipe.width).to(memory_format=torch.channels_last)
    units = make_units(split(network, data.shape), case, config)
    preprocess = Preprocess(data.normalisation, config.augment, case.seed)
    for number, block in enumerate([[u] for u in units] if case.mode == BLOCKS else [units]):
        prefix = [u.body.eval() for u in units[:number]]
        inputs = ImageInputs(data, preprocess, CPU, case.seed, block=number, prefix=prefix)
        train_units(block, inputs, config, recipe.batch)
    return units


def run(case: Case, recipe: Recipe, data: ImageData, test: ImageData) -> dict[str, Any]:
    """The results in a case's row."""
    started = time.process_time()
    units = train(case, recipe, data)
    seconds = round(time.process_time() - started, 2)
    pixels, labels = data.batch(torch.arange(recipe.batch))
    x = Preprocess(data.normalisation)(pixels, None, stream=0)
    return {"exits": exit_accuracies(units, test), "cpu_seconds": seconds} | head_costs(units, x, labels)


# --- report ---------------------------------------------------------------------------------------------------------


def print_tables(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, float]]:
    """A table for each (data, model, mode, units); returns the mean accuracy of the last exit of each kind in it."""
    groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["kind"] != BACKPROPAGATION:
            place = row["data"], row["model"], row["mode"], row["units"]
            groups.setdefault(place, {}).setdefault(row["kind"], []).append(row)
    found = {}
    for place, kinds in groups.items():
        base = [r for r in rows if r["kind"] == BACKPROPAGATION and (r["data"], r["model"]) == place[:2]]
        kinds = ({BACKPROPAGATION: base} if base else {}) | kinds
        units = len(next(reversed(kinds.values()))[0]["exits"])
        print(f"\n{place[0]}, {place[1]}, {place[2]}, K={units}")
        print(f"{'kind':<20}{'sd':>5}{'n':>3}{'MFLOPs':>9}{'params':>9}{'MiB':>7}{'share':>7}{'CPU s':>7}  exits, %")
        for kind, group_rows in kinds.items():
            print(table_line(kind, group_rows))
        found[place] = {kind: mean_last(group_rows) for kind, group_rows in kinds.items()}
        heads = {kind: value for kind, value in found[place].items() if kind != BACKPROPAGATION}
        best = max(heads, key=lambda kind: heads[kind])
        print(f"best head by the whole network's accuracy: {best}, {heads[best]:.2%}")
    return found


def table_line(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    exits = [100 * statistics.mean(values) for values in zip(*(r["exits"] for r in rows), strict=True)]
    spread = 100 * statistics.stdev(r["exits"][-1] for r in rows) if len(rows) > 1 else 0.0
    first = rows[0]
    return (
        f"{kind:<20}{spread:>5.1f}{len(rows):>3}{sum(first['head_flops']) / 1e6:>9.2f}"
        f"{sum(first['head_parameters']):>9}{max(first['head_bytes'], default=0) / 2**20:>7.1f}"
        f"{statistics.mean(r['head_share'] for r in rows):>7.2f}{statistics.mean(r['cpu_seconds'] for r in rows):>7.1f}"
        f"  {' '.join(f'{e:.1f}' for e in exits)}"
    )


def mean_last(rows: Sequence[dict[str, Any]]) -> float:
    return statistics.mean(r["exits"][-1] for r in rows)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prints the tables and returns the checks, one for each recipe and data set; a value is a difference of means."""
    checks = {}
    for images_, epochs in dict.fromkeys((r["images"], r["epochs"]) for r in rows):
        print(f"\n{images_:,} images, {epochs} epochs")
        same = [r for r in rows if (r["images"], r["epochs"]) == (images_, epochs)]
        found = print_tables(same)
        for data in dict.fromkeys(r["data"] for r in same):
            means = found.get((data, "vgg16", TOGETHER, 4), {})
            both = BACKPROPAGATION in means and DEFAULT in means
            value = 100 * (means[BACKPROPAGATION] - means[DEFAULT]) if both else None
            name = f"points below backpropagation, {DEFAULT}, {data}, {images_:,} x {epochs}"
            checks[name] = check(value, "<= 2")
    return checks


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the file in one step: a run that is stopped leaves the old rows or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rows": list(rows)}), encoding="utf-8")
    part.replace(path)


def run_all(args: argparse.Namespace, recipe: Recipe, specs: dict[str, str]) -> list[dict[str, Any]]:
    """Runs what FILE does not hold yet; returns all its rows, also those of other parts and recipes."""
    rows: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists():
        rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    load = cache(lambda name: images(specs[name], recipe.images, recipe.test))
    for case in cases(args.parts.split(",")):
        key = case._asdict() | asdict(recipe)
        if any(row.items() >= key.items() for row in rows):
            continue
        if not specs[case.data]:
            raise SystemExit(f"expected --{case.data} SPEC, the data set to train on, for one of {args.parts}")
        rows.append(key | run(case, recipe, *load(case.data)))
        print(f"{' '.join(map(str, case)):<62}{table_line('', rows[-1:])[20:]}", flush=True)
        if args.json is not None:
            save(args.json, rows)
    return rows


def spec_of(kind: str, variable: str) -> str:
    """KIND:DIR from an environment variable that holds that or DIR alone; empty where it is not set."""
    found = os.environ.get(variable, "")
    return found if not found or ":" in found else f"{kind}:{found}"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--cifar10", default=spec_of("cifar10", "NF_DATA_CIFAR10"), help="cifar10:DIR, as --data")
    parser.add_argument("--fashion", default=spec_of("idx", "NF_DATA_FASHION"), help="idx:DIR, as --data")
    parser.add_argument("--parts", default=",".join(p for p in PARTS if p != "quick"), help=", ".join(PARTS))
    parser.add_argument("--images", type=int, default=8000, help="to train on")
    parser.add_argument("--epochs", type=int, default=4, help="for each block")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="at batch 128")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    specs = {"cifar10": args.cifar10, "fashion": args.fashion, "data": args.data}
    del args.cifar10, args.fashion  # folders of this machine do not enter the document
    if args.quick:
        args.parts, args.images, args.epochs = "quick", min(args.images, 1500), 2
    recipe = Recipe(args.images, args.epochs, args.batch, args.lr)
    rows = run_all(args, recipe, specs)
    finish(args, rows, summary(rows))


if __name__ == "__main__":
    main()

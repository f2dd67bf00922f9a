"""Accuracy at equal epochs under a budget: backpropagation, windows and layerwise, inputs recomputed and cached.

    python -m bench.bench_accuracy --data idx:DIR --json bench/results/accuracy_fashion.json

vgg11 at width 1/4, 10,000 training images, 8 epochs (for each block), crop-flip augmentation, three seeds. The budget
is 60 % of backpropagation's live peak at batch 128. Every arm sees the same images the same number of times; the
accuracy is the whole network's on the 10,000 test images, and the best exit's beside it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import nf_engine
from bench.timing import arguments, check, finish, images
from nf_engine.compare import Arm, train_peer
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.exits import evaluate
from nf_engine.models import build
from nf_engine.planner import Planner
from nf_engine.preprocess import Preprocess
from nf_engine.stages import split

ARMS = ("backpropagation", "windows recomputed", "windows cached", "layerwise recomputed", "layerwise cached")
SHARE = 0.6


def budget_of(data: ImageData, width: float, config: TrainConfig, share: float) -> int:
    """A share of the peak of backpropagation at batch 128: activations, gradients, weights and optimizer state."""
    cut = split(build("vgg11", width=width), data.shape)
    preprocess = Preprocess(data.normalisation, config.augment)
    planner = Planner(cut, config, preprocess, True, None, len(data), "vgg11", None, together=True)
    return int(share * planner.plan(1 << 40).bounds.backpropagation)


def run(arm: str, seed: int, data: ImageData, test: ImageData, config: TrainConfig, width: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = build("vgg11", width=width)
    strategy, _, tier = arm.partition(" ")
    if strategy == "backpropagation":
        cut = split(network, data.shape)
        result = train_peer(cut, data, test, config, Arm("backpropagation", 128), device=torch.device("cpu"))
        return {"accuracy": result.accuracy, "best_exit": result.accuracy, "seconds": sum(result.epoch_seconds),
                "peak": result.peak, "units": 1, "blocks": 1, "batches": [128]}  # fmt: skip
    cache = "recompute" if tier == "recomputed" else "disk"
    with tempfile.TemporaryDirectory() as folder:
        held_out = test.subset(torch.arange(min(512, len(test))))
        result = nf_engine.train(
            network, data, held_out, config=config, partition=strategy, cache=cache,
            progress="none", output_dir=Path(folder) / "run",
        )  # fmt: skip
        scores = [evaluate(result.model, test, policy=f"fixed:{k}").accuracy for k in range(result.model.exits)]
    return {
        "accuracy": scores[-1],
        "best_exit": max(scores),
        "exits": scores,
        "seconds": sum(result.timings[k] for k in ("train", "score", "cache_write")),
        "peak": max(m.allocated for m in result.memory),
        "units": len(result.plan.units),
        "blocks": len(result.plan.blocks),
        "batches": [b.batch for b in result.plan.blocks],
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--share", type=float, default=SHARE, help="budget as a share of backpropagation's peak at 128")
    parser.add_argument("--batch", type=int, help="samples a step of windows and layerwise; planned where left out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.epochs, args.images, args.seeds = 2, min(args.images, 2000), "0"
    data, test = images(args.data, args.images)
    config = TrainConfig(epochs=args.epochs, augment="crop-flip", device="cpu")
    budget = budget_of(data, args.width, config, args.share)
    config = config.with_fields({"memory_budget": budget, "batch_size": args.batch or "auto"})
    rows: list[dict[str, Any]] = []
    print(f"budget {budget} bytes, {args.share:.0%} of backpropagation's live peak at batch 128")
    print(
        f"{'arm':<22}{'seed':>5}{'accuracy':>10}{'best exit':>11}{'seconds':>9}{'peak/budget':>12}"
        "  units/blocks, batches"
    )
    for seed in (int(s) for s in args.seeds.split(",")):
        for arm in args.arms.split(","):
            before = next(
                (r for r in rows if r["seed"] == seed and r["blocks"] == 1 and _strategy(r) == arm.split()[0]), None
            )
            if before is not None and arm != "backpropagation":
                rows.append(before | {"arm": arm, "note": "one block: nothing to cache, the same run"})
                continue
            row = {"arm": arm, "seed": seed} | run(
                arm, seed, data, test, config.with_fields({"seed": seed}), args.width
            )
            row["peak_share"] = row["peak"] / budget
            rows.append(row)
            print(
                f"{arm:<22}{seed:>5}{row['accuracy']:>10.2%}{row['best_exit']:>11.2%}{row['seconds']:>9.1f}"
                f"{row['peak_share']:>12.2f}  {row['units']}/{row['blocks']}, {row['batches']}",
                flush=True,
            )
            if args.json is not None:
                args.json.with_suffix(".part").write_text(json.dumps(rows))
    finish(args, rows, summary(rows))


def _strategy(row: dict[str, Any]) -> str:
    return str(row["arm"]).partition(" ")[0]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, printed, and the checks."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row["accuracy"])
    for arm, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{arm:<22} mean {statistics.mean(values):.2%}, sd {100 * spread:.2f} points, n {len(values)}")
    checks = {}
    if "backpropagation" in found:
        base = statistics.mean(found["backpropagation"])
        for arm, values in found.items():
            if arm != "backpropagation":
                target = "<= 2" if arm.startswith("windows") else "<= 100"
                checks[f"points below backpropagation, {arm}"] = check(100 * (base - statistics.mean(values)), target)
    over = sum(r["peak_share"] > 1 for r in rows if r["arm"] != "backpropagation")
    return checks | {"runs over budget": check(over, "== 0")}


if __name__ == "__main__":
    main()

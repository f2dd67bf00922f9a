"""Epoch times under a budget: backpropagation, checkpointed backpropagation, windows and layerwise, in turn.

    python -m bench.bench_training --data idx:DIR --json bench/results/training.json

Same model, images, augmentation, optimizer and epochs; the arms run one after another in each round, and the rounds are
repeated, so that a drift of the machine hits them alike. An epoch of nf_engine holds everything but the plan: training,
held-out scores, cache writes; its plan is a column of its own. Two questions:
    equal     all arms at --batch, at which windows fits the budget and backpropagation does not
    largest   the peers at the largest batch that fits the budget, against windows at --batch
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import nf_engine
from bench.timing import arguments, check, finish, images
from nf_engine.compare import Arm, train_peer
from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span, checkpointed_peak
from nf_engine.data import ImageData
from nf_engine.exits import evaluate
from nf_engine.models import build
from nf_engine.planner import Planner
from nf_engine.preprocess import Preprocess
from nf_engine.stages import split

PEERS = ("backpropagation", "checkpointed")


class Bench:
    """One model, one budget: which batches fit, and one training of an arm."""

    def __init__(
        self, name: str, width: float, share: float, data: ImageData, test: ImageData, config: TrainConfig
    ) -> None:
        self.name, self.width, self.data, self.test = name, width, data, test
        planner = self.planner(config)
        self.costs = Costs(planner.profile, True, planner.measured, planner.settings.stored_dtype)
        self.budget = int(share * planner.plan(1 << 40).bounds.backpropagation)
        self.config = config.with_fields({"memory_budget": self.budget})

    def planner(self, config: TrainConfig) -> Planner:
        cut = split(build(self.name, width=self.width), self.data.shape)
        preprocess = Preprocess(self.data.normalisation, config.augment)
        made = Planner(cut, config, preprocess, True, None, len(self.data), self.name, None, together=True)
        return made

    def largest(self, arm: str) -> int:
        """The largest batch that a peer can train at inside the budget."""
        units = (Span(0, len(self.costs.profile.stages) - 1),)
        if arm == "backpropagation":
            return self.costs.largest_batch(units, self.budget, self.costs.overhead(units), 1024)
        fixed = self.costs.overhead(units) + self.costs.fixed(units)
        return max(b for b in range(1, 1025) if fixed + checkpointed_peak(self.costs, b) <= self.budget)

    def run(self, arm: str, batch: int | str, seed: int) -> dict[str, Any]:
        """Seconds of an epoch, accuracy and peak of one training."""
        torch.manual_seed(seed)
        network = build(self.name, width=self.width)
        config = self.config.with_fields({"seed": seed})
        if arm in PEERS:
            assert isinstance(batch, int)
            cut = split(network, self.data.shape)
            done = train_peer(cut, self.data, self.test, config, Arm(arm, batch), device=torch.device("cpu"))
            return {
                "epoch_seconds": statistics.mean(done.epoch_seconds),
                "accuracy": done.accuracy,
                "peak": done.peak,
                "plan_seconds": 0.0,
                "batches": [batch],
                "units": 1,
            }
        with tempfile.TemporaryDirectory() as folder:
            result = nf_engine.train(
                network,
                self.data,
                self.test.subset(torch.arange(min(512, len(self.test)))),
                config=config,
                partition=arm,
                batch_size=batch,
                progress="none",
                output_dir=Path(folder) / "run",
            )
            times = result.timings
            return {
                "epoch_seconds": (times["train"] + times["score"] + times["cache_write"]) / config.epochs,
                "accuracy": evaluate(result.model, self.test).accuracy,
                "peak": max(m.allocated for m in result.memory),
                "plan_seconds": times["plan"],
                "batches": [b.batch for b in result.plan.blocks],
                "units": len(result.plan.units),
            }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="vgg11")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--share", type=float, default=0.8, help="budget as a share of backpropagation's peak at 128")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.images, args.epochs, args.rounds = min(args.images, 2000), 1, 1
    data, test = images(args.data, args.images, 2000)
    bench = Bench(
        args.model,
        args.width,
        args.share,
        data,
        test,
        TrainConfig(epochs=args.epochs, augment="crop-flip", device="cpu"),
    )
    cases: list[tuple[str, str, int | str]] = [("equal", arm, args.batch) for arm in (*PEERS, "windows")]
    cases += [("largest", arm, bench.largest(arm)) for arm in PEERS]
    cases.append(("largest", "layerwise", "auto"))
    print(
        f"{args.model} at width {args.width}, budget {bench.budget:,} bytes, "
        f"{args.share:.0%} of backpropagation's peak at 128"
    )
    print(
        f"{'case':<9}{'arm':<17}{'round':>6}{'s/epoch':>9}{'plan s':>8}{'accuracy':>10}{'peak':>13}{'/budget':>9}"
        "  batches"
    )
    rows: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for case, arm, batch in cases:
            row = {"case": case, "arm": arm, "round": number} | bench.run(arm, batch, number)
            rows.append(row)
            print(
                f"{case:<9}{arm:<17}{number:>6}{row['epoch_seconds']:>9.2f}{row['plan_seconds']:>8.1f}{row['accuracy']:>10.2%}"
                f"{row['peak']:>13,}{row['peak'] / bench.budget:>9.2f}  {row['batches']}",
                flush=True,
            )
    finish(args, rows, checks(rows, bench.budget))


def checks(rows: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Ratios of epoch times, round by round, then their median."""

    def ratio(case: str, arm: str, other_case: str, other: str) -> float:
        def seconds(wanted_case: str, wanted: str) -> dict[int, float]:
            return {r["round"]: r["epoch_seconds"] for r in rows if (r["case"], r["arm"]) == (wanted_case, wanted)}

        mine, theirs = seconds(case, arm), seconds(other_case, other)
        return statistics.median(mine[k] / theirs[k] for k in mine)

    ours = [r for r in rows if r["arm"] not in PEERS]
    return {
        "windows / backpropagation, equal batch": check(
            ratio("equal", "windows", "equal", "backpropagation"), "<= 1.05"
        ),
        "windows / checkpointed, equal batch": check(ratio("equal", "windows", "equal", "checkpointed"), "< 1"),
        "windows / backpropagation at the largest batch in the budget": check(
            ratio("equal", "windows", "largest", "backpropagation"), "< 1"
        ),
        "windows / checkpointed at the largest batch in the budget": check(
            ratio("equal", "windows", "largest", "checkpointed"), "< 1"
        ),
        "runs of nf_engine over budget": check(sum(r["peak"] > budget for r in ours), "== 0"),
    }


if __name__ == "__main__":
    main()

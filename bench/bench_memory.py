"""Peak tensor bytes of whole runs against their budgets: budgets x models x strategies.

    python -m bench.bench_memory --json bench/results/memory.json

Each row is one `nf_engine.train` under a meter that counts every tensor that operators make, from the first line to the
last: splitting, profiling, probing, training, scoring, caching. The meter slows a run; seconds are not compared.
Budgets are shares of backpropagation's peak at batch 128. What does not fit is refused before training and says so.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import nf_engine
from bench.timing import arguments, check, finish, images
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes
from nf_engine.errors import InfeasibleBudgetError
from nf_engine.models import build
from nf_engine.planner import Planner
from nf_engine.preprocess import Preprocess
from nf_engine.stages import split

SHARES = (0.25, 0.35, 0.5, 0.6, 0.75, 1.1)
MODELS = ("vgg11", "resnet18")
STRATEGIES = ("windows", "layerwise")


def backpropagation_peak(name: str, width: float, data: ImageData) -> int:
    network = build(name, width=width)
    preprocess = Preprocess(data.normalisation)
    planner = Planner(
        split(network, data.shape), TrainConfig(), preprocess, True, None, 10_000, name, None, together=True
    )
    return planner.plan(1 << 40).bounds.backpropagation


def run(name: str, width: float, strategy: str, budget: int, data: ImageData, held: ImageData) -> dict[str, Any]:
    """One whole training under the meter."""
    network = build(name, width=width)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, TensorBytes([*network.parameters(), *network.buffers()]) as counter:
        try:
            result = nf_engine.train(
                network, data, held, memory_budget=budget, partition=strategy, epochs=1, device="cpu", progress="none",
                max_batch_size=128, output_dir=Path(folder) / "run",
            )  # fmt: skip
        except InfeasibleBudgetError as error:
            return {"feasible": False, "need": error.need, "peak": counter.peak}
    return {
        "feasible": True,
        "peak": counter.peak,
        "predicted": result.plan.peak,
        "batches": [b.batch for b in result.plan.blocks],
        "units": len(result.plan.units),
        "tiers": [b.cache.tier for b in result.plan.blocks],
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--width", type=float, default=0.25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, held = images(args.data, 300 if args.quick else 600, 100)
    rows: list[dict[str, Any]] = []
    print(
        f"{'model':<10}{'strategy':<11}{'share':>6}{'budget':>12}{'predicted':>12}{'measured':>12}{'/budget':>9}{'off':>7}"
        "  batches"
    )
    shares = SHARES[1::2] if args.quick else SHARES
    for name in MODELS[:1] if args.quick else MODELS:
        whole = backpropagation_peak(name, args.width, data)
        for strategy in STRATEGIES:
            for share in shares:
                budget = int(share * whole)
                gc.collect()
                row = {"model": name, "strategy": strategy, "share": share, "budget": budget}
                row |= run(name, args.width, strategy, budget, data, held)
                rows.append(row)
                print(describe(row), flush=True)
    ran = [r for r in rows if r["feasible"]]
    finish(args, rows, {
        "runs over budget": check(sum(r["peak"] > r["budget"] for r in rows), "== 0"),
        "runs": check(len(ran), ">= 1"),
        "largest error of the predicted peak, %": check(
            max(100 * abs(r["predicted"] / r["peak"] - 1) for r in ran), "<= 5"
        ),
    })  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    head = f"{row['model']:<10}{row['strategy']:<11}{row['share']:>6}{row['budget']:>12,}"
    if not row["feasible"]:
        return f"{head}  does not fit: needs {row['need']:,}; refused before training"
    return (
        f"{head}{row['predicted']:>12,}{row['peak']:>12,}{row['peak'] / row['budget']:>9.3f}"
        f"{row['predicted'] / row['peak'] - 1:>7.1%}  {row['batches']}"
    )


if __name__ == "__main__":
    main()

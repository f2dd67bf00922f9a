"""Peak bytes of whole runs against their budgets: budgets x models x strategies.

    python -m bench.bench_memory --json bench/results/memory.json
    python -m bench.bench_memory --device cuda --width 1 --precision bf16-mixed --json FILE    on a GPU

Each row is one `nf_engine.train`. On the CPU it runs under a meter that counts every tensor that operators make, from
the first line to the last: splitting, profiling, probing, training, scoring, caching. The meter slows a run; seconds
are not compared. On a GPU the allocator counts, beyond what it held before, while blocks train: peak in tensors, and
the reserved bytes; shrunk counts the batches for which it had no room though they were planned. What lies between peak
and reserved is fragmentation: run it again with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
Budgets are shares of backpropagation's peak at batch 128. What does not fit is refused before training and says so.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import nf_engine
from bench.timing import arguments, check, finish, images
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes, pick
from nf_engine.errors import InfeasibleBudgetError
from nf_engine.models import build
from nf_engine.planner import Planner
from nf_engine.preprocess import Preprocess
from nf_engine.stages import split

SHARES = (0.25, 0.35, 0.5, 0.6, 0.75, 1.1)
MODELS = ("vgg11", "resnet18")
STRATEGIES = ("windows", "layerwise")


def backpropagation_peak(name: str, width: float, data: ImageData, config: TrainConfig, device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    planner = Planner(
        split(build(name, width=width), data.shape), config, Preprocess(data.normalisation), True,
        device if on_gpu else None, 10_000, name, None, together=not on_gpu,
    )  # fmt: skip
    return planner.plan(1 << 40).bounds.backpropagation


def run(
    name: str, width: float, strategy: str, budget: int, data: ImageData, held: ImageData, config: TrainConfig
) -> dict[str, Any]:
    """One whole training, on the CPU under the meter."""
    network = build(name, width=width)
    on_gpu = config.device == "cuda"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        counter = None
        if not on_gpu:
            counter = stack.enter_context(TensorBytes([*network.parameters(), *network.buffers()]))
        try:
            result = nf_engine.train(
                network, data, held, config=config, memory_budget=budget, partition=strategy, progress="none",
                output_dir=Path(folder) / "run",
            )  # fmt: skip
        except InfeasibleBudgetError as error:
            return {"feasible": False, "need": error.need, "peak": counter.peak if counter else 0, "reserved": 0}
        lines = map(json.loads, (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines())
        shrunk = sum(line["event"] == "out_of_memory" for line in lines)
    return {
        "feasible": True,
        "peak": counter.peak if counter else max(m.allocated for m in result.memory),
        "reserved": max(m.reserved for m in result.memory),
        "shrunk": shrunk,
        "predicted": result.plan.peak,
        "batches": [b.batch for b in result.plan.blocks],
        "units": len(result.plan.units),
        "tiers": [b.cache.tier for b in result.plan.blocks],
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, held = images(args.data, 300 if args.quick else 600, 100)
    device = pick(args.device)
    config = TrainConfig(device=device.type, precision=args.precision, epochs=1, max_batch_size=128)
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    rows: list[dict[str, Any]] = []
    print(
        f"{'model':<10}{'strategy':<11}{'share':>6}{'budget':>14}{'predicted':>14}{'measured':>14}{'/budget':>9}{'off':>7}"
        "  batches"
    )
    shares = SHARES[1::2] if args.quick else SHARES
    for name in MODELS[:1] if args.quick else MODELS:
        whole = backpropagation_peak(name, args.width, data, config, device)
        for strategy in STRATEGIES:
            for share in shares:
                budget = int(share * whole)
                gc.collect()
                row = {"model": name, "strategy": strategy, "share": share, "budget": budget, "allocator": allocator}
                row |= run(name, args.width, strategy, budget, data, held, config)
                rows.append(row)
                print(describe(row), flush=True)
    ran = [r for r in rows if r["feasible"]]
    finish(args, rows, {
        "runs over budget": check(sum((r["reserved"] or r["peak"]) > r["budget"] for r in rows), "== 0"),
        "runs": check(len(ran), ">= 1"),
        "largest error of the predicted peak, %": check(
            max(100 * abs(r["predicted"] / r["peak"] - 1) for r in ran), "<= 5"
        ),
    })  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    head = f"{row['model']:<10}{row['strategy']:<11}{row['share']:>6}{row['budget']:>14,}"
    if not row["feasible"]:
        return f"{head}  does not fit: needs {row['need']:,}; refused before training"
    return (
        f"{head}{row['predicted']:>14,}{row['peak']:>14,}{(row['reserved'] or row['peak']) / row['budget']:>9.3f}"
        f"{row['predicted'] / row['peak'] - 1:>7.1%}  {row['batches']}" + (" shrunk" if row["shrunk"] else "")
    )


if __name__ == "__main__":
    main()

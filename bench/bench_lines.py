"""Peaks predicted by lines over the batch, summed over stages, against whole steps: networks x batches x precisions.

    python -m bench.bench_lines --json bench/results/lines.json
    python -m bench.bench_lines --device cuda --precision bf16-mixed --json FILE    on a GPU

Stages are profiled at batches 8, 64 and 512. Each row holds one unit's peak, as the sum over its stages' lines has it,
and as a step of the whole unit has it, weights and optimizer state apart: all stages, each half of them, the largest
stage. The Planner measures the units that it chose whole, so that no plan carries such an error; it costs rounds.
On a GPU its allocator counts, with the workspaces of its libraries. Without one, fake tensors are run.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from bench.timing import arguments, check, finish
from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span
from nf_engine.device import pick
from nf_engine.models import build
from nf_engine.peaks import profile_unit
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import profile_stages
from nf_engine.records import UnitPlan
from nf_engine.recovery import is_out_of_memory
from nf_engine.stages import Cut, split

NETS = (  # name, pixels
    *(("vgg11", 32), ("vgg13", 32), ("vgg16", 32), ("vgg19", 64), ("vgg16", 224)),
    *(("resnet18", 32), ("resnet34", 32), ("resnet50", 32), ("resnet18", 64), ("resnet50", 224)),
)
SIZES = (8, 16, 32, 64, 128, 256)
LARGE_BATCH = 128  # at which the largest stage is the largest
OFF = 0.05  # of the peak: TrainConfig.memory_margin


def spans(costs: Costs, count: int) -> dict[str, Span]:
    """The units that are compared."""
    half = count // 2
    largest = max(range(count), key=lambda k: costs.unit(Span(k, k), LARGE_BATCH))
    return {
        "whole": Span(0, count - 1),
        "first half": Span(0, half - 1),
        "second half": Span(half, count - 1),
        "largest stage": Span(largest, largest),
    }


def measured(cut: Cut, costs: Costs, span: Span, config: TrainConfig, batch: int, device: torch.device) -> int | None:
    """Peak bytes of a step of the unit; None where the device has not so many."""
    head = costs.profile.stages[span.last].head
    unit = UnitPlan(span.first, span.last, head.spec, head.path, 0)
    try:
        return round(profile_unit(cut, unit, config, batch, device).at(batch))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None


def rows_of(name: str, pixels: int, width: float, config: TrainConfig, device: torch.device) -> list[dict[str, Any]]:
    """All units of a network at all batches."""
    torch.manual_seed(0)
    cut = split(build(name, width=width, input_size=pixels), (3, pixels, pixels))
    images = Preprocess(Normalisation((0.0,) * 3, (255.0,) * 3))
    there = device if device.type == "cuda" else None
    profile = profile_stages(cut, config, images, name=name, uint8=True, device=there)
    costs = Costs(profile, False, {}, config.stored_dtype)
    rows = []
    for unit, span in spans(costs, len(cut.stages)).items():
        for batch in SIZES:
            peak = measured(cut, costs, span, config, batch, device)
            row = {"net": name, "pixels": pixels, "unit": unit, "first": span.first, "last": span.last, "batch": batch}
            predicted = round(costs.unit(span, batch))
            rows.append(
                row | {"predicted": predicted, "peak": peak, "off": None if peak is None else predicted / peak - 1}
            )
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--width", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick(args.device)
    args.device = device.type
    config = TrainConfig(device=device.type, precision=args.precision)
    rows: list[dict[str, Any]] = []
    print(f"{'net':<10}{'pixels':>7}  {'unit':<15}" + "".join(f"{size:>9}" for size in SIZES) + "   off at each batch")
    for name, pixels in NETS[::5] if args.quick else NETS:
        made = rows_of(name, pixels, args.width, config, device)
        rows += made
        for unit in dict.fromkeys(r["unit"] for r in made):
            cells = ("-" if r["off"] is None else f"{r['off']:.2%}" for r in made if r["unit"] == unit)
            print(f"{name:<10}{pixels:>7}  {unit:<15}" + "".join(f"{cell:>9}" for cell in cells), flush=True)
    off = [r["off"] for r in rows if r["off"] is not None]
    finish(args, rows, {
        "units whose peak is more than 5 % off, %": check(100 * sum(abs(v) > OFF for v in off) / len(off), "<= 5"),
        "most that a sum is below the peak, %": check(max(0.0, -100 * min(off)), "<= 5"),
    })  # fmt: skip


if __name__ == "__main__":
    main()

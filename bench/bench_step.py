"""The training step alone: units, recomputation and CUDA graphs against a plain loop, on one batch that stays in place.

    python -m bench.bench_step --threads 1 --json bench/results/step.json

The same network, batch, loss and optimizer for all; candidates in turn, medians of the ratios round by round:
    backpropagation   the loop that a user would write
    checkpointed      the same; all segments but the last of `recomputed` run again (torch.utils.checkpoint inside)
    one unit          nf_engine's step of a single unit: what its own machinery costs
    recomputed        one unit that runs the stages before CUT again
    two, four units   with linear and with deep heads, as the planner would take
On a GPU each of ours also as one CUDA graph, and ten steps under torch.profiler: wall time over the sum of the kernels.
With --json the trace of those steps lies beside it. CPU times are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.bench_head_kinds import CUTS
from bench.bench_heads import in_turn
from bench.head_peers import captured
from bench.timing import arguments, check, finish
from nf_engine.config import TrainConfig
from nf_engine.device import pick, placed
from nf_engine.instruments import flops_of
from nf_engine.local_step import Unit, make_optimizer, train_block
from nf_engine.models import build
from nf_engine.precision import compute_dtype, forward
from nf_engine.stages import Cut, split
from nf_engine.step_graph import WARM_UP, CudaRecorder, StepGraph
from nf_engine.unit_heads import head_specs, make_head

CUT = 4  # stages before it run twice in `recomputed`
TRACED = 10  # steps
PLAIN = "backpropagation"
ARMS: dict[str, tuple[int, tuple[int, ...], str]] = {  # units, where segments start, kind of the heads
    "one unit": (1, (), "linear"),
    "recomputed": (1, (CUT,), "linear"),
    "two units": (2, (), "linear"),
    "four units": (4, (), "deep"),
}


def plain_step(cut: Cut, starts: Sequence[int], config: TrainConfig, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """One update of the whole network, as a user would write it."""
    stages = [s.module for s in cut.stages]
    optimizer = make_optimizer([p for m in (*stages, cut.classifier) for p in m.parameters()], config)

    def run(first: int, end: int, h: Tensor) -> Tensor:
        for stage in stages[first:end]:
            h = forward(stage, h)
        return h

    def step() -> None:
        edges = [0, *starts]
        h = x
        for first, end in itertools.pairwise(edges):
            h = checkpoint(partial(run, first, end), h, use_reentrant=False, preserve_rng_state=False)  # none is drawn
        logits = cut.classifier(run(edges[-1], len(stages), h).float())
        F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def units_of(cut: Cut, model: str, arm: str, config: TrainConfig, device: torch.device) -> list[Unit]:
    count, starts, kind = ARMS[arm]
    shapes = [cut.input_shape, *(s.output_shape for s in cut.stages)]
    flops = [flops_of(s.module, shape) for s, shape in zip(cut.stages, shapes, strict=False)]
    specs = head_specs(cut, config.with_fields({"head": kind}), flops)
    ends = (*(CUTS[model, count] if count > 1 else ()), len(cut.stages))
    units = []
    for first, end in zip((0, *ends), ends, strict=False):
        head = make_head(cut, specs[end - 1], end - 1, config)
        unit = Unit(f"{first + 1}-{end}", [s.module for s in cut.stages[first:end]], head, starts)
        for module in unit.modules():
            placed(module, device).train()
        unit.prepare(config)
        units.append(unit)
    return units


def our_step(units: list[Unit], x: Tensor, labels: Tensor, graph: bool) -> Callable[[], None]:
    """One update of all units, eager or as a graph that has been recorded already."""
    losses = torch.zeros(len(units), device=x.device)
    recorder = CudaRecorder(x.device, print) if graph else None
    replay = StepGraph(units, losses, recorder) if recorder is not None else None

    def step() -> None:
        train_block(units, [(x, labels)], losses, replay)

    for _ in range(WARM_UP + 1 if graph else 0):
        step()
    assert recorder is None or recorder.refusal is None, recorder.refusal
    return step


def candidates(
    model: str, width: float, batch: int, config: TrainConfig, device: torch.device
) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(device, compute_dtype(config))
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator).to(device)

    def network() -> Cut:
        torch.manual_seed(0)
        made = split(build(model, width=width), (3, 32, 32))
        for module in (*(s.module for s in made.stages), made.classifier):
            placed(module, device).train()
        return made

    found: dict[str, Callable[[], object]] = {PLAIN: plain_step(network(), (), config, x, labels)}
    found["checkpointed"] = plain_step(network(), (CUT,), config, x, labels)
    if device.type == "cuda":
        for name, starts in ((PLAIN, ()), ("checkpointed", (CUT,))):
            found[f"{name}, graph"] = captured(plain_step(network(), starts, config, x, labels))
    for arm in ARMS:
        for graph in (False, True) if device.type == "cuda" else (False,):
            units = units_of(network(), model, arm, config, device)
            found[arm + (", graph" if graph else "")] = our_step(units, x.clone(), labels.clone(), graph)
    return found


def traced(step: Callable[[], object], place: Path | None) -> float | None:
    """Wall time of some steps over that of their kernels; 1: the device never waits, None: no kernel was seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TRACED):
            step()
        torch.cuda.synchronize()
    spans = [e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if place is not None:
        profile.export_chrome_trace(str(place))
    if not spans:
        return None
    wall = max(s.end for s in spans) - min(s.start for s in spans)
    return float(wall / sum(s.elapsed_us() for s in spans))


def measure(args: argparse.Namespace, model: str, device: torch.device) -> list[dict[str, Any]]:
    """A row for each candidate: milliseconds, and the ratio to backpropagation, as medians over the rounds."""
    config = TrainConfig(precision=args.precision, device=device.type)
    steps = candidates(model, args.width, args.batch, config, device)
    times = in_turn(steps, device, args.rounds)
    clocked = 0 if device.type == "cuda" else 1
    rows = []
    for name in steps:
        ratios = [a[clocked] / b[clocked] for a, b in zip(times[name], times[PLAIN], strict=True)]
        row = {
            "model": model, "step": name, "device": device.type, "batch": args.batch, "width": args.width,
            "precision": args.precision, "ms": 1e3 * statistics.median(t[clocked] for t in times[name]),
            "ratio": statistics.median(ratios), "wall_to_kernels": None,
        }  # fmt: skip
        if device.type == "cuda":
            place = args.json and args.json.with_name(f"{args.json.stem}_{model}.trace.json")
            place = place if name == "four units, graph" else None
            row["wall_to_kernels"] = traced(steps[name], place)
        rows.append(row)
        gap = "-" if row["wall_to_kernels"] is None else f"{row['wall_to_kernels']:.3f}"
        print(f"{model:<10}{name:<22}{row['ms']:>10.3f}{row['ratio']:>8.3f}{gap:>8}", flush=True)
    return rows


def checks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for model in dict.fromkeys(r["model"] for r in rows):
        of = {r["step"]: r for r in rows if r["model"] == model}
        found[f"{model}: one unit / backpropagation"] = check(of["one unit"]["ratio"], "<= 1.05")
        found[f"{model}: two units / backpropagation"] = check(of["two units"]["ratio"], "<= 1.05")
        found[f"{model}: two units / checkpointed"] = check(
            of["two units"]["ratio"] / of["checkpointed"]["ratio"], "<= 0.85"
        )
        found[f"{model}: recomputed / checkpointed"] = check(
            of["recomputed"]["ratio"] / of["checkpointed"]["ratio"], "<= 1.02"
        )
        graphs = [of[name] for name in (f"{arm}, graph" for arm in ARMS) if name in of]
        gaps = [r["wall_to_kernels"] for r in graphs if r["wall_to_kernels"] is not None]
        found[f"{model}: step as a graph / its kernels"] = check(max(gaps, default=None), "<= 1.05")
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", default="vgg16,resnet18")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=float, help="1/4 on the CPU, 1 on a GPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick(args.device)
    args.width = args.width or (1.0 if device.type == "cuda" else 0.25)
    if args.quick:
        args.rounds, args.models = 3, "vgg16"
    print(f"{'model':<10}{'step':<22}{'ms':>10}{'ratio':>8}{'/kernels':>8}")
    own = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()  # where graphs record
    with own:
        rows = [row for model in args.models.split(",") for row in measure(args, model, device)]
    finish(args, rows, checks(rows))


if __name__ == "__main__":
    main()

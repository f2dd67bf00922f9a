"""Heads: forward, loss and backward of each kind against PyTorch eager and torch.compile, in time and in bytes.

    python -m bench.bench_heads --threads 1 --json bench/results/heads.json

x (N, C, H, W), C@H in the table. Kinds: linear q=1, 2, 4; deep d=1 pool 4 and d=2, as wide as x; and the end that all
have, "tail": linear and loss on 512 features, a map of one pixel. Candidates, each plain and on CUDA in a CUDA graph:
    eager         nn.Sequential, as models write it (nn.AdaptiveAvgPool2d, ...), and F.cross_entropy under autograd; for
                  bfloat16 x under autocast, with float32 weights
    compile       the same through torch.compile; max-autotune with that mode (without its own graphs), on CUDA
    reference     ops' plain PyTorch step, without autograd
    fused         the Triton path, on CUDA; through ops.head_step, as is the CPU's reference, checks included
Each step gives loss, dx and float32 gradients of the weights, and is held against float64 before it is timed. The
candidates run in turn; a ratio is the median over the rounds. On CUDA small x come from a rotation that exceeds the L2.
On the CPU ratios are of CPU time, which other processes disturb less. GB/s counts the least bytes: x read, dx written
(but not for linear q=1, whose dx is a broadcast view), against the bandwidth of copy_ in the same run. Peak bytes are
beyond x; of compiled CPU code they are not seen. The closed form is of contiguous x: there it is compared, whatever
--layout is timed.
A second table: what share of a unit's local step its head takes, in the engine's own units and precision (float32).

--only and --add split a long run: a row measured again replaces the row in FILE, the others stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import plots
from bench.bench_head_kinds import CUTS, save
from bench.head_peers import NAMES, PEERS, TAIL, Case, Problem, Step, captured, cases, make_step, ours
from bench.timing import arguments, check, finish
from nf_engine.config import TrainConfig
from nf_engine.device import meter, pick
from nf_engine.heads import head_bytes
from nf_engine.instruments import flops_of
from nf_engine.local_step import Unit, local_step, make_optimizer
from nf_engine.models import build
from nf_engine.records import HeadSpec
from nf_engine.stages import split
from nf_engine.unit_heads import head_specs, make_head

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
KEY = ("device", "layout", "shape", "batch", "classes", "dtype", "kind", "candidate", "mode")
UNIT_KEY = ("device", "model", "unit", "batch")

# --- time and bytes -------------------------------------------------------------------------------------------------


def clock(run: Callable[[], object], device: torch.device, count: int = 1) -> tuple[float, float]:
    """Seconds of a call, the mean of some: on the wall (on CUDA between two events), and of this process's CPU."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    if marks:
        torch.cuda.synchronize(device)
        marks[0].record()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if marks:
        marks[1].record()
        torch.cuda.synchronize(device)
        wall = marks[0].elapsed_time(marks[1]) / 1e3
    return wall / count, cpu / count


def in_turn(
    runs: dict[Any, Callable[[], object]], device: torch.device, rounds: int
) -> dict[Any, list[tuple[float, float]]]:
    """Seconds of each call, round after round: A B A B. Short calls are repeated inside a round."""
    least = 0.005 if device.type == "cuda" else 0.05  # seconds
    for run in runs.values():
        run()
    counts = {key: min(100, math.ceil(least / clock(run, device)[0])) for key, run in runs.items()}
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(clock(run, device, counts[key]))
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that copy_ reads and writes."""
    source = torch.randn((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    times = in_turn({"copy": lambda: target.copy_(source)}, device, 9)["copy"]
    return 2 * source.nbytes / statistics.median(wall for wall, _ in times)


def peak_bytes(step: Step, problem: Problem) -> int:
    """Most bytes alive in a step beyond what it is given."""
    given = [problem.xs[0], problem.labels, problem.scale, *problem.params.flat(), *problem.running[0],
             *problem.running[1], *problem.module.buffers()]  # fmt: skip
    with meter(problem.device, given) as counter:
        before = counter.now
        step(problem.xs[0])
        return counter.peak - before


def against_closed_form(case: Case, device: torch.device, name: str) -> dict[str, int]:
    problem = Problem(case, device, torch.contiguous_format)
    step = make_step(name, problem)
    step(problem.xs[0])  # libraries take their workspaces
    closed = head_bytes(case.spec, case.shape, case.classes, case.batch, case.dtype.itemsize, name)
    return {"peak_contiguous": peak_bytes(step, problem), "closed_form": closed}


def measure(
    case: Case, device: torch.device, layout: str, names: Sequence[str], rounds: int, copied: float
) -> list[dict[str, Any]]:
    """A row for each candidate and mode; one that fails, or disagrees with float64, has a note instead of times."""
    if set(names) & set(PEERS):
        torch.compiler.reset()  # or shapes seen before would count as recompilations
    problem = Problem(case, device, LAYOUTS[layout])
    place = {"device": device.type, "layout": layout}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, mode in itertools.product(names, ("plain", "graph") if device.type == "cuda" else ("plain",)):
        rows[name, mode] = row = place | case.names() | {"candidate": name, "mode": mode}
        if "note" in (plain := rows[name, "plain"]):
            row["note"] = plain["note"]
            continue
        try:
            if mode == "plain":
                step = make_step(name, problem)
                row["error"] = problem.error(step(problem.xs[0]))
                if device.type == "cuda" or name not in PEERS:
                    row["peak"] = peak_bytes(step, problem)
                if name in ("reference", "fused"):
                    row |= against_closed_form(case, device, name)
                run = lambda step=step: [step(x) for x in problem.xs]  # noqa: E731
            else:
                run = captured(runs[name, "plain"])
                row["error"] = problem.error(run()[0])
        except Exception as error:  # no compiler, out of memory, what a graph cannot hold: the others are measured
            row["note"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
            continue
        if not row["error"] <= problem.tolerance():
            row["note"] = f"error {row['error']:.2g} against float64, at most {problem.tolerance():g}"
        else:
            runs[name, mode] = run
    times = in_turn(runs, device, rounds)
    for key, seen in times.items():
        rows[key] |= summary_of(seen, times.get(("eager", key[1])), len(problem.xs), case, copied, device)
    return list(rows.values())


def summary_of(
    seen: Sequence[tuple[float, float]], eager: Sequence[tuple[float, float]] | None, steps: int, case: Case,
    copied: float, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Medians of a candidate's rounds of so many steps."""
    clocked = 0 if device.type == "cuda" else 1
    low, *_, high = statistics.quantiles((1e3 * wall / steps for wall, _ in seen), n=5)
    wall = statistics.median(t[0] for t in seen) / steps
    speed = case.least_bytes / wall
    row = {"ms": 1e3 * wall, "ms_20": low, "ms_80": high,
           "cpu_ms": 1e3 * statistics.median(t[1] for t in seen) / steps,
           "gb_per_second": speed / 1e9, "copy_share": speed / copied}  # fmt: skip
    if eager is not None:
        row["eager_ratio"] = statistics.median(e[clocked] / t[clocked] for e, t in zip(eager, seen, strict=True))
    return row


# --- share of a unit's step -----------------------------------------------------------------------------------------


def units_of(model: str, width: float, device: torch.device) -> Iterator[tuple[Unit, tuple[int, ...], HeadSpec]]:
    """The units of a K=4 cut that have an auxiliary head, the shape of their input, and the head."""
    config = TrainConfig(head="deep")  # what "auto" takes for four units
    cut = split(build(model, width=width), (3, 32, 32))
    inputs = [cut.input_shape, *(s.output_shape for s in cut.stages)]
    specs = head_specs(cut, config, [flops_of(s.module, shape) for s, shape in zip(cut.stages, inputs, strict=False)])
    start = 0
    for end in CUTS[model, 4]:
        head = make_head(cut, specs[end - 1], end - 1, config)
        unit = Unit(f"{start + 1}-{end}", [s.module for s in cut.stages[start:end]], head)
        for module in unit.modules():
            module.to(device, memory_format=torch.channels_last)
        unit.optimizer = make_optimizer(unit.parameters(), config)
        yield unit, inputs[start], specs[end - 1]
        start = end


def head_shares(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Time of head.step over time of local_step, for each unit; in turn."""
    width, batch = (1.0, 256) if device.type == "cuda" else (0.25, 64)
    for model in ("vgg16", "resnet18"):
        for unit, shape, spec in units_of(model, width, device):
            x = torch.randn(batch, *shape, device=device).to(memory_format=torch.channels_last)
            labels = torch.randint(10, (batch,), device=device)
            with torch.no_grad():
                h = unit.body(x)

            def head(unit: Unit = unit, h: Tensor = h, labels: Tensor = labels) -> None:
                unit.head.step(h, labels)
                for parameter in unit.head.parameters():
                    parameter.grad = None

            def whole(unit: Unit = unit, x: Tensor = x, labels: Tensor = labels) -> None:
                local_step(unit, x, labels)

            runs: dict[str, Callable[[], object]] = {"head": head, "step": whole}
            if device.type == "cuda":  # as the engine runs them: alone, launches would be most of so short a time
                runs = {name: captured(run) for name, run in runs.items()}
            times = in_turn(runs, device, rounds)
            clocked = 0 if device.type == "cuda" else 1
            shares = [a[clocked] / b[clocked] for a, b in zip(times["head"], times["step"], strict=True)]
            yield {
                "device": device.type, "model": model, "unit": unit.name, "batch": batch, "width": width,
                "head": f"{spec.kind} q={spec.pool} width={spec.width} d={spec.depth}",
                "head_ms": 1e3 * statistics.median(t[0] for t in times["head"]),
                "step_ms": 1e3 * statistics.median(t[0] for t in times["step"]),
                "share": statistics.median(shares),
            }  # fmt: skip


# --- report ---------------------------------------------------------------------------------------------------------

HEADER = (f"{'shape':<7}{'N':>5}{'K':>5} {'dtype':<5}{'kind':<16}{'candidate':<13}{'mode':<6}{'ms':>9}{'20..80 %':>18}"
          f"{'CPU ms':>9}{'eager/':>7}{'MiB':>9}{'/form':>6}{'GB/s':>8}{'/copy':>6}{'error':>9}")  # fmt: skip


def table_line(row: dict[str, Any]) -> str:
    head = (f"{row['shape']:<7}{row['batch']:>5}{row['classes']:>5} {row['dtype']:<5}{row['kind']:<16}"
            f"{row['candidate']:<13}{row['mode']:<6}")  # fmt: skip
    if "note" in row:
        return f"{head}  {row['note']}"
    ratio, peak = row.get("eager_ratio"), row.get("peak")
    form = f"{row['peak_contiguous'] / row['closed_form']:.2f}" if "closed_form" in row else "-"
    return (
        f"{head}{row['ms']:>9.4f}{row['ms_20']:>9.4f}{row['ms_80']:>9.4f}{row['cpu_ms']:>9.4f}"
        f"{'-' if ratio is None else f'{ratio:.2f}':>7}{'-' if peak is None else f'{peak / 2**20:.2f}':>9}"
        f"{form:>6}{row['gb_per_second']:>8.1f}{row['copy_share']:>6.2f}{row['error']:>9.1e}"
    )


def share_line(row: dict[str, Any]) -> str:
    return (f"{row['model']:<10}{row['width']:>5g}{row['unit']:>6}{row['batch']:>6}  {row['head']:<26}"
            f"{row['head_ms']:>9.3f}{row['step_ms']:>9.3f}{row['share']:>7.2f}")  # fmt: skip


def worst(values: Iterable[float], pick_one: Callable[[list[float]], float]) -> float | None:
    found = list(values)
    return pick_one(found) if found else None


def summary(rows: Sequence[dict[str, Any]], device: torch.device, l2_bytes: float) -> dict[str, Any]:
    """The checks; l2_bytes: of the GPU."""
    heads = [r for r in rows if "candidate" in r and r["device"] == device.type]
    mine = [r for r in heads if r["candidate"] == ours(device)]
    timed = [r for r in mine if "ms" in r]
    large = [r for r in timed if device.type == "cuda" and r["kind"].startswith("linear") and x_bytes(r) > l2_bytes]

    def against(peers: Sequence[str]) -> Iterator[float]:
        for row in large:
            same = {k: row[k] for k in KEY if k != "candidate"}.items()
            for peer in (r for r in heads if r["candidate"] in peers and "ms" in r and r.items() >= same):
                yield peer["ms"] / row["ms"]

    shares = [r["share"] for r in rows if "share" in r and r["device"] == "cuda" == device.type and r["batch"] >= 256]
    off = [abs(r["peak_contiguous"] / r["closed_form"] - 1) for r in timed if "closed_form" in r]
    beyond = "where x exceeds the L2, worst"
    return {
        f"pool-linear: eager / ours, {beyond}": check(worst(against(["eager"]), min), ">= 3"),
        f"pool-linear: torch.compile / ours, {beyond}": check(worst(against(PEERS), min), ">= 1.5"),
        f"pool-linear: share of the copy bandwidth, {beyond}": check(
            worst((r["copy_share"] for r in large), min), ">= 0.7"
        ),
        "no kind slower than eager: eager / ours, worst": check(
            worst((r["eager_ratio"] for r in timed if "eager_ratio" in r), min), ">= 1"
        ),
        "peak bytes off the closed form, worst": check(worst(off, max), "<= 0.05"),
        "head's share of the unit's step on a GPU, worst": check(worst(shares, max), "<= 0.1"),
        "ours failed or disagrees with float64": check(sum("note" in r for r in mine) if mine else None, "== 0"),
    }


def x_bytes(row: dict[str, Any]) -> int:
    channels, side = map(int, row["shape"].split("@"))
    return int(row["batch"]) * channels * side**2 * (2 if row["dtype"] == "bf16" else 4)


def draw(rows: Sequence[dict[str, Any]]) -> Callable[..., None]:
    """A line for each shape and kind, a dot for each candidate: hollow inside a CUDA graph."""

    def label(row: dict[str, Any]) -> str:
        classes = f" K{row['classes']}" if row["classes"] != 10 else ""
        return f"{row['shape']} N{row['batch']}{classes} {row['kind']}"

    def on(*axes: Any) -> None:
        lines = {name: k for k, name in enumerate(dict.fromkeys(map(label, rows)))}
        for side, (field, factor, unit) in zip(
            axes, (("ms", 1, "ms a step"), ("peak", 2**-20, "peak MiB beyond x")), strict=True
        ):
            for k, (name, colour) in enumerate(zip(NAMES, plots.COLOURS, strict=False)):
                for mode in ("plain", "graph"):
                    dots = [
                        (lines[label(r)], factor * r[field])
                        for r in rows
                        if (r["candidate"], r["mode"]) == (name, mode) and r.get(field)
                    ]
                    if dots:
                        fill = colour if mode == "plain" else "none"
                        side.scatter([v for _, v in dots], [y for y, _ in dots], s=70 - 10 * k, facecolors=fill,
                                     edgecolors=colour, label=name + " in a graph" * (mode == "graph"))  # fmt: skip
            side.set_xscale("log")
            side.set_xlabel(unit)
            side.set_yticks(range(len(lines)), list(lines) if side is axes[0] else [""] * len(lines))
            side.set_ylim(len(lines) - 0.4, -0.6)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)

    return on


def plot(args: argparse.Namespace, rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Of one dtype: bfloat16 where it was measured."""
    heads = [r for r in rows if "candidate" in r and (r["device"], r["layout"]) == (device.type, args.layout)]
    dtype = "bf16" if any(r["dtype"] == "bf16" for r in heads) else "fp32"
    shown = [r for r in heads if r["dtype"] == dtype or r["kind"] == TAIL]
    lines = len({(r["shape"], r["batch"], r["classes"], r["kind"]) for r in shown})
    title = f"Forward, loss and backward of the heads, {device.type}, {dtype}, {args.layout}"
    plots.save(args.json, title, 2, (11, 1.5 + 0.22 * lines), draw(shown))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in (KEY if "candidate" in row else UNIT_KEY))


def joined(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, the new instead of the old of the same key."""
    return list({key_of(row): row for row in (*old, *new)}.values())


def run_all(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measures what was asked for; FILE is replaced after each case, so that a run that is stopped leaves its rows."""
    rows: list[dict[str, Any]] = []
    old = (
        json.loads(args.json.read_text("utf-8"))["rows"]
        if (args.add or args.resume) and args.json and args.json.exists()
        else []
    )

    def took(new: Sequence[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> None:
        rows.extend(new)
        print("\n".join(map(line, new)), flush=True)
        if args.json is not None:
            save(args.json, joined(old, rows))

    names = args.candidates.split(",")
    rounds = (7 if args.quick else 11) if device.type == "cpu" else 21
    copied = copy_bandwidth(device)
    print(f"copy_: {copied / 1e9:.1f} GB/s read and written; {args.layout}\n{HEADER}", flush=True)
    done = {key_of(row) for row in old if "candidate" in row}
    for case in cases(device, args.quick):
        place = {"device": device.type, "layout": args.layout} | case.names()
        if args.resume and all(key_of(place | {"candidate": n, "mode": "plain"}) in done for n in names):
            continue
        if re.search(args.only, " ".join(map(str, case.names().values()))):
            took(measure(case, device, args.layout, names, rounds, copied), table_line)
    if re.search(args.only, "share"):
        print(f"\n{'model':<10}{'width':>5}{'unit':>6}{'N':>6}  {'head':<26}{'head ms':>9}{'step ms':>9}{'share':>7}")
        for row in head_shares(device, rounds):
            took([row], share_line)
    return joined(old, rows)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", default="", help='regular expression on "SHAPE N K DTYPE KIND", or on "share"')
    parser.add_argument("--candidates", help=f"comma-separated, of {', '.join(NAMES)}; ratios need eager")
    parser.add_argument("--layout", default="channels_last", choices=LAYOUTS, help="of x and of convolutions' weights")
    parser.add_argument("--add", action="store_true", help="keep the rows of FILE that are not measured again")
    parser.add_argument("--resume", action="store_true", help="as --add, and leave out the cases that FILE has")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick(args.device)
    if args.candidates is None:
        slow = {"max-autotune"} if args.quick else set()  # to compile
        elsewhere = {"max-autotune", "fused"} if device.type == "cpu" else set()
        args.candidates = ",".join(n for n in NAMES if n not in slow | elsewhere)
    torch.backends.cudnn.benchmark = True
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else math.inf
    rows = run_all(args, device)
    finish(args, rows, summary(rows, device, l2_bytes))
    plot(args, rows, device)


if __name__ == "__main__":
    main()

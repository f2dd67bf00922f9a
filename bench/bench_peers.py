"""Everything a user would pick instead, under the same budgets: time to an accuracy, speed, memory, the model.

    python -m bench.bench_peers --data idx:DIR --json bench/results/peers.json
    python -m bench.bench_peers --parts vgg16-32-10,resnet18-64-200 --images 50000 --limit 480 --json FILE    on a GPU

A part is MODEL-PIXELS-OUTPUTS; images are enlarged to the pixels. Budgets are shares of what backpropagation needs at
batch 128; "tight" is what it needs at batch 8, "none" is no budget. Peers (nf_engine/compare.py), each at the largest
batch up to --batch that fits by measurement, which takes none of its time here:
    backpropagation; accumulated, to --batch; checkpointed at each stage; compiled with activation_memory_budget 1, 0.5,
    0.3, 0.1, and the one of these that saves most, accumulated; offloaded, by save_on_cpu; local, with 256-filter heads
nf_engine: windows, layerwise, and each with a part of it switched off. Where there is nothing to switch off, or the
batch is that of another budget, the run would be the same, and its row is copied.

Every arm has the same images in the same order, augmentation, schedule, optimizer, layout, precision and epochs (for
each block); the budget is enforced by the meter on the CPU and by the allocator on a GPU. A row's curve is (seconds,
accuracy of the best exit so far) after each epoch; the seconds hold profiling, planning, compiling and caches, not the
scoring for the curve. The reference accuracy is the best of backpropagation without a budget minus 3 points. Images a
second are those of the median epoch; ours hold the writing of caches.
On the CPU `compiled` runs inductor's graphs operator by operator, and host copies of `offloaded` are memory beside
the budget: there their bytes can be compared, their seconds cannot. Small batches cost the CPU little time.

A run is resumable: FILE is replaced after each row, rows found in it are skipped, --limit ends it after some seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench import plots
from bench.peer_runs import BASE, COMPILED, NONE, PEERS, Recipe, Workload, release
from bench.timing import arguments, check, finish, images
from nf_engine.device import pick
from nf_engine.errors import DeviceLostError
from nf_engine.ops import head_path

DROP = 0.03  # below backpropagation's best: the accuracy that time is measured to
FIELDS: dict[str, dict[str, Any]] = {  # of TrainConfig
    "windows": {},
    "layerwise": {"partition": "layerwise"},
    "windows, full batch": {},
    "windows, prefer accuracy": {"prefer": "accuracy"},
    "windows, no recomputation": {"recompute": False},
    "windows, no cache": {"cache": "recompute"},
    "windows, linear heads": {"head": "linear"},
    "windows, fixed heads": {"head": "deep", "head_width": 256},
    "layerwise, no cache": {"partition": "layerwise", "cache": "recompute"},
    "windows, one batch size": {},
    "layerwise, one batch size": {"partition": "layerwise"},
}
CUDA_ONLY = {  # environment
    "windows, reference heads": {"NF_KERNELS": "off"},
    "windows, eager steps": {"NF_GRAPHS": "off"},
}

# On the CPU `compiled` and `local` take long: there they are run where memory is scarce alone.
ON_CPU = "^(?!(none|0.6|0.8|1) compiled|(none|tight|0.6|0.8|1) local)"
# A look at the bench itself: the accuracies of so short a training say nothing.
QUICK = "none (back|windows|layerwise)|0.8 (?!compiled (1|0.3|0.1|accumulated)|.*heads)"

# --- what is run ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One run; its fields open its row."""

    part: str
    budget: str
    arm: str
    seed: int


# --- all runs -------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> list[Case]:
    """All runs in order: in each part and seed one budget after another, backpropagation without one first."""
    first = ("backpropagation", "windows", "layerwise")  # what is left out where time ends are the others
    listed = (*PEERS, *FIELDS, *(CUDA_ONLY if pick(args.device).type == "cuda" else ()))
    arms = (*first, *(arm for arm in listed if arm not in first))
    wanted = re.compile(args.only)
    return [
        Case(part, budget, arm, seed)
        for part in args.parts.split(",")
        for seed in range(args.seeds)
        for budget in sorted(args.budgets.split(","), key=lambda b: b != NONE)
        for arm in arms
        if wanted.search(f"{budget} {arm}") and not (budget == NONE and "," in arm)  # without a budget nothing is on
    ]


def same_run(
    case: Case, how: dict[str, Any] | None, budget: int | None, rows: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """A row that this run would repeat: the same peer under another budget, or nothing to switch off.

    how: of the peer; None for ours. budget: that the other run stayed in. rows: of the same part and seed.
    """
    if how is not None:
        room = math.inf if budget is None else budget
        return next((r for r in rows if r["fits"] and r["how"] == how and used(r) <= room), None)
    name, _, off = case.arm.partition(", ")
    base = row_of(rows, case.budget, name) if off else None
    return base if base is not None and not (base["fits"] and is_on(off, base)) else None


def used(row: dict[str, Any]) -> int:
    """What a run's budget is held against: what the allocator reserved, or the tensors of the CPU."""
    found: int = row["reserved"] or row["peak"]
    return found


def row_of(rows: Iterable[dict[str, Any]], budget: str, arm: str) -> dict[str, Any] | None:
    return next((r for r in rows if (r["budget"], r["arm"]) == (budget, arm)), None)


def is_on(part: str, row: dict[str, Any]) -> bool:
    """Whether a row of ours uses what an ablation switches off."""
    units = [unit for block in row["how"] for unit in block]
    kinds = {head for *_, head in units} - {"classifier"}
    return {
        "full batch": set(row["batches"]) != {row["batch"]},
        "prefer accuracy": len(units) > 1,
        "no recomputation": any(starts for _, _, starts, _ in units),
        "no cache": row["cache_bytes"] > 0,
        "linear heads": "deep" in kinds,
        "fixed heads": bool(kinds),
        "reference heads": bool(kinds),
        "eager steps": True,
        "one batch size": len(set(row["batches"])) > 1,
    }[part]


def run(case: Case, work: Workload, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of a run, made, or copied from those of the same part and seed."""
    budget = work.bytes(case.budget)
    head = {"budget_bytes": budget}
    peer = case.arm in PEERS
    arm = work.arm(case.arm, budget) if peer else None
    same = same_run(case, asdict(arm) if arm else None, budget, rows) if arm or not peer else None
    if same is not None:
        results = {k: v for k, v in same.items() if k not in Case._fields}
        return results | head | {"same_as": f"{same['budget']} {same['arm']}"}
    if peer:
        return head | work.run_peer(arm, budget, case.seed)
    name, _, off = case.arm.partition(", ")
    fields = dict(FIELDS.get(case.arm, FIELDS[name]))
    base = row_of(rows, case.budget, name)
    if off == "full batch":
        fields["batch_size"] = work.recipe.batch
    elif off == "one batch size" and base is not None:
        fields["batch_size"] = min(base["batches"])
    with patch.dict(os.environ, CUDA_ONLY.get(case.arm, {})):
        head_path.cache_clear()  # it has read the environment before
        try:
            return head | work.run_ours(fields, budget, case.seed)
        finally:
            head_path.cache_clear()


def run_or_why(case: Case, work: Workload, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As run; a run that fails says why in its row, and the others follow."""
    try:
        return run(case, work, rows)
    except (DeviceLostError, torch.AcceleratorError):
        raise  # nothing more can run in this process
    except Exception as error:  # a loss that is not finite, a compiler that fails: no reason to lose the rest
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    print(f"{case}: {why}", file=sys.stderr)
    release(work.device)
    return {"budget_bytes": work.bytes(case.budget), "fits": False, "why": why}


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the file in one step: a run that is stopped leaves the old rows or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rows": list(rows)}), encoding="utf-8")
    part.replace(path)


def run_all(args: argparse.Namespace, recipe: Recipe) -> tuple[list[dict[str, Any]], int]:
    """Runs what FILE does not hold yet; returns its rows of this recipe, and how many runs the time did not allow."""
    rows: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists():
        rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    data, test = images(args.data, recipe.images, recipe.test)
    workload = cache(lambda part: Workload(part, recipe, data, test))
    started, missing = time.monotonic(), 0
    for case in cases(args):
        mine = [r for r in rows if r.items() >= asdict(recipe).items()]
        if any(r.items() >= case._asdict().items() for r in mine):
            continue
        if time.monotonic() - started > args.limit:
            missing += 1
            continue
        mine = [r for r in mine if (r["part"], r["seed"]) == (case.part, case.seed)]
        rows.append(case._asdict() | asdict(recipe) | run_or_why(case, workload(case.part), mine))
        print(line(rows[-1], None), flush=True)
        if args.json is not None:
            save(args.json, rows)
    return rows, missing


# --- report ---------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'budget':<7}{'MiB':>8}  {'arm':<27}{'peak/':>6}{'s/epoch':>9}{'img/s':>9}{'plan s':>8}{'accuracy':>10}"
    f"{'s to ref':>10}{'exit params':>13}{'exit img/s':>12}{'cache MiB':>11}  batches"
)


def reference(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """The accuracy that a row's time is measured to."""
    same = ("part", "seed", *Recipe.__dataclass_fields__)
    base = [
        r["curve"][-1][1] for r in rows
        if (r["budget"], r["arm"]) == (NONE, BASE) and all(r[k] == row[k] for k in same)
    ]  # fmt: skip
    return base[0] - DROP if base else None


def seconds_to(row: dict[str, Any], accuracy: float | None) -> float | None:
    """Seconds to an accuracy; None where it was not reached, or did not run."""
    if not row["fits"] or accuracy is None:
        return None
    return next((seconds for seconds, reached in row["curve"] if reached >= accuracy), None)


def line(row: dict[str, Any], target: float | None) -> str:
    size = "-" if row["budget_bytes"] is None else f"{row['budget_bytes'] / 2**20:.1f}"
    head = f"{row['budget']:<7}{size:>8}  {row['arm']:<27}"
    if not row["fits"]:
        return f"{head}  does not fit"
    share = "-" if row["budget_bytes"] is None else f"{(row['reserved'] or row['peak']) / row['budget_bytes']:.2f}"
    reached = seconds_to(row, target)
    return (
        f"{head}{share:>6}{row['epoch_seconds']:>9.2f}{row['images_per_second']:>9,.0f}{row['plan_seconds']:>8.1f}"
        f"{row['accuracy']:>10.2%}{'-' if reached is None else f'{reached:.1f}':>10}{row['exit_parameters']:>13,}"
        f"{row['exit_images_per_second']:>12,.0f}{row['cache_bytes'] / 2**20:>11.1f}"
        f"  {', '.join(map(str, row['batches']))}{parts(row)}"
    )


def parts(row: dict[str, Any]) -> str:
    how = row["how"]
    if isinstance(how, dict):
        return f" in {how['parts']} parts" if how["parts"] > 1 else ""
    units = sum(len(block) for block in how)
    return f" in {units} units" + (", some stages twice" if any(u[2] for block in how for u in block) else "")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    for part, seed in dict.fromkeys((r["part"], r["seed"]) for r in rows):
        mine = [r for r in rows if (r["part"], r["seed"]) == (part, seed)]
        mine.sort(key=lambda r: r["budget_bytes"] or 0)
        target = reference(rows, mine[0])
        print(f"\n{part}, seed {seed}, time to {'-' if target is None else f'{target:.2%}'}\n{HEADER}")
        for row in mine:
            print(line(row, target))


class Times(NamedTuple):
    """Seconds to the reference accuracy under one budget, infinite where it is not reached or does not fit."""

    share: float
    base: float
    peers: float  # the best of all peers
    ours: float  # the best of windows and layerwise


def times(rows: Sequence[dict[str, Any]]) -> list[Times]:
    """One entry for each part, seed and budget that both backpropagation and windows were run under."""
    found = []
    for part, seed, budget in dict.fromkeys((r["part"], r["seed"], r["budget"]) for r in rows):
        mine = {r["arm"]: r for r in rows if (r["part"], r["seed"], r["budget"]) == (part, seed, budget)}
        if BASE not in mine or "windows" not in mine:
            continue
        target = reference(rows, mine[BASE])
        reached = {arm: seconds_to(row, target) or math.inf for arm, row in mine.items()}
        whole = next((used(r) for r in rows if (r["part"], r["budget"], r["arm"]) == (part, NONE, BASE)), math.nan)
        share = math.inf if budget == NONE else mine[BASE]["budget_bytes"] / whole
        found.append(
            Times(
                share,
                reached[BASE],
                min(reached.get(a, math.inf) for a in PEERS),
                min(reached.get(a, math.inf) for a in ("windows", "layerwise")),
            )
        )
    return found


def least(values: Iterable[float]) -> float | None:
    """The least ratio, those of two infinite times apart; None where there is none, or it is infinite."""
    return min((v for v in values if math.isfinite(v)), default=None)


def checks(rows: Sequence[dict[str, Any]], missing: int) -> dict[str, Any]:
    """The targets; those of a GPU are None where there is none."""
    ran = [r for r in rows if r["fits"]]
    capped_rows = [r for r in ran if r["budget_bytes"] is not None]
    over = sum(used(r) > r["budget_bytes"] for r in capped_rows)
    made = {
        "runs over budget": check(over, "== 0"),
        "runs that are still to be made": check(missing, "== 0"),
        "windows / backpropagation at the same batch, time of an image, median": check(equal_batch(ran), "<= 1.05"),
        "windows / checkpointed under the same budget, time of an image, median": check(same_budget(ran), "<= 0.85"),
    }
    on_gpu = [r for r in rows if r["device"] != "cpu"]
    seen = times(on_gpu)
    tight = [t for t in seen if t.share <= 1.02 / 3]  # a budget was a share of another run's need
    tightest = [t for t in tight if t.share == min(t.share for t in tight)]
    limited = [r for r in on_gpu if r["fits"] and r["arm"] == "windows" and r["budget_bytes"] is not None]
    free = {
        (r["part"], r["seed"], r["arm"]): r["images_per_second"] for r in on_gpu if r["fits"] and r["budget"] == NONE
    }
    speed = [v / free[p, s, BASE] for (p, s, arm), v in free.items() if arm == "windows" and (p, s, BASE) in free]
    return made | {
        "GPU: times faster than backpropagation, budgets up to a third": check(
            least(t.base / t.ours for t in tight), ">= 2.3"
        ),
        "GPU: times faster than backpropagation, the tightest budget": check(
            least(t.base / t.ours for t in tightest), ">= 6.1"
        ),
        "GPU: times faster than the best peer, budgets up to a third": check(
            least(t.peers / t.ours for t in tight), ">= 1.3"
        ),
        "GPU: times faster than the best peer, any budget": check(least(t.peers / t.ours for t in seen), ">= 1"),
        "GPU: times the images/s of backpropagation without a budget": check(least(speed), ">= 1.2"),
        "GPU: least share of the budget that windows reserves": check(
            least(r["reserved"] / r["budget_bytes"] for r in limited), ">= 0.85"
        ),
        "GPU: largest share of planning in a training, windows": check(
            max((r["plan_seconds"] / r["seconds"] for r in limited), default=None), "<= 0.015"
        ),
    }


def equal_batch(ran: Sequence[dict[str, Any]]) -> float | None:
    """Median ratio of the times of an image where windows keeps a batch at which backpropagation exceeds the budget."""
    ratios = []
    for row in ran:
        if row["arm"] == "windows, full batch" and set(row["batches"]) == {row["batch"]}:
            base = next((r for r in ran if (r["part"], r["seed"], r["budget"], r["arm"])
                         == (row["part"], row["seed"], NONE, BASE)), None)  # fmt: skip
            if base is not None and used(base) > row["budget_bytes"]:
                ratios.append(base["images_per_second"] / row["images_per_second"])
    return statistics.median(ratios) if ratios else None


def same_budget(ran: Sequence[dict[str, Any]]) -> float | None:
    """Median ratio of the times of an image of windows and of checkpointing where backpropagation needs more."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in ran:
        if row["budget"] not in (NONE, "1"):
            found.setdefault((row["part"], row["seed"], row["budget"]), {})[row["arm"]] = row
    ratios = [
        arms["checkpointed"]["images_per_second"] / arms["windows"]["images_per_second"]
        for arms in found.values()
        if {"windows", "checkpointed"} <= arms.keys()
    ]
    return statistics.median(ratios) if ratios else None


def draw(rows: Sequence[dict[str, Any]], *axes: Any) -> None:
    """Time to the reference accuracy against the budget; of the compiled arms the fastest at each budget."""
    names = {arm: "compiled, the best share" if arm in COMPILED else arm for arm in (*PEERS, "layerwise", "windows")}
    for place, part in zip(axes, dict.fromkeys(r["part"] for r in rows), strict=True):
        mine = [r for r in rows if r["part"] == part and r["seed"] == 0]
        points: dict[str, dict[float, float]] = {}
        for row in mine:
            reached = seconds_to(row, reference(rows, row))
            if row["arm"] in names and row["budget_bytes"] is not None and reached is not None:
                curve = points.setdefault(names[row["arm"]], {})
                size = row["budget_bytes"] / 2**20
                curve[size] = min(reached, curve.get(size, math.inf))
        curves = {name: sorted(points[name].items()) for name in dict.fromkeys(names.values()) if name in points}
        plots.times(place, curves, ("windows", "layerwise"))
        place.set_title(part)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", default="vgg11-32-10", help="MODEL-PIXELS-OUTPUTS, ...")
    parser.add_argument("--budgets", default="none,tight,0.33,0.6,0.8", help="shares of backpropagation's need")
    parser.add_argument("--only", help="runs whose 'BUDGET ARM' matches this expression; all, but for some on the CPU")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no run is started")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=2000, help="to train on")
    parser.add_argument("--test", type=int, default=500, help="images that every accuracy is taken from")
    parser.add_argument("--epochs", type=int, default=4, help="for each block")
    parser.add_argument(
        "--batch", type=int, default=128, help="most samples of a peer's step, and the accumulated batch"
    )
    parser.add_argument("--lr", type=float, default=0.1, help="at batch 128")
    parser.add_argument("--width", type=float, help="of the models; 1/4 on the CPU, 1 on a GPU")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.parts, args.budgets, args.only = "vgg11-32-10", "none,0.8", QUICK
        args.images, args.test, args.epochs, args.width = min(args.images, 800), 200, 2, 0.125
    args.device = pick(args.device).type
    if args.only is None:
        args.only = ON_CPU if args.device == "cpu" else ""
    width = args.width or (0.25 if args.device == "cpu" else 1.0)
    recipe = Recipe(args.device, args.images, args.test, args.epochs, args.batch, args.lr, width, args.precision)
    rows, missing = run_all(args, recipe)
    print_table(rows)
    finish(args, rows, checks(rows, missing))
    columns = len({r["part"] for r in rows})
    plots.save(args.json, "Seconds to the reference accuracy", columns, (6.5 * columns, 4.5), lambda *a: draw(rows, *a))
    if missing:
        sys.exit(75)  # the same command goes on


if __name__ == "__main__":
    main()

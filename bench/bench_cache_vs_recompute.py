"""Seconds to read a stage's outputs back against seconds to compute them again, and what `cache = "auto"` makes of it.

    python -m bench.bench_cache_vs_recompute --json bench/results/cache_vs_recompute.json

A row for each place where vgg16, vgg19 and resnet18 can be cut into two blocks, at 32, 64 and 224 pixels:
    recompute   seconds a sample of an eval forward through all stages before the cut, in float32, stage after stage
    disk, ram   seconds a sample to write to and to read from a real cache of samples of that shape, fp16, read back in
                float32 and in shuffled order, as training does; the disk past the page cache
    break-even  bytes a sample / recompute seconds: a store that reads faster than this beats recomputing
`auto` is `choose_tier` with the rates that `probe_tiers` measured once, as a run does. The measured best is the least
of these sums for --samples samples and --epochs epochs, from the row's own figures:
    disk, ram   max(recompute, write) + epochs * read, where the cache fits          recompute   epochs * recompute
Training itself counts as no time, so that nothing hides behind it: the hardest case for a cache. `auto` was right where
its tier takes at most 5 % longer than the best: that close it prefers ram to disk to recompute by rule.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.bench_cache import forget
from bench.plots import COLOURS, GREY, save
from bench.timing import arguments, check, finish, median_seconds
from nf_engine.cache_format import MIB, CacheGeometry
from nf_engine.config import TrainConfig
from nf_engine.models import build
from nf_engine.records import (
    BlockPlan,
    Bounds,
    CachePlan,
    HeadProfile,
    HeadSpec,
    Line,
    Plan,
    Profile,
    StageProfile,
    TierProbe,
    UnitPlan,
)
from nf_engine.stages import split
from nf_engine.storage import ActivationCache, EngineOptions
from nf_engine.tier_probe import probe_tiers
from nf_engine.tiers import choose_tier

MODELS = ("vgg16", "vgg19", "resnet18")
BATCHES = {32: 32, 64: 16, 224: 4}  # pixels -> samples of a forward pass
TIERS = ("ram", "disk")
Shape = tuple[int, ...]


# --- what is measured -----------------------------------------------------------------------------------------------


def stage_seconds(name: str, pixels: int, repeats: int) -> list[tuple[str, Shape, float]]:
    """Name, output shape and seconds a sample of each stage."""
    batch = BATCHES[pixels]
    cut = split(build(name, input_size=pixels).eval(), (3, pixels, pixels))
    x = torch.rand(batch, *cut.input_shape)
    found = []
    with torch.no_grad():
        for stage in cut.stages:
            seconds = median_seconds(functools.partial(stage.module.eval(), x), repeats)
            found.append((stage.name, stage.output_shape, seconds / batch))
            x = stage.module(x)
    return found


def batch_of(shape: Shape) -> int:
    """Samples of an append and of a read."""
    return max(1, min(128, 32 * MIB // (2 * math.prod(shape))))


def tier_seconds(shape: Shape, size: int, repeats: int, folder: Path, probe: TierProbe) -> dict[str, float]:
    """Medians of seconds a sample to write and to read about `size` bytes of samples on each tier, in turn."""
    count = max(16, min(8192, size // (2 * math.prod(shape))))
    geometry = CacheGeometry(sample_shape=shape, dtype="fp16", samples=count)
    options = EngineOptions(write_threads=probe.write_threads, read_threads=probe.read_threads)  # as a run would
    batch = batch_of(shape)
    x = torch.randn(batch, *shape).relu()
    times: dict[str, list[float]] = {f"{tier}_{way}": [] for tier in TIERS for way in ("write", "read")}
    for k in range(repeats):
        for tier in TIERS:
            with ActivationCache.create(folder, "x.nfc", geometry, tier=tier, options=options) as cache:
                started = time.perf_counter()
                for start in range(0, count, batch):
                    ids = torch.arange(start, min(start + batch, count))
                    cache.append(x[: len(ids)], torch.zeros_like(ids), ids)
                cache.finish()
                times[f"{tier}_write"].append((time.perf_counter() - started) / count)
                forget(folder)  # of consequence only where the file system refuses O_DIRECT
                started = time.perf_counter()
                seen = sum(len(b.x) for b in cache.batches(0, batch, key=k))
                times[f"{tier}_read"].append((time.perf_counter() - started) / count)
            if seen != count:
                raise RuntimeError(f"expected {count} samples from {tier}, got {seen}")
            (folder / "x.nfc").unlink(missing_ok=True)
    return {name: statistics.median(seen) for name, seen in times.items()}


# --- what auto picks ------------------------------------------------------------------------------------------------


def config(epochs: int) -> TrainConfig:
    return TrainConfig(cache="auto", cache_dtype="fp16", epochs=epochs, augment="none")


def measured_probe(shape: Shape, folder: Path) -> TierProbe:
    """The rates that a run would measure; what it takes to fetch an image counts as nothing, here as in the rows."""
    return probe_tiers(shape, batch_of(shape), folder, config(1), device=torch.device("cpu"))


def pick(stages: Sequence[tuple[str, Shape, float]], cut: int, probe: TierProbe, samples: int, epochs: int) -> str:
    """The tier of `cache = "auto"` for two blocks, stages ..cut and cut+1.., where training takes no time."""
    none, spec = Line(0.0, 0.0), HeadSpec("linear")
    head = HeadProfile(spec, 0, 0, 0, 0, 0, none, "reference", None)
    profiles = tuple(
        StageProfile(
            name, shape, 4 * math.prod(shape), 0, 0, 0, 0, none, none, none, none, none, 0, none,
            Line(0.0, seconds), none, head,
        )
        for name, shape, seconds in stages
    )  # fmt: skip
    profile = Profile(
        "bench", "cpu", torch.__version__, "sgd", "none", "32-true", (3, 32, 32), 10, 0, (64,), none, profiles
    )  # fmt: skip
    images = CachePlan("images", "uint8", 1, 0, {}, "")
    blocks = tuple(
        BlockPlan((UnitPlan(first, last, spec, "reference", 0),), 64, 0.1, 0, 0.0, images)
        for first, last in ((0, cut), (cut + 1, len(stages) - 1))
    )
    names = tuple(name for name, _, _ in stages)
    plan = Plan(
        "bench", "windows", "cpu", 1 << 40, 1 << 40, 0, samples, epochs, names, blocks,
        Bounds(64, 0, 0, 0, 0), 0, None, (),
    )  # fmt: skip
    return choose_tier(profile, config(epochs), plan, 1, probe, 64).tier


# --- what was best --------------------------------------------------------------------------------------------------


def totals(row: dict[str, Any], samples: int, epochs: int, room: dict[str, int]) -> dict[str, float]:
    """Seconds of a whole training with each tier that fits, from the measured seconds a sample of one row."""
    found = {"recompute": samples * epochs * row["recompute"]}
    for tier in TIERS:
        if row["bytes"] * samples <= room[tier]:
            making = max(row["recompute"], row[f"{tier}_write"])
            found[tier] = samples * (making + epochs * row[f"{tier}_read"])
    return found


def judged(row: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Adds the measured best tier and whether `auto` comes within 5 % of it; a tier without room is never right."""
    best = min(seconds, key=lambda t: seconds[t])
    slower = seconds[row["auto"]] / seconds[best] - 1 if row["auto"] in seconds else math.inf
    return row | {"seconds": seconds, "best": best, "right": slower <= 0.05, "slower": slower if slower < 9 else None}


# --- report ---------------------------------------------------------------------------------------------------------


def checks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"share of cuts where auto is within 5 % of the measured best tier": check(
        sum(r["right"] for r in rows) / len(rows), ">= 0.95"
    )}  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    times = "".join(f"{1e6 * row[name]:>11.1f}" for name in ("recompute", "disk_read", "ram_read"))
    return (
        f"{row['model']:<9}{row['pixels']:>4} {row['stage']:<16}{shape:>12}{row['bytes']:>11,}{times}"
        f"{row['break_even'] / 1e6:>11.1f}  {row['auto']:<10}{row['best']:<10}{'yes' if row['right'] else 'NO'}"
    )


def draw(rows: list[dict[str, Any]], left: Any, right: Any) -> None:
    markers = dict(zip(BATCHES, "os^", strict=True))
    models = list(dict.fromkeys(r["model"] for r in rows))
    for row in rows:
        look = {"color": COLOURS[models.index(row["model"])], "marker": markers[row["pixels"]], "markersize": 6}
        left.plot(row["bytes"], row["recompute"], linestyle="", **look)
        right.plot(row["bytes"], row["break_even"] / 1e6, linestyle="", **look)
        if not row["right"]:
            right.plot(row["bytes"], row["break_even"] / 1e6, "x", color="black", markersize=11)
    for tier, style in (("disk", "-"), ("ram", "--")):
        sizes = sorted({r["bytes"] for r in rows})
        read = [statistics.median(r[f"{tier}_read"] for r in rows if r["bytes"] == size) for size in sizes]
        left.plot(sizes, read, style, color="black")
        rates = [size / seconds / 1e6 for size, seconds in zip(sizes, read, strict=True)]
        right.plot(sizes, rates, style, color="black", label=f"read from {tier}")
    for k, name in enumerate(models):
        right.plot([], [], "o", color=COLOURS[k], label=f"recompute, {name}")
    for pixels in dict.fromkeys(r["pixels"] for r in rows):
        right.plot([], [], markers[pixels], color=GREY, label=f"{pixels} pixels")
    if not all(r["right"] for r in rows):
        right.plot([], [], "x", color="black", label="auto was wrong")
    left.set_title("Seconds a sample (points above a line: reading is faster)")
    left.set_ylabel("seconds")
    right.set_title("Break-even bandwidth (points below a line: reading is faster)")
    right.set_ylabel("MB/s")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="bytes a sample, fp16")
    right.figure.legend(loc="outside lower center", ncols=9)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files go; /tmp may be memory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [(m, p) for m in MODELS for p in BATCHES][: 1 if args.quick else None]
    size = (32 if args.quick else 96) * MIB
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_cache_") as folder:
        stages = {case: stage_seconds(*case, args.repeats) for case in cases}
        shapes = sorted({shape for found in stages.values() for _, shape, _ in found[:-1]}, key=math.prod)
        probe = measured_probe(shapes[-1], Path(folder))
        measured = {shape: tier_seconds(shape, size, args.repeats, Path(folder), probe) for shape in shapes}
    print(f"probe: {probe}")
    print(
        f"{'model':<9}{'px':>4} {'cut after':<16}{'shape':>12}{'bytes':>11}{'recompute':>11}{'disk':>11}{'ram, us':>11}"
        f"{'even, MB/s':>11}  {'auto':<10}{'best':<10}right"
    )
    rows: list[dict[str, Any]] = []
    for (model, pixels), found in stages.items():
        recompute = 0.0
        for k, (stage, shape, seconds) in enumerate(found[:-1]):
            recompute += seconds
            row = {"model": model, "pixels": pixels, "stage": stage, "shape": shape, "bytes": 2 * math.prod(shape)}
            row |= {"recompute": recompute, "break_even": row["bytes"] / recompute} | measured[shape]
            row["auto"] = pick(found, k, probe, args.samples, args.epochs)
            rows.append(judged(row, totals(row, args.samples, args.epochs, probe.room)))
            print(describe(rows[-1]), flush=True)
    args.folder = None  # of this machine
    title = f"Reading a stage's outputs back against computing them again; CPU threads: {args.threads}"
    finish(args, rows, checks(rows))
    save(args.json, title, 2, (13, 5.5), functools.partial(draw, rows))


if __name__ == "__main__":
    main()

"""Partitioner: profile and budget in, plan out. Arithmetic only; no torch, no device, no randomness.

`layerwise` joins stages whose largest batches are alike. `windows` takes the fewest units that fit at the target batch;
a unit may run stages twice to fit, where that is hardly slower than more units, or where accuracy is preferred.
Both searches are exact over the costs of costs.py.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Partitioner); the algorithms are ours, the paper's text
was not available.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span, Spans, checkpointed_peak, head_of
from nf_engine.errors import ConfigError, InfeasibleBudgetError
from nf_engine.records import BlockPlan, Bounds, Line, Plan, Profile, UnitPlan, format_bytes, stored_bytes
from nf_engine.tiers import cache_plan, copies_of, mixing

TARGET_BATCH = 128
FALLBACK_BATCHES = (64, 32)
BATCH_STEP = 8  # batches between those are multiples of it
LEAST_BATCH = 16  # below it BatchNorm is noise: more units are tried before
MIN_STEPS = 50  # an epoch in fewer steps trains too little, whatever fits
MAX_LR = 8.0  # times the lr at batch 128
SLOWER = 1.03  # times the fastest plan's work: so much may a plan with fewer units cost


def cache_bytes(costs: Costs, blocks: list[Spans], config: TrainConfig, samples: int) -> int:
    """Bytes of all caches between the blocks of a plan."""
    shapes = (costs.profile.stages[block[-1].last].output_shape for block in blocks[:-1])
    return sum(stored_bytes(shape, config.stored_dtype) * samples * copies_of(config) for shape in shapes)


def _compositions(length: int, parts: int) -> Iterator[Spans]:
    for cuts in itertools.combinations(range(1, length), parts - 1):
        edges = (0, *cuts, length)
        yield tuple(Span(edges[k], edges[k + 1] - 1) for k in range(parts))


def _groupings(units: Spans) -> Iterator[list[Spans]]:
    for joins in itertools.product((True, False), repeat=len(units) - 1):
        blocks: list[list[Span]] = [[units[0]]]
        for unit, joined in zip(units[1:], joins, strict=True):
            if joined:
                blocks[-1].append(unit)
            else:
                blocks.append([unit])
        yield [tuple(b) for b in blocks]


def _singles(count: int) -> Spans:
    return tuple(Span(s, s) for s in range(count))


class _Found(NamedTuple):
    """The best plan with some number of units at a batch. work: as Costs.work."""

    blocks: list[Spans]
    batch: int
    work: float
    plain: bool


def windows(costs: Costs, allowed: float, config: TrainConfig, samples: int, target: int) -> _Found | None:
    """The plan whose units and batch suit `prefer`; ties by cache bytes, then time, then peak.

    At the target batch, then 64, 32 and the largest at which backpropagation fits, then with one unit a stage at the
    largest batch that fits them all. More units, or smaller batches, are looked at as long as those found recompute
    something.
    """
    batches = [target]
    if config.batch_size == "auto":
        lower = max(config.min_batch_size, LEAST_BATCH)
        batches += [b for b in _fallbacks(costs, allowed, target) if lower <= b < target]
    found: list[_Found] = []
    for batch in batches:
        for parts in range(1, min(config.max_units, len(costs.profile.stages)) + 1):
            best = _of_parts(costs, allowed, config, samples, batch, parts)
            found += [best] if best is not None else []
            if best is not None and (best.plain or config.prefer == "accuracy"):
                return _preferred(found, config)
    if found:
        return _preferred(found, config)
    singles = _singles(len(costs.profile.stages))
    overhead = costs.overhead(singles)
    batch = min(costs.largest_batch((unit,), allowed, overhead, batches[-1]) for unit in singles)
    if batch < smallest_batch(config, target):
        return None
    joined = _join_singles(costs, allowed, singles, batch, samples, config)
    assert joined is not None, "each stage alone fits at this batch"
    return _Found(joined, batch, 0.0, True)


def _fallbacks(costs: Costs, allowed: float, target: int) -> list[int]:
    """Batches to try where the target does not fit, falling; the last is backpropagation's largest, which ends it."""
    whole = (Span(0, len(costs.profile.stages) - 1),)
    largest = costs.largest_batch(whole, allowed, costs.overhead(whole), target) // BATCH_STEP * BATCH_STEP
    return [*(b for b in FALLBACK_BATCHES if b > largest), largest]


def _preferred(found: list[_Found], config: TrainConfig) -> _Found:
    """Of plans by falling batch and rising number of units: the first, or the first that is nearly the fastest."""
    if config.prefer == "accuracy":
        return found[0]
    fastest = min(f.work for f in found)
    return next(f for f in found if f.work <= SLOWER * fastest)


def _of_parts(costs: Costs, allowed: float, config: TrainConfig, samples: int, batch: int, parts: int) -> _Found | None:
    """The best plan of so many units, each of which recomputes as little as it can."""

    @cache
    def fits(first: int, last: int) -> bool:
        if not config.recompute:
            return costs.unit(Span(first, last), batch) <= allowed
        return costs.recomputation(first, last, batch, allowed) is not None

    best: tuple[tuple[float, ...], _Found] | None = None
    for units in _compositions(len(costs.profile.stages), parts):
        if not all(fits(u.first, u.last) for u in units):
            continue
        overhead = costs.overhead(units)
        for grouped in _groupings(units):
            blocks = [b for g in grouped if (b := costs.fitted(g, batch, overhead, allowed)) is not None]
            spans = tuple(u for b in blocks for u in b)
            plain = not any(u.starts for u in spans)
            if len(blocks) < len(grouped) or not (plain or config.recompute):
                continue
            work = costs.work(spans, batch)
            stored = cache_bytes(costs, blocks, config, samples)
            key = stored, work, max(costs.block(b, batch, overhead) for b in blocks)
            if best is None or key < best[0]:
                best = key, _Found(blocks, batch, work, plain)
    return best[1] if best is not None else None


def smallest_batch(config: TrainConfig, target: int) -> int:
    """The least batch a plan may use: min_batch_size, or exactly the batch asked for."""
    return min(config.min_batch_size, target) if config.batch_size == "auto" else target


def _join_singles(
    costs: Costs, allowed: float, singles: Spans, batch: int, samples: int, config: TrainConfig
) -> list[Spans] | None:
    """One unit a stage, joined into the blocks with the fewest cache bytes, then the fewest blocks, that fit."""
    overhead, count = costs.overhead(singles), len(singles)
    best: list[tuple[tuple[int, int], list[Spans]] | None] = [((0, 0), [])] + [None] * count
    for end in range(1, count + 1):
        for start in range(end):
            before = best[start]
            if before is None or costs.block(singles[start:end], batch, overhead) > allowed:
                continue
            blocks = [*before[1], singles[start:end]]
            stored = cache_bytes(costs, blocks, config, samples)
            key = (stored, len(blocks))
            current = best[end]
            if current is None or key < current[0]:
                best[end] = key, blocks
    found = best[count]
    return found[1] if found else None


def layerwise(
    costs: Costs, allowed: float, config: TrainConfig, smallest: int, largest: int
) -> list[tuple[Spans, int]] | None:
    """One unit a stage; a stage joins the block before it while their largest batches differ by less than a threshold.

    Returns blocks with their batch sizes; None where a stage does not fit at `smallest`.
    """
    count = len(costs.profile.stages)
    singles = _singles(count)
    overhead = costs.overhead(singles)
    fits = [costs.largest_batch((unit,), allowed, overhead, largest) for unit in singles]
    if min(fits) < smallest:
        return None
    blocks: list[tuple[Spans, int]] = []
    members: list[int] = [0]
    for s in range(1, count):
        group = [*members, s]
        low, high = min(fits[i] for i in group), max(fits[i] for i in group)
        units = tuple(singles[i] for i in group)
        if (high - low) / high < config.grouping_threshold and costs.block(units, low, overhead) <= allowed:
            members = group
        else:
            blocks.append((tuple(singles[i] for i in members), min(fits[i] for i in members)))
            members = [s]
    blocks.append((tuple(singles[i] for i in members), min(fits[i] for i in members)))
    return blocks


def scaled_lr(config: TrainConfig, batch: int) -> float:
    """The learning rate at a batch size: linear for SGD, square root for AdamW, capped; config.lr is meant at 128."""
    ratio = batch / TARGET_BATCH
    return float(f"{config.lr * min(ratio if config.optimizer == 'sgd' else ratio**0.5, MAX_LR):.6g}")


def _bounds(costs: Costs, batch: int, plan_peak: float) -> Bounds:
    count = len(costs.profile.stages)
    whole = (Span(0, count - 1),)
    fixed = costs.overhead(whole) + costs.fixed(whole)
    singles = _singles(count)
    overhead = costs.overhead(singles)
    return Bounds(
        batch=batch,
        backpropagation=round(costs.block(whole, batch, costs.overhead(whole))),
        checkpointed=round(fixed + checkpointed_peak(costs, batch)),
        plan=round(plan_peak),
        lower=round(max(costs.block((unit,), 1, overhead) for unit in singles)),
    )


def partition(
    profile: Profile,
    config: TrainConfig,
    *,
    budget: int,
    samples: int,
    together: bool = False,
    exact: Mapping[Span, Line] | None = None,
    slack: int = 0,
) -> Plan:
    """The best plan of a profile under a budget.

    Args:
        profile: cost of each stage.
        config: strategy, batch sizes, thresholds.
        budget: bytes; the plan uses at most budget * (1 - memory_margin) - slack of them.
        samples: training samples, for cache bytes, times and the cap on batch sizes.
        together: resting weights lie in the budgeted memory (the CPU).
        exact: unit peaks measured whole; they replace the sums over stages.
        slack: bytes that an earlier plan turned out to need beyond its prediction.

    Raises:
        InfeasibleBudgetError: no plan fits; names the stage, its need and the budget.
        ConfigError: the caches asked for do not suit the device, or the activations where the plan cuts.
    """
    if config.cache == "device" and together:
        raise ConfigError("cache='device' is the memory of a GPU, the plan is for the CPU; set cache='ram'")
    costs = Costs(profile, together, exact or {}, config.stored_dtype)
    allowed = budget * (1 - config.memory_margin) - slack
    cap = max(1, min(config.max_batch_size, samples))
    target = min(TARGET_BATCH if config.batch_size == "auto" else int(config.batch_size), cap)
    if config.partition == "layerwise":
        wide = max(target, samples // MIN_STEPS) if config.batch_size == "auto" else target
        chosen = layerwise(costs, allowed, config, smallest_batch(config, target), min(cap, wide))
    else:
        found = windows(costs, allowed, config, samples, target)
        chosen = [(units, found.batch) for units in found.blocks] if found else None
    if chosen is None:
        raise _infeasible(costs, budget, allowed, smallest_batch(config, target))
    return _plan(costs, config, chosen, budget, round(allowed), samples, target)


def _plan(
    costs: Costs,
    config: TrainConfig,
    chosen: list[tuple[Spans, int]],
    budget: int,
    allowed: int,
    samples: int,
    target: int,
) -> Plan:
    profile = costs.profile
    every = tuple(u for units, _ in chosen for u in units)
    overhead = costs.overhead(every)
    blocks = []
    for units, batch in chosen:
        plans = []
        step = costs.seconds(units, batch)
        for unit in units:
            head = head_of(profile, unit.last)
            peak = round(costs.unit(unit, batch))
            plans.append(UnitPlan(unit.first, unit.last, head.spec, head.path, peak, unit.starts))
        blocks.append(
            BlockPlan(
                units=tuple(plans),
                batch=batch,
                lr=scaled_lr(config, batch),
                peak=round(costs.block(units, batch, overhead)),
                seconds=None if step is None else step * samples / batch,
                cache=cache_plan(profile, config, units[0].first, batch, samples),
            )
        )
    seconds = [b.seconds for b in blocks if b.seconds is not None]
    peak = max(b.peak for b in blocks)
    return Plan(
        model=profile.model,
        strategy=config.partition,
        device=profile.device,
        budget=budget,
        allowed=allowed,
        overhead=overhead,
        samples=samples,
        epochs=config.epochs,
        stages=tuple(s.name for s in profile.stages),
        blocks=tuple(blocks),
        bounds=_bounds(costs, target, peak),
        host_bytes=0,  # until the tiers are decided
        epoch_seconds=sum(seconds) if len(seconds) == len(blocks) else None,
        warnings=_warnings(profile, config, blocks, samples),
        optimizer=config.optimizer,
        precision=config.precision,
    )


def forward_batch(costs: Costs, plan: Plan, block: BlockPlan) -> int:
    """The most samples that can go through the frozen stages before a block at a time, 0 if not even one fits."""
    units = tuple(Span(u.first, u.last, u.starts) for u in block.units)
    stages = costs.profile.stages[: block.first]
    fixed = plan.overhead + costs.fixed(units) + 2 * costs.input_bytes(block.first) * block.batch
    if not costs.together:
        fixed += sum(s.weights for s in stages)
    fixed += costs.profile.stages[block.last].output * block.batch
    size = block.batch
    while size:
        sizes = [costs.input_bytes(k) * size + s.forward.at(size) for k, s in enumerate(stages)]
        if fixed + max(*sizes, costs.profile.loading.at(size)) + costs.profile.input * block.batch <= plan.allowed:
            return size
        size //= 2
    return 0


def _warnings(profile: Profile, config: TrainConfig, blocks: list[BlockPlan], samples: int) -> tuple[str, ...]:
    notes = []
    for k, block in enumerate(blocks[1:], 1):
        cache = block.cache
        sample = stored_bytes(profile.stages[block.first - 1].output_shape, cache.dtype)
        ratio = mixing(sample, samples * cache.copies, cache.window)
        if ratio > 1.05:
            notes.append(
                f"block {k}: samples share a batch again {ratio:.1f} times as often as in a full shuffle, "
                f"with {format_bytes(cache.window)} of the cache mixed at a time"
            )
    if config.augment != "none" and len(blocks) > 1 and copies_of(config) == 1 and config.cache != "recompute":
        notes.append("one cached copy: augmentation is frozen after the first block; raise augment_copies or recompute")
    target = TARGET_BATCH if config.batch_size == "auto" else int(config.batch_size)
    small = min(b.batch for b in blocks)
    if config.partition == "windows" and small < target:
        notes.append(f"batch {target} does not fit; trained at {small}")
    return tuple(notes)


def _infeasible(costs: Costs, budget: int, allowed: float, batch: int) -> InfeasibleBudgetError:
    count = len(costs.profile.stages)
    singles = _singles(count)
    overhead = costs.overhead(singles)
    needs = [costs.block((unit,), batch, overhead) for unit in singles]
    worst = max(range(count), key=needs.__getitem__)
    one = round(costs.block((singles[worst],), 1, overhead))
    name = costs.profile.stages[worst].name
    need = math.ceil(1.02 * needs[worst] * budget / allowed)  # the margin grows with it; 2 % for what sums leave out
    suggestions = [f"memory_budget={need}"]
    if one <= allowed and batch > 1:
        suggestions.append(f"min_batch_size={max(1, costs.largest_batch((singles[worst],), allowed, overhead, batch))}")
    return InfeasibleBudgetError(
        f"stage {name} needs {format_bytes(one)} ({one} bytes) at batch 1 and {format_bytes(needs[worst])} at batch "
        f"{batch}; the budget is {format_bytes(budget)} ({budget} bytes), {format_bytes(allowed)} of it usable; "
        f"try {' or '.join(suggestions)}",
        stage=name,
        need=one if one > allowed else round(needs[worst]),
        budget=budget,
        suggestions=tuple(suggestions),
    )

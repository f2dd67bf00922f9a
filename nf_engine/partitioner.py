"""Partitioner: profile and budget in, plan out. Arithmetic only; no torch, no device, no randomness.

The bytes of a unit of stages i..j at batch b, all from the profile's lines, weights and optimizer state apart:

    x_i + max( kept_i + .. + kept_j + output + the head's step,
               kept_i + .. + kept_l + transient_l + gradients of l+1 .. j and the head + output and its gradient, any l,
               all gradients + output )

A block adds the weights and optimizer state of all its units once, and takes its largest unit. `layerwise` joins stages
whose largest batches are alike; `windows` takes the fewest units that fit at the target batch. Both searches are exact.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Partitioner); the algorithms are ours, the paper's text
was not available.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from nf_engine.config import TrainConfig
from nf_engine.errors import ConfigError, InfeasibleBudgetError
from nf_engine.records import (
    ENGINE_SLOTS,
    BlockPlan,
    Bounds,
    HeadProfile,
    Line,
    Plan,
    Profile,
    StageProfile,
    UnitPlan,
    format_bytes,
    stored_bytes,
)
from nf_engine.tiers import cache_plan, copies_of, mixing

TARGET_BATCH = 128
FALLBACK_BATCHES = (64, 32)
MIN_STEPS = 50  # an epoch in fewer steps trains too little, whatever fits
MAX_LR = 8.0  # times the lr at batch 128


def head_of(profile: Profile, last: int) -> HeadProfile:
    return profile.stages[last].head


@dataclass(frozen=True)
class Costs:
    """Bytes of units and blocks of one profile.

    Args:
        profile: measured stages.
        together: the weights of all stages lie in the memory that is budgeted (training on the CPU).
        exact: unit peaks measured whole, by (first, last): they replace the sum over stages.
        dtype: as which cached inputs wait: on a device of its own the engine's slots hold batches of them.
    """

    profile: Profile
    together: bool
    exact: Mapping[tuple[int, int], Line]
    dtype: str = "fp32"

    def _head(self, first: int, last: int, batch: int) -> float:
        """Bytes while the head takes its step."""
        return self._kept(first, last, batch) + head_of(self.profile, last).transient.at(batch)

    def _kept(self, first: int, last: int, batch: int) -> float:
        stages = self.profile.stages[first : last + 1]
        return stages[0].input.at(batch) + sum(s.kept.at(batch) for s in stages) + stages[-1].loose.at(batch)

    def _backward(self, first: int, last: int, batch: int) -> float:
        stages, head = self.profile.stages, head_of(self.profile, last)
        out = stages[last].output * batch
        gradients = float(head.gradients)
        kept = stages[first].input.at(batch) + sum(s.kept.at(batch) for s in stages[first : last + 1])
        peak = 0.0
        for k in range(last, first - 1, -1):
            held = 0 if k == last else 2 * out
            peak = max(peak, kept + stages[k].transient.at(batch) + gradients + held)
            kept -= stages[k].kept.at(batch)
            gradients += stages[k].gradients
        return max(peak, stages[first].input.at(batch) + gradients + out)

    def unit(self, first: int, last: int, batch: int) -> float:
        """Peak bytes of one step of the unit, weights and optimizer state apart."""
        if (first, last) in self.exact:
            return self.exact[first, last].at(batch)
        return max(self._backward(first, last, batch), self._head(first, last, batch))

    def overhead(self, units: tuple[tuple[int, int], ...]) -> int:
        """Bytes beside every block: on the CPU the resting weights share the memory."""
        if not self.together:
            return 0
        return sum(s.weights for s in self.profile.stages) + sum(head_of(self.profile, j).weights for _, j in units)

    def fixed(self, units: tuple[tuple[int, int], ...]) -> int:
        """Weights (where they are not in the overhead) and optimizer state of a block of these units."""
        total = 0
        for i, j in units:
            parts: list[StageProfile | HeadProfile] = [*self.profile.stages[i : j + 1], head_of(self.profile, j)]
            total += sum(p.optimizer + (0 if self.together else p.weights) for p in parts)
        return total

    def input_bytes(self, first: int) -> int:
        """Bytes of one sample of a block's inputs."""
        return self.profile.stages[first - 1].output if first else self.profile.input

    def _slots(self, first: int, batch: int) -> int:
        """Bytes of the device slots that batches of cached inputs arrive in; on the CPU they are not budgeted."""
        if first == 0 or self.together:
            return 0
        return ENGINE_SLOTS * batch * stored_bytes(self.profile.stages[first - 1].output_shape, self.dtype)

    def block(self, units: tuple[tuple[int, int], ...], batch: int, overhead: int) -> float:
        """Peak bytes of training a block of these units."""
        first, last = units[0][0], units[-1][1]
        buffer = self.input_bytes(first) * batch if first else 0  # the reused input of a cached block outlives unit 0
        stored = self._slots(first, batch)
        peak = self.unit(*units[0], batch) + stored
        peak = max([peak, *(self.unit(i, j, batch) + buffer + stored for i, j in units[1:])])
        if first == 0:
            peak = max(peak, self.profile.loading.at(batch) + self.profile.stages[last].output * batch)
        return overhead + self.fixed(units) + peak

    def largest_batch(self, units: tuple[tuple[int, int], ...], allowed: float, overhead: int, high: int) -> int:
        """The largest batch in 1..high whose block fits, 0 if none; bytes grow with the batch."""
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.block(units, middle, overhead) <= allowed else (low, middle - 1)
        return low


Units = tuple[tuple[int, int], ...]


def cache_bytes(profile: Profile, units: list[Units], samples: int, copies: int, dtype: str) -> int:
    """Bytes of all caches between the blocks of a plan."""
    shapes = (profile.stages[block[-1][1]].output_shape for block in units[:-1])
    return sum(stored_bytes(shape, dtype) * samples * copies for shape in shapes)


def _compositions(length: int, parts: int) -> Iterator[Units]:
    for cuts in itertools.combinations(range(1, length), parts - 1):
        edges = (0, *cuts, length)
        yield tuple((edges[k], edges[k + 1] - 1) for k in range(parts))


def _groupings(units: Units) -> Iterator[list[Units]]:
    for joins in itertools.product((True, False), repeat=len(units) - 1):
        blocks: list[list[tuple[int, int]]] = [[units[0]]]
        for unit, joined in zip(units[1:], joins, strict=True):
            if joined:
                blocks[-1].append(unit)
            else:
                blocks.append([unit])
        yield [tuple(b) for b in blocks]


def _head_time(profile: Profile, units: Units, batch: int) -> float:
    heads = [head_of(profile, j) for _, j in units]
    timed = [h.seconds.at(batch) for h in heads if h.seconds is not None]
    return sum(timed) if len(timed) == len(heads) else float(sum(h.flops for h in heads))


def windows(
    costs: Costs, allowed: float, config: TrainConfig, samples: int, target: int
) -> tuple[list[Units], int] | None:
    """The fewest units whose blocks fit at the target batch; ties by cache bytes, then time, then peak.

    After the target 64 and 32 are tried; then one unit a stage at the largest batch that fits them all.
    """
    profile, count = costs.profile, len(costs.profile.stages)
    batches = [target, *(b for b in FALLBACK_BATCHES if config.min_batch_size <= b < target)]
    if config.batch_size != "auto":
        batches = [target]
    for batch in batches:
        bytes_of = cache(lambda i, j, batch=batch: costs.unit(i, j, batch))
        for parts in range(1, min(config.max_units, count) + 1):
            best: tuple[tuple[float, ...], list[Units]] | None = None
            for units in _compositions(count, parts):
                if any(bytes_of(i, j) > allowed for i, j in units):
                    continue
                for blocks in _groupings(units):
                    overhead = costs.overhead(units)
                    peak = max(costs.block(b, batch, overhead) for b in blocks)
                    if peak > allowed:
                        continue
                    stored = cache_bytes(profile, blocks, samples, copies_of(config), config.stored_dtype)
                    key = (stored, _head_time(profile, units, batch), peak)
                    if best is None or key < best[0]:
                        best = key, blocks
            if best is not None:
                return best[1], batch
    singles: Units = tuple((s, s) for s in range(count))
    overhead = costs.overhead(singles)
    batch = min(costs.largest_batch((unit,), allowed, overhead, batches[-1]) for unit in singles)
    if batch < smallest_batch(config, target):
        return None
    joined = _join_singles(costs, allowed, singles, batch, samples, config)
    assert joined is not None, "each stage alone fits at this batch"
    return joined, batch


def smallest_batch(config: TrainConfig, target: int) -> int:
    """The least batch a plan may use: min_batch_size, or exactly the batch asked for."""
    return min(config.min_batch_size, target) if config.batch_size == "auto" else target


def _join_singles(
    costs: Costs, allowed: float, singles: Units, batch: int, samples: int, config: TrainConfig
) -> list[Units] | None:
    """One unit a stage, joined into the blocks with the fewest cache bytes, then the fewest blocks, that fit."""
    overhead, count = costs.overhead(singles), len(singles)
    best: list[tuple[tuple[int, int], list[Units]] | None] = [((0, 0), [])] + [None] * count
    for end in range(1, count + 1):
        for start in range(end):
            before = best[start]
            if before is None or costs.block(singles[start:end], batch, overhead) > allowed:
                continue
            blocks = [*before[1], singles[start:end]]
            stored = cache_bytes(costs.profile, blocks, samples, copies_of(config), config.stored_dtype)
            key = (stored, len(blocks))
            current = best[end]
            if current is None or key < current[0]:
                best[end] = key, blocks
    found = best[count]
    return found[1] if found else None


def layerwise(
    costs: Costs, allowed: float, config: TrainConfig, smallest: int, largest: int
) -> list[tuple[Units, int]] | None:
    """One unit a stage; a stage joins the block before it while their largest batches differ by less than a threshold.

    Returns blocks with their batch sizes; None where a stage does not fit at `smallest`.
    """
    count = len(costs.profile.stages)
    singles: Units = tuple((s, s) for s in range(count))
    overhead = costs.overhead(singles)
    fits = [costs.largest_batch((unit,), allowed, overhead, largest) for unit in singles]
    if min(fits) < smallest:
        return None
    blocks: list[tuple[Units, int]] = []
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


def checkpointed_peak(costs: Costs, batch: int) -> float:
    """Peak of backpropagation checkpointed at the best set of stage boundaries: the honest rival at equal batch.

    Segment inputs are kept; one segment at a time is recomputed and differentiated; all gradients wait for the step.
    """
    stages, count = costs.profile.stages, len(costs.profile.stages)
    gradients = sum(s.gradients for s in stages) + head_of(costs.profile, count - 1).gradients
    segment = {}
    for i in range(count):
        kept = 0.0
        worst = 0.0
        for j in range(i, count):
            kept += stages[j].kept.at(batch)
            worst = max(worst, kept + stages[j].transient.at(batch))
            segment[i, j] = worst
    sizes = [costs.input_bytes(i) * batch for i in range(count)]
    best = float("inf")
    for limit in sorted(set(segment.values())):
        least = [0.0] + [float("inf")] * count  # bytes of segment inputs kept, over the first j stages
        for j in range(1, count + 1):
            for i in range(j):
                if segment[i, j - 1] <= limit:
                    least[j] = min(least[j], least[i] + sizes[i])
        best = min(best, least[count] + limit)
    return best + gradients


def scaled_lr(config: TrainConfig, batch: int) -> float:
    """The learning rate at a batch size: linear for SGD, square root for AdamW, capped; config.lr is meant at 128."""
    ratio = batch / TARGET_BATCH
    return float(f"{config.lr * min(ratio if config.optimizer == 'sgd' else ratio**0.5, MAX_LR):.6g}")


def _bounds(costs: Costs, batch: int, plan_peak: float) -> Bounds:
    count = len(costs.profile.stages)
    whole: Units = ((0, count - 1),)
    fixed = costs.overhead(whole) + costs.fixed(whole)
    singles: Units = tuple((s, s) for s in range(count))
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
    exact: Mapping[tuple[int, int], Line] | None = None,
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
        chosen = [(units, found[1]) for units in found[0]] if found else None
    if chosen is None:
        raise _infeasible(costs, budget, allowed, smallest_batch(config, target))
    return _plan(costs, config, chosen, budget, round(allowed), samples, target)


def _plan(
    costs: Costs,
    config: TrainConfig,
    chosen: list[tuple[Units, int]],
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
        for i, j in units:
            head = head_of(profile, j)
            plans.append(UnitPlan(i, j, head.spec, head.path, round(costs.unit(i, j, batch))))
        blocks.append(
            BlockPlan(
                units=tuple(plans),
                batch=batch,
                lr=scaled_lr(config, batch),
                peak=round(costs.block(units, batch, overhead)),
                seconds=_epoch_seconds(profile, units, batch, samples),
                cache=cache_plan(profile, config, units[0][0], batch, samples),
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
    )


def forward_batch(costs: Costs, plan: Plan, block: BlockPlan) -> int:
    """The most samples that can go through the frozen stages before a block at a time, 0 if not even one fits."""
    units = tuple((u.first, u.last) for u in block.units)
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


def _epoch_seconds(profile: Profile, units: Units, batch: int, samples: int) -> float | None:
    lines = [s.seconds for i, j in units for s in profile.stages[i : j + 1]]
    lines += [head_of(profile, j).seconds for _, j in units]
    if any(line is None for line in lines):
        return None
    return sum(line.at(batch) for line in lines if line is not None) * samples / batch


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
    singles: Units = tuple((s, s) for s in range(count))
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

"""Tiers: where the inputs of a block wait, and what that takes; arithmetic on measured rates, no torch.

A cache lies on the device, in RAM, in a file, or nowhere: then its samples are recomputed in every epoch. `choose_tier`
drops what does not fit and takes the fastest of the rest; `SlowDisk` and `choose_again` look at it while training.
The bytes of a file are those of its layout, csrc/cache/format.h.
"""

from __future__ import annotations

import math
from dataclasses import replace

from nf_engine.config import TrainConfig
from nf_engine.errors import ConfigError, InfeasibleBudgetError
from nf_engine.records import WINDOW, CachePlan, Plan, Profile, TierProbe, format_bytes, stored_bytes

CHUNK = 2**20  # bytes of samples that a chunk of a cache aims at
PAGE = 4096
LEAST_U8 = 64  # values of a channel below which its lo and step weigh too much


def copies_of(config: TrainConfig) -> int:
    """Augmented copies in a cache: as configured, else two where augmentation is on."""
    return config.augment_copies or (1 if config.augment == "none" else 2)


def cache_plan(profile: Profile, config: TrainConfig, first: int, batch: int, samples: int) -> CachePlan:
    """The cache before stage `first` as configured, without a choice."""
    if first == 0:
        return CachePlan("images", "uint8", 1, 0, {}, "the first block reads the images")
    before, dtype, copies = profile.stages[first - 1], config.stored_dtype, copies_of(config)
    if dtype == "u8" and math.prod(before.output_shape[1:]) < LEAST_U8:
        shape = "x".join(map(str, before.output_shape))
        raise ConfigError(
            f"cache_dtype='u8' needs channels of {LEAST_U8} values or more, but the plan caches the {shape} outputs of "
            f"{before.name}; set cache_dtype='auto', or cut earlier with split_points"
        )
    sample = stored_bytes(before.output_shape, dtype)
    if config.cache == "recompute":
        copies = 1
    chunk, stride = chunk_of(sample, samples * copies)
    window = max(WINDOW, -(-2 * batch // chunk) * stride)  # at least two batches
    reason = "measured when training starts" if config.cache == "auto" else "as configured"
    size = 0 if config.cache == "recompute" else sample * samples * copies
    return CachePlan(config.cache, dtype, copies, size, {}, reason, window=window)


def chunk_of(sample: int, count: int) -> tuple[int, int]:
    """Samples of one chunk, and its bytes in the file, of a cache of `count` samples of `sample` bytes."""
    samples = min(count, max(1, CHUNK // max(sample, 64)))
    return samples, -(-samples * (sample + 16) // PAGE) * PAGE


def held_bytes(cache: CachePlan, samples: int, tier: str) -> int:
    """Bytes that a cache takes in a tier: the samples, in RAM their records of 16 bytes, too, on disk a whole file."""
    count = samples * cache.copies
    if cache.bytes == 0 or tier == "device":
        return cache.bytes
    if tier == "ram":
        return cache.bytes + 16 * count
    chunk, stride = chunk_of(cache.bytes // count, count)
    chunks = -(-count // chunk)
    return PAGE + chunks * stride + -(-4 * chunks // PAGE) * PAGE + PAGE


def mixing(sample: int, count: int, window: int) -> float:
    """How often two samples share a batch again, as a multiple of a full shuffle; about, by a fit to the planner."""
    chunk, stride = chunk_of(sample, count)
    chunks = max(2, window // stride)
    return 1.0 if chunks * chunk >= count else 1 + 3 * count / (chunks**2 * chunk)


def choose_tier(
    profile: Profile, config: TrainConfig, plan: Plan, number: int, probe: TierProbe | None, forward_size: int
) -> CachePlan:
    """Where the inputs of block `number` wait.

    Seconds of a tier: one pass of writing, hidden behind the forward pass that makes the outputs (or the reverse), and
    the block's epochs, each with its reading hidden behind the training. S bytes, V copies, E epochs:

        device      V Tf                       + E Tc                             Tc  an epoch of this block
        ram         max(V Tf, S / min(d, m))   + E max(Tc, S / V / min(u, m))     Tf  forward pass of the block before
        disk        max(V Tf, S / min(w, d))   + E max(Tc, S / V / min(r, m, u))  Tp  forward pass of all stages before
        recompute                                E (Tc + Tp)

    with w, r, u, d, m = write, read, up, down, gather of the probe. A tier without room drops out; so does "device" on
    the CPU. The least time wins, and within 5 % the earlier row.

    Args:
        plan: tiers of the blocks before `number` are decided; that of `number` may be chosen again.
        probe: measured rates; None leaves "auto" open.
        forward_size: samples of a recomputing forward pass; 0: it does not fit the budget.

    Raises:
        InfeasibleBudgetError: the tier asked for has no room, or none has.
    """
    block = plan.blocks[number]
    given = cache_plan(profile, config, block.first, block.batch, plan.samples)
    room = _rooms(plan, number, probe)
    need = {t: held_bytes(given, plan.samples, t) for t in room}
    dropped = {
        t: f"needs {format_bytes(need[t])}, has room for {format_bytes(max(0, r))}"
        for t, r in room.items()
        if r < need[t]
    }
    if forward_size == 0:
        dropped["recompute"] = f"does not fit {format_bytes(plan.allowed)} even one image at a time"
    if given.tier in dropped or (given.tier == "auto" and probe is not None and {*room, "recompute"} == set(dropped)):
        raise _no_tier(plan, number, given, dropped)
    if given.tier != "auto" or probe is None:
        return replace(given, forward_batch=forward_size)
    seconds = {
        t: _tier_seconds(profile, plan, number, given, probe, t, forward_size)
        for t in (*room, "recompute")
        if t not in dropped
    }
    least = min(seconds.values())
    tier = next(t for t, v in seconds.items() if v <= 1.05 * least)
    reason = f"{tier} is {'fastest' if seconds[tier] == least else 'within 5 % of the fastest'}: "
    reason += ", ".join(f"{t} {v:.2f} s" for t, v in seconds.items())
    reason += "".join(f"; {t} {why}" for t, why in dropped.items())
    rounded = {t: float(f"{v:.6g}") for t, v in seconds.items()}
    chosen = replace(given, tier=tier, seconds=rounded, reason=reason, dropped=dropped, forward_batch=forward_size)
    if tier == "recompute":
        return replace(chosen, copies=1, bytes=0)
    write, read = _rates(probe, tier) if tier != "device" else (0.0, 0.0)
    return replace(chosen, rate=read, write_rate=write)


def _tier_seconds(
    profile: Profile, plan: Plan, number: int, cache: CachePlan, probe: TierProbe, tier: str, forward_size: int
) -> float:
    """The table of `choose_tier`."""
    block, before = plan.blocks[number], plan.blocks[number - 1]
    epoch = block.seconds or 0.0
    if tier == "recompute":
        return plan.epochs * (epoch + _prefix_seconds(profile, plan, probe, 0, block.first, forward_size))
    start = 0 if before.cache.tier in ("images", "recompute") else before.first
    making = cache.copies * _prefix_seconds(profile, plan, probe, start, block.first, before.batch)
    if tier == "device":
        return making + plan.epochs * epoch
    write, read = _rates(probe, tier)
    return max(making, cache.bytes / write) + plan.epochs * max(epoch, cache.bytes / cache.copies / read)


def _rates(probe: TierProbe, tier: str) -> tuple[float, float]:
    """Bytes a second of writing and of reading a cache in RAM or on disk."""
    write, read = min(probe.down, probe.gather), min(probe.up, probe.gather)
    return (write, read) if tier == "ram" else (min(probe.down, probe.write), min(read, probe.read))


def _rooms(plan: Plan, number: int, probe: TierProbe | None) -> dict[str, int]:
    """Bytes that the cache before block `number` may take in each tier, beside the one read while it is written.

    On the device it lies beside two blocks, one after the other: the one that writes and the one that reads it.
    """
    before = plan.blocks[number - 1]
    room = {}
    if plan.device != "cpu":
        room["device"] = plan.allowed - max(before.peak, plan.blocks[number].peak)
    if probe is not None:
        room |= {t: probe.room[t] for t in ("ram", "disk")}
    return {
        t: r - (held_bytes(before.cache, plan.samples, t) if before.cache.tier == t else 0) for t, r in room.items()
    }


def _no_tier(plan: Plan, number: int, given: CachePlan, dropped: dict[str, str]) -> InfeasibleBudgetError:
    stage = plan.stages[plan.blocks[number].first]
    if given.tier == "auto":
        tried, suggestion = dropped, "augment_copies=1"
        advice = "free some disk space, raise max_cache_bytes or lower augment_copies"
    else:
        tried = {given.tier: dropped[given.tier]}
        suggestion = "cache='recompute'" if given.tier == "disk" else "cache='disk'"
        advice = f"set {suggestion}"
    reasons = "; ".join(f"{t} {why}" for t, why in tried.items())
    return InfeasibleBudgetError(
        f"the inputs of {stage} can wait nowhere: {reasons}; {advice}",
        stage=stage,
        need=plan.allowed + 1 if given.tier == "recompute" else held_bytes(given, plan.samples, given.tier),
        budget=plan.budget,
        suggestions=(suggestion,),
    )


def _prefix_seconds(profile: Profile, plan: Plan, probe: TierProbe, first: int, end: int, batch: int) -> float:
    """Seconds of one pass of all samples through stages first..end-1, from the images where first is 0."""
    one = _forward_seconds(profile, first, end, batch) + (probe.fetch if first == 0 else 0.0)
    return plan.samples * one


def choose_again(cache: CachePlan, epochs: int, epoch_seconds: float) -> bool:
    """Whether recomputing the inputs is expected to beat a disk that has slowed down to `epoch_seconds` an epoch.

    Args:
        cache: of the block, chosen with `seconds` for all `epochs`; a tier that did not fit has none.
        epoch_seconds: measured, of the last epoch, training included.
    """
    recompute = cache.seconds.get("recompute")
    return cache.forward_batch > 0 and recompute is not None and recompute / epochs < 0.95 * epoch_seconds


class SlowDisk:
    """Says once that the disk has become too slow for its plan: 10 s of waiting below half the planned rate.

    Drives slow down when their fast cells are full. Only time in which the disk was waited for counts; time at a good
    rate is taken off again, so that rare hiccups in hours of training do not add up.
    """

    def __init__(self, planned: float, patience: float = 10.0) -> None:
        """planned: bytes a second, 0: never slow. patience: seconds."""
        self._planned, self._patience = planned, patience
        self._slow = 0.0
        self._told = False

    def add(self, seconds: float, count: int) -> bool:
        """Reports `count` bytes in `seconds` in which the disk was the bottleneck; True the one time it matters."""
        slow = count < 0.5 * self._planned * seconds
        self._slow = max(0.0, self._slow + (seconds if slow else -seconds))
        if self._told or self._slow < self._patience:
            return False
        self._told = True
        return True


def _forward_seconds(profile: Profile, first: int, end: int, batch: int) -> float:
    """Seconds a sample of an eval forward through stages first..end-1."""
    lines = [s.forward_seconds for s in profile.stages[first:end]]
    return sum(line.at(batch) for line in lines if line is not None) / batch

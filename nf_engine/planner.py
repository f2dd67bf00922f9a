"""Planner: profile and plan of one model, refined until what the plan predicts is what the worker uses.

profile -> partition -> measure the chosen units whole -> partition again ... -> decide the tiers -> run each block on
the meter. On the CPU and without a device all of it happens on fake tensors, in seconds; on CUDA on the device itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span
from nf_engine.device import capped, room_bytes
from nf_engine.errors import InfeasibleBudgetError
from nf_engine.heads import WIDEST
from nf_engine.partitioner import TARGET_BATCH, forward_batch, partition
from nf_engine.peaks import block_peak, profile_unit
from nf_engine.preprocess import Preprocess
from nf_engine.profiler import BATCHES, profile_stages
from nf_engine.records import (
    IMAGE_SLOTS,
    BlockPlan,
    CachePlan,
    Line,
    Plan,
    Profile,
    TierProbe,
    UnitPlan,
    format_bytes,
    image_bytes,
)
from nf_engine.recovery import RECOVERING, asked_bytes, is_out_of_memory
from nf_engine.seconds import fetch_seconds
from nf_engine.stages import Cut
from nf_engine.tier_probe import PROBE_SECONDS, probe_tiers
from nf_engine.tiers import choose_tier

LINEAR_UNITS = 2  # up to so many units linear heads are the more accurate ones: bench/bench_head_kinds.py
ROUNDS = 8  # of planning: each one measures the units that the one before chose
SMALL = 32 * 2**20  # bytes of caches for which a short probe will do
T = TypeVar("T")


class _State(NamedTuple):
    """What is known with one choice of heads; upto: the batch up to which, from its half on, a measured line holds."""

    settings: TrainConfig
    profile: Profile
    measured: dict[Span, Line]
    upto: dict[Span, int]


class _Lack(NamedTuple):
    """Bytes that a measurement is taken to need: what there was, and what was asked for then, a tenth of it or more."""

    need: int


def _unless_full(measure: Callable[[], T], device: torch.device) -> T | _Lack:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what it holds in store could be had as well
    room = room_bytes(device)
    try:
        return measure()
    except RuntimeError as error:
        if device.type not in RECOVERING or not is_out_of_memory(error):
            raise
        asked = asked_bytes(error)
    # Here the exception is gone, and with its frames what the failed measurement held on to.
    gc.collect()
    torch.cuda.empty_cache()
    return _Lack(room + max(asked or 0, room // 10))


def _span(unit: UnitPlan) -> Span:
    return Span(unit.first, unit.last, unit.starts)


def _rank(plan: Plan) -> tuple[int, int, int]:
    """Smaller is better for the accuracy: units, blocks, and then larger batches."""
    return len(plan.units), len(plan.blocks), -min(b.batch for b in plan.blocks)


class Planner:
    """Profile and plan of one cut model, refined until every unit of the plan has been measured whole."""

    def __init__(
        self,
        cut: Cut,
        settings: TrainConfig,
        preprocess: Preprocess,
        uint8: bool,
        device: torch.device | None,
        samples: int,
        name: str,
        folder: Path | None,
        batch_sizes: Sequence[int] = BATCHES,
        budget: int | None = None,
        together: bool | None = None,
        in_memory: bool = True,
    ) -> None:
        """together: resting weights share the budget; where None, if the device is the CPU.

        in_memory: the training images are one array, no Dataset.
        """
        self.cut, self.preprocess, self.uint8 = cut, preprocess, uint8
        self.device, self.samples, self.folder = device, samples, folder
        self.together = device is not None and device.type == "cpu" if together is None else together
        self._may_reside = uint8 and in_memory and not self.together
        self._probed: TierProbe | None = None
        self._profiled = partial(
            profile_stages,
            cut,
            preprocess=preprocess,
            name=name,
            uint8=uint8,
            device=device,
            batch_sizes=batch_sizes,
            budget=budget,
        )
        self._states: dict[tuple[str, int], _State] = {}
        self._given = settings
        self._take("deep" if settings.head == "deep" else "linear", WIDEST)

    def _take(self, kind: str, widest: int) -> None:
        """Heads of this kind and width from here on."""
        if (kind, widest) not in self._states:
            settings = self._given.with_fields({"head": kind})
            self._states[kind, widest] = _State(settings, self._profiled(config=settings, widest=widest), {}, {})
        self.settings, self.profile, self.measured, self._upto = self._states[kind, widest]

    def plan(self, budget: int) -> Plan:
        """The plan whose blocks, run whole under the meter, stay below the budget minus its margin.

        Where the kind of the heads is ours to choose, they are deep from three units on, if such a plan fits.

        Raises:
            InfeasibleBudgetError: there is none.
        """
        if self._given.head == "deep":
            return self._deep(budget)
        self._take("linear", WIDEST)
        linear = self._plan(budget)
        if self._given.head == "linear" or self._given.partition == "layerwise" or len(linear.units) <= LINEAR_UNITS:
            return linear
        try:
            return self._deep(budget)
        except InfeasibleBudgetError:
            self._take("linear", WIDEST)
            note = "linear heads, as no plan with deep ones fits the budget"
            return replace(linear, warnings=(*linear.warnings, note))

    def _deep(self, budget: int) -> Plan:
        """With deep heads, the widest with which the plan has no more units and no smaller batches than with narrower.

        Wide heads are more accurate, narrow ones take fewer bytes.
        """
        found: list[tuple[Plan, int]] = []
        failure: InfeasibleBudgetError | None = None
        for widest in (WIDEST,) if self._given.head_width else (WIDEST, WIDEST // 2):
            self._take("deep", widest)
            try:
                found.append((self._plan(budget), widest))
            except InfeasibleBudgetError as error:
                failure = error
        if not found:
            assert failure is not None
            raise failure
        made, widest = min(found, key=lambda pair: _rank(pair[0]))  # the first of equals: the wider
        self._take("deep", widest)
        return made

    def _plan(self, budget: int) -> Plan:
        where = self.device or torch.device("cpu")
        last = len(self.cut.stages) - 1
        target = min(
            TARGET_BATCH if self.settings.batch_size == "auto" else int(self.settings.batch_size), self.samples
        )
        whole = UnitPlan(0, last, self.profile.stages[last].head.spec, "autograd", 0)
        bound = _unless_full(partial(self._line, whole, target, where), where)
        if not isinstance(bound, _Lack):  # backpropagation; else the sum over its stages has to do
            self._note(whole, target, bound)
        slack = 0
        for _ in range(ROUNDS):
            made = self._partition(budget, slack)
            new = [(u, b.batch) for b in made.blocks for u in b.units if not self._is_measured(u, b.batch)]
            for unit, batch in new:
                self._measure(unit, batch, where)
            if new:
                continue
            made = self._with_tiers(made)
            made = self._with_peaks(made, where)
            excess = made.peak - made.allowed - slack
            if excess <= 0:
                return self._with_images(replace(made, allowed=made.allowed + slack))
            slack += excess
        raise InfeasibleBudgetError(
            f"no plan settled under {format_bytes(budget)} ({budget} bytes) in {ROUNDS} rounds; "
            f"the last one needs {format_bytes(made.peak)}; raise memory_budget or lower min_batch_size",
            stage=self.profile.stages[made.blocks[0].first].name,
            need=made.peak,
            budget=budget,
            suggestions=(f"memory_budget={made.peak + made.budget - made.allowed}",),
        )

    def _partition(self, budget: int, slack: int) -> Plan:
        return partition(
            self.profile,
            self.settings,
            budget=budget,
            samples=self.samples,
            together=self.together,
            exact=self.measured,
            slack=slack,
        )

    def _is_measured(self, unit: UnitPlan, batch: int) -> bool:
        high = self._upto.get(_span(unit), 0)
        return high // 2 <= batch <= high

    def _line(self, unit: UnitPlan, batch: int, device: torch.device) -> Line:
        return profile_unit(self.cut, unit, self.settings, batch, device)

    def _measure(self, unit: UnitPlan, batch: int, device: torch.device) -> None:
        found = _unless_full(partial(self._line, unit, batch, device), device)
        self._note(unit, batch, Line(0.0, found.need / batch) if isinstance(found, _Lack) else found)

    def _note(self, unit: UnitPlan, batch: int, line: Line) -> None:
        self.measured[_span(unit)] = line
        self._upto[_span(unit)] = batch

    def _with_tiers(self, made: Plan) -> Plan:
        """The plan with the tier of every cache decided: measured for "auto" where there is a device."""
        costs = Costs(self.profile, self.together, self.measured, self.settings.stored_dtype)
        probe = self._probe(made)
        blocks = list(made.blocks)
        for k, block in enumerate(blocks[1:], 1):
            size = forward_batch(costs, made, block)
            blocks[k] = replace(block, cache=choose_tier(self.profile, self.settings, made, k, probe, size))
            made = replace(made, blocks=tuple(blocks))
        host_bytes = max(_host_bytes(b.cache) + self._pinned_bytes(b) for b in blocks)
        return replace(made, host_bytes=host_bytes, probe=probe)

    def _pinned_bytes(self, block: BlockPlan) -> int:
        """Host memory in which batches of images wait for the device."""
        if self.together or not block.reads_images:
            return 0
        return IMAGE_SLOTS * block.batch * self.profile.image

    def _probe(self, made: Plan) -> TierProbe | None:
        """Rates and rooms of the tiers, measured once, with the largest samples that the plan caches."""
        if self.settings.cache != "auto" or self.device is None or self.folder is None or len(made.blocks) == 1:
            return None
        if self._probed is None:
            largest = max(made.blocks[1:], key=lambda b: b.cache.bytes)
            small = largest.cache.bytes < SMALL
            self._probed = probe_tiers(
                self.cut.stages[largest.first - 1].output_shape,
                largest.batch,
                self.folder,
                self.settings,
                device=self.device,
                seconds=PROBE_SECONDS / 10 if small else PROBE_SECONDS,
                fetch=fetch_seconds(self.cut, self.preprocess, self.uint8, made.blocks[0].batch, self.device),
            )
        return self._probed

    def _with_peaks(self, made: Plan, device: torch.device) -> Plan:
        """The plan with the peaks of its blocks, each run whole; on CUDA under the cap that the training will have."""

        def peak(number: int, block: BlockPlan) -> int:
            run = partial(
                block_peak,
                self.cut,
                block,
                self.settings,
                self.preprocess,
                uint8=self.uint8,
                device=device,
                overhead=made.overhead,
                together=self.together,
                edges=[b.first for b in made.blocks[1:number]],
            )
            found = _unless_full(run, device)
            return found.need if isinstance(found, _Lack) else found

        on_device = [b.cache.bytes if b.cache.tier == "device" else 0 for b in made.blocks] + [0]
        beside = [on_device[k] + on_device[k + 1] for k in range(len(made.blocks))]  # what it reads, what it leaves
        blocks: list[BlockPlan] = []
        for k, block in enumerate(made.blocks):
            with capped(device, max(1, made.budget - beside[k])):
                blocks.append(replace(block, peak=peak(k, block) + beside[k]))
        most = max(b.peak for b in blocks)
        return replace(made, blocks=tuple(blocks), bounds=replace(made.bounds, plan=most))

    def _with_images(self, made: Plan) -> Plan:
        """The plan with all images on the device while a block reads them, where that fits beside all that it holds.

        They get what caches on the device leave: a cached sample has more bytes than its image, and prefetching hides
        the copies of images. The slots stay counted, held-out images come through them. Nothing else changes.
        """
        size = image_bytes(self.cut.input_shape, self.samples)
        if not self._may_reside or any(b.reads_images and b.peak + size > made.allowed for b in made.blocks):
            return made
        blocks = tuple(replace(b, peak=b.peak + size) if b.reads_images else b for b in made.blocks)
        made = replace(made, blocks=blocks, resident_images=size)
        return replace(made, bounds=replace(made.bounds, plan=made.peak))


def _host_bytes(cache: CachePlan) -> int:
    """Host memory that reading a cache takes beside the budget: the window, and the whole cache where it is in RAM."""
    if cache.bytes == 0:
        return 0
    return min(cache.window, cache.bytes) + (cache.bytes if cache.tier == "ram" else 0)

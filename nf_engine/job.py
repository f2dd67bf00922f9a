"""Job: what the parts of one run share, and what they tell to others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from nf_engine.checkpoint import Parts, fill, parse
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes, placed
from nf_engine.interrupt import Interrupt
from nf_engine.local_step import Unit
from nf_engine.preprocess import Preprocess
from nf_engine.recompute import Body
from nf_engine.records import BlockPlan, Plan
from nf_engine.recovery import is_out_of_memory
from nf_engine.run_folder import RunFolder
from nf_engine.stages import Cut
from nf_engine.worker import EpochReport, Score


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block: predicted, and measured as tensors (allocated), allocator pool (reserved), whole process.

    On the CPU reserved is 0, and process is the resident set of the whole program, images and caches included.
    """

    block: int
    predicted: int
    allocated: int
    reserved: int
    process: int


class Observer(Protocol):
    """Told what happens; progress displays and logs implement it."""

    def planned(self, plan: Plan) -> None: ...
    def block_started(self, number: int, block: BlockPlan) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def epoch_ended(self, report: EpochReport, accuracy: float, now: int, peak: int) -> None: ...
    def block_ended(self, number: int, scores: Sequence[Score], memory: BlockMemory) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class Job:
    """One run.

    Attributes:
        cut: stages and classifier of the model, trained in place.
        heads: one for each unit of the plan, in order; trained in place.
        plan: with every tier decided; replaced where a batch has to shrink.
        data, held_out: images; the exits are scored on held_out.
        train_images, plain: preprocessing with and without augmentation.
        folder: with a first commit.
        keep_cache: leave the caches on the disk.
        history: an entry for each block and epoch. seconds: by what they were spent on.
        before: bytes allocated and reserved on a CUDA device before the run: workspaces, and what is the caller's.
    """

    cut: Cut
    heads: Sequence[nn.Module]
    plan: Plan
    config: TrainConfig
    data: ImageData
    held_out: ImageData
    train_images: Preprocess
    plain: Preprocess
    folder: RunFolder
    device: torch.device
    observer: Observer
    interrupt: Interrupt
    keep_cache: bool = False
    history: list[dict[str, object]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "score": 0.0, "cache_write": 0.0})
    before: tuple[int, int] = (0, 0)

    def _numbers(self, number: int) -> range:
        """Numbers of the units of a block, among all."""
        ends = list(itertools.accumulate((len(b.units) for b in self.plan.blocks), initial=0))
        return range(ends[number], ends[number + 1])

    def names(self, number: int) -> list[str]:
        """Keys of the units of a block in files."""
        return [f"unit{k}" for k in self._numbers(number)]

    def units(self, number: int, *, training: bool = True) -> list[Unit]:
        """The units of a block on the device, with what training needs beside their modules where they are to train."""
        units = []
        for unit, k in zip(self.plan.blocks[number].units, self._numbers(number), strict=True):
            stages = [s.module for s in self.cut.stages[unit.first : unit.last + 1]]
            name = self.plan.stages[unit.first] + ".." + self.plan.stages[unit.last]
            made = Unit(name, stages, self.heads[k], [s - unit.first for s in unit.starts])
            for module in made.modules():
                placed(module, self.device)
            if training:
                made.prepare(self.config)
            units.append(made)
        return units

    def parts(self, number: int) -> Parts:
        """The modules of a block under the keys of its file, wherever they are."""
        parts: dict[str, nn.Module] = {}
        for name, unit, k in zip(
            self.names(number), self.plan.blocks[number].units, self._numbers(number), strict=True
        ):
            parts[f"{name}.body"] = Body([s.module for s in self.cut.stages[unit.first : unit.last + 1]])
            parts[f"{name}.head"] = self.heads[k]
        return parts

    def begin_again(self, number: int) -> None:
        """Puts the weights back that a block had before any training."""
        (entry,) = self.folder.manifest_now.of_role("initial")
        everything, block = parse(self.folder.read(entry), entry.name), self.plan.blocks[number]
        names = {f"stage{i}" for i in range(block.first, block.last + 1)} | {f"head{k}" for k in self._numbers(number)}
        parts = {name: part for name, part in initial_parts(self.cut, self.heads).items() if name in names}
        fill(parts, {key: t for key, t in everything.items() if key.partition(".")[0] in names}, entry.name)
        for module in parts.values():
            module.zero_grad(set_to_none=True)

    def leave(self, units: Sequence[Unit], following: int | None = None) -> None:
        """Brings a block back to the host, with the frozen stages that fed it, and frees what only training needed.

        The modules of the `following` block, if one is named, stay where they are.
        """
        for unit in units:
            unit.optimizer = unit.loss_scale = None
            for module in unit.modules():
                module.eval()
        parts = [] if following is None else self.parts(following).values()
        stay = {m for part in parts for m in part.modules()}
        for module in (*(s.module for s in self.cut.stages), *self.heads):
            if module not in stay:
                module.to("cpu")

    def bring(self, number: int) -> None:
        """Brings a block to the device; where that has not the memory now, its training will ask again."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or weights would lie in the middle of what was freed, and keep it
        try:
            for part in self.parts(number).values():
                placed(part, self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.leave(())

    def start_count(self, units: Sequence[Unit]) -> TensorBytes | None:
        """The block's meter on the CPU; on CUDA the allocator counts from here on."""
        if self.device.type == "cpu":
            modules = [*(s.module for s in self.cut.stages), *self.heads]
            resident: list[Tensor] = [t for m in modules for t in (*m.parameters(), *m.buffers())]
            return TensorBytes([*resident, *(t for u in units for t in u.tensors())])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return None

    def now(self, counter: TensorBytes | None) -> tuple[int, int]:
        """Bytes of tensors now, and at most since the block began."""
        if counter is not None:
            return counter.now, counter.peak
        now, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return now - self.before[0], peak - self.before[0]


def initial_parts(cut: Cut, heads: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """All modules under the keys of the file of the weights before any training."""
    stages = {f"stage{i}": s.module for i, s in enumerate(cut.stages)}
    return stages | {f"head{k}": head for k, head in enumerate(heads)}

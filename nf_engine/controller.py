"""Controller: brings the blocks to the device one after another and hands the cache from one to the next.

    images -> block 0 -> cache 1 -> block 1 -> cache 2 -> ...       each block: train, score its exits, write outputs

Only the block in training (and, where a tier is "recompute", the frozen stages before it) is on the device.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Controller).
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nf_engine.config import TrainConfig, parse_bytes
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes, placed, watched
from nf_engine.errors import BudgetExceededError
from nf_engine.local_step import Unit, make_optimizer
from nf_engine.preprocess import Preprocess
from nf_engine.records import BlockPlan, CachePlan, Plan, format_bytes
from nf_engine.run_folder import RunFolder
from nf_engine.stages import Cut
from nf_engine.storage import ActivationCache, CacheGeometry, EngineOptions
from nf_engine.tiers import SlowDisk, choose_again
from nf_engine.worker import (
    Batch,
    CacheInputs,
    EpochReport,
    ImageInputs,
    Score,
    counter_key,
    forward_block,
    train_epochs,
)

PREVIEW = 512  # most held-out samples that an epoch's accuracy is estimated from; at most 2 % of an epoch


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


Inputs = ImageInputs | CacheInputs


class Controller:
    """Runs a plan.

    Args:
        cut: stages and classifier of the model, trained in place.
        heads: one for each unit of the plan, in order; trained in place.
        plan: with every tier decided.
        data, held_out: images; the exits are scored on held_out.
        train_images, plain: preprocessing with and without augmentation.
    """

    def __init__(
        self,
        cut: Cut,
        heads: Sequence[nn.Module],
        plan: Plan,
        config: TrainConfig,
        data: ImageData,
        held_out: ImageData,
        train_images: Preprocess,
        plain: Preprocess,
        folder: RunFolder,
        device: torch.device,
        observer: Observer,
        *,
        keep_cache: bool = False,
    ) -> None:
        self.cut, self.heads, self.plan, self.config = cut, heads, plan, config
        self.data, self.held_out = data, held_out
        self.train_images, self.plain = train_images, plain
        self.folder, self.device, self.observer = folder, device, observer
        self.keep_cache = keep_cache
        self.seconds: dict[str, float] = {"train": 0.0, "score": 0.0, "cache_write": 0.0}
        self.memory: list[BlockMemory] = []
        self.history: list[dict[str, object]] = []
        digest = hashlib.sha256((plan.to_json() + config.to_toml() + data.digest()).encode())
        self._fingerprint = digest.digest()
        self._numbers = list(itertools.accumulate((len(b.units) for b in plan.blocks), initial=0))

    def run(self) -> list[Score]:
        """Trains all blocks; returns the held-out score of every exit, in order."""
        scores: list[Score] = []
        inputs: Inputs = self._images(self.data, self.train_images)
        held: Inputs = self._images(self.held_out, self.plain)
        for number, block in enumerate(self.plan.blocks):
            self.observer.block_started(number, block)
            units = self._units(number, block)
            for stage in inputs.prefix if isinstance(inputs, ImageInputs) else ():
                placed(stage, self.device).eval()
            counter = self._start_count()
            inputs.copies = self._copies_after(number) if isinstance(inputs, ImageInputs) else inputs.copies
            try:
                self._train(number, block, units, inputs, held, counter)
                after, after_held, found = self._leave(number, block, units, inputs, held, counter)
            finally:
                self._release(inputs, held)
            scores += found
            self._finish(number, units, found, counter)
            if after is not None and after_held is not None:
                inputs, held = after, after_held
        return scores

    def _images(self, data: ImageData, preprocess: Preprocess) -> ImageInputs:
        return ImageInputs(data, preprocess, self.device, self.config.seed)

    def _copies_after(self, number: int) -> int:
        """Copies of its outputs that a block which reads images has to write."""
        following = self.plan.blocks[number + 1 :]
        return following[0].cache.copies if following else 1

    def _units(self, number: int, block: BlockPlan) -> list[Unit]:
        units = []
        for k, unit in enumerate(block.units):
            stages = [s.module for s in self.cut.stages[unit.first : unit.last + 1]]
            name = self.plan.stages[unit.first] + ".." + self.plan.stages[unit.last]
            made = Unit(name, stages, self.heads[self._numbers[number] + k])
            for module in made.modules():
                placed(module, self.device)
            made.optimizer = make_optimizer(made.parameters(), self.config)
            units.append(made)
        return units

    def _resident(self) -> list[Tensor]:
        modules = [*(s.module for s in self.cut.stages), *self.heads]
        return [t for m in modules for t in (*m.parameters(), *m.buffers())]

    def _start_count(self) -> TensorBytes | None:
        """The block's meter on the CPU; on CUDA the allocator counts from here on."""
        if self.device.type == "cpu":
            return TensorBytes(self._resident())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return None

    def _release(self, *used: Inputs) -> None:
        """Closes caches that were used up, or whose block failed, and deletes them unless they are to be kept."""
        for inputs in used:
            if isinstance(inputs, CacheInputs):
                inputs.close()
                if not self.keep_cache and inputs.cache.record.tier == "disk":
                    self.folder.remove(inputs.cache.record.name)
                self.folder.log("cache_read", name=inputs.cache.record.name, **asdict(inputs.cache.stats()))

    def _train(
        self,
        number: int,
        block: BlockPlan,
        units: list[Unit],
        inputs: Inputs,
        held: Inputs,
        counter: TensorBytes | None,
    ) -> None:
        started = time.perf_counter()
        source = _Switch(inputs)
        disk = _DiskWatch(inputs.cache, block.cache) if isinstance(inputs, CacheInputs) else None

        def report(epoch: EpochReport) -> None:
            wanted = min(PREVIEW, max(block.batch, inputs.samples // 50))
            sample = itertools.islice(held.once(min(block.batch, wanted), None), -(-wanted // block.batch))
            sums = forward_block(units, sample, score=True, write=None, device=self.device)
            accuracy = sums.scores()[-1].accuracy
            for unit in units:
                unit.body.train()
                unit.head.train()
            now, peak = self._now(counter)
            self.observer.epoch_ended(epoch, accuracy, now, peak)
            line = {
                "block": number,
                "epoch": epoch.epoch,
                "samples": epoch.samples * (epoch.epoch + 1),
                "train/loss": list(epoch.losses),
                "val/accuracy": accuracy,
            }
            self.history.append({**line, "seconds": epoch.seconds, "mem/peak": peak})
            self.folder.append("metrics.jsonl", line)
            if disk is not None and disk.slowed_down(epoch.seconds) and isinstance(inputs, CacheInputs):
                self._choose_again(number, block, inputs, source, epoch)

        train_epochs(
            units,
            source,
            block,
            self.config,
            self.device,
            report,
            block=number,
            on_step=self.observer.step,
            counter=counter,
        )
        self.seconds["train"] += time.perf_counter() - started

    def _choose_again(
        self, number: int, block: BlockPlan, inputs: CacheInputs, source: _Switch, epoch: EpochReport
    ) -> None:
        """The disk has slowed down: recompute for the rest of the block where that is expected to be faster."""
        text = (
            f"block {number}: the disk reads below half of the planned {format_bytes(block.cache.rate)}/s; "
            f"epoch {epoch.epoch} took {epoch.seconds:.1f} s"
        )
        switch = choose_again(block.cache, self.config.epochs, epoch.seconds)
        if switch:
            source.current = self._recompute(number, _once_each(inputs.order), self.data)
            for stage in source.current.prefix:
                placed(stage, self.device).eval()
        self.observer.note(f"{text}; {'inputs are recomputed from now on' if switch else 'recomputing is no faster'}")
        self.folder.log("slow_disk", number=number, epoch=epoch.epoch, seconds=epoch.seconds, recompute=switch)

    def _leave(
        self,
        number: int,
        block: BlockPlan,
        units: list[Unit],
        inputs: Inputs,
        held: Inputs,
        counter: TensorBytes | None,
    ) -> tuple[Inputs | None, Inputs | None, list[Score]]:
        """Scores the block's exits and makes the next block's inputs."""
        last = number + 1 == len(self.plan.blocks)
        tier = "" if last else self.plan.blocks[number + 1].cache.tier
        started = time.perf_counter()
        if last or tier == "recompute":
            scores = self._pass(units, held, block.batch, None, None, counter, score=True)
            self.seconds["score"] += time.perf_counter() - started
            if last:
                return None, None, scores
            return (
                self._recompute(number + 1, self._recomputed_order(number + 1, "x", inputs), self.data),
                self._recompute(number + 1, self._recomputed_order(number + 1, "v", held), self.held_out),
                scores,
            )
        after_held, scores = self._store(number + 1, "v", units, held, block.batch, counter, score=True)
        self.seconds["score"] += time.perf_counter() - started
        started = time.perf_counter()
        try:
            after, _ = self._store(number + 1, "x", units, inputs, block.batch, counter, score=False)
        except BaseException:
            self._release(after_held)
            raise
        self.seconds["cache_write"] += time.perf_counter() - started
        return after, after_held, scores

    def _pass(
        self,
        units: list[Unit],
        inputs: Inputs,
        batch: int,
        key: int | None,
        cache: ActivationCache | None,
        counter: TensorBytes | None,
        *,
        score: bool,
    ) -> list[Score]:
        def write(h: Tensor, b: Batch) -> None:
            assert cache is not None
            cache.append(h, b.labels.cpu(), b.ids, b.copies)

        batches = watched(inputs.once(batch, key), counter)
        sums = forward_block(units, batches, score=score, write=write if cache else None, device=self.device)
        return sums.scores() if score else []

    def _store(
        self,
        number: int,
        prefix: str,
        units: list[Unit],
        inputs: Inputs,
        batch: int,
        counter: TensorBytes | None,
        *,
        score: bool,
    ) -> tuple[CacheInputs, list[Score]]:
        """Writes the outputs of the block before `number`, all copies, in a fresh random order."""
        plan = self.plan.blocks[number].cache
        geometry = self._geometry(number, inputs.samples * inputs.copies, inputs.copies)
        key = counter_key(self.config.seed, "write", prefix, number)
        cache = ActivationCache.create(
            self.folder.path,
            f"{prefix}{number:03d}-g0001.nfc",
            geometry,
            tier=plan.tier,
            block=number,
            fingerprint=self._fingerprint,
            order_key=key,
            device=self.device,
            options=self._engine_options(),
        )
        try:
            scores = self._pass(units, inputs, batch, key, cache, counter, score=score)
            cache.finish()
        except BaseException:
            cache.abort()
            raise
        self.folder.log("cache_written", name=cache.record.name, tier=plan.tier, **asdict(cache.stats()))
        order = _order_after(inputs, key)
        made = CacheInputs(cache, self.config.seed, number, inputs.samples, inputs.copies, order, plan.window)
        return made, scores

    def _geometry(self, number: int, samples: int, copies: int) -> CacheGeometry:
        shape = self.cut.stages[self.plan.blocks[number].first - 1].output_shape
        return CacheGeometry(
            sample_shape=shape, dtype=self.config.stored_dtype, samples=samples, copies=copies, channels_last=True
        )

    def _engine_options(self) -> EngineOptions:
        config, probe = self.config, self.plan.probe
        options = EngineOptions(
            pinned_bytes=parse_bytes(config.pinned_bytes, "pinned_bytes"),
            durable=config.durable_cache,
            io_timeout=config.io_timeout,
        )
        if probe is None:
            return options
        return replace(options, write_threads=probe.write_threads, read_threads=probe.read_threads)

    def _recomputed_order(self, number: int, prefix: str, inputs: Inputs) -> NDArray[np.int64]:
        """Ids of one copy in the order that a cache before block `number` would have."""
        return _once_each(_order_after(inputs, counter_key(self.config.seed, "write", prefix, number)))

    def _recompute(self, number: int, order: NDArray[np.int64], data: ImageData) -> ImageInputs:
        """The frozen stages before block `number`, fed with images, in the order that a cache would give."""
        block = self.plan.blocks[number]
        stages = [s.module for s in self.cut.stages[: block.first]]
        return ImageInputs(
            data,
            self.plain if data is self.held_out else self.train_images,
            self.device,
            self.config.seed,
            block=number,
            prefix=stages,
            forward_batch=block.cache.forward_batch,
            order=order,
            geometry=self._geometry(number, len(data), 1),
            window=block.cache.window,
        )

    def _now(self, counter: TensorBytes | None) -> tuple[int, int]:
        if counter is not None:
            return counter.now, counter.peak
        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)

    def _finish(
        self,
        number: int,
        units: list[Unit],
        scores: list[Score],
        counter: TensorBytes | None,
    ) -> None:
        """Saves the block, frees its optimiser state, and holds its peak against the budget."""
        reserved = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0
        peak = self._now(counter)[1]
        memory = BlockMemory(number, self.plan.blocks[number].peak, peak, reserved, psutil.Process().memory_info().rss)
        self.memory.append(memory)
        for unit in units:
            unit.optimizer = None
            for module in unit.modules():
                module.eval()
                module.to("cpu")
        modules = {f"unit{self._numbers[number] + k}.{part}": m for k, u in enumerate(units)
                   for part, m in zip(("body", "head"), u.modules(), strict=True)}  # fmt: skip
        self.folder.write_weights(f"b{number:03d}.safetensors", modules, {"format": "nf-block/1"})
        self.folder.log("block", number=number, predicted=memory.predicted, allocated=peak, reserved=reserved)
        self.observer.block_ended(number, scores, memory)
        if peak > self.plan.budget:
            raise BudgetExceededError(
                f"block {number} used {format_bytes(peak)} ({peak} bytes) of tensors, the budget is "
                f"{format_bytes(self.plan.budget)}; it is saved in {self.folder.path}; raise memory_margin",
                stage=f"block {number}",
                need=peak,
                budget=self.plan.budget,
            )


@dataclass
class _Switch:
    """Inputs that can change their source between two epochs."""

    current: Inputs

    @property
    def samples(self) -> int:
        return self.current.samples

    def train(self, epoch: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.current.train(epoch, batch)

    def once(self, batch: int, key: int | None) -> Iterator[Batch]:
        return self.current.once(batch, key)


class _DiskWatch:
    """Holds the reading of a disk cache against its plan, an epoch at a time."""

    def __init__(self, cache: ActivationCache, plan: CachePlan) -> None:
        self._cache = cache
        self._slow = SlowDisk(plan.rate if cache.record.tier == "disk" else 0.0)
        self._before = cache.stats()

    def slowed_down(self, epoch_seconds: float) -> bool:
        """Once. The rate of an epoch is that of the disk for as long as the training waited for it."""
        now, before = self._cache.stats(), self._before
        self._before = now
        stalled = now.read_stall - before.read_stall
        return self._slow.add(stalled, int((now.bytes_read - before.bytes_read) * stalled / epoch_seconds))


def _order_after(inputs: Inputs, key: int) -> NDArray[np.int64]:
    """Sample ids in the order in which a pass of this key writes them, all copies."""
    ids = inputs.order_ids()[inputs.positions(key)]
    return np.tile(ids, inputs.copies) if isinstance(inputs, ImageInputs) else ids


def _once_each(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of one copy, in the order of their first appearance."""
    return ids[np.sort(np.unique(ids, return_index=True)[1])]

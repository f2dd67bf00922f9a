"""Controller: brings the blocks to the device one after another and hands the cache from one to the next.

    images -> block 0 -> cache 1 -> block 1 -> cache 2 -> ...       each block: train, score its exits, write outputs

Only the block in training (and, where a tier is "recompute", the frozen stages before it) is on the device.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Controller).
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
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
from nf_engine.device import TensorBytes, placed, room_bytes, watched
from nf_engine.errors import BudgetExceededError
from nf_engine.feed import Resident
from nf_engine.local_step import Unit, train_block
from nf_engine.partitioner import scaled_lr
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Preprocess
from nf_engine.records import BlockPlan, CachePlan, Plan, format_bytes, image_bytes
from nf_engine.recovery import RECOVERING, SHARES, HostCopy, asked_bytes, is_out_of_memory
from nf_engine.run_folder import RunFolder
from nf_engine.stages import Cut
from nf_engine.step_graph import WARM_UP, CudaRecorder, Recorder, StepGraph
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

log = logging.getLogger(__name__)

METRICS = ("block", "epoch", "samples", "train/loss", "val/accuracy")  # of an epoch, in metrics.jsonl
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
        self._held = (0, 0)  # bytes allocated and reserved before the run: workspaces, and what is the caller's
        self._images_there: Resident | None = None
        self._recorder: Recorder | None = CudaRecorder(device, self._note_eager) if device.type == "cuda" else None
        self._numbers = list(itertools.accumulate((len(b.units) for b in plan.blocks), initial=0))

    def run(self) -> list[Score]:
        """Trains all blocks; returns the held-out score of every exit, in order."""
        if self.device.type == "cuda":
            self._held = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        scores: list[Score] = []
        inputs: Inputs = self._images(self.data, self.train_images)
        held: Inputs = self._images(self.held_out, self.plain)
        for number in range(len(self.plan.blocks)):
            for stage in inputs.prefix if isinstance(inputs, ImageInputs) else ():
                placed(stage, self.device).eval()
            self._place_images(inputs)
            inputs.copies = self._copies_after(number) if isinstance(inputs, ImageInputs) else inputs.copies
            try:
                units, counter = self._trained(number, inputs, held)
                block = self.plan.blocks[number]
                after, after_held, found = self._leave(number, block, units, inputs, held, counter)
            finally:
                self._release(inputs, held)
            scores += found
            self._finish(number, units, found, counter)
            if after is not None and after_held is not None:
                inputs, held = after, after_held
        self._images_there = None
        return scores

    def _place_images(self, inputs: Inputs) -> None:
        """Brings the training images to the device for the blocks that read them, where the plan has the room."""
        if not isinstance(inputs, ImageInputs):
            self._images_there = None
        elif self._images_there is None and self._may_reside():
            self._images_there = Resident(self.data, self.device)
        if isinstance(inputs, ImageInputs):
            inputs.feed = self._images_there

    def _may_reside(self) -> bool:
        """The plan may be of other data."""
        size = image_bytes(self.data.shape, len(self.data))
        return self.data.in_memory and self.data.dtype == torch.uint8 and size <= self.plan.resident_images

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
            starts = [s - unit.first for s in unit.starts]
            made = Unit(name, stages, self.heads[self._numbers[number] + k], starts)
            for module in made.modules():
                placed(module, self.device)
            made.prepare(self.config)
            units.append(made)
        return units

    def _resident(self) -> list[Tensor]:
        modules = [*(s.module for s in self.cut.stages), *self.heads]
        return [t for m in modules for t in (*m.parameters(), *m.buffers())]

    def _start_count(self, units: Sequence[Unit]) -> TensorBytes | None:
        """The block's meter on the CPU; on CUDA the allocator counts from here on."""
        if self.device.type == "cpu":
            return TensorBytes([*self._resident(), *(t for u in units for t in u.tensors())])
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

    def _trained(self, number: int, inputs: Inputs, held: Inputs) -> tuple[list[Unit], TensorBytes | None]:
        """Trains a block; where the device runs out of memory, again from the block's start with a smaller batch."""
        planned, history = self.plan.blocks[number], len(self.history)
        modules = [s.module for s in self.cut.stages[planned.first : planned.last + 1]]
        modules += self.heads[self._numbers[number] : self._numbers[number + 1]]
        start = HostCopy(modules) if self.device.type in RECOVERING else None
        asked: int | None = None
        for batch in dict.fromkeys(max(1, int(share * planned.batch)) for share in SHARES):
            block = self._use_batch(number, planned, batch)
            self.observer.block_started(number, block)
            try:
                return self._attempt(number, block, inputs, held, start)
            except RuntimeError as error:
                if start is None or not is_out_of_memory(error):
                    raise
                asked, free = asked_bytes(error), room_bytes(self.device)
            # Here the exception is gone, and with its frames what the failed step held on to.
            start.restore()
            self._clear_attempt(history, inputs, held)
            self._tell_out_of_memory(number, batch, asked, free)
        budget = self.plan.budget
        raise BudgetExceededError(
            f"block {number} ran out of memory at batch {planned.batch} and at every smaller one down to {batch}; the "
            f"budget is {format_bytes(budget)} ({budget} bytes); lower max_batch_size, or raise memory_budget",
            stage=f"block {number}",
            need=budget + (asked or 1),
            budget=budget,
        )

    def _attempt(
        self, number: int, block: BlockPlan, inputs: Inputs, held: Inputs, start: HostCopy | None
    ) -> tuple[list[Unit], TensorBytes | None]:
        if start is not None:
            self._rehearse(number, block, inputs, held)
            start.restore()
        units = self._units(number, block)
        counter = self._start_count(units)
        try:
            self._train(number, block, units, inputs, held, counter)
        finally:
            self._release_graph()
        return units, counter

    def _rehearse(self, number: int, block: BlockPlan, inputs: Inputs, held: Inputs) -> None:
        """Runs at full size what the training will: its first steps, an eval step, and one on a short last batch.

        Only sizes that ran here are trained at. The caller puts the weights back.
        """
        units = self._units(number, block)
        devices = [self.device] if self.device.type == "cuda" else []
        losses = torch.zeros(len(units), device=self.device)
        graph = StepGraph(units, losses, self._recorder) if self._recorder is not None else None
        for unit in units:
            unit.body.train()
            unit.head.train()
        try:
            with torch.random.fork_rng(devices=devices):
                train_block(units, itertools.islice(inputs.train(0, block.batch), WARM_UP + 1), losses, graph)
                if graph is not None:
                    graph.end_epoch()
                forward_block(units, _full_and_short(held, block.batch), score=True, write=None, device=self.device)
        finally:
            self._release_graph()
            _rewind(inputs, held)

    def _use_batch(self, number: int, planned: BlockPlan, batch: int) -> BlockPlan:
        """The block at this batch size, with the learning rate that belongs to it; from here on in the plan, too."""
        if batch == planned.batch:
            return planned
        block = replace(planned, batch=batch, lr=scaled_lr(self.config, batch))
        blocks = (*self.plan.blocks[:number], block, *self.plan.blocks[number + 1 :])
        self.plan = replace(self.plan, blocks=blocks)
        self.folder.write("plan.json", self.plan.to_json())
        return block

    def _clear_attempt(self, history: int, *used: Inputs) -> None:
        """Drops what a failed attempt has left: buffers, garbage, and epochs beyond the first `history`."""
        _rewind(*used)
        self._images_there = None  # spare room was planned for them, and there is none
        for inputs in used:
            if isinstance(inputs, ImageInputs):
                inputs.feed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        del self.history[history:]
        lines = ({name: line[name] for name in METRICS} for line in self.history)
        self.folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def _tell_out_of_memory(self, number: int, batch: int, asked: int | None, free: int) -> None:
        wanted = "an unknown number of bytes" if asked is None else f"{asked} bytes"
        text = "block %d ran out of memory at batch %d: asked for %s, %d bytes were free; it is as before its training"
        log.warning(text, number, batch, wanted, free)
        self.folder.log("out_of_memory", number=number, batch=batch, asked=asked, free=free)

    def _release_graph(self) -> None:
        if self._recorder is not None:
            self._recorder.release()

    def _note_eager(self, text: str) -> None:
        self.observer.note(text)
        self.folder.log("eager_steps", reason=text)

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
            samples = epoch.samples * (epoch.epoch + 1)
            line = dict(zip(METRICS, (number, epoch.epoch, samples, list(epoch.losses), accuracy), strict=True))
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
            recorder=self._recorder,
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
        seed, dtype = self.config.seed, compute_dtype(self.config)
        made = CacheInputs(cache, seed, number, inputs.samples, inputs.copies, order, plan.window, dtype)
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
        now, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return now - self._held[0], peak - self._held[0]

    def _finish(
        self,
        number: int,
        units: list[Unit],
        scores: list[Score],
        counter: TensorBytes | None,
    ) -> None:
        """Saves the block, frees its optimiser state, and holds its peak against the budget."""
        reserved = torch.cuda.max_memory_reserved(self.device) - self._held[1] if self.device.type == "cuda" else 0
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


def _full_and_short(inputs: Inputs, size: int) -> Iterator[Batch]:
    """A batch as large as the largest of a pass, and one as short as its last."""
    for batch in itertools.islice(inputs.once(size, None), 1):
        yield batch
        rest = inputs.samples * inputs.copies % size
        if 0 < rest < len(batch.x):
            yield Batch(*(t[:rest] for t in batch))


def _rewind(*used: Inputs) -> None:
    for inputs in used:
        if isinstance(inputs, CacheInputs):
            inputs.rewind()


def _order_after(inputs: Inputs, key: int) -> NDArray[np.int64]:
    """Sample ids in the order in which a pass of this key writes them, all copies."""
    ids = inputs.order_ids()[inputs.positions(key)]
    return np.tile(ids, inputs.copies) if isinstance(inputs, ImageInputs) else ids


def _once_each(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of one copy, in the order of their first appearance."""
    return ids[np.sort(np.unique(ids, return_index=True)[1])]

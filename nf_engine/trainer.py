"""Trainer: brings one block from the last commit to the end of its training.

Every few minutes, and where the run is asked to stop, the state between two steps is committed; a run that starts from
it goes on with the very next step. Where a CUDA device runs out of memory the block starts again with a smaller batch.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nf_engine.chain import Chain, Inputs, rewind
from nf_engine.checkpoint import check_finite, load_training, parse, to_bytes, training_state
from nf_engine.device import TensorBytes, room_bytes, tensor_bytes
from nf_engine.errors import BudgetExceededError
from nf_engine.job import Job
from nf_engine.local_step import Unit, train_block
from nf_engine.manifest import Position
from nf_engine.partitioner import scaled_lr
from nf_engine.records import BlockPlan, CachePlan, Plan, format_bytes
from nf_engine.recovery import RECOVERING, SHARES, asked_bytes, is_out_of_memory
from nf_engine.run_caches import TRAIN
from nf_engine.run_folder import NewFile
from nf_engine.step_graph import WARM_UP, CudaRecorder, Recorder, StepGraph
from nf_engine.storage import ActivationCache
from nf_engine.tiers import SlowDisk, choose_again
from nf_engine.worker import Batch, CacheInputs, EpochReport, Start, forward_block, train_epochs

log = logging.getLogger(__name__)

METRICS = ("block", "epoch", "samples", "train/loss", "val/accuracy")  # of an epoch, in metrics.jsonl
PREVIEW = 512  # most held-out samples that an epoch's accuracy is estimated from; at most 2 % of an epoch


class Trainer:
    """Trains the blocks of one run."""

    def __init__(self, job: Job, chain: Chain) -> None:
        self._job, self._chain = job, chain
        self._touched: set[int] = set()  # blocks whose weights are not those of the start any more
        self._committed = time.monotonic()
        self._recorder: Recorder | None = None
        if job.device.type == "cuda":
            self._recorder = CudaRecorder(job.device, self._note_eager)

    def train(self, number: int, inputs: Inputs, held: Inputs) -> tuple[list[Unit], TensorBytes | None]:
        """Trains a block; where the device runs out of memory, again from the block's start with a smaller batch.

        Raises:
            BudgetExceededError: no batch down to half of the planned one fits.
            Stopped: the run was asked to; what the block has reached is committed.
        """
        planned = self._job.plan.blocks[number]
        asked: int | None = None
        batches = list(dict.fromkeys(max(1, int(share * planned.batch)) for share in SHARES))
        while batches:
            batch = batches[0]
            block = self._use_batch(number, planned, batch)
            self._job.observer.block_started(number, block)
            try:
                return self._attempt(number, block, inputs, held)
            except RuntimeError as error:
                if self._job.device.type not in RECOVERING or not is_out_of_memory(error):
                    raise
                asked, free = asked_bytes(error), room_bytes(self._job.device)
            # Here the exception is gone, and with its frames what the failed step held on to.
            self._tell_out_of_memory(number, batch, asked, free)
            if self._clear_attempt(number, inputs, held):
                self._replan(number, replace(self._job.plan, resident_images=0))  # there was no room for them
            else:
                del batches[0]
        budget = self._job.plan.budget
        raise BudgetExceededError(
            f"block {number} ran out of memory at batch {planned.batch} and at every smaller one down to {batch}; the "
            f"budget is {format_bytes(budget)} ({budget} bytes); lower max_batch_size, or raise memory_budget",
            stage=f"block {number}",
            need=budget + (asked or 1),
            budget=budget,
        )

    def _attempt(
        self, number: int, block: BlockPlan, inputs: Inputs, held: Inputs
    ) -> tuple[list[Unit], TensorBytes | None]:
        job = self._job
        if number in self._touched:
            job.begin_again(number)
        self._touched.add(number)
        if job.device.type in RECOVERING:
            self._rehearse(number, block, inputs, held)
            job.begin_again(number)
        units = job.units(number)
        start = self._restored(number, units)
        job.folder.reserve(self._chain.caches.bytes_after(number) + state_bytes(units))
        counter = job.start_count(units)
        try:
            self._train(number, block, units, inputs, held, counter, start)
        finally:
            self._release_graph()
            job.folder.drop_ballast()
        return units, counter

    def _restored(self, number: int, units: Sequence[Unit]) -> Start:
        """Brings the units to the last commit, where that lies inside this block."""
        job, now = self._job, self._job.folder.manifest_now
        if now.position <= Position(number):
            return Start()
        (entry,) = now.of_role("train")
        losses = torch.zeros(len(units), device=job.device)
        load_training(job.names(number), units, losses, parse(job.folder.read(entry), entry.name), entry.name)
        job.observer.note(f"block {number + 1} goes on after epoch {now.position.epoch}, step {now.position.step}")
        return Start(now.position.epoch, now.position.step, losses)

    def commit(self, number: int, units: Sequence[Unit], epoch: int, step: int, losses: Tensor) -> None:
        """Makes the state between two steps durable. Raises NonFiniteError: it is worth nothing."""
        job = self._job
        state = training_state(job.names(number), units, losses)
        check_finite(state, f"block {number}, epoch {epoch}, step {step}")
        started = time.perf_counter()
        data = to_bytes(state, {"format": TRAIN_FORMAT})
        job.folder.commit(Position(number, epoch, step), [NewFile("train", data, number)])
        self._committed = time.monotonic()
        seconds = time.perf_counter() - started
        job.seconds["commit"] = job.seconds.get("commit", 0.0) + seconds
        job.folder.log("commit", number=number, epoch=epoch, step=step, seconds=seconds)

    def commit_end(self, number: int, units: Sequence[Unit]) -> None:
        """Makes the trained but unfinished block durable."""
        epochs = self._job.config.epochs
        if self._job.folder.manifest_now.position < Position(number, epochs):
            self.commit(number, units, epochs, 0, torch.zeros(len(units)))

    def _rehearse(self, number: int, block: BlockPlan, inputs: Inputs, held: Inputs) -> None:
        """Runs at full size what the training will: its first steps, an eval step, and one on a short last batch.

        Only sizes that ran here are trained at. The caller puts the weights back.
        """
        device = self._job.device
        units = self._job.units(number)
        losses = torch.zeros(len(units), device=device)
        graph = StepGraph(units, losses, self._recorder) if self._recorder is not None else None
        for unit in units:
            unit.body.train()
            unit.head.train()
        try:
            train_block(units, itertools.islice(inputs.train(0, block.batch), WARM_UP + 1), losses, graph)
            if graph is not None:
                graph.end_epoch()
            forward_block(units, _full_and_short(held, block.batch), score=True, write=None, device=device)
        finally:
            self._release_graph()
            rewind(inputs)
            rewind(held)

    def _use_batch(self, number: int, planned: BlockPlan, batch: int) -> BlockPlan:
        """The block at this batch size, with the learning rate that belongs to it; from here on in the plan, too."""
        if batch == planned.batch:
            return planned
        job = self._job
        block = replace(planned, batch=batch, lr=scaled_lr(job.config, batch))
        blocks = (*job.plan.blocks[:number], block, *job.plan.blocks[number + 1 :])
        self._replan(number, replace(job.plan, blocks=blocks))
        return block

    def _replan(self, number: int, plan: Plan) -> None:
        """Another plan from this block's start on, for this process and later ones."""
        self._job.plan = plan
        self._job.folder.commit(Position(number), [NewFile("plan", plan.to_json().encode())], drop=("train",))

    def _clear_attempt(self, number: int, *used: Inputs) -> bool:
        """Drops what a failed attempt has left: buffers, garbage, and its epochs; whether all images were there."""
        resided = self._chain.evict(*used)
        gc.collect()
        if self._job.device.type == "cuda":
            torch.cuda.empty_cache()
        before = sum(line["block"] != number for line in self._job.folder.metrics())
        del self._job.history[before:]
        self._job.folder.cut_metrics(before)
        return resided

    def _tell_out_of_memory(self, number: int, batch: int, asked: int | None, free: int) -> None:
        wanted = "an unknown number of bytes" if asked is None else f"{asked} bytes"
        text = "block %d ran out of memory at batch %d: asked for %s, %d bytes were free; it is as before its training"
        log.warning(text, number, batch, wanted, free)
        self._job.folder.log("out_of_memory", number=number, batch=batch, asked=asked, free=free)

    def _release_graph(self) -> None:
        if self._recorder is not None:
            self._recorder.release()

    def _note_eager(self, text: str) -> None:
        self._job.observer.note(text)
        self._job.folder.log("eager_steps", reason=text)

    def _train(
        self,
        number: int,
        block: BlockPlan,
        units: list[Unit],
        inputs: Inputs,
        held: Inputs,
        counter: TensorBytes | None,
        start: Start,
    ) -> None:
        job, started = self._job, time.perf_counter()
        source = _Switch(inputs)
        disk = _DiskWatch(inputs.cache, block.cache) if isinstance(inputs, CacheInputs) else None
        per_epoch = inputs.samples // block.batch

        def between(epoch: int, step: int, losses: Tensor) -> None:
            job.observer.step(epoch * per_epoch + step, job.config.epochs * per_epoch)
            due = time.monotonic() - self._committed >= 60 * job.config.checkpoint_minutes
            if (due or job.interrupt.reason) and job.folder.manifest_now.position < Position(number, epoch, step):
                self.commit(number, units, epoch, step, losses)
            job.interrupt.check()

        def report(epoch: EpochReport) -> None:
            wanted = min(PREVIEW, max(block.batch, inputs.samples // 50))
            sample = itertools.islice(held.once(min(block.batch, wanted), None), -(-wanted // block.batch))
            sums = forward_block(units, sample, score=True, write=None, device=job.device)
            accuracy = sums.scores()[-1].accuracy
            for unit in units:
                unit.body.train()
                unit.head.train()
            now, peak = job.now(counter)
            job.observer.epoch_ended(epoch, accuracy, now, peak)
            samples = epoch.samples * (epoch.epoch + 1)
            line = dict(zip(METRICS, (number, epoch.epoch, samples, list(epoch.losses), accuracy), strict=True))
            job.history.append({**line, "seconds": epoch.seconds, "mem/peak": peak})
            job.folder.add_metrics(line)
            if disk is not None and disk.slowed_down(epoch.seconds) and isinstance(inputs, CacheInputs):
                self._choose_again(number, block, source, epoch)

        train_epochs(
            units,
            source,
            block,
            job.config,
            job.device,
            report,
            block=number,
            start=start,
            between=between,
            counter=counter,
            recorder=self._recorder,
        )
        job.seconds["train"] += time.perf_counter() - started

    def _choose_again(self, number: int, block: BlockPlan, source: _Switch, epoch: EpochReport) -> None:
        """The disk has slowed down: recompute for the rest of the block where that is expected to be faster."""
        job = self._job
        text = (
            f"block {number}: the disk reads below half of the planned {format_bytes(block.cache.rate)}/s; "
            f"epoch {epoch.epoch} took {epoch.seconds:.1f} s"
        )
        switch = choose_again(block.cache, job.config.epochs, epoch.seconds)
        if switch:
            source.current = self._chain.recomputed(number, TRAIN)
            self._chain.place(source.current)
        job.observer.note(f"{text}; {'inputs are recomputed from now on' if switch else 'recomputing is no faster'}")
        job.folder.log("slow_disk", number=number, epoch=epoch.epoch, seconds=epoch.seconds, recompute=switch)


TRAIN_FORMAT = "nf-train/1"


def state_bytes(units: Sequence[Unit]) -> int:
    """Bytes of a commit inside a block, generously: weights, and two values of the optimiser for each."""
    return sum(tensor_bytes(u.tensors()) + 2 * tensor_bytes(u.parameters()) for u in units) + (1 << 20)


@dataclass
class _Switch:
    """Inputs that can change their source between two epochs."""

    current: Inputs

    @property
    def samples(self) -> int:
        return self.current.samples

    def train(self, epoch: int, batch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return self.current.train(epoch, batch, start)

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

"""Chain: where the inputs of each block come from, and where its outputs go.

    images -> block 0 -> cache 1 -> block 1 -> cache 2 -> ...

A cache is derivable: where it is missing, damaged or stale it is made again from the finished blocks, in the same
order, so that a resumed run reads what the uninterrupted one would have read. A tier "recompute" keeps nothing: the
frozen stages run again, on samples in the order that a cache would have them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from nf_engine.data import ImageData
from nf_engine.device import TensorBytes, placed, watched
from nf_engine.errors import BudgetExceededError, CacheError, CacheStaleError, DiskFullError, StorageError
from nf_engine.feed import Resident
from nf_engine.job import Job
from nf_engine.local_step import Unit
from nf_engine.manifest import FileEntry
from nf_engine.preprocess import Preprocess
from nf_engine.records import format_bytes, image_bytes
from nf_engine.recovery import RECOVERING, asked_bytes, is_out_of_memory
from nf_engine.run_caches import HELD, TRAIN, RunCaches, once_each
from nf_engine.storage import ActivationCache, CacheRecord
from nf_engine.worker import (
    WRITE_STREAM,
    Batch,
    CacheInputs,
    ImageInputs,
    Score,
    forward_block,
    forward_prefix,
)

log = logging.getLogger(__name__)

Inputs = ImageInputs | CacheInputs
T = TypeVar("T")
ROWS = 16  # of a cache, computed again when it is opened: the first of a fixed shuffle
CLOSE = 0.05  # of the rows' norm, beyond twice what their precision explains; a leaky ReLU for a ReLU is 0.08


class Chain:
    """The inputs of all blocks of one run, and what describes them: caches."""

    def __init__(self, job: Job) -> None:
        self._job, self.caches = job, RunCaches(job)
        self._resident: Resident | None = None

    # --- inputs ---

    def inputs(self, number: int) -> tuple[Inputs, Inputs]:
        """Inputs of a block for training and for scoring, of a run that has trained the blocks before it."""
        job = self._job
        if number == 0:
            return self._images(job.data, job.train_images), self._images(job.held_out, job.plain)
        if self.caches.tier(number) == "recompute":
            return self.recomputed(number, TRAIN), self.recomputed(number, HELD)
        return self._opened(number) or self._rebuilt(number)

    def _images(self, data: ImageData, preprocess: Preprocess) -> ImageInputs:
        copies = self.caches.copies(1, TRAIN) if data is self._job.data else 1
        return ImageInputs(data, preprocess, self._job.device, self._job.config.seed, copies=copies)

    def recomputed(self, number: int, prefix: str) -> ImageInputs:
        """The frozen stages before a block, fed with images, in the order that a cache would give."""
        job, block = self._job, self._job.plan.blocks[number]
        data = self.caches.data(prefix)
        return ImageInputs(
            data,
            job.train_images if prefix == TRAIN else job.plain,
            job.device,
            job.config.seed,
            block=number,
            prefix=[s.module for s in job.cut.stages[: block.first]],
            edges=self._edges(number),
            forward_batch=block.cache.forward_batch,
            order=once_each(self.caches.ids(number, prefix)),
            geometry=self.caches.geometry(number, len(data), 1),
            copies=self.caches.copies(number + 1, prefix),
            window=block.cache.window,
        )

    def _edges(self, number: int) -> list[int]:
        """First stages of the blocks before one, but for the first: there its inputs would wait in caches."""
        return [b.first for b in self._job.plan.blocks[1:number]]

    def place(self, inputs: Inputs) -> None:
        """Brings to the device what the inputs need there: frozen stages, and all images if the plan has the room."""
        if not isinstance(inputs, ImageInputs):
            self._resident = None
            return
        for stage in inputs.prefix:
            placed(stage, self._job.device).eval()
        if inputs.data is self._job.data:
            if self._resident is None and self._may_reside():
                self._resident = Resident(self._job.data, self._job.device)
            inputs.feed = self._resident

    def evict(self, *used: Inputs) -> bool:
        """Drops what a failed attempt has left on the device; whether all images were there."""
        there, self._resident = self._resident is not None, None
        for inputs in used:
            rewind(inputs)
            if isinstance(inputs, ImageInputs):
                inputs.feed = None
        return there

    def _may_reside(self) -> bool:
        """The plan may be of other data."""
        data = self._job.data
        size = image_bytes(data.shape, len(data))
        return data.in_memory and data.dtype == torch.uint8 and size <= self._job.plan.resident_images

    def _opened(self, number: int) -> tuple[Inputs, Inputs] | None:
        """From the files of the last commit; None where they are not there, or not what they should be."""
        entries = {e.name[0]: e for e in self._job.folder.manifest_now.of_role("cache") if e.block == number}
        if self.caches.tier(number) != "disk" or len(entries) < 2:
            return None
        opened: list[CacheInputs] = []
        try:
            for prefix in (TRAIN, HELD):
                record = replace(
                    self.caches.record(number, prefix, entries[prefix].name), table_sha256=entries[prefix].sha256
                )
                cache = ActivationCache.open(
                    self._job.folder.files, record, device=self._job.device, options=self.caches.options()
                )
                opened.append(self.caches.reader(number, prefix, cache))
                self._check_rows(number, prefix, opened[-1])
        except (CacheError, StorageError) as error:
            for inputs in opened:
                inputs.close()
            self._tell(number, str(error))
            return None
        return opened[0], opened[1]

    def _check_rows(self, number: int, prefix: str, inputs: CacheInputs) -> None:
        """Computes some rows of a cache again: its fingerprint says nothing of the code that ran.

        On the host, where the finished blocks rest, and no more rows than any of them was planned for. Images that are
        drawn anew at each reading, by a Dataset's own transforms, cannot be compared.

        Raises:
            CacheStaleError: they are others, by more than the precision of the run explains.
        """
        job, host, stages = self._job, torch.device("cpu"), self._job.cut.stages[: self._job.plan.blocks[number].first]
        rows = min(ROWS, *(b.batch for b in job.plan.blocks[:number]))
        with closing(watched(inputs.once(rows, None), None)) as batches:
            found = next(iter(batches))
        same = found.copies == found.copies[0]  # (N,)
        ids, stream = found.ids[same], WRITE_STREAM + int(found.copies[0])
        images, again = (self.caches.data(prefix).batch(ids)[0] for _ in range(2))
        if not torch.equal(images, again):
            return
        x = (job.train_images if prefix == TRAIN else job.plain)(images, ids, stream=stream)
        modules = [placed(stage.module, host).eval() for stage in stages]
        forwarded = partial(forward_prefix, modules, count=len(ids), size=len(ids))
        h = forwarded(load=lambda _: x, dtype=job.config.stored_dtype, edges=self._edges(number)).float()
        exact = forwarded(load=lambda _: x.float(), dtype="fp32")
        off, most = (found.x.to(host)[same].float() - h).norm(), CLOSE * h.norm() + 2 * (h - exact).norm()
        if not off <= most:
            raise CacheStaleError(
                f"{inputs.cache.record.name}: expected {len(ids)} rows within {float(most):.4g} of what the finished "
                f"blocks give now, found them {float(off):.4g} away: their code has changed, or it computes other "
                "values here"
            )

    def _rebuilt(self, number: int) -> tuple[Inputs, Inputs]:
        job = self._job
        job.observer.note(f"the inputs of block {number + 1} are made again from those of block {number}")
        inputs, held = self.inputs(number - 1)
        self.place(inputs)
        units = job.units(number - 1, training=False)
        try:
            return self.after(number - 1, units, inputs, held, None)
        except BaseException:
            job.leave(units)
            raise
        finally:
            self.release(inputs, held)

    def forget(self, number: int, error: CacheError) -> None:
        """Takes the caches before a block, one of which turned out to be damaged, out of the run."""
        self._tell(number, str(error))
        self._job.folder.commit(self._job.folder.manifest_now.position, drop=("cache",))

    def _tell(self, number: int, reason: str) -> None:
        log.warning("the inputs of block %d are made again: %s", number, reason)
        self._job.folder.log("cache_refused", number=number, reason=reason)

    # --- outputs ---

    def score(self, units: Sequence[Unit], held: Inputs, batch: int, counter: TensorBytes | None) -> list[Score]:
        """The held-out score of each unit's exit."""
        with closing(watched(held.once(batch, None), counter)) as batches:
            seen = self._stoppable(batches)
            return forward_block(units, seen, score=True, write=None, device=self._job.device).scores()

    def after(
        self, number: int, units: Sequence[Unit], inputs: Inputs, held: Inputs, counter: TensorBytes | None
    ) -> tuple[Inputs, Inputs]:
        """Inputs of the block that follows a finished one, made from its weights; on a disk they are committed."""
        following, batch = number + 1, self._job.plan.blocks[number].batch
        if self.caches.tier(following) == "recompute":
            made: tuple[Inputs, Inputs] = self.recomputed(following, TRAIN), self.recomputed(following, HELD)
            self._commit(following, [])
            return made
        after_held = self._finished(self._stored(following, HELD, units, held, batch, counter))
        try:
            cache = self._stored(following, TRAIN, units, inputs, batch, counter)
            after = self._finished(cache, partial(self._hand_over, following, units, inputs))
            try:
                self._commit(following, [after.cache.record, after_held.cache.record])
            except BaseException:
                self.release(after)
                raise
        except BaseException:
            self.release(after_held)
            raise
        return after, after_held

    def _stored(
        self,
        number: int,
        prefix: str,
        units: Sequence[Unit],
        inputs: Inputs,
        batch: int,
        counter: TensorBytes | None,
    ) -> ActivationCache:
        """Gives a cache the outputs of the block before `number`; where the device has not the memory, fewer at a time.

        The last of them may still be on their way to the disk.
        """
        asked: int | None = None
        for size in dict.fromkeys(max(1, batch // parts) for parts in (1, 2, 4)):
            try:
                return self._written(number, prefix, units, inputs, size, counter)
            except RuntimeError as error:
                if self._job.device.type not in RECOVERING or not is_out_of_memory(error):
                    raise
                asked = asked_bytes(error)
            # Here the exception is gone, and with its frames what the failed pass held on to.
            self.evict(inputs)
            gc.collect()
            torch.cuda.empty_cache()
            log.warning("out of memory at batch %d while the inputs of block %d were written", size, number)
            self._job.folder.log("out_of_memory", number=number - 1, batch=size, asked=asked)
        budget = self._job.plan.budget
        raise BudgetExceededError(
            f"block {number - 1} is trained and saved, but ran out of memory at batch {size} while its outputs were "
            f"written; the budget is {format_bytes(budget)} ({budget} bytes); free the device, and run the same "
            "command again",
            stage=f"block {number - 1}",
            need=budget + (asked or 1),
            budget=budget,
        )

    def _written(
        self,
        number: int,
        prefix: str,
        units: Sequence[Unit],
        inputs: Inputs,
        batch: int,
        counter: TensorBytes | None,
    ) -> ActivationCache:
        """All copies, in a fresh random order."""
        job = self._job
        name = f"{prefix}{number:03d}-g{job.folder.next_generation:04d}.nfc"
        record = self.caches.record(number, prefix, name)
        cache = ActivationCache.create(
            job.folder.files,
            record.name,
            record.geometry,
            tier=record.tier,
            block=number,
            generation=record.generation,
            fingerprint=bytes.fromhex(record.fingerprint),
            order_key=record.order_key,
            device=job.device,
            options=self.caches.options(),
        )

        labels = self.caches.data(prefix).labels  # asking the device for the batch's would wait for its maps

        def write(h: Tensor, b: Batch) -> None:
            cache.append(h, labels.index_select(0, b.ids), b.ids, b.copies)

        try:
            with closing(watched(inputs.once(batch, record.order_key), counter)) as batches:
                forward_block(units, self._stoppable(batches), score=False, write=write, device=job.device)
        except BaseException:
            cache.abort()
            raise
        return cache

    def _finished(self, cache: ActivationCache, beside: Callable[[], None] = lambda: None) -> CacheInputs:
        """Waits for the last outputs to be written; `beside` runs until then."""
        record = cache.record
        try:
            beside()
            cache.finish()
        except BaseException:
            cache.abort()
            raise
        self._job.folder.log("cache_written", name=record.name, tier=record.tier, **asdict(cache.stats()))
        return self.caches.reader(record.block, record.name[0], cache)

    def _hand_over(self, number: int, units: Sequence[Unit], inputs: Inputs) -> None:
        """The units that have given their last outputs make way on the device for block `number`."""
        self.evict(inputs)
        self._job.leave(units)
        self._job.bring(number)

    def _commit(self, number: int, records: Sequence[CacheRecord]) -> None:
        """The caches before a block take the place of all others."""
        folder = self._job.folder
        entries = [
            FileEntry(r.name, "cache", number, r.geometry.file_bytes, r.table_sha256)
            for r in records
            if r.tier == "disk"
        ]
        drop = () if self._job.keep_cache else ("cache",)
        if entries or (drop and folder.manifest_now.of_role("cache")):
            folder.commit(folder.manifest_now.position, there=entries, drop=drop)

    def _stoppable(self, batches: Iterator[T]) -> Iterator[T]:
        for batch in batches:
            self._job.interrupt.check()
            yield batch
            del batch

    def release(self, *used: Inputs) -> None:
        """Closes caches that were used up, or whose block failed; what no commit lists any more is deleted."""
        folder = self._job.folder
        for inputs in used:
            if isinstance(inputs, CacheInputs):
                record = inputs.cache.record
                try:
                    inputs.close()
                except (StorageError, DiskFullError) as error:  # what was wanted of it has been read
                    log.warning("%s: not closed: %s", record.name, error)
                folder.log("cache_read", name=record.name, **asdict(inputs.cache.stats()))
                if record.tier == "disk" and record.name not in {e.name for e in folder.manifest_now.files}:
                    folder.remove(record.name)


def rewind(inputs: Inputs) -> None:
    if isinstance(inputs, CacheInputs):
        inputs.rewind()

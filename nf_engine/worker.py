"""Worker: trains one block, scores its exits, hands out its outputs. Knows batches, not files.

Images or cached activations (N, C, H, W) come from an `Inputs`; each pass over it is a function of (seed, block, pass),
so the same plan gives the same batches wherever the inputs wait. Outputs leave in eval mode, in a fresh random order.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Worker).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nf_engine.codec import DTYPES, make_codec
from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import LAYOUT, TensorBytes, watched
from nf_engine.errors import NonFiniteError
from nf_engine.feed import Feed, Piece, feed_to
from nf_engine.local_step import Unit, train_block
from nf_engine.precision import forward
from nf_engine.preprocess import Preprocess
from nf_engine.records import WINDOW, BlockPlan
from nf_engine.step_graph import Recorder, StepGraph
from nf_engine.storage import ActivationCache, CacheGeometry, sample_order

T = TypeVar("T")


def counter_key(*parts: object) -> int:
    """A 64-bit key from (seed, purpose, block, epoch, ...): all randomness is a function of such counters."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def image_order(key: int, samples: int) -> NDArray[np.int64]:
    """A full shuffle: (samples,) int64."""
    return np.random.Generator(np.random.Philox(key=key)).permutation(samples)


class Batch(NamedTuple):
    """x (N, C, H, W) and labels (N,) on the device; ids (N,) of the samples and copies (N,), both host int64."""

    x: Tensor
    labels: Tensor
    ids: Tensor
    copies: Tensor


class Inputs(Protocol):
    """Where the inputs of a block come from."""

    @property
    def samples(self) -> int: ...  # of one copy

    def train(self, epoch: int, batch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """samples // batch full batches of an epoch, in a random order; each is the reader's to overwrite.

        start: number of the first; the ones before it are neither read nor made.
        """
        ...

    def once(self, batch: int, key: int | None) -> Iterator[Batch]:
        """Every sample of every copy once, in the order of `key`, or in a fixed one for None; the last may be short."""
        ...


@dataclass
class ImageInputs:
    """Images through the finished blocks: the inputs of the first block, and those of a recomputed one.

    Attributes:
        data: images. preprocess: augmentation and normalisation, on the device.
        prefix: finished stages in eval mode on the device; empty for the first block.
        edges: numbers of the stages before which maps are rounded, the first ones of the blocks in the prefix.
        forward_batch: samples that go through the prefix at a time.
        order: ids in the order that the file of a cache of these inputs would have, so that the tier changes time, not
            numbers; None for the first block: full shuffles.
        geometry: of that cache; its dtype rounds the recomputed inputs, and at the edges, as caches would.
        feed: how the images come to the device; None: as suits it.
    """

    data: ImageData
    preprocess: Preprocess
    device: torch.device
    seed: int
    block: int = 0
    prefix: Sequence[nn.Module] = ()
    edges: Sequence[int] = ()
    forward_batch: int = 0
    order: NDArray[np.int64] | None = None
    geometry: CacheGeometry | None = None
    copies: int = 1
    window: int = WINDOW
    feed: Feed | None = None

    @property
    def samples(self) -> int:
        return len(self.data)

    def order_ids(self) -> NDArray[np.int64]:
        return np.arange(self.samples) if self.order is None else self.order

    def positions(self, key: int) -> NDArray[np.int64]:
        if self.geometry is not None:
            return sample_order(key, self.samples, self.geometry, self.window)
        return image_order(key, self.samples)

    def train(self, epoch: int, batch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        ids = torch.from_numpy(self.order_ids()[self.positions(pass_key(self.seed, self.block, epoch))])
        full = ids.split(batch)[start : len(ids) // batch]  # type: ignore[no-untyped-call]

        def load(piece: Piece) -> tuple[Tensor, Tensor]:
            return self.prepare(piece.images, piece.ids, epoch), piece.labels

        yield from self._loaded(full, load)

    def once(self, batch: int, key: int | None) -> Iterator[Batch]:
        fixed = key is None and self.geometry is None  # else as a cache would be read, whose fixed order is that of 0
        ids = torch.from_numpy(self.order_ids() if fixed else self.order_ids()[self.positions(key or 0)])
        for copy in range(self.copies):
            yield from self._loaded(ids.split(batch), partial(self._batch, copy))  # type: ignore[no-untyped-call]

    def _batch(self, copy: int, piece: Piece) -> Batch:
        x = self.prepare(piece.images, piece.ids, WRITE_STREAM + copy)
        return Batch(x, piece.labels, piece.host_ids, torch.full_like(piece.host_ids, copy))

    def _loaded(self, parts: Sequence[Tensor], load: Callable[[Piece], T]) -> Iterator[T]:
        feed = self.feed or feed_to(self.device, self.data)
        with closing(feed.pieces(parts)) as pieces:
            yield from map(load, pieces)  # a loop would hold on to the images while the reader works

    def prepare(self, images: Tensor, ids: Tensor, stream: int) -> Tensor:
        """Images (N, C, H, W) and their ids, on the device -> the block's inputs."""
        if not self.prefix:
            return self.preprocess(images, ids, stream=stream)
        size = self.forward_batch or len(images)

        def load(start: int) -> Tensor:
            return self.preprocess(images[start : start + size], ids[start : start + size], stream=stream)

        dtype = self.geometry.dtype if self.geometry else "fp32"
        return forward_prefix(self.prefix, load, len(images), size, dtype, self.edges)


def forward_prefix(
    prefix: Sequence[nn.Module],
    load: Callable[[int], Tensor],
    count: int,
    size: int,
    dtype: str,
    edges: Sequence[int] = (),
) -> Tensor:
    """Frozen stages over `count` samples, `size` at a time: (count, C, H, W), of the dtype of the images.

    Args:
        load: load(start) gives the preprocessed images from `start` on.
        dtype: of caches, which the result is rounded to, and what the stages of the numbers `edges` are given.
    """
    out: Tensor | None = None
    with torch.no_grad():
        for start in range(0, count, size):
            h = load(start)
            for number, stage in enumerate(prefix):
                if number in edges:
                    round_as_stored(h, h, dtype)
                h = forward(stage, h)
            if out is None:
                out = torch.empty((count, *h.shape[1:]), dtype=h.dtype, device=h.device, memory_format=LAYOUT)
            round_as_stored(h, out[start : start + size], dtype)
            del h
    assert out is not None
    return out


def round_as_stored(h: Tensor, out: Tensor, dtype: str) -> None:
    """out = h (N, C, H, W) as it comes back from a cache of that dtype; out may be h."""
    if DTYPES.get(dtype) in (h.dtype, torch.float32):  # nothing is rounded
        out.copy_(h)
        return
    codec = make_codec(dtype, tuple(h.shape[1:]), channels_last=True)
    stored = torch.empty(len(h), codec.sample_bytes, dtype=torch.uint8, device=h.device)
    codec.encode(h, stored)
    codec.decode(stored, out)


WRITE_STREAM = 1 << 20  # augmentation streams of cached copies; epochs count from 0


def pass_key(seed: int, block: int, number: int) -> int:
    """Key of the order in which pass `number` of a block reads its inputs."""
    return counter_key(seed, "order", block, number)


@dataclass
class CacheInputs:
    """A finished cache as the inputs of a block, in `dtype`. A pass over V copies is V epochs."""

    cache: ActivationCache
    seed: int
    block: int
    samples: int
    copies: int
    order: NDArray[np.int64]  # ids as stored
    window: int = WINDOW
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._pass: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next = (0, 0)  # the epoch and batch that the pass under way goes on with

    def order_ids(self) -> NDArray[np.int64]:
        return self.order

    def positions(self, key: int) -> NDArray[np.int64]:
        return sample_order(key, len(self.order), self.cache.geometry, self.window)

    def rewind(self) -> None:
        """Ends a pass that was not read to its end, with the memory that it holds."""
        self._pass, self._next = iter(()), (0, 0)

    def close(self) -> None:
        """Rewinds, and closes the cache."""
        self.rewind()
        self.cache.close()

    def train(self, epoch: int, batch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        per_epoch, number = self.samples // batch, epoch % self.copies * (self.samples // batch) + start
        if number == 0 or self._next != (epoch, start):
            self._pass = self._read(epoch // self.copies, batch, number)
        self._next = (epoch + 1, 0)
        try:
            yield from itertools.islice(self._pass, per_epoch - start)
        finally:
            if (epoch + 1) % self.copies == 0:
                self.rewind()  # or the memory of a pass that is over would wait for the next one

    def _read(self, number: int, batch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        key = pass_key(self.seed, self.block, number)
        for b in self._batches(batch, key, drop_last=True, first=first):
            yield b.x, b.labels

    def once(self, batch: int, key: int | None) -> Iterator[Batch]:
        yield from self._batches(batch, key)

    def _batches(self, batch: int, key: int | None, drop_last: bool = False, first: int = 0) -> Iterator[Batch]:
        read = self.cache.batches(
            0,
            batch,
            key=0 if key is None else key,
            start=first,
            drop_last=drop_last,
            out_dtype=self.dtype,
            window_bytes=self.window,
        )
        for b in read:
            yield Batch(b.x, b.labels, b.ids, b.copies)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class EpochReport:
    """One epoch of one block. losses: mean local loss of each unit; seconds: of the epoch."""

    block: int
    epoch: int
    losses: tuple[float, ...]
    samples: int
    seconds: float


@dataclass(frozen=True)
class Start:
    """Where in a block a training begins: after `epoch` epochs and `step` steps of the next one.

    losses: (units,) sums over these steps; None where there are none.
    """

    epoch: int = 0
    step: int = 0
    losses: Tensor | None = None


Between = Callable[[int, int, Tensor], None]


def train_epochs(
    units: Sequence[Unit],
    inputs: Inputs,
    plan: BlockPlan,
    config: TrainConfig,
    device: torch.device,
    report: Callable[[EpochReport], None],
    *,
    block: int = 0,
    start: Start | None = None,
    between: Between | None = None,
    counter: TensorBytes | None = None,
    recorder: Recorder | None = None,
) -> None:
    """Trains all units of a block for the configured epochs.

    Args:
        start: a state that the units have reached before; None: their first step.
        between: called before each step with epoch, step and the summed losses (units,) of the epoch so far; all steps
            before are whole, and an exception ends the training there.
        recorder: of the step as a whole; None: every step is eager. Its last recording is the caller's to release.

    Raises:
        NonFiniteError: a local loss is NaN or infinite; names block, unit and epoch, and on the CPU the step.
    """
    start = start or Start()
    per_epoch = inputs.samples // plan.batch
    steps = per_epoch * config.epochs
    warmup = round(per_epoch * min(config.warmup_epochs, config.epochs / 2))
    losses = torch.zeros(len(units), dtype=torch.float32, device=device)
    graph = StepGraph(units, losses, recorder) if recorder is not None else None
    for unit in units:
        unit.body.train()
        unit.head.train()

    def batches(epoch: int, first: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        counted = counter if epoch < start.epoch + 2 else None
        with closing(watched(inputs.train(epoch, plan.batch, first), counted)) as source:
            for step in range(first, per_epoch):
                if device.type == "cpu" and step > first:  # elsewhere it would wait for the device
                    _check_losses(losses.tolist(), units, plan, block, epoch, step - 1)
                if between is not None:
                    between(epoch, step, losses)
                rate = learning_rate(epoch * per_epoch + step, steps, warmup, plan.lr)
                if graph is not None:
                    graph.set_rate(rate, plan.lr)
                else:
                    for unit in units:
                        unit.set_rate(rate, plan.lr)
                seed_step(device, config.seed, block, epoch, step)
                yield next(source)

    for epoch in range(start.epoch, config.epochs):
        started = time.perf_counter()
        losses.zero_()
        first = start.step if epoch == start.epoch else 0
        if first and start.losses is not None:
            losses.copy_(start.losses)
        with closing(batches(epoch, first)) as source:  # an error, too, must end the count of `watched`
            done = train_block(units, source, losses, graph)
        means = tuple((losses / max(1, first + done)).tolist())  # the only wait for the device in an epoch
        _check_losses(means, units, plan, block, epoch, per_epoch - 1)
        if graph is not None:
            graph.end_epoch()
        report(EpochReport(block, epoch, means, (first + done) * plan.batch, time.perf_counter() - started))


def _check_losses(
    losses: Sequence[float], units: Sequence[Unit], plan: BlockPlan, block: int, epoch: int, step: int
) -> None:
    for unit, loss in zip(units, losses, strict=True):
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"block {block}, unit {unit.name}, epoch {epoch}, step {step} or before: the local loss is {loss}; "
                f"lower lr (the block trains at {plan.lr:.4g}) or raise warmup_epochs"
            )


def seed_step(device: torch.device, seed: int, block: int, epoch: int, step: int) -> None:
    """Makes what a module draws in a step (dropout) a function of the step's number."""
    key = counter_key(seed, "step", block, epoch, step) >> 1  # manual_seed of the default generator takes 63 bits
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


@dataclass(frozen=True)
class Score:
    """Held-out result of one exit: share of right answers, and mean cross-entropy without smoothing."""

    accuracy: float
    loss: float


class Sums(NamedTuple):
    """Of one eval pass: right answers and summed cross-entropy of each unit's exit (units,), and samples seen."""

    right: Tensor
    loss: Tensor
    seen: int

    def scores(self) -> list[Score]:
        return [
            Score(r / self.seen, t / self.seen) for r, t in zip(self.right.tolist(), self.loss.tolist(), strict=True)
        ]


def forward_block(
    units: Sequence[Unit],
    batches: Iterator[Batch],
    *,
    score: bool,
    write: Callable[[Tensor, Batch], None] | None,
    device: torch.device,
) -> Sums:
    """One eval pass of a block: adds up each exit's score where asked and hands the block's outputs to `write`."""
    for unit in units:
        unit.body.eval()
        unit.head.eval()
    right = torch.zeros(len(units), device=device)
    loss = torch.zeros(len(units), device=device)
    seen = 0
    with torch.no_grad():
        for batch in batches:
            h = batch.x
            for k, unit in enumerate(units):
                h = unit.body(h)
                if score:
                    logits = unit.head(h)
                    right[k] += (logits.argmax(1) == batch.labels).sum()
                    loss[k] += F.cross_entropy(logits.float(), batch.labels, reduction="sum")
            seen += len(batch.labels)
            if write is not None:
                write(h, batch)
            del h, batch
    return Sums(right, loss, seen)


__all__ = [
    "Batch",
    "CacheInputs",
    "EpochReport",
    "ImageInputs",
    "Inputs",
    "Score",
    "Start",
    "counter_key",
    "forward_block",
    "image_order",
    "learning_rate",
    "pass_key",
    "seed_step",
    "train_epochs",
]

"""Peaks of whole units and blocks, run as the worker runs them: the truth behind the sums over stages.

Measured as stages are, see instruments.py. The terms of a unit's peak: partitioner.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nf_engine.codec import make_codec
from nf_engine.config import TrainConfig
from nf_engine.device import tensor_bytes
from nf_engine.instruments import copies_of, first_update, ones
from nf_engine.local_step import Unit, local_step, train_block
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Preprocess
from nf_engine.records import ENGINE_SLOTS, IMAGE_SLOTS, BlockPlan, Line, UnitPlan, stored_bytes
from nf_engine.stages import Cut
from nf_engine.unit_heads import make_head
from nf_engine.worker import Batch, forward_block, forward_prefix


def profile_unit(cut: Cut, unit: UnitPlan, config: TrainConfig, batch: int, device: torch.device) -> Line:
    """Peak of whole steps of one unit, its weights and optimizer state apart: the truth behind the sum over stages.

    Measured at half the batch and at the batch. A peak is a maximum of lines, hence convex: between the two sizes the
    line through them is never below it.
    """
    head = make_head(cut, unit.head, unit.last, config)
    modules = [s.module for s in cut.stages[unit.first : unit.last + 1]]
    shape = cut.stages[unit.first - 1].output_shape if unit.first else cut.input_shape
    where = device if device.type == "cuda" else torch.device("cpu")
    sizes = (max(1, batch // 2), batch) if batch > 1 else (1,)
    peaks = []
    with copies_of([*modules, head], device) as (copies, counter):
        work = Unit("unit", copies[:-1], copies[-1], [s - unit.first for s in unit.starts])
        work.prepare(config)
        assert work.optimizer is not None
        first_update(work.optimizer)
        work.body.train()
        work.head.train()
        for size in sizes:
            base = counter.now
            counter.reset()
            x = ones(size, shape, where, compute_dtype(config))
            h, loss = local_step(work, x, torch.zeros(size, dtype=torch.int64, device=where))
            peaks.append(counter.peak - base)
            del x, h, loss
    if len(sizes) == 1:
        return Line(0.0, peaks[-1])
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return Line(peaks[1] - slope * batch, slope)


def block_peak(
    cut: Cut,
    block: BlockPlan,
    config: TrainConfig,
    preprocess: Preprocess,
    *,
    uint8: bool,
    device: torch.device,
    overhead: int,
    together: bool,
    edges: Sequence[int] = (),
) -> int:
    """Peak bytes of a block as the worker runs it: training steps, then an eval step that scores and writes.

    Args:
        overhead: bytes of weights beside the block; those that the block itself uses are not counted twice.
        edges: of a recomputed prefix, see worker.forward_prefix.
        together: host memory is the device's (the CPU), where the slots of the cache engine are not budgeted, and
            images come without any.
    """
    first, last = block.first, block.last
    modules = [s.module for s in cut.stages[first : last + 1]]
    heads = [make_head(cut, u.head, u.last, config) for u in block.units]
    frozen = [s.module for s in cut.stages[:first]] if block.cache.tier == "recompute" else []
    where = device if device.type == "cuda" else torch.device("cpu")
    kind = torch.uint8 if uint8 else torch.float32
    preprocess = copy.copy(preprocess)
    shape = cut.stages[first - 1].output_shape if first else cut.input_shape
    dtype, computed = config.stored_dtype, compute_dtype(config)
    after = make_codec(dtype, cut.stages[last].output_shape, channels_last=True)
    with copies_of([*modules, *heads, *frozen], device) as (copies, counter):
        bodies, ready = copies[: len(modules)], copies[len(modules) : len(modules) + len(heads)]
        prefix = [m.eval() for m in copies[len(modules) + len(heads) :]]
        weights = tensor_bytes(t for m in copies for t in (*m.parameters(), *m.buffers()))

        def slots(size: int) -> Tensor:
            return torch.ones(ENGINE_SLOTS, block.batch, size, dtype=torch.uint8, device=where)

        staging = slots(after.sample_bytes) if together else None
        # On the CPU a cache that holds the compute dtype hands out its own memory.
        loose = ones(block.batch, shape, where, computed) if together and dtype == config.compute_dtype else None
        base = counter.now
        counter.reset()
        units = [
            Unit("unit", bodies[u.first - first : u.last + 1 - first], head, [s - u.first for s in u.starts])
            for u, head in zip(block.units, ready, strict=True)
        ]
        for unit in units:
            unit.prepare(config)
            unit.body.train()
            unit.head.train()

        def load(images: Tensor, size: int) -> Tensor:
            return preprocess(images[:size], torch.arange(size), stream=0)

        def image_slots(count: int) -> Tensor:
            return torch.ones(count, block.batch, *cut.input_shape, dtype=kind, device=where)

        def inputs(images: Tensor) -> Tensor:
            if not prefix:
                return load(images, block.batch)
            size = block.cache.forward_batch
            return forward_prefix(
                prefix, lambda at: load(images, min(size, block.batch - at)), block.batch, size, dtype, edges
            )

        def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
            cached = bool(first) and not prefix
            arriving = None if cached or together else image_slots(IMAGE_SLOTS)
            ids = torch.zeros(0 if arriving is None else IMAGE_SLOTS, 2, block.batch, dtype=torch.int64, device=where)
            ring = slots(stored_bytes(shape, dtype)) if cached and not together else None
            buffer = loose
            if buffer is None:
                buffer = ones(block.batch, shape, where, computed) if cached else None
            held: list[Tensor] = []

            def arrived(waiting: Tensor | None) -> Tensor:
                if cached and buffer is not None:
                    return buffer
                x = inputs(image_slots(1)[0] if waiting is None else waiting[0])
                if together:
                    return x
                # A recorded step reads every batch where it found the first; whoever brought this one has it still.
                held[:] = [held[0].copy_(x) if held else x, x]
                return held[0]

            for _ in range(count):
                if cached and dtype == "u8" and computed != torch.float32:  # values are float32 before they are rounded
                    values = make_codec(dtype, shape, channels_last=True).transient_bytes(block.batch)
                    torch.empty(values, dtype=torch.uint8, device=where)
                yield arrived(arriving), torch.zeros(block.batch, dtype=torch.int64, device=where)
            del ring, arriving, ids

        train_block(units, batches(2 if together else 3), torch.zeros(len(units), device=where))
        host = torch.arange(block.batch)
        evaluated = (Batch(x, y, host, host) for x, y in batches(1))

        staging = slots(after.sample_bytes) if staging is None else staging

        def write(h: Tensor, _: Batch) -> None:
            after.encode(h, staging[0])

        forward_block(units, evaluated, score=True, write=write, device=where)
        return int(counter.peak - base + max(overhead, weights))

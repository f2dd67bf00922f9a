"""Profiler: bytes and seconds of each stage against the batch size, each a fitted line with its residual.

Bytes come from running the worker's own step: on CUDA for real with the allocator's counters, else on fake tensors with
`TensorBytes`, which needs no device and allocates nothing. Seconds come from the real device, where there is one.
Everything runs on copies, so weights, buffers and random state stay as they are, also when memory runs out half way.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Profiler); the terms of a unit's peak are ours: partitioner.py.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nf_engine.codec import make_codec
from nf_engine.config import TrainConfig
from nf_engine.device import LAYOUT, Meter, TensorBytes, free_bytes, meter, placed, tensor_bytes
from nf_engine.errors import BudgetError
from nf_engine.heads import WIDEST, Shape, adaptive_width, build_head, clipped, head_bytes, head_flops
from nf_engine.local_step import Unit, local_step, make_optimizer, train_block
from nf_engine.ops import head_path
from nf_engine.precision import compute_dtype, forward
from nf_engine.preprocess import Preprocess
from nf_engine.records import (
    ENGINE_SLOTS,
    IMAGE_SLOTS,
    BlockPlan,
    HeadProfile,
    HeadSpec,
    Line,
    Profile,
    StageProfile,
    UnitPlan,
    stored_bytes,
)
from nf_engine.stages import Cut
from nf_engine.worker import Batch, forward_block, forward_prefix

BATCHES = (8, 64, 512)
REPEATS = 3
T = TypeVar("T")


def fit(batches: Sequence[int], values: Sequence[float]) -> Line:
    """Least squares through (batch, value), with the largest relative residual; neither part is negative."""
    if len(set(batches)) == 1:
        return Line(0.0, values[0] / batches[0])
    slope, fixed = (float(v) for v in np.polyfit(batches, values, 1))
    if fixed < 0:
        slope, fixed = max(v / b for b, v in zip(batches, values, strict=True)), 0.0
    elif slope * (batches[-1] - batches[0]) < -1e-6 * max(values):  # a noisy clock: the largest batch is measured best
        slope, fixed = values[-1] / batches[-1], 0.0
    slope = max(slope, 0.0)  # a constant, but for rounding
    residuals = [abs(fixed + slope * b - v) / v for b, v in zip(batches, values, strict=True) if v > 0]
    return Line(fixed, slope, max(residuals, default=0.0))


def fit_bytes(batches: Sequence[int], values: Sequence[float]) -> Line:
    """A fit of bytes; where it is off by more than 5 %, the upper envelope takes its place: no peak is missed."""
    line = fit(batches, values)
    if line.residual <= 0.05:
        return line
    lift = max(v - line.at(b) for b, v in zip(batches, values, strict=True))
    return Line(line.fixed + max(0.0, lift), line.per_sample, line.residual)


@contextmanager
def _copies(modules: Sequence[nn.Module], device: torch.device) -> Iterator[tuple[list[nn.Module], Meter]]:
    """Copies of some modules to measure on, with a meter: real ones on CUDA, fake ones otherwise."""
    if device.type == "cuda":
        with torch.random.fork_rng(devices=[device]):
            copies = [placed(copy.deepcopy(m), device) for m in modules]
            with meter(device) as counter:
                yield copies, counter
        return
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        copies = [copy.deepcopy(m) for m in modules]
    with fake:
        _lay_out(copies)
    tensors = [t for m in copies for t in (*m.parameters(), *m.buffers())]
    with fake, TensorBytes(tensors, fake) as counter:
        yield copies, counter


def _lay_out(modules: Sequence[nn.Module]) -> None:
    """What `device.placed` does, for modules of fake tensors, which cannot be moved in place."""
    laid: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may be shared
    for owner in (m for module in modules for m in module.modules()):
        for name, p in owner._parameters.items():
            if p is not None and p.ndim == 4:
                new = nn.Parameter(p.detach().contiguous(memory_format=LAYOUT), p.requires_grad)
                owner._parameters[name] = laid.setdefault(p, new)


def _ones(batch: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Maps (batch, *shape) as a worker would hand them on."""
    return torch.empty(batch, *shape, dtype=dtype, device=device, memory_format=LAYOUT).fill_(1)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return tensor_bytes(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _saved(module: nn.Module, x: Tensor) -> tuple[int, bool, bool]:
    """Bytes saved for backward beside weights, input and output; and whether input and output are saved."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = forward(module, x)
    for tensor in (*module.parameters(), *module.buffers()):
        found.pop(_storage(tensor), None)
    saves_input = found.pop(_storage(x), None) is not None
    saves_output = found.pop(_storage(h), None) is not None
    return sum(found.values()), saves_input, saves_output


def _stage_bytes(module: nn.Module, x: Tensor, counter: Meter) -> dict[str, float]:
    """One stage alone: what it saves, and the peaks of training and of forward above its input."""
    module.train()
    inner, saves_input, saves_output = _saved(module, x)
    base = counter.now
    counter.reset()
    h = forward(module, x)
    size = h.untyped_storage().nbytes()
    dh = torch.ones_like(h)
    if h.requires_grad:
        torch.autograd.backward(h, dh)
    train_peak = counter.peak - base
    del h, dh
    for p in module.parameters():
        p.grad = None
    x.grad = None
    module.eval()
    counter.reset()
    base = counter.now
    with torch.no_grad():
        forward(module, x)
    return {
        "inner": inner,
        "saves_input": float(saves_input),
        "saves_output": float(saves_output),
        "output": size,
        "train_peak": train_peak,
        "forward": counter.peak - base,
    }


def _head_peak(head: nn.Module, h: Tensor, labels: Tensor, counter: Meter) -> float:
    head.train()
    base = counter.now
    counter.reset()
    loss, dh = head.step(h, labels, None)  # type: ignore[operator]
    peak = counter.peak - base
    del loss, dh
    for p in head.parameters():
        p.grad = None
    return peak


def flops_of(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating point operations of one sample's forward, a multiply-add counted as two."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        module = copy.deepcopy(module).eval()
    with fake, FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, *shape))
    return int(counter.get_total_flops())


def _chw(shape: tuple[int, ...]) -> Shape:
    channels, height, width = shape
    return channels, height, width


def head_specs(cut: Cut, config: TrainConfig, flops: Sequence[int], widest: int = WIDEST) -> list[HeadSpec]:
    """The head that a unit ending at each stage gets; the last one is the model's own classifier."""
    specs = []
    modules = [*(s.module for s in cut.stages), cut.classifier]
    parameters = sum(p.numel() for m in modules for p in m.parameters())
    total = sum(flops) + flops_of(cut.classifier, _chw(cut.stages[-1].output_shape))
    for stage in cut.stages[:-1]:
        shape = _chw(stage.output_shape)
        spec = HeadSpec("deep" if config.head == "deep" else "linear", config.head_pool)
        if spec.kind == "deep":
            spec = replace(spec, depth=config.head_depth)
            width = config.head_width or adaptive_width(spec, shape, cut.classes, total, parameters, widest)
            spec = replace(spec, width=width)
        specs.append(clipped(spec, shape))
    return [*specs, HeadSpec("classifier", 1)]


def make_head(cut: Cut, spec: HeadSpec, stage: int, config: TrainConfig) -> nn.Module:
    """The head of a unit that ends at a stage, its weights a function of (seed, stage)."""
    classifier = cut.classifier if spec.kind == "classifier" else None
    return build_head(
        spec,
        _chw(cut.stages[stage].output_shape),
        cut.classes,
        smoothing=config.label_smoothing,
        seed=config.seed * 1000 + stage,
        classifier=classifier,
    )


def _while_memory_lasts(
    measure: Callable[[int], T], batches: Sequence[int], name: str, device: torch.device
) -> list[T]:
    """measure(batch) for each batch, up to the first that runs out of memory; two points make a line.

    Raises:
        BudgetError: not even two batch sizes fit the device.
    """
    points: list[T] = []
    for batch in batches:
        try:
            points.append(measure(batch))
        except torch.OutOfMemoryError:
            if len(points) >= 2:
                break
            free = free_bytes(device)
            raise BudgetError(
                f"stage {name} ran out of memory while it was profiled at batch {batch}, {free} bytes are free; "
                "free some, or profile with smaller batch_sizes",
                stage=name,
                need=free + 1,
                budget=free,
            ) from None
    return points


def _profile_head(
    cut: Cut, spec: HeadSpec, stage: int, config: TrainConfig, batches: Sequence[int], device: torch.device
) -> HeadProfile:
    head = make_head(cut, spec, stage, config)
    shape = _chw(cut.stages[stage].output_shape)
    where = device if device.type == "cuda" else torch.device("cpu")
    dtype = compute_dtype(config)
    path = "autograd" if spec.kind == "classifier" else head_path(where, dtype).name
    with _copies([head], device) as (copies, counter):
        optimizer = _optimizer_state(copies[0], config)
        if path != "autograd":  # closed forms, which a test holds to the meter; units are measured whole later
            peaks = [float(head_bytes(spec, shape, cut.classes, b, dtype.itemsize, path)) for b in batches]
        else:

            def peak(batch: int) -> float:
                h = _ones(batch, shape, where, dtype)
                return _head_peak(copies[0], h, torch.zeros(batch, dtype=torch.int64, device=where), counter)

            peaks = _while_memory_lasts(peak, batches, cut.stages[stage].name, device)
    trained = [p for p in head.parameters() if p.requires_grad]
    return HeadProfile(
        spec=spec,
        weights=tensor_bytes([*head.parameters(), *head.buffers()]),
        gradients=tensor_bytes(trained),
        optimizer=optimizer,
        parameters=sum(p.numel() for p in head.parameters()),
        flops=flops_of(cut.classifier, shape) if spec.kind == "classifier" else head_flops(spec, shape, cut.classes),
        transient=fit_bytes(batches[: len(peaks)], peaks),
        path=path,
        seconds=None,
    )


def _optimizer_state(module: nn.Module, config: TrainConfig) -> int:
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        return 0
    optimizer = make_optimizer(trained, config)
    _first_update(optimizer)
    return state_bytes(optimizer)


def _profile_stage(
    cut: Cut,
    number: int,
    config: TrainConfig,
    batches: Sequence[int],
    device: torch.device,
    before_keeps: bool,
    head: HeadProfile,
    flops: int,
) -> tuple[StageProfile, bool]:
    """One stage's record, and whether it keeps its own output for backward."""
    stage = cut.stages[number]
    shape = cut.stages[number - 1].output_shape if number else cut.input_shape
    where = device if device.type == "cuda" else torch.device("cpu")
    with _copies([stage.module], device) as (copies, counter):

        def point(batch: int) -> dict[str, float]:
            x = _ones(batch, shape, where, compute_dtype(config)).requires_grad_(number > 0)
            p = _stage_bytes(copies[0], x, counter)
            size = x.untyped_storage().nbytes()
            own_input = size if p["saves_input"] and not before_keeps else 0
            kept = p["inner"] + (p["output"] if p["saves_output"] else 0)
            return p | {
                "transient": p["train_peak"] - kept,
                "kept": kept + own_input,
                "held_input": size - own_input,
                "loose": 0 if p["saves_output"] else p["output"],
            }

        points = _while_memory_lasts(point, batches, stage.name, device)
        optimizer = _optimizer_state(copies[0], config)

    def line(key: str) -> Line:
        return fit_bytes(batches[: len(points)], [p[key] for p in points])

    module = stage.module
    trained = [p for p in module.parameters() if p.requires_grad]
    record = StageProfile(
        name=stage.name,
        output_shape=stage.output_shape,
        output=compute_dtype(config).itemsize * math.prod(stage.output_shape),
        parameters=sum(p.numel() for p in module.parameters()),
        weights=tensor_bytes([*module.parameters(), *module.buffers()]),
        gradients=tensor_bytes(trained),
        optimizer=optimizer,
        kept=line("kept"),
        input=line("held_input"),
        loose=line("loose"),
        transient=line("transient"),
        forward=line("forward"),
        flops=flops,
        seconds=None,
        forward_seconds=None,
        rerun_seconds=None,
        head=head,
    )
    return record, bool(points[0]["saves_output"])


def _loading(cut: Cut, preprocess: Preprocess, uint8: bool, batches: Sequence[int], device: torch.device) -> Line:
    """Peak of a batch of images on its way to the first stage."""
    peaks = []
    kind = torch.uint8 if uint8 else torch.float32
    preprocess = copy.copy(preprocess)  # its constants are made where it runs, here perhaps as fake tensors
    with _copies([], device) as (_, counter):
        where = device if device.type == "cuda" else torch.device("cpu")
        for batch in batches:
            base = counter.now
            counter.reset()
            images = torch.ones(batch, *cut.input_shape, dtype=kind, device=where)
            x = preprocess(images, torch.arange(batch), stream=0)
            peaks.append(counter.peak - base)
            del images, x
    return fit_bytes(batches, peaks)


def profile_stages(
    cut: Cut,
    config: TrainConfig,
    preprocess: Preprocess,
    *,
    name: str,
    uint8: bool,
    device: torch.device | None,
    batch_sizes: Sequence[int] = BATCHES,
    budget: int | None = None,
    widest: int = WIDEST,
) -> Profile:
    """Measures every stage of a cut model.

    Args:
        cut: stages and classifier; only copies of them run.
        config: head kinds, optimizer.
        preprocess: what images go through on the device.
        name: of the model, for the record.
        uint8: images reach the device as uint8, else as float32.
        device: where to measure seconds, and on CUDA bytes; None: bytes only, on fake tensors.
        batch_sizes: three or more.
        budget: bytes that measuring the seconds must stay below; None: no bound.
        widest: of deep heads, as in heads.adaptive_width.

    Returns:
        Profile: bytes as lines of the batch size, FLOPs, and seconds where a device was given.
    """
    flops = [
        flops_of(s.module, cut.stages[k - 1].output_shape if k else cut.input_shape) for k, s in enumerate(cut.stages)
    ]
    specs = head_specs(cut, config, flops, widest)
    where = device or torch.device("cpu")
    stages: list[StageProfile] = []
    keeps = False
    for k in range(len(cut.stages)):
        head = _profile_head(cut, specs[k], k, config, batch_sizes, where)
        stage, keeps = _profile_stage(cut, k, config, batch_sizes, where, keeps, head, flops[k])
        stages.append(stage)
    if device is not None:
        resting = sum(s.weights + s.head.weights for s in stages)
        room = None if budget is None else budget - resting
        stages = [_with_seconds(cut, k, s, config, device, room) for k, s in enumerate(stages)]
    return Profile(
        model=name,
        device=device.type if device is not None else "none",
        torch=str(torch.__version__),
        optimizer=config.optimizer,
        augment=config.augment,
        precision=config.precision,
        input_shape=cut.input_shape,
        classes=cut.classes,
        input=compute_dtype(config).itemsize * math.prod(cut.input_shape),
        batch_sizes=tuple(batch_sizes),
        loading=_loading(cut, preprocess, uint8, batch_sizes, where),
        stages=tuple(stages),
        image=(1 if uint8 else 4) * math.prod(cut.input_shape) + 16,
    )


def _timed_sizes(stage: StageProfile, room: int | None) -> tuple[int, int, int]:
    """8, 16 and 32 samples, or less where a copy of the stage and its step would need more than `room` bytes."""
    copies = 2 * (stage.weights + stage.gradients + stage.head.weights + stage.head.gradients)
    for top in (32, 16, 8):
        step = stage.input.at(top) + stage.kept.at(top) + stage.transient.at(top) + 3 * stage.output * top
        if room is None or copies + step <= room:
            break
    return top // 4, top // 2, top


def _with_seconds(
    cut: Cut, number: int, stage: StageProfile, config: TrainConfig, device: torch.device, room: int | None
) -> StageProfile:
    """The record with measured seconds of training step, both forwards and head, at three batch sizes."""
    sizes = _timed_sizes(stage, room)
    shape = cut.stages[number - 1].output_shape if number else cut.input_shape
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        body = placed(copy.deepcopy(cut.stages[number].module), device)
        head = make_head(cut, stage.head.spec, number, config)
        head = copy.deepcopy(head) if stage.head.spec.kind == "classifier" else head
        head = placed(head, device)
        times: dict[str, list[float]] = {"train": [], "rerun": [], "forward": [], "head": []}
        for batch in sizes:
            x = torch.rand(batch, *shape, device=device).to(compute_dtype(config), memory_format=LAYOUT)
            x.requires_grad_(number > 0)
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            with torch.no_grad():
                h = forward(body.train(), x)
            dh = torch.rand_like(h)
            head.train()
            times["train"].append(seconds_of(partial(_forward_backward, body, x, dh), device))
            times["rerun"].append(seconds_of(partial(forward, body, x), device))
            times["head"].append(seconds_of(partial(_head_step, head, h, labels), device))
            body.eval()
            with torch.no_grad():
                times["forward"].append(seconds_of(partial(forward, body, x), device))
    lines = {k: fit(sizes, v) for k, v in times.items()}
    return replace(
        stage,
        seconds=lines["train"],
        forward_seconds=lines["forward"],
        rerun_seconds=lines["rerun"],
        head=replace(stage.head, seconds=lines["head"]),
    )


def _head_step(head: nn.Module, h: Tensor, labels: Tensor) -> None:
    head.step(h, labels, None)  # type: ignore[operator]


def _forward_backward(body: nn.Module, x: Tensor, dh: Tensor) -> None:
    h = forward(body, x)
    if h.requires_grad:
        torch.autograd.backward(h, dh)
    for p in body.parameters():
        p.grad = None
    x.grad = None


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs after a warm-up."""
    times = []
    for k in range(REPEATS + 1):
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        if k:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fetch_seconds(cut: Cut, preprocess: Preprocess, uint8: bool, batch: int, device: torch.device) -> float:
    """Seconds to bring one image from host memory through the preprocessing."""
    images = torch.ones(batch, *cut.input_shape, dtype=torch.uint8 if uint8 else torch.float32)
    preprocess, ids = copy.copy(preprocess), torch.arange(batch)
    return seconds_of(lambda: preprocess(images[ids].to(device), ids, stream=0), device) / batch


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
    with _copies([*modules, head], device) as (copies, counter):
        work = Unit("unit", copies[:-1], copies[-1], [s - unit.first for s in unit.starts])
        work.prepare(config)
        assert work.optimizer is not None
        _first_update(work.optimizer)
        work.body.train()
        work.head.train()
        for size in sizes:
            base = counter.now
            counter.reset()
            x = _ones(size, shape, where, compute_dtype(config))
            h, loss = local_step(work, x, torch.zeros(size, dtype=torch.int64, device=where))
            peaks.append(counter.peak - base)
            del x, h, loss
    if len(sizes) == 1:
        return Line(0.0, peaks[-1])
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return Line(peaks[1] - slope * batch, slope)


def _first_update(optimizer: torch.optim.Optimizer) -> None:
    """An update that makes the optimizer's state; on copies only."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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
) -> int:
    """Peak bytes of a block as the worker runs it: training steps, then an eval step that scores and writes.

    Args:
        overhead: bytes of weights beside the block; those that the block itself uses are not counted twice.
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
    with _copies([*modules, *heads, *frozen], device) as (copies, counter):
        bodies, ready = copies[: len(modules)], copies[len(modules) : len(modules) + len(heads)]
        prefix = [m.eval() for m in copies[len(modules) + len(heads) :]]
        weights = tensor_bytes(t for m in copies for t in (*m.parameters(), *m.buffers()))

        def slots(size: int) -> Tensor:
            return torch.ones(ENGINE_SLOTS, block.batch, size, dtype=torch.uint8, device=where)

        staging = slots(after.sample_bytes) if together else None
        # On the CPU a cache that holds the compute dtype hands out its own memory.
        loose = _ones(block.batch, shape, where, computed) if together and dtype == config.compute_dtype else None
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
                prefix, lambda at: load(images, min(size, block.batch - at)), block.batch, size, dtype
            )

        def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
            cached = bool(first) and not prefix
            arriving = None if cached or together else image_slots(IMAGE_SLOTS)
            ids = torch.zeros(0 if arriving is None else IMAGE_SLOTS, 2, block.batch, dtype=torch.int64, device=where)
            ring = slots(stored_bytes(shape, dtype)) if cached and not together else None
            buffer = loose
            if buffer is None:
                buffer = _ones(block.batch, shape, where, computed) if cached else None
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
                    values = make_codec(dtype, _chw(shape), channels_last=True).transient_bytes(block.batch)
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

"""Profiler: bytes and seconds of each stage against the batch size, each a fitted line with its residual.

Bytes come from running the worker's own step on copies, see instruments.py; seconds from the real device, where there
is one.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Profiler); the terms of a unit's peak are ours: partitioner.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig
from nf_engine.device import Meter, free_bytes, tensor_bytes
from nf_engine.errors import BudgetError
from nf_engine.heads import WIDEST, head_bytes, head_flops
from nf_engine.instruments import copies_of, first_update, fit_bytes, flops_of, ones
from nf_engine.local_step import make_optimizer
from nf_engine.ops import head_path
from nf_engine.precision import compute_dtype, forward
from nf_engine.preprocess import Preprocess
from nf_engine.records import HeadProfile, HeadSpec, Line, Profile, StageProfile
from nf_engine.recovery import is_out_of_memory
from nf_engine.seconds import with_seconds
from nf_engine.stages import Cut
from nf_engine.unit_heads import chw, head_specs, make_head

BATCHES = (8, 64, 512)
T = TypeVar("T")


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
        stages = [with_seconds(cut, k, s, config, device, room) for k, s in enumerate(stages)]
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
    with copies_of([stage.module], device) as (copies, counter):

        def point(batch: int) -> dict[str, float]:
            x = ones(batch, shape, where, compute_dtype(config)).requires_grad_(number > 0)
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

        points = _where_memory_lasts(point, batches, f"stage {stage.name}", device)
        optimizer = _optimizer_state(copies[0], config)

    def line(key: str) -> Line:
        return fit_bytes([*points], [p[key] for p in points.values()])

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
    return record, bool(next(iter(points.values()))["saves_output"])


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


def _profile_head(
    cut: Cut, spec: HeadSpec, stage: int, config: TrainConfig, batches: Sequence[int], device: torch.device
) -> HeadProfile:
    head = make_head(cut, spec, stage, config)
    shape = chw(cut.stages[stage].output_shape)
    where = device if device.type == "cuda" else torch.device("cpu")
    dtype = compute_dtype(config)
    path = "autograd" if spec.kind == "classifier" else head_path(where, dtype).name
    with copies_of([head], device) as (copies, counter):
        optimizer = _optimizer_state(copies[0], config)
        if path != "autograd":  # closed forms, which a test holds to the meter; units are measured whole later
            peaks = {b: float(head_bytes(spec, shape, cut.classes, b, dtype.itemsize, path)) for b in batches}
        else:

            def peak(batch: int) -> float:
                h = ones(batch, shape, where, dtype)
                return _head_peak(copies[0], h, torch.zeros(batch, dtype=torch.int64, device=where), counter)

            peaks = _where_memory_lasts(peak, batches, f"the head of stage {cut.stages[stage].name}", device)
    trained = [p for p in head.parameters() if p.requires_grad]
    return HeadProfile(
        spec=spec,
        weights=tensor_bytes([*head.parameters(), *head.buffers()]),
        gradients=tensor_bytes(trained),
        optimizer=optimizer,
        parameters=sum(p.numel() for p in head.parameters()),
        flops=flops_of(cut.classifier, shape) if spec.kind == "classifier" else head_flops(spec, shape, cut.classes),
        transient=fit_bytes([*peaks], [*peaks.values()]),
        path=path,
        seconds=None,
    )


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


def _optimizer_state(module: nn.Module, config: TrainConfig) -> int:
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        return 0
    optimizer = make_optimizer(trained, config)
    first_update(optimizer)
    return state_bytes(optimizer)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return tensor_bytes(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))


def _where_memory_lasts(
    measure: Callable[[int], T], batches: Sequence[int], name: str, device: torch.device
) -> dict[int, T]:
    """measure(batch) for each of the ascending batches up to the first that runs out of memory.

    Two points make a line: where there are fewer, that first batch is halved until there are, or it is one sample.

    Raises:
        BudgetError: not even one sample fits the device.
    """
    points: dict[int, T] = {}

    def fits(batch: int) -> bool:
        try:
            points[batch] = measure(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return batch in points

    batch = next((b for b in batches if not fits(b)), 0)
    while batch > 1 and len(points) < 2:
        batch //= 2
        if batch not in points:
            fits(batch)
    if not points:
        free = free_bytes(device)
        raise BudgetError(
            f"{name} ran out of memory while it was profiled with one sample, {free} bytes are free; free some, or "
            "use smaller images",
            stage=name,
            need=free + 1,
            budget=free,
        )
    return dict(sorted(points.items()))


def _loading(cut: Cut, preprocess: Preprocess, uint8: bool, batches: Sequence[int], device: torch.device) -> Line:
    """Peak of a batch of images on its way to the first stage."""
    kind = torch.uint8 if uint8 else torch.float32
    preprocess = copy.copy(preprocess)  # its constants are made where it runs, here perhaps as fake tensors
    with copies_of([], device) as (_, counter):
        where = device if device.type == "cuda" else torch.device("cpu")

        def peak(batch: int) -> float:
            base = counter.now
            counter.reset()
            images = torch.ones(batch, *cut.input_shape, dtype=kind, device=where)
            preprocess(images, torch.arange(batch), stream=0)
            return counter.peak - base

        peaks = _where_memory_lasts(peak, batches, "a batch of images", device)
    return fit_bytes([*peaks], [*peaks.values()])

"""Instruments: what the bytes and FLOPs of a plan are measured with, and the lines that are fitted to them.

Modules are measured on copies: on CUDA on real ones with the allocator's counters, else on fake ones with
`TensorBytes`, which needs no device and allocates nothing. So weights, buffers and random state stay as they are, also
when memory runs out half way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nf_engine.device import LAYOUT, Meter, TensorBytes, meter, placed
from nf_engine.records import Line


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
def copies_of(modules: Sequence[nn.Module], device: torch.device) -> Iterator[tuple[list[nn.Module], Meter]]:
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


def ones(batch: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Maps (batch, *shape) as a worker would hand them on."""
    return torch.empty(batch, *shape, dtype=dtype, device=device, memory_format=LAYOUT).fill_(1)


def first_update(optimizer: torch.optim.Optimizer) -> None:
    """An update that makes the optimizer's state; on copies only."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def flops_of(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating point operations of one sample's forward, a multiply-add counted as two."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        module = copy.deepcopy(module).eval()
    with fake, FlopCounterMode(display=False) as counter, torch.no_grad():
        where = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        module(torch.empty(1, *shape, device=where))
    return int(counter.get_total_flops())

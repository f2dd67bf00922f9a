"""Ops: the heads' local step, checked once at the edge and sent to the implementation for the device.

One table decides: `head_path` names the path, fused (Triton, on a GPU) or reference (plain PyTorch, everywhere else),
and why. Under torch.compile a step is one opaque operator, nf_engine::head_step; eager calls go round the dispatcher,
which costs ten times the microseconds of a call. No step reads a value back from the device, so that it can be captured
in a CUDA graph.
Shapes: x (N, C, H, W), labels (N,), logits (N, K); parameters and results as in reference.HeadParams and HeadStep.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nf_engine import reference
from nf_engine.reference import IGNORE_INDEX, HeadParams, HeadStep, Statistics, layout_of, stride_of

__all__ = ["IGNORE_INDEX", "HeadParams", "HeadPath", "HeadStep", "Statistics", "head_path", "head_step", "stride_of"]

log = logging.getLogger(__name__)


class HeadPath(NamedTuple):
    """name: "fused" or "reference"; reason: why, for people."""

    name: str
    reason: str


@cache
def head_path(device: torch.device, dtype: torch.dtype = torch.float32) -> HeadPath:
    """The implementation that heads take for h of this dtype on this device; logged once.

    NF_KERNELS=off in the environment keeps the reference everywhere.
    """
    if device.type != "cuda":
        return HeadPath("reference", f"device {device.type}")
    if os.environ.get("NF_KERNELS", "on") == "off":
        path = HeadPath("reference", "NF_KERNELS=off")
    elif dtype not in (torch.float32, torch.bfloat16, torch.float16):
        path = HeadPath("reference", f"no kernels for {str(dtype).removeprefix('torch.')}")
    else:
        try:
            from nf_engine import fused
        except ImportError as error:
            path = HeadPath("reference", f"Triton cannot be imported: {error}")
        else:
            path = HeadPath("reference", why) if (why := fused.refusal(device, dtype)) else HeadPath("fused", "Triton")
    log.info("heads on %s, %s: %s path (%s)", device, dtype, *path)
    return path


def head_step(
    x: Tensor,
    params: HeadParams,
    labels: Tensor,
    scale: Tensor,
    *,
    running: Statistics | None = None,
    pool: int,
    smoothing: float,
) -> HeadStep:
    """One local step of a head: loss and all gradients at once, no autograd graph. Not itself differentiable.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; never written, never aliased by a result.
        params: float32 masters, on x's device; with convolutions the head is `deep`, without it is `linear`.
        labels: (N,), int64, each in [0, K) or IGNORE_INDEX; the range is not checked, a wrong label gives a NaN row.
        scale: one element, float32 (float64 for float64 x), on x's device: 1 / (rows that count).
        running: statistics of the norms of a deep head, which the step moves.
        pool: cells a side that the last map is pooled to, at most its smaller side.
        smoothing: of the labels, in [0, 1].

    Returns:
        HeadStep: loss_rows (N,) unscaled, dx like x, float32 grads like params; dx and grads of scale * sum(loss_rows).
        An ignored row of a linear head adds exactly nothing; a deep head's norms see it all the same.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; or a norm has one value a channel.

    Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164.
    """
    running = running or Statistics()
    _check(x, params, running, pool)
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64 or labels.device != x.device:
        raise ValueError(f"expected int64 labels ({x.shape[0]},) on {x.device}, got {_text(labels)}")
    if scale.numel() != 1 or scale.device != x.device or not scale.is_floating_point():
        raise ValueError(f"expected scale as one floating point element on {x.device}, got {_text(scale)}")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"expected smoothing in [0, 1], got {smoothing}")
    # Autocast off: the dtypes inside are chosen.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if not torch.compiler.is_compiling():
            return _step(x, params, running, labels, scale, pool, smoothing)
        lists = [list(part) for part in (*params[:3], *running)]
        rows, dx, *flat = _operator(x, *lists, params.wl, params.bl, labels, scale, pool, smoothing)
        for moved in reversed((*running.means, *running.variances)):
            moved.copy_(flat.pop())
    return HeadStep(rows, dx.expand_as(x), HeadParams.of(flat))


def _step(
    x: Tensor, params: HeadParams, running: Statistics, labels: Tensor, scale: Tensor, pool: int, smoothing: float
) -> HeadStep:
    if head_path(x.device, x.dtype).name == "fused":
        from nf_engine import fused

        return fused.head_step(x, params, running, labels, scale, pool, smoothing)
    return reference.head_step(x, params, running, labels, scale, pool, smoothing)


@torch.library.custom_op("nf_engine::head_step", mutates_args=())
def _operator(
    x: Tensor,
    convs: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    wl: Tensor,
    bl: Tensor,
    labels: Tensor,
    scale: Tensor,
    pool: int,
    smoothing: float,
) -> list[Tensor]:
    """Rows, dx, the gradients and the moved statistics in one list; torch.compile wants a function without effects.

    A dx that is one value a channel comes as (N, C, 1, 1).
    """
    params = HeadParams(tuple(convs), tuple(gammas), tuple(betas), wl, bl)
    moved = Statistics(tuple(m.clone() for m in means), tuple(v.clone() for v in variances))
    step = _step(x, params, moved, labels, scale, pool, smoothing)
    dx = step.dx[:, :, :1, :1].contiguous() if _broadcast(convs, pool) else step.dx
    return [step.loss_rows, dx, *(g.contiguous() for g in step.grads.flat()), *moved.means, *moved.variances]


@_operator.register_fake
def _(
    x: Tensor,
    convs: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    wl: Tensor,
    bl: Tensor,
    labels: Tensor,
    scale: Tensor,
    pool: int,
    smoothing: float,
) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(*x.shape[:2], 1, 1) if _broadcast(convs, pool) else torch.empty_like(x, memory_format=layout_of(x))
    grads = [x.new_empty(p.shape, dtype=wide) for p in (*convs, *gammas, *betas, wl, bl)]
    return [x.new_empty(x.shape[0], dtype=wide), dx, *grads, *map(torch.empty_like, [*means, *variances])]


def _broadcast(convs: list[Tensor], pool: int) -> bool:
    return not convs and pool == 1


def _check(x: Tensor, params: HeadParams, running: Statistics, pool: int) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"expected floating point x (N, C, H, W), got {_text(x)}")
    channels, height, width = x.shape[1:]
    expected: list[tuple[int, ...]] = []
    for weight in params.convs:
        stride = stride_of(height, width)
        height, width = -(-height // stride), -(-width // stride)
        expected.append((weight.shape[0], channels, 3, 3))
        channels = weight.shape[0]
    if pool < 1 or pool > min(height, width):
        raise ValueError(f"expected 1 <= pool <= {min(height, width)}, the side of the last map, got {pool}; clip it")
    filters = [(shape[0],) for shape in expected]
    expected += [*filters * 2, (len(params.bl), channels * pool**2), (len(params.bl),)]
    found = [tuple(p.shape) for p in params.flat()]
    if found != expected:
        raise ValueError(f"expected parameters {expected} for x {tuple(x.shape)} and pool {pool}, got {found}")
    statistics, wide = [*running.means, *running.variances], torch.promote_types(x.dtype, torch.float32)
    if [(tuple(p.shape), p.dtype) for p in statistics] != [(shape, wide) for shape in filters * 2]:
        raise ValueError(
            f"expected running means and variances {filters}, one for each convolution, {wide} beside x in {x.dtype}; "
            f"got {', '.join(map(_text, statistics)) or 'none'}"
        )
    if params.convs and x.shape[0] * height * width < 2:
        raise ValueError(
            f"a norm needs two values a channel, x {tuple(x.shape)} leaves it one; use a larger batch or a linear head"
        )


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"

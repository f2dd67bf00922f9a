"""Fused: the head's local step on a GPU, from the Triton kernels and the library's convolutions and products.

The same maths as reference.head_step, in fewer passes: x is pooled in one read, the linear layer and the loss are one
launch, norm, ReLU and pooling are one pass behind each convolution, and each gradient of a map is written over the map.
Nothing waits for the device or reads from it, sums have a fixed order, and shapes alone decide the launches: a step can
be captured in a CUDA graph, and the same inputs give the same bits.
Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164; NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

import subprocess
from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from nf_engine.kernels.linear_ce import MAX_CLASSES, cross_entropy, linear_cross_entropy
from nf_engine.kernels.norm_relu import norm_relu_backward_, norm_relu_forward
from nf_engine.kernels.pool import pool_backward, pool_forward
from nf_engine.reference import (
    EPSILON,
    IGNORE_INDEX,
    MOMENTUM,
    HeadParams,
    HeadStep,
    Statistics,
    conv,
    conv_backward,
    like_weight,
)

__all__ = ["head_step", "refusal"]

LEAST_TRITON = (3, 6)
LEAST_CAPABILITY = (8, 0)  # bfloat16, and the shared memory that the tiles count on


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why heads cannot take this path on a CUDA device; None if they can: a small step of each kind has run there."""
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) < LEAST_TRITON:
        return f"Triton {triton.__version__}, needs {'.'.join(map(str, LEAST_TRITON))}"
    if (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        return f"compute capability {'.'.join(map(str, found))}, needs {'.'.join(map(str, LEAST_CAPABILITY))}"
    try:
        _try(device, dtype)
    except (RuntimeError, OSError, subprocess.SubprocessError, triton.TritonError) as error:  # also of its C compiler
        return f"a trial step failed: {error}"
    return None


def head_step(
    x: Tensor, params: HeadParams, running: Statistics, labels: Tensor, scale: Tensor, pool: int, smoothing: float
) -> HeadStep:
    """Forward and backward of a head at once; arguments and results as in reference.head_step."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return _step(_dense(x), params, running, labels, scale, pool, smoothing)


def _step(
    x: Tensor, params: HeadParams, running: Statistics, labels: Tensor, scale: Tensor, pool: int, smoothing: float
) -> HeadStep:
    saved, y = [], x
    features: Tensor | None = None
    for k, (weight, gamma, beta, mean, variance) in enumerate(zip(*params[:3], *running, strict=True)):
        weight = like_weight(weight, y)
        s = _dense(conv(y, weight))
        last = k + 1 == len(params.convs) and pool == 1
        out, *batch = norm_relu_forward(s, gamma, beta, mean, variance, momentum=MOMENTUM, eps=EPSILON, pool=last)
        saved.append((y, weight, s, gamma, beta, batch, last))
        features, y = (out, y) if last else (None, out)
        del out
    if features is None:
        features = pool_forward(y, pool)
    loss_rows, dlogits, dfeatures = _tail(features, params, labels, scale, smoothing)
    dwl, dbl = dlogits.t() @ features, dlogits.sum(0)
    dy = dfeatures if saved and saved[-1][-1] else pool_backward(dfeatures, y)
    grads = []
    while saved:
        del y
        y, weight, s, gamma, beta, batch, last = saved.pop()
        if not last:
            dy = _laid_out_as(s, dy)
        dgamma, dbeta = norm_relu_backward_(s, dy, gamma, beta, *batch, pool=last)  # s is its gradient from here on
        del dy
        dy, dweight = conv_backward(s, y, weight)
        del s
        grads.append((dweight.to(dgamma.dtype), dgamma, dbeta))
    convs, gammas, betas = zip(*reversed(grads), strict=True) if grads else ((), (), ())
    return HeadStep(loss_rows, dy, HeadParams(convs, gammas, betas, dwl, dbl))


def _tail(
    features: Tensor, params: HeadParams, labels: Tensor, scale: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_rows (N,), dlogits (N, K), dfeatures (N, D), all float32 (float64 for float64 x)."""
    wl, bl = (p.to(features.dtype).contiguous() for p in (params.wl, params.bl))
    labels = labels.contiguous()
    if len(bl) <= MAX_CLASSES:
        return linear_cross_entropy(features, wl, bl, labels, scale, ignore_index=IGNORE_INDEX, smoothing=smoothing)
    logits = torch.addmm(bl, features, wl.t())
    rows, dlogits = cross_entropy(logits, labels, scale, ignore_index=IGNORE_INDEX, smoothing=smoothing)
    return rows, dlogits, dlogits @ wl


def _laid_out_as(s: Tensor, dy: Tensor) -> Tensor:
    """dy with the strides of s, which libraries are free to change in a gradient."""
    return dy if dy.stride() == s.stride() else torch.empty_like(s).copy_(dy)


def _dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that the kernels read."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _try(device: torch.device, dtype: torch.dtype) -> None:
    """A small step of each kind: what cannot be compiled or launched fails here, not in a training."""
    x = torch.zeros(4, 16, 4, 4, device=device, dtype=dtype)
    labels, scale = torch.zeros(4, device=device, dtype=torch.int64), torch.ones(1, device=device)
    one, weight = torch.ones(16, device=device), torch.zeros(16, 16, 3, 3, device=device)
    wl, bl = torch.zeros(2, 16, device=device), torch.zeros(2, device=device)
    head_step(x, HeadParams((), (), (), wl, bl), Statistics(), labels, scale, 1, 0.0)
    params = HeadParams((weight,), (one,), (one,), wl, bl)
    head_step(x, params, Statistics((one.clone(),), (one.clone(),)), labels, scale, 1, 0.0)
    torch.cuda.synchronize(device)

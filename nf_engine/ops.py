"""Ops: the heads' operations, checked once at the edge and sent to the implementation for the device.

Every device takes the plain PyTorch of `reference`; a fused kernel enters `_STEPS` under its device type.
Shapes: x (N, C, H, W), labels (N,), logits (N, K); parameters and results as in reference.HeadParams and HeadStep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nf_engine import reference
from nf_engine.records import HeadSpec
from nf_engine.reference import IGNORE_INDEX, KERNELS, HeadParams, HeadStep

__all__ = ["IGNORE_INDEX", "KERNELS", "HeadParams", "HeadStep", "head_logits", "head_step"]

_STEPS = {"cpu": reference.head_step}


def head_step(
    x: Tensor, params: HeadParams, labels: Tensor, scale: Tensor, *, spec: HeadSpec, smoothing: float, chunks: int = 1
) -> HeadStep:
    """One local step of a head: loss and all gradients at once, no autograd graph. Not itself differentiable.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; never written, never aliased by a result.
        params: float32 masters, on x's device.
        labels: (N,), int64, each in [0, K) or IGNORE_INDEX; the range is not checked, a wrong label gives a NaN row.
        scale: one element, float32 (float64 for float64 x), on x's device: 1 / (rows that count).
        spec: kind linear, conv1x1 or conv3x3, with pool <= min(H, W).
        smoothing: of the labels, in [0, 1].
        chunks: parts of the batch that a convolution's map is made in; changes memory, not the maths.

    Returns:
        HeadStep: loss_rows (N,) unscaled, dx like x, float32 grads like params; dx and grads of scale * sum(loss_rows).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164.
    """
    _check_head(x, params, spec, chunks)
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64 or labels.device != x.device:
        raise ValueError(f"expected int64 labels ({x.shape[0]},) on {x.device}, got {_text(labels)}")
    if scale.numel() != 1 or scale.device != x.device or not scale.is_floating_point():
        raise ValueError(f"expected scale as one floating point element on {x.device}, got {_text(scale)}")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"expected smoothing in [0, 1], got {smoothing}")
    step = _STEPS.get(x.device.type, reference.head_step)
    # Autocast off: the dtypes inside are chosen.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return step(x, params, labels, scale, spec=spec, smoothing=smoothing, chunks=chunks)


def head_logits(x: Tensor, params: HeadParams, *, spec: HeadSpec, chunks: int = 1) -> Tensor:
    """Forward only, without a graph: float32 logits (N, K); arguments and errors as in head_step."""
    _check_head(x, params, spec, chunks)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return reference.head_logits(x, params, spec=spec, chunks=chunks)


def _check_head(x: Tensor, params: HeadParams, spec: HeadSpec, chunks: int) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"expected floating point x (N, C, H, W), got {_text(x)}")
    if spec.kind not in KERNELS:
        raise ValueError(f"expected a head of kind {', '.join(KERNELS)}, got {spec.kind}; others are ModuleHead's")
    if spec.pool > min(x.shape[2:]):
        raise ValueError(f"expected pool <= min(H, W) of x {tuple(x.shape)}, got {spec.pool}; clip it to the map")
    if chunks < 1:
        raise ValueError(f"expected chunks >= 1, got {chunks}")
    kernel, filters, classes = (KERNELS[spec.kind], spec.width or x.shape[1], len(params.bl))
    conv = ((filters, x.shape[1], kernel, kernel), (filters,)) if kernel else (None, None)
    expected = (*conv, (classes, filters * spec.pool**2), (classes,))
    found = tuple(None if p is None else tuple(p.shape) for p in params)
    if found != expected:
        raise ValueError(f"expected parameters {expected} for {spec} on x {tuple(x.shape)}, got {found}")


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"

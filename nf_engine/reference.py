"""Reference: the head's local step in plain PyTorch; the CPU path, the fallback, and the truth for the kernels.

A head maps x (N, C, H, W) to logits (N, K) and is trained by its own loss, which is scalar and local. So forward and
backward happen at once, without autograd, and a convolution's map (N, F, H, W) lives for one chunk of the batch only.
    linear             features = pool_q(x)                                D = C q q
    conv1x1, conv3x3   features = pool_q(relu(conv(x) + bias))             D = F q q
    all                logits = features @ wl.T + bl, in float32;  loss = cross-entropy with label smoothing
pool_q is adaptive average pooling to q x q. N batch, C channels, H W image, F filters, K classes.
Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164; NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nf_engine.records import HeadSpec

__all__ = ["IGNORE_INDEX", "KERNELS", "HeadParams", "HeadStep", "cross_entropy_rows", "head_logits", "head_step"]

IGNORE_INDEX = -100  # torch's own default
KERNELS = {"linear": 0, "conv1x1": 1, "conv3x3": 3}  # the kinds that step without autograd, with their kernel size


class HeadParams(NamedTuple):
    """Weights of a head, or their gradients: wc (F, C, k, k), bc (F,), wl (K, D), bl (K,); no wc, bc for `linear`."""

    wc: Tensor | None
    bc: Tensor | None
    wl: Tensor
    bl: Tensor


class HeadStep(NamedTuple):
    """loss_rows (N,) unscaled, 0 where ignored; dx like x, and grads like params, both of scale * sum(loss_rows)."""

    loss_rows: Tensor
    dx: Tensor
    grads: HeadParams


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, smoothing: float, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row with its gradient, both from one softmax.

    Args:
        logits: (N, K), any floating dtype.
        labels: (N,), int64; ignore_index makes loss and gradient of the row 0. Any other label outside [0, K) makes
            them NaN: the range is not checked, a check would wait for the GPU.
        smoothing: e of loss = (1 - e)(lse - z_y) + e(lse - mean z), torch's definition.

    Returns:
        loss_rows (N,) in nats and dlogits (N, K), the gradient of sum(loss_rows); float32 (float64 for float64 logits).
    """
    logp = F.log_softmax(logits.to(_wide(logits)), dim=1)
    classes = logp.shape[1]
    ignored = labels == ignore_index
    known = ignored | ((labels >= 0) & (labels < classes))
    hit = labels[:, None] == torch.arange(classes, device=labels.device)  # compared, so no label reads out of bounds

    loss = logp.gather(1, labels.clamp(0, classes - 1)[:, None]).squeeze(1).mul_(smoothing - 1.0)
    if smoothing:  # the mean may be -inf, and 0 * inf is NaN
        loss -= smoothing * logp.mean(1)
    dlogits = logp.exp_().sub_(smoothing / classes).add_(hit, alpha=smoothing - 1.0)
    loss.masked_fill_(ignored, 0.0).masked_fill_(~known, torch.nan)
    dlogits.masked_fill_(ignored[:, None], 0.0).masked_fill_(~known[:, None], torch.nan)
    return loss, dlogits


def head_step(
    x: Tensor, params: HeadParams, labels: Tensor, scale: Tensor, *, spec: HeadSpec, smoothing: float, chunks: int = 1
) -> HeadStep:
    """Forward and backward of a head at once. No autograd: call it under torch.no_grad().

    Args:
        x: (N, C, H, W), any dense layout; never written, never aliased.
        params: float32 masters; wc and bc are cast to x.dtype, wl and bl work in float32.
        labels: (N,), int64, IGNORE_INDEX where a row does not count.
        scale: float32, one element, on x's device: 1 / (rows that count); inf where there are none.
        spec: kind linear, conv1x1 or conv3x3; pool <= min(H, W).
        smoothing: of the labels, in [0, 1).
        chunks: parts of the batch that a convolution's map is made in; changes memory, not the maths.

    Returns:
        loss_rows float32 (N,); dx in x's dtype; grads float32. For float64 x all are float64.
    """
    if KERNELS[spec.kind]:
        return _conv_step(x, params, labels, scale, spec, smoothing, chunks)
    features = _pool(x, spec.pool)
    loss_rows, dfeatures, dwl, dbl = _tail(features, params, labels, scale, smoothing)
    dx = _pool_backward(dfeatures.view_as(features), x)
    return HeadStep(loss_rows, dx, HeadParams(None, None, dwl, dbl))


def head_logits(x: Tensor, params: HeadParams, *, spec: HeadSpec, chunks: int = 1) -> Tensor:
    """Forward only: float32 logits (N, K) (float64 for float64 x); arguments as in head_step."""
    rows = []
    for part in torch.split(x, _rows(x, chunks)):
        features = _pool(_conv_relu(part, params) if KERNELS[spec.kind] else part, spec.pool).flatten(1)
        rows.append(F.linear(features, params.wl.to(features.dtype), params.bl.to(features.dtype)))
    return torch.cat(rows)


def _conv_step(
    x: Tensor, params: HeadParams, labels: Tensor, scale: Tensor, spec: HeadSpec, smoothing: float, chunks: int
) -> HeadStep:
    assert params.wc is not None  # ops checks that the kind has its weights
    rows = _rows(x, chunks)
    whole = rows >= x.shape[0]
    dwc, dbc, dwl, dbl = (torch.zeros_like(p, dtype=_wide(x)) for p in params if p is not None)
    params = params._replace(wc=_like_weight(params.wc, x))
    loss_rows = torch.empty(x.shape[0], dtype=_wide(x), device=x.device)
    dx = x.new_empty(0) if whole else torch.empty_like(x)  # one chunk: the convolution's own gradient is dx, no copy

    for start in range(0, max(1, x.shape[0]), rows):
        r = slice(start, start + rows)
        s = _conv_relu(x[r], params)  # (n, F, H, W), the one map of this chunk from here to the end
        pooled = _pool(s, spec.pool)
        loss_rows[r], dfeatures, dw, db = _tail(pooled, params, labels[r], scale, smoothing)
        dwl += dw
        dbl += db
        dpooled = dfeatures.view_as(pooled)
        s.sign_()  # the ReLU's output becomes its own mask
        dbc += (_pool(s, spec.pool) * dpooled).sum((0, 2, 3))  # active share of each cell: exact, no pass over dS
        _scale_windows(s, dpooled)  # and the mask becomes dS, in place
        dx_rows, dw = _conv_backward(s, x[r], cast(Tensor, params.wc))
        dwc += dw
        if whole:
            dx = dx_rows
        else:
            dx[r] = dx_rows
        del s, dx_rows  # or they would live through the next chunk's convolution
    return HeadStep(loss_rows, dx, HeadParams(dwc, dbc, dwl, dbl))


def _tail(
    pooled: Tensor, params: HeadParams, labels: Tensor, scale: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear layer and loss over pooled (n, C, q, q), float32: loss_rows, dfeatures (n, D), dwl, dbl."""
    features = pooled.flatten(1)
    wl = params.wl.to(features.dtype)
    loss_rows, dlogits = cross_entropy_rows(F.linear(features, wl, params.bl.to(features.dtype)), labels, smoothing)
    dlogits.mul_(scale).masked_fill_((labels == IGNORE_INDEX)[:, None], 0.0)  # again: scale is inf if all are ignored
    return loss_rows, dlogits @ wl, dlogits.t() @ features, dlogits.sum(0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor, chunks: int) -> int:
    return max(1, -(-x.shape[0] // chunks))


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _like_weight(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype, memory_format=_format(x))


def _pool(x: Tensor, q: int) -> Tensor:
    """(N, C, H, W) -> (N, C, q, q), a new tensor; torch's adaptive pooling is the slowest of the three."""
    height, width = x.shape[2:]
    if height == width == q:
        return x.to(_wide(x), copy=True)
    if height % q == 0 and width % q == 0:
        return F.avg_pool2d(x, (height // q, width // q)).to(_wide(x))
    return F.adaptive_avg_pool2d(x, q).to(_wide(x))


def _windows(x: Tensor, q: int) -> Tensor | None:
    """View (N, C, q, H/q, q, W/q) of x (N, C, H, W); None where windows overlap."""
    n, c, h, w = x.shape
    return None if h % q or w % q else x.view(n, c, q, h // q, q, w // q)


def _cells(dpooled: Tensor, windows: Tensor) -> Tensor:
    """Gradient of each pixel of a window, shaped to be broadcast over `windows`; small, so cast before it is spread."""
    area = windows.shape[3] * windows.shape[5]
    return (dpooled / area).to(windows.dtype)[:, :, :, None, :, None]


def _pool_backward(dpooled: Tensor, x: Tensor) -> Tensor:
    """Gradient (N, C, H, W) of pool_q at x, which lends its shape only."""
    dx = torch.empty_like(x)
    if (windows := _windows(dx, dpooled.shape[2])) is not None:
        windows.copy_(
            _cells(dpooled, windows)
        )  # no temporary, and no slower than torch's own backward in either layout
        return dx
    del dx
    dpooled = dpooled.to(x.dtype).contiguous(memory_format=_format(x))  # mixed layouts take 3 times as long
    return cast(Tensor, torch.ops.aten._adaptive_avg_pool2d_backward(dpooled, x))


def _scale_windows(s: Tensor, dpooled: Tensor) -> None:
    """s *= gradient of pool_q, in place."""
    if (windows := _windows(s, dpooled.shape[2])) is not None:
        windows.mul_(_cells(dpooled, windows))
    else:
        s.mul_(_pool_backward(dpooled, s))


def _conv_relu(x: Tensor, params: HeadParams) -> Tensor:
    assert params.wc is not None
    assert params.bc is not None
    wc = _like_weight(params.wc, x)
    return F.conv2d(x, wc, params.bc.to(x.dtype), padding=wc.shape[2] // 2).relu_()


def _conv_backward(ds: Tensor, x: Tensor, wc: Tensor) -> tuple[Tensor, Tensor]:
    pad = wc.shape[2] // 2
    dx, dwc, _ = torch.ops.aten.convolution_backward(
        ds, x, wc, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return dx, dwc

"""Reference: the head's local step in plain PyTorch; the CPU path, the fallback, and the truth for the kernels.

A head maps x (N, C, H, W) to logits (N, K) and is trained by its own loss, which is scalar and local. So forward and
backward happen at once, without autograd.
    linear   features = pool_q(x)                                                       D = C q q
    deep     features = pool_q(y_d), y_0 = x, y_k = relu(norm(conv_k(y_{k-1})))         D = F_d q q
    both     logits = features @ wl.T + bl, in float32;  loss = cross-entropy with label smoothing
pool_q is adaptive average pooling to q x q; conv is 3x3, padded by 1, of stride 2 while there is something to halve;
norm is BatchNorm over the batch. N batch, C channels, H W image, F filters, K classes.
Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164; NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EPSILON",
    "IGNORE_INDEX",
    "MOMENTUM",
    "HeadParams",
    "HeadStep",
    "Statistics",
    "cross_entropy_rows",
    "head_features",
    "head_step",
    "layout_of",
    "stride_of",
]

IGNORE_INDEX = -100  # torch's own defaults
MOMENTUM = 0.1
EPSILON = 1e-5
ROW_PARTS = 16  # of a batch, spread one after the other


class HeadParams(NamedTuple):
    """Weights of a head, or their gradients; the first three hold one tensor for each convolution, none for `linear`.

    convs: (F_k, F_{k-1}, 3, 3); gammas, betas: (F_k,), of the norms; wl: (K, D); bl: (K,).
    """

    convs: tuple[Tensor, ...]
    gammas: tuple[Tensor, ...]
    betas: tuple[Tensor, ...]
    wl: Tensor
    bl: Tensor

    def flat(self) -> list[Tensor]:
        return [*self.convs, *self.gammas, *self.betas, self.wl, self.bl]

    @classmethod
    def of(cls, flat: list[Tensor]) -> HeadParams:
        d = (len(flat) - 2) // 3
        return cls(tuple(flat[:d]), tuple(flat[d : 2 * d]), tuple(flat[2 * d : 3 * d]), flat[-2], flat[-1])


class Statistics(NamedTuple):
    """Running mean and variance (F_k,) of each norm, in the parameters' dtype; a step moves them, as BatchNorm does."""

    means: tuple[Tensor, ...] = ()
    variances: tuple[Tensor, ...] = ()


class HeadStep(NamedTuple):
    """loss_rows (N,) unscaled, 0 where ignored; dx like x, and grads like params, both of scale * sum(loss_rows).

    dx is channels_last where x is, else contiguous; grads are dense, those of convolutions in either layout.
    """

    loss_rows: Tensor
    dx: Tensor
    grads: HeadParams


def stride_of(height: int, width: int) -> int:
    """Stride of a head's convolution on a map (H, W)."""
    return 2 if max(height, width) > 1 else 1


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
    hit = torch.arange(len(labels), device=labels.device), labels.clamp(0, classes - 1)  # no label is out of bounds

    loss = logp[hit].mul_(smoothing - 1.0)
    if smoothing:  # the mean may be -inf, and 0 * inf is NaN
        loss -= smoothing * logp.mean(1)
    dlogits = logp.exp_().sub_(smoothing / classes)
    dlogits[hit] += smoothing - 1.0
    loss.masked_fill_(ignored, 0.0).masked_fill_(~known, torch.nan)
    dlogits.masked_fill_(ignored[:, None], 0.0).masked_fill_(~known[:, None], torch.nan)
    return loss, dlogits


def head_step(
    x: Tensor, params: HeadParams, running: Statistics, labels: Tensor, scale: Tensor, pool: int, smoothing: float
) -> HeadStep:
    """Forward and backward of a head at once. No autograd: call it under torch.no_grad().

    Args:
        x: (N, C, H, W), any dense layout; never written, never aliased.
        params: float32 masters; weights of convolutions are cast to x.dtype, the linear layer works in float32.
        running: of the norms; moved.
        labels: (N,), int64, IGNORE_INDEX where a row does not count.
        scale: float32, one element, on x's device: 1 / (rows that count); inf where there are none.
        pool: q, at most the smaller side of the last map.
        smoothing: of the labels, in [0, 1].

    Returns:
        loss_rows float32 (N,); dx in x's dtype, for a linear head with q = 1 a broadcast view of one value a channel;
        grads float32. For float64 x all are float64.
    """
    saved, y = [], x
    for weight, gamma, beta, mean, variance in zip(*params[:3], *running, strict=True):
        weight = like_weight(weight, y)
        s = conv(y, weight)
        z, *batch = torch.native_batch_norm(s, _as(gamma, s), _as(beta, s), mean, variance, True, MOMENTUM, EPSILON)
        saved.append((y, weight, s, gamma, batch))
        y = z.relu_()
        del z  # a second name would keep the last map until the end
    pooled = _pool(y, pool)
    loss_rows, dfeatures, dwl, dbl = tail(pooled.flatten(1), params, labels, scale, smoothing)
    dpooled = dfeatures.view_as(pooled)
    del pooled, dfeatures
    if not saved:
        return HeadStep(loss_rows, _pool_backward(dpooled, x), HeadParams((), (), (), dwl, dbl))

    grads = []
    dy = _scale_windows(y.sign_(), dpooled)  # the ReLU's output becomes its mask, and the mask the gradient, in place
    del dpooled
    while saved:
        x, weight, s, gamma, batch = saved.pop()
        del y  # the map after this norm; dy may be the same memory
        ds, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dy, s, _as(gamma, s), None, None, *batch, True, EPSILON, [True, True, True]
        )
        del dy, s
        dy, dweight = conv_backward(ds, x, weight)
        del ds
        grads.append((dweight, dgamma, dbeta))
        y = x
        if saved:
            dy.mul_(y.sign_())
    convs, gammas, betas = zip(*reversed(grads), strict=True)
    return HeadStep(loss_rows, dy, HeadParams(convs, gammas, betas, dwl, dbl))


def head_features(x: Tensor, params: HeadParams, running: Statistics, pool: int, training: bool) -> Tensor:
    """Features (N, D) before the linear layer, float32 (float64 for float64 x); differentiable, arguments as above."""
    for weight, gamma, beta, mean, variance in zip(*params[:3], *running, strict=True):
        s = conv(x, like_weight(weight, x))
        x = F.relu(F.batch_norm(s, mean, variance, _as(gamma, s), _as(beta, s), training, MOMENTUM, EPSILON))
    return F.adaptive_avg_pool2d(x, pool).flatten(1).to(_wide(x))


def tail(
    features: Tensor, params: HeadParams, labels: Tensor, scale: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear layer and loss over features (N, D), float32: loss_rows, dfeatures (N, D), dwl, dbl."""
    wl = params.wl.to(features.dtype)
    loss_rows, dlogits = cross_entropy_rows(F.linear(features, wl, params.bl.to(features.dtype)), labels, smoothing)
    dlogits.mul_(scale).masked_fill_((labels == IGNORE_INDEX)[:, None], 0.0)  # again: scale is inf if all are ignored
    return loss_rows, dlogits @ wl, dlogits.t() @ features, dlogits.sum(0)


def like_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A convolution's weight in x's dtype and layout."""
    return weight.to(x.dtype, memory_format=layout_of(x))


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """The head's convolution, (N, C, H, W) -> (N, F, H', W')."""
    return F.conv2d(x, weight, stride=stride_of(*x.shape[2:]), padding=1)


def conv_backward(ds: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the weight: float32 (float64), in the layout that the library gives it."""
    stride = stride_of(*x.shape[2:])
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        ds, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return dx, dweight.to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _as(parameter: Tensor, s: Tensor) -> Tensor:
    """A norm's parameter in the dtype that torch's own norms want beside s."""
    return parameter.to(_wide(s))


def layout_of(x: Tensor) -> torch.memory_format:
    """Layout of a gradient of x: channels_last where x is, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _pool(x: Tensor, q: int) -> Tensor:
    """(N, C, H, W) -> (N, C, q, q), a new tensor; torch's adaptive pooling is the slowest of the three."""
    height, width = x.shape[2:]
    if height == width == q:
        return x.to(_wide(x), copy=True, memory_format=torch.contiguous_format)
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
    return dpooled.div_(area).to(windows.dtype)[:, :, :, None, :, None]


def _pool_backward(dpooled: Tensor, x: Tensor) -> Tensor:
    """Gradient (N, C, H, W) of pool_q at x, which lends its shape only; dpooled is divided in place."""
    q, (height, width) = dpooled.shape[2], x.shape[2:]
    if q == 1:  # one value a channel: what reads it reads a view
        return dpooled.div_(height * width).to(x.dtype).expand(x.shape)
    dx = torch.empty_like(x, memory_format=layout_of(x))
    if (windows := _windows(dx, q)) is not None:
        cells = _cells(dpooled, windows)
        if layout_of(x) == torch.contiguous_format and width > q:
            # Whole rows, of which q are spread at a time: elements of a few floats would be copied one by one. In parts
            # of the batch, because the rows are H / q times smaller than dx, which may be not at all.
            for part, of_part in zip(dx.chunk(ROW_PARTS), cells.chunk(ROW_PARTS), strict=True):
                rows = part.view(-1, *windows.shape[1:4], width)
                rows.copy_(of_part[:, :, :, 0, :, 0].repeat_interleave(width // q, dim=3)[:, :, :, None])
        else:
            windows.copy_(cells)
        return dx
    del dx
    dpooled = dpooled.to(x.dtype).contiguous(memory_format=layout_of(x))  # mixed layouts take 3 times as long
    return cast(Tensor, torch.ops.aten._adaptive_avg_pool2d_backward(dpooled, x))


def _scale_windows(mask: Tensor, dpooled: Tensor) -> Tensor:
    """mask *= gradient of pool_q, in place."""
    if (windows := _windows(mask, dpooled.shape[2])) is not None:
        windows.mul_(_cells(dpooled, windows))
        return mask
    return mask.mul_(_pool_backward(dpooled, mask))

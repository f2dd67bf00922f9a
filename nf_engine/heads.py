"""Heads: the small classifiers that give each unit its local loss, their sizes, and the rule for their width.

h (N, C, H, W) -> logits (N, K). Kinds:
    linear      adaptive average pool to q x q, linear
    deep        strided 3x3 convolutions, each with BatchNorm and ReLU; average pool to q x q, linear
    classifier  the model's own, at the end of the last unit
The first two step without autograd (ops.head_step); the last is any module and steps under autograd, from a detached
leaf. The last linear layer of our own heads starts at zero, so the first gradient into the body is 0.
Costs are closed forms: FLOPs count 2 for each multiply-add of convolutions and linear layers, forward, one sample.
Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164; deep heads, shaped like the layers that
follow: AugLocal, https://arxiv.org/abs/2402.17318; widths chosen by cost: NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf_engine import ops, reference
from nf_engine.errors import ConfigError
from nf_engine.ops import IGNORE_INDEX, HeadParams, Statistics
from nf_engine.precision import autocast_like
from nf_engine.records import HeadSpec

__all__ = [
    "WIDEST",
    "AuxiliaryHead",
    "HeadSpec",
    "ModuleHead",
    "adaptive_width",
    "build_head",
    "clipped",
    "head_bytes",
    "head_flops",
    "head_parameters",
]

KINDS = ("linear", "deep")  # that step without autograd
LEAST_WIDTH = 16
STEADY = 20.0  # most peak rate of a head's last layer times its features: docs/local_learning.md
WIDEST = 4  # filters of a deep head for each channel of h
Shape = tuple[int, int, int]  # (C, H, W)


class AuxiliaryHead(nn.Module):
    """A head of kind linear or deep; its loss is cross-entropy with label smoothing.

    Args:
        spec: pool is clipped to the last map.
        channels, height, width: of h.
        classes: K.
        smoothing: of the labels.
        seed: of the convolutions' weights; the global generator is left alone.

    Raises:
        ConfigError: the spec is no such head.
    """

    def __init__(
        self,
        spec: HeadSpec,
        channels: int,
        height: int,
        width: int,
        classes: int,
        *,
        smoothing: float = 0.1,
        seed: int,
    ) -> None:
        super().__init__()
        if spec.kind not in KINDS:
            raise ConfigError(f"expected a head of kind {', '.join(KINDS)}, got {spec.kind!r}; use build_head")
        self.spec = clipped(spec, (channels, height, width))
        self.smoothing = smoothing
        generator = torch.Generator().manual_seed(seed)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        features = channels
        for fan_in, features, stride, _, _ in _convs(self.spec, (channels, height, width)):
            # Made on meta: torch's own initialisation would draw from the global generator.
            conv = nn.Conv2d(fan_in, features, 3, stride, padding=1, bias=False, device="meta")
            conv.weight = nn.Parameter(torch.empty(features, fan_in, 3, 3))
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            self.convs.append(conv)
            self.norms.append(nn.BatchNorm2d(features, reference.EPSILON, reference.MOMENTUM))
        self.linear_weight = nn.Parameter(torch.zeros(classes, features * self.spec.pool**2))
        self.linear_bias = nn.Parameter(torch.zeros(classes))

    def forward(self, h: Tensor) -> Tensor:
        """h (N, C, H, W) -> float32 logits (N, K); differentiable. In eval mode norms use their running statistics."""
        features = reference.head_features(h, self._params(), self._running(), self.spec.pool, self.training)
        return F.linear(features, self.linear_weight.to(features.dtype), self.linear_bias.to(features.dtype))

    def step(self, h: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and gradients at once; adds to .grad of the parameters, and moves the norms' running statistics.

        Args:
            h: (N, C, H, W), read only; no graph is made.
            labels: (N,), int64, IGNORE_INDEX where a row does not count.
            scale: float32, one element on h's device; None: 1 / (rows that count), the mean.

        Returns:
            loss 0-d, scale * sum over rows, 0 if none counts; dh like h, its gradient, maybe a broadcast view.

        Raises:
            ValueError: shapes, dtypes or devices do not fit together, or a norm has one value a channel.
        """
        if scale is None:
            count = (labels != IGNORE_INDEX).sum()
            scale = count.to(torch.promote_types(h.dtype, torch.float32)).reciprocal()
        params = self._params()
        rows, dh, grads = ops.head_step(
            h, params, labels, scale, running=self._running(), pool=self.spec.pool, smoothing=self.smoothing
        )
        for parameter, grad in zip(params.flat(), grads.flat(), strict=True):
            if parameter.requires_grad:
                _add_grad(parameter, grad)
        total = rows.sum()
        return (total * scale.reshape(())).masked_fill_(total == 0, 0.0), dh  # scale is inf where no row counts

    def most_rates(self) -> dict[nn.Parameter, float]:
        """The largest peak of SGD's learning rate for parameters that have one.

        A step of the last layer is stable up to a rate of about 2 / |features|^2, whatever the batch, and |features|^2
        grows with their number: a pooled 4 x 4 map of 256 channels has 4,096 of them.
        """
        return {self.linear_weight: STEADY / self.linear_weight.shape[1]}

    def _params(self) -> HeadParams:
        convs, gammas, betas = (
            tuple(m.get_parameter(name) for m in modules)
            for modules, name in ((self.convs, "weight"), (self.norms, "weight"), (self.norms, "bias"))
        )
        return HeadParams(convs, gammas, betas, self.linear_weight, self.linear_bias)

    def _running(self) -> Statistics:
        means, variances = (tuple(m.get_buffer(name) for m in self.norms) for name in ("running_mean", "running_var"))
        return Statistics(means, variances)


class ModuleHead(nn.Module):
    """Any module (N, C, H, W) -> logits (N, K) as a head: the model's own classifier.

    With scale None the loss is torch's own mean, so that one unit over the whole model trains exactly as plain
    backpropagation does, bit for bit; scale * sum would differ in the last bit.
    """

    def __init__(self, module: nn.Module, *, smoothing: float = 0.1) -> None:
        super().__init__()
        self.module = module
        self.smoothing = smoothing

    def most_rates(self) -> dict[nn.Parameter, float]:
        """None: one unit over the whole model is to train as backpropagation does."""
        return {}

    def forward(self, h: Tensor) -> Tensor:
        """module(h), in h's dtype."""
        with autocast_like(h):
            logits: Tensor = self.module(h)
        return logits

    def step(self, h: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As AuxiliaryHead.step, under autograd from a detached leaf; the graph is freed before it returns."""
        leaf = h.detach().requires_grad_()
        reduction = "mean" if scale is None else "sum"
        with torch.enable_grad():
            logits = self(leaf)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(
                logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=self.smoothing, reduction=reduction
            )
        torch.autograd.backward(loss, None if scale is None else scale.to(loss.dtype).reshape(()))
        if leaf.grad is None:
            raise ValueError(f"logits of {type(self.module).__name__} do not depend on h; use a module that reads it")
        value = loss.detach() if scale is None else loss.detach() * scale.reshape(())
        return value.masked_fill((labels == IGNORE_INDEX).all(), 0.0), leaf.grad


def build_head(
    spec: HeadSpec,
    shape: Shape,
    classes: int,
    *,
    smoothing: float,
    seed: int,
    classifier: nn.Module | None = None,
) -> AuxiliaryHead | ModuleHead:
    """The head that spec names, for h of shape (C, H, W). `classifier` is the module that kind "classifier" wraps.

    Raises:
        ConfigError: the kind is unknown, its pool, width or depth is not positive, or the classifier is missing.
    """
    if spec.kind in KINDS:
        return AuxiliaryHead(spec, *shape, classes, smoothing=smoothing, seed=seed)
    if spec.kind != "classifier":
        raise ConfigError(f"head kind must be {', '.join(KINDS)} or classifier, got {spec.kind!r}")
    if classifier is None:
        raise ConfigError("a head of kind classifier wraps the model's own; pass it as classifier=")
    return ModuleHead(classifier, smoothing=smoothing)


def adaptive_width(
    spec: HeadSpec, shape: Shape, classes: int, flops: int, parameters: int, widest: int = WIDEST
) -> int:
    """Filters of a deep head's first convolution: some times as many as h has channels, or fewer where that is dear.

    Of widest C and its halves down to C/4 (LEAST_WIDTH at least) the largest whose head has at most an eighth of the
    network's FLOPs and of its weights; the smallest of them if none has.

    Args:
        spec: of a deep head; its own width does not count.
        shape: (C, H, W) of the unit's output.
        classes: K.
        flops: of the whole network's forward, one sample, 2 for each multiply-add.
        parameters: of the whole network.
        widest: a power of two.
    """
    widths = [max(LEAST_WIDTH, widest * shape[0] // share) for share in (1, 2, 4, 8, 16) if 4 * widest >= share]
    for width in widths:
        wide = replace(spec, width=width)
        cheap = 8 * head_flops(wide, shape, classes) <= flops
        if cheap and 8 * head_parameters(wide, shape, classes) <= parameters:
            return width
    return widths[-1]


def head_flops(spec: HeadSpec, shape: Shape, classes: int) -> int:
    """FLOPs of one sample's forward. Raises ValueError for kind "classifier": that is the module's own matter."""
    spec = clipped(spec, shape)
    convs = _convs(spec, shape)
    return 2 * (sum(9 * c * f * h * w for c, f, _, h, w in convs) + classes * _features(spec, shape))


def head_parameters(spec: HeadSpec, shape: Shape, classes: int) -> int:
    """Number of trained weights. Raises ValueError for kind "classifier"."""
    spec = clipped(spec, shape)
    convs = _convs(spec, shape)
    return sum(9 * c * f + 2 * f for c, f, *_ in convs) + classes * (_features(spec, shape) + 1)


def head_bytes(
    spec: HeadSpec, shape: Shape, classes: int, batch: int, itemsize: int = 4, path: str = "reference"
) -> int:
    """Peak bytes of a step beyond h itself: dh, maps, features and logits, gradients of the weights.

    Not in it: workspaces inside a convolution, and the rounding of allocators; the profiler measures those. h is
    contiguous; one in channels_last adds at most a copy of the weights and one of the features.

    Args:
        spec: of any kind but "classifier", which has no closed form (ValueError).
        shape: (C, H, W) of h.
        classes: K.
        batch: N.
        itemsize: bytes of an element of h.
        path: "reference" or "fused", as ops.head_path names it.
    """
    spec, fused = clipped(spec, shape), path == "fused"
    features, logits = 4 * batch * _features(spec, shape), 4 * batch * classes
    gradients = 4 * classes * (_features(spec, shape) + 1)  # of the linear layer; the convolutions' come one by one
    tail = max(features + 2 * logits, 2 * features + logits + gradients) + 4 * batch
    gradients += (2 * features + logits if fused else 0) + 4 * batch
    convs = _convs(spec, shape)
    if not convs:
        dh = itemsize * batch * shape[0] * (shape[1] * shape[2] if spec.pool > 1 else 1)
        if not fused and spec.pool > 1:  # the gradient of the features, cast, and spread to rows
            rows = spec.pool * dh // (shape[1] * reference.ROW_PARTS)
            gradients += features + (itemsize * features // 4 if itemsize < 4 else 0) + rows
        return max(tail, gradients + dh)
    maps = [itemsize * batch * f * h * w for _, f, _, h, w in convs]  # of each convolution; s, then y = relu(norm(s))
    before = [itemsize * batch * shape[0] * shape[1] * shape[2], *maps]  # the gradient that leaves layer k
    weights = [9 * c * f for c, f, *_ in convs]
    cast = itemsize if itemsize < 4 else 0  # weights are cast for the forward, and their gradients back
    peaks = [2 * sum(maps) + cast * sum(weights) + tail]
    beside = [2 if fused else 3] * len(maps)  # y, s and ds in a norm's backward; fused, ds is written over s
    if fused and spec.pool == 1:  # the last y is pooled as it is made, and its gradient never spread
        peaks[0] -= maps[-1]
        beside[-1] = 1
    elif fused:  # y and its gradient
        peaks[0] += maps[-1]
    for k in reversed(range(len(convs))):
        below = 2 * sum(maps[:k]) + cast * sum(weights[: k + 1])
        peaks.append(below + beside[k] * maps[k] + gradients)
        gradients += 4 * weights[k] + 8 * convs[k][1]
        peaks.append(below + maps[k] + before[k] + gradients + cast * weights[k])
    return max(peaks)


def clipped(spec: HeadSpec, shape: Shape) -> HeadSpec:
    """The spec with its pool no larger than the last map of a head on h (C, H, W).

    Raises:
        ValueError: the kind has no closed form.
        ConfigError: pool, width or depth is not positive.
    """
    if spec.kind not in KINDS:
        raise ValueError(f"a head of kind {spec.kind!r} has no closed form; measure its module")
    if spec.pool < 1 or (spec.kind == "deep" and min(spec.width, spec.depth) < 1):
        raise ConfigError(f"expected pool >= 1, and width and depth >= 1 for a deep head, got {spec}")
    side = min(shape[1:])
    for *_, height, width in _convs(spec, shape):
        side = min(height, width)
    return replace(spec, pool=min(spec.pool, side))


def _convs(spec: HeadSpec, shape: Shape) -> list[tuple[int, int, int, int, int]]:
    """(channels in, filters, stride, height, width of the output) of each convolution; none of a linear head.

    The first has `width` filters, each next one twice as many, up to four times the first.
    """
    (fan_in, height, width), convs = shape, []
    for k in range(spec.depth if spec.kind == "deep" else 0):
        stride = reference.stride_of(height, width)
        height, width = -(-height // stride), -(-width // stride)
        filters = spec.width * min(2**k, 4)
        convs.append((fan_in, filters, stride, height, width))
        fan_in = filters
    return convs


def _features(spec: HeadSpec, shape: Shape) -> int:
    """D: values that the linear layer reads; of a clipped spec."""
    convs = _convs(spec, shape)
    return (convs[-1][1] if convs else shape[0]) * spec.pool**2


def _add_grad(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        # In the layout of the parameter, as autograd does: a fused optimiser walks both in the order of memory.
        parameter.grad = reference.like_weight(grad, parameter)
    else:
        parameter.grad.add_(grad)

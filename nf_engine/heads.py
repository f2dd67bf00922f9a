"""Heads: the small classifiers that give each unit its local loss, their sizes, and the rule for their width.

h (N, C, H, W) -> logits (N, K). Kinds:
    linear             adaptive average pool to q x q, linear
    conv1x1, conv3x3   convolution to F filters, ReLU, pool to q x q, linear
    deep               strided 3x3 convolutions with BatchNorm and ReLU, global average pool, linear
    classifier         the model's own, at the end of the last unit
The first three step without autograd (ops.head_step), in chunks of the batch; the last two are any module and step
under autograd, from a detached leaf. The last linear layer of our own heads starts at zero, so the first gradient into
the body is 0.
Costs are closed forms: FLOPs count 2 for each multiply-add of convolutions and linear layers, forward, one sample.
Source: local losses of Belilovsky et al., https://arxiv.org/abs/1901.08164; NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf_engine import ops
from nf_engine.errors import ConfigError
from nf_engine.ops import IGNORE_INDEX, KERNELS, HeadParams
from nf_engine.records import HeadSpec

__all__ = [
    "AuxiliaryHead",
    "HeadSpec",
    "ModuleHead",
    "adaptive_width",
    "build_head",
    "deep_head",
    "head_bytes",
    "head_flops",
    "head_parameters",
]

WIDTHS = (32, 64, 128, 256)
CHUNKS = (1, 2, 4, 8, 16, 32)
Shape = tuple[int, int, int]  # (C, H, W)


class AuxiliaryHead(nn.Module):
    """A head of kind linear, conv1x1 or conv3x3; its loss is cross-entropy with label smoothing.

    Args:
        spec: pool is clipped to the map.
        channels, height, width: of h.
        classes: K.
        smoothing: of the labels.
        chunks: parts of the batch that step makes a convolution's map in; may be set later.
        seed: of the convolution's weights; the global generator is left alone.

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
        chunks: int = 1,
        seed: int,
    ) -> None:
        super().__init__()
        if spec.kind not in KERNELS:
            raise ConfigError(f"expected a head of kind {', '.join(KERNELS)}, got {spec.kind!r}; use build_head")
        self.spec = _clipped(spec, (channels, height, width))
        self.smoothing = smoothing
        self.chunks = chunks
        self.conv_weight: nn.Parameter | None = None
        self.conv_bias: nn.Parameter | None = None
        features = channels
        if kernel := KERNELS[spec.kind]:
            features = spec.width
            self.conv_weight = nn.Parameter(torch.empty(features, channels, kernel, kernel))
            self.conv_bias = nn.Parameter(torch.zeros(features))
            _kaiming(self.conv_weight, torch.Generator().manual_seed(seed))
        self.linear_weight = nn.Parameter(torch.zeros(classes, features * self.spec.pool**2))
        self.linear_bias = nn.Parameter(torch.zeros(classes))

    def forward(self, h: Tensor) -> Tensor:
        """h (N, C, H, W) -> float32 logits (N, K); differentiable, whole batch at once."""
        if self.conv_weight is not None and self.conv_bias is not None:
            weight, bias = self.conv_weight.to(h.dtype), self.conv_bias.to(h.dtype)
            h = F.relu(F.conv2d(h, weight, bias, padding=weight.shape[2] // 2))
        wide = torch.promote_types(h.dtype, torch.float32)
        features = F.adaptive_avg_pool2d(h, self.spec.pool).flatten(1).to(wide)
        return F.linear(features, self.linear_weight.to(wide), self.linear_bias.to(wide)).to(wide)

    def step(self, h: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and gradients at once; adds to .grad of the parameters.

        Args:
            h: (N, C, H, W), read only; no graph is made.
            labels: (N,), int64, IGNORE_INDEX where a row does not count.
            scale: float32, one element on h's device; None: 1 / (rows that count), the mean.

        Returns:
            loss 0-d, scale * sum over rows, 0 if none counts; dh like h, its gradient.

        Raises:
            ValueError: shapes, dtypes or devices do not fit together.
        """
        if scale is None:
            count = (labels != IGNORE_INDEX).sum()
            scale = count.to(torch.promote_types(h.dtype, torch.float32)).reciprocal()
        params = HeadParams(self.conv_weight, self.conv_bias, self.linear_weight, self.linear_bias)
        rows, dh, grads = ops.head_step(
            h, params, labels, scale, spec=self.spec, smoothing=self.smoothing, chunks=self.chunks
        )
        for parameter, grad in zip(params, grads, strict=True):
            if parameter is not None and grad is not None and parameter.requires_grad:
                _add_grad(parameter, grad)
        total = rows.sum()
        return (total * scale.reshape(())).masked_fill_(total == 0, 0.0), dh  # scale is inf where no row counts


class ModuleHead(nn.Module):
    """Any module (N, C, H, W) -> logits (N, K) as a head: the model's own classifier, or a deep head.

    With scale None the loss is torch's own mean, so that one unit over the whole model trains exactly as plain
    backpropagation does, bit for bit; scale * sum would differ in the last bit.
    """

    def __init__(self, module: nn.Module, *, smoothing: float = 0.1) -> None:
        super().__init__()
        self.module = module
        self.smoothing = smoothing

    def forward(self, h: Tensor) -> Tensor:
        """module(h)."""
        logits: Tensor = self.module(h)
        return logits

    def step(self, h: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As AuxiliaryHead.step, under autograd from a detached leaf; the graph is freed before it returns."""
        leaf = h.detach().requires_grad_()
        reduction = "mean" if scale is None else "sum"
        with torch.enable_grad():
            logits = self.module(leaf)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(
                logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=self.smoothing, reduction=reduction
            )
        torch.autograd.backward(loss, None if scale is None else scale.to(loss.dtype).reshape(()))
        if leaf.grad is None:
            raise ValueError(f"logits of {type(self.module).__name__} do not depend on h; use a module that reads it")
        value = loss.detach() if scale is None else loss.detach() * scale.reshape(())
        return value.masked_fill((labels == IGNORE_INDEX).all(), 0.0), leaf.grad


def deep_head(channels: int, height: int, width: int, classes: int, *, depth: int = 2, seed: int) -> nn.Sequential:
    """Strided 3x3 convolutions, each with BatchNorm and ReLU, then global average pool and a linear layer from zero.

    The first convolution has max(16, channels) filters, each next one twice as many, up to four times the first; each
    halves the map while there is something to halve. BatchNorm needs two values a channel in train mode: a batch of one
    sample on a map that has come down to 1x1 is torch's own ValueError.

    Raises:
        ConfigError: depth is not positive.

    Source: AugLocal's idea, https://arxiv.org/abs/2402.17318: a head shaped like the layers that follow.
    """
    if depth < 1:
        raise ConfigError(f"head depth must be at least 1, got {depth}")
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, filters, stride, _, _ in (convs := _deep_convs((channels, height, width), depth)):
        # Made on meta: torch's own initialisation would draw from the global generator.
        conv = nn.Conv2d(fan_in, filters, 3, stride, padding=1, bias=False, device="meta")
        conv.weight = nn.Parameter(torch.empty(filters, fan_in, 3, 3))
        _kaiming(conv.weight, generator)
        layers += [conv, nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
    linear = nn.Linear(convs[-1][1], classes, device="meta")
    linear.weight = nn.Parameter(torch.zeros(classes, convs[-1][1]))
    linear.bias = nn.Parameter(torch.zeros(classes))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def build_head(
    spec: HeadSpec,
    shape: Shape,
    classes: int,
    *,
    smoothing: float,
    chunks: int = 1,
    seed: int,
    classifier: nn.Module | None = None,
) -> AuxiliaryHead | ModuleHead:
    """The head that spec names, for h of shape (C, H, W). `classifier` is the module that kind "classifier" wraps.

    Raises:
        ConfigError: the kind is unknown, its width or depth is not positive, or the classifier is missing.
    """
    if spec.kind in KERNELS:
        return AuxiliaryHead(spec, *shape, classes, smoothing=smoothing, chunks=chunks, seed=seed)
    if spec.kind == "deep":
        return ModuleHead(deep_head(*shape, classes, depth=spec.depth, seed=seed), smoothing=smoothing)
    if spec.kind != "classifier":
        raise ConfigError(f"head kind must be {', '.join(KERNELS)}, deep or classifier, got {spec.kind!r}")
    if classifier is None:
        raise ConfigError("a head of kind classifier wraps the model's own; pass it as classifier=")
    return ModuleHead(classifier, smoothing=smoothing)


def adaptive_width(
    shape: Shape, classes: int, unit_flops: int, prefix_parameters: int, *, kernel: int, pool: int = 1
) -> int:
    """Filters of a convolutional head: the widest that stays small beside what it trains.

    The largest of WIDTHS whose head has at most half the FLOPs of the unit and at most a tenth of the parameters of the
    prefix (the model up to and with this unit); the smallest of them if none has.

    Args:
        shape: (C, H, W) of the unit's output.
        classes: K.
        unit_flops: forward, one sample, 2 for each multiply-add.
        prefix_parameters: weights of all stages up to the unit's end.
        kernel: 1 or 3.
        pool: q of the head.
    """
    for width in reversed(WIDTHS):
        spec = HeadSpec(f"conv{kernel}x{kernel}", pool=pool, width=width)
        cheap = 2 * head_flops(spec, shape, classes) <= unit_flops
        if cheap and 10 * head_parameters(spec, shape, classes) <= prefix_parameters:
            return width
    return WIDTHS[0]


def head_flops(spec: HeadSpec, shape: Shape, classes: int) -> int:
    """FLOPs of one sample's forward. Raises ValueError for kind "classifier": that is the module's own matter."""
    (channels, height, width), spec = shape, _clipped(spec, shape)
    if spec.kind == "deep":
        convs = _deep_convs(shape, spec.depth)
        return 2 * (sum(9 * c * f * h * w for c, f, _, h, w in convs) + classes * convs[-1][1])
    if kernel := KERNELS[spec.kind]:
        return 2 * spec.width * (channels * kernel**2 * height * width + classes * spec.pool**2)
    return 2 * classes * channels * spec.pool**2


def head_parameters(spec: HeadSpec, shape: Shape, classes: int) -> int:
    """Number of trained weights. Raises ValueError for kind "classifier"."""
    channels, spec = shape[0], _clipped(spec, shape)
    if spec.kind == "deep":
        convs = _deep_convs(shape, spec.depth)
        return sum(9 * c * f + 2 * f for c, f, *_ in convs) + classes * (convs[-1][1] + 1)
    if kernel := KERNELS[spec.kind]:
        return spec.width * (channels * kernel**2 + 1) + classes * (spec.width * spec.pool**2 + 1)
    return classes * (channels * spec.pool**2 + 1)


def head_bytes(spec: HeadSpec, shape: Shape, classes: int, batch: int, chunks: int = 1, itemsize: int = 4) -> int:
    """Peak bytes of a step beyond h itself: dh, temporaries of a chunk, features and logits, gradients of the weights.

    Not in it: workspaces inside a convolution, and the rounding of allocators; the profiler measures those.

    Args:
        spec: of any kind but "classifier", which has no closed form (ValueError).
        shape: (C, H, W) of h.
        classes: K.
        batch: N.
        chunks: as in AuxiliaryHead; no matter for kinds without a map.
        itemsize: bytes of an element of h.
    """
    (channels, height, width), spec = shape, _clipped(spec, shape)
    gradients = 4 * head_parameters(spec, shape, classes)
    dh = itemsize * batch * channels * height * width  # X
    if spec.kind == "deep":
        return gradients + _deep_bytes(spec, shape, batch * itemsize)
    cells = (spec.width or channels) * spec.pool**2  # D
    if not KERNELS[spec.kind]:
        return dh + gradients + 4 * batch * (3 * cells + 1)
    rows = -(-batch // chunks)
    part = itemsize * rows * channels * height * width  # the chunk's own dh, copied into dh unless it is all of it
    conv_map = itemsize * rows * spec.width * height * width  # Fm / n
    # Uneven windows overlap: the gradient of their pooling is a second map for a moment, before the chunk's dh is made.
    overlap = conv_map if height % spec.pool or width % spec.pool else 0
    tail = 4 * rows * (2 * cells + 2 * classes) + 4 * batch
    weight = 4 * spec.width * channels * KERNELS[spec.kind] ** 2  # of one chunk, before it is added
    return (dh if rows < batch else 0) + conv_map + max(part + weight, overlap) + tail + gradients


def _clipped(spec: HeadSpec, shape: Shape) -> HeadSpec:
    if spec.kind not in (*KERNELS, "deep"):
        raise ValueError(f"a head of kind {spec.kind!r} has no closed form; measure its module")
    if spec.pool < 1 or (KERNELS.get(spec.kind) and spec.width < 1) or (spec.kind == "deep" and spec.depth < 1):
        raise ConfigError(
            f"expected pool >= 1, width >= 1 for a convolution and depth >= 1 for a deep head, got {spec}"
        )
    return replace(spec, pool=min(spec.pool, *shape[1:]))


def _kaiming(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


def _add_grad(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        parameter.grad.add_(grad)


def _deep_convs(shape: Shape, depth: int) -> list[tuple[int, int, int, int, int]]:
    """(channels in, filters, stride, height, width of the output) of each convolution of a deep head."""
    (fan_in, height, width), convs = shape, []
    first = max(16, fan_in)
    for k in range(depth):
        stride = 2 if max(height, width) > 1 else 1
        height, width = -(-height // stride), -(-width // stride)
        filters = first * min(2**k, 4)
        convs.append((fan_in, filters, stride, height, width))
        fan_in = filters
    return convs


def _deep_bytes(spec: HeadSpec, shape: Shape, element: int) -> int:
    """Live maps of a deep head's step under autograd; `element` bytes for each position of a map, over the batch."""
    maps = [element * f * h * w for _, f, _, h, w in _deep_convs(shape, spec.depth)]
    # Each layer keeps what its norm and its ReLU need; its backward holds two gradients of the map beside them.
    peaks = [2 * sum(maps[: k + 1]) + 2 * m for k, m in enumerate(maps)]
    dh = element * shape[0] * shape[1] * shape[2]
    return max(*peaks, maps[0] + dh)

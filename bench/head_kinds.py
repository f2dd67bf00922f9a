"""Kinds of heads: every shape of auxiliary head that the benches compare, ours and those that lost.

A kind makes a plain module h (N, C, H, W) -> logits (N, K) from the shape of one sample of h, K and a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

CONV_FILTERS = 64  # of the heads with one convolution

Shape = tuple[int, ...]  # (C, H, W)
Maker = Callable[[Shape, int, torch.Generator], nn.Module]


def convolution(fan_in: int, filters: int, kernel: int, generator: torch.Generator, *, stride: int = 1,
                norm: bool = True) -> list[nn.Module]:  # fmt: skip
    """Convolution, BatchNorm (or a bias) and ReLU."""
    conv = nn.Conv2d(fan_in, filters, kernel, stride, padding=kernel // 2, bias=not norm)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return [conv, *([nn.BatchNorm2d(filters)] if norm else []), nn.ReLU(inplace=True)]


def pooled_linear(features: int, pool: int, classes: int) -> list[nn.Module]:
    """Average pool to pool x pool cells and a linear layer from zero: the first gradient into the body is 0."""
    linear = nn.Linear(features * pool**2, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return [nn.AdaptiveAvgPool2d(pool), nn.Flatten(), linear]


def linear_head(shape: Shape, classes: int, generator: torch.Generator, *, pool: int) -> nn.Module:
    return nn.Sequential(*pooled_linear(shape[0], min(pool, *shape[1:]), classes))


def conv_head(shape: Shape, classes: int, generator: torch.Generator, *, kernel: int) -> nn.Module:
    conv = convolution(shape[0], CONV_FILTERS, kernel, generator, norm=False)
    return nn.Sequential(*conv, *pooled_linear(CONV_FILTERS, min(2, *shape[1:]), classes))


def deep_head(shape: Shape, classes: int, generator: torch.Generator, *, depth: int, scale: float = 1, pool: int = 1,
              norm: bool = True) -> nn.Module:  # fmt: skip
    """Strided 3x3 convolutions; the first has max(16, C) filters, the others twice and four times as many."""
    (channels, height, width), layers = shape, []
    for k in range(depth):
        filters = max(16, int(scale * max(16, shape[0]) * min(2**k, 4)))
        stride = 2 if max(height, width) > 1 else 1
        layers += convolution(channels, filters, 3, generator, stride=stride, norm=norm)
        channels, height, width = filters, -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, *pooled_linear(channels, min(pool, height, width), classes))


def pool_first_head(shape: Shape, classes: int, generator: torch.Generator) -> nn.Module:
    conv = convolution(shape[0], CONV_FILTERS, 3, generator)
    tail = pooled_linear(CONV_FILTERS, min(2, *shape[1:]), classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(8, *shape[1:])), *conv, *tail)


KINDS: dict[str, Maker] = {
    "deep d=2": partial(deep_head, depth=2),
    "linear q=4": partial(linear_head, pool=4),
    "deep d=2 pool 2": partial(deep_head, depth=2, pool=2),
    "deep d=2 pool 4": partial(deep_head, depth=2, pool=4),
    "deep d=1 pool 4": partial(deep_head, depth=1, pool=4),
    "deep d=1 pool 4 width 2": partial(deep_head, depth=1, pool=4, scale=2),
    "deep d=1 pool 4 no norm": partial(deep_head, depth=1, pool=4, norm=False),
    "deep d=2 width 2": partial(deep_head, depth=2, scale=2),
    "deep d=2 width 4": partial(deep_head, depth=2, scale=4),
    "deep d=2 width 4 pool 2": partial(deep_head, depth=2, scale=4, pool=2),
    "deep d=1 pool 4 width 4": partial(deep_head, depth=1, pool=4, scale=4),
    "deep d=3": partial(deep_head, depth=3),
    "deep d=1": partial(deep_head, depth=1),
    "linear q=1": partial(linear_head, pool=1),
    "linear q=2": partial(linear_head, pool=2),
    "conv1x1": partial(conv_head, kernel=1),
    "conv3x3": partial(conv_head, kernel=3),
    "deep d=2 no norm": partial(deep_head, depth=2, norm=False),
    "deep d=2 width 1/2": partial(deep_head, depth=2, scale=0.5),
    "deep d=2 width 1/4": partial(deep_head, depth=2, scale=0.25),
    "pool first": pool_first_head,
}

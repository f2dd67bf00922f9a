"""Codec: how a cache stores samples, in torch operations on any device.

Samples (N, C, H, W) go to rows of bytes (N, sample_bytes) and back. Values lie in stored order: NCHW, or (H, W, C) for
channels_last. "fp32", "fp16" and "bf16" are plain casts. "u8" is affine8, 8 bits per sample and channel:
    C pairs {f32 lo, f32 step} | numel bytes q | zeros up to a multiple of 16        value = lo + step * q, in float32
with lo the least value of the channel, step = (most - lo) / 255 and q = rint((x - lo) / step). A value comes back
within step / 2 and, for four roundings, two units in the last place of the largest of |lo|, |most| and most - lo. A
constant channel has step 0; so has one whose range is below 255 * 2**-126, where a step would be no normal float32.
Nothing here waits for the device. Source: affine quantisation, https://arxiv.org/abs/1712.05877; the layout is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nf_engine.errors import NonFiniteError
from nf_engine.records import stored_bytes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIECE = 16 * 2**20  # bytes of float32 that are quantised at a time
NORMAL = torch.finfo(torch.float32).tiny


class Codec(Protocol):
    """One way to store samples of one shape."""

    @property
    def sample_bytes(self) -> int: ...

    def transient_bytes(self, batch: int) -> int:
        """The most bytes that one call below allocates for a batch, arguments apart."""
        ...

    def encode(self, x: Tensor, out: Tensor) -> None:
        """x (N, *shape), any float dtype and strides -> out (N, sample_bytes) uint8, rows dense, every byte written."""
        ...

    def decode(self, stored: Tensor, out: Tensor) -> None:
        """stored (N, sample_bytes) uint8 -> out (N, *shape), any float dtype and strides."""
        ...

    def is_stored(self, x: Tensor) -> bool:
        """The memory of x (N, *shape) is already what `encode` would write."""
        ...

    def view(self, stored: Tensor) -> Tensor | None:
        """stored (N, sample_bytes) as the samples (N, *shape) that it is, or None where it has to be decoded."""
        ...

    def finite(self, stored: Tensor) -> Tensor:
        """A bool on the device: no stored sample holds a NaN or an infinity, given or made by the cast."""
        ...


def make_codec(dtype: str, shape: tuple[int, ...], channels_last: bool = False) -> Codec:
    """The codec of a stored dtype: "fp32", "fp16", "bf16" or "u8".

    Args:
        shape: of one sample, (C, H, W); any number of sizes for a cast to NCHW.

    Raises:
        ValueError: the dtype is unknown, or "u8" or channels_last is asked for without three sizes.
    """
    if (channels_last or dtype == "u8") and len(shape) != 3:
        what = "u8" if dtype == "u8" else "channels_last"
        raise ValueError(f"{what} expects a sample of shape (C, H, W), got {shape}")
    if dtype == "u8":
        return Affine8(shape, channels_last)
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype {', '.join(DTYPES)} or u8, got {dtype!r}")
    return Raw(shape, channels_last, dtype)


@dataclass(frozen=True)
class Raw:
    """A cast to `dtype`; a value beyond its range becomes infinite, which `finite` finds."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: str

    @property
    def sample_bytes(self) -> int:
        return stored_bytes(self.shape, self.dtype)

    def transient_bytes(self, batch: int) -> int:
        return 4 * 512  # the extremes and flags of `finite`, at the allocator's least size each

    def encode(self, x: Tensor, out: Tensor) -> None:
        self.view(out).copy_(x)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        out.copy_(self.view(stored))

    def view(self, stored: Tensor) -> Tensor:
        return _as_samples(stored.view(DTYPES[self.dtype]), self.shape, self.channels_last)

    def is_stored(self, x: Tensor) -> bool:
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.dtype == DTYPES[self.dtype] and x.is_contiguous(memory_format=order)

    def finite(self, stored: Tensor) -> Tensor:
        return _finite(stored.view(DTYPES[self.dtype]))


@dataclass(frozen=True)
class Affine8:
    """8 bits per sample and channel; see the module. Zeros of a ReLU and constant channels come back exactly.

    A NaN, an infinity, or a range beyond float32 makes lo or step of its channel non-finite, which `finite` finds.
    """

    shape: tuple[int, ...]
    channels_last: bool

    @property
    def sample_bytes(self) -> int:
        return stored_bytes(self.shape, "u8")

    def transient_bytes(self, batch: int) -> int:
        # One piece in float32, beside it lo, step, divisor and flag of its channels, each rounded up by the allocator.
        count = min(batch, self._piece)
        return count * (4 * math.prod(self.shape) + 5 * 4 * self.shape[0]) + 8 * 512

    def encode(self, x: Tensor, out: Tensor) -> None:
        for start in range(0, len(x), self._piece):
            self._encode(x[start : start + self._piece], out[start : start + self._piece])

    def decode(self, stored: Tensor, out: Tensor) -> None:
        for start in range(0, len(stored), self._piece):
            self._decode(stored[start : start + self._piece], out[start : start + self._piece])

    def _encode(self, x: Tensor, out: Tensor) -> None:
        lo, step, q, padding = self._parts(out)
        least = x.amin((2, 3), keepdim=True).float()
        span = x.amax((2, 3), keepdim=True).float().sub_(least).div_(255)
        span.masked_fill_(span < NORMAL, 0)
        lo.copy_(least)
        step.copy_(span)
        scaled = torch.sub(x, least)  # float32, for `least` is
        q.copy_(scaled.div_(span.masked_fill_(span == 0, 1)).round_())
        padding.zero_()

    def _decode(self, stored: Tensor, out: Tensor) -> None:
        lo, step, q, _ = self._parts(stored)
        values = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        values.copy_(q)
        values.mul_(step).add_(lo)  # two roundings on every device: a fused multiply-add would differ
        if values is not out:
            out.copy_(values)

    def is_stored(self, x: Tensor) -> bool:
        return False

    def view(self, stored: Tensor) -> Tensor | None:
        return None

    def finite(self, stored: Tensor) -> Tensor:
        return _finite(stored.view(torch.float32)[:, : 2 * self.shape[0]])

    @property
    def _piece(self) -> int:
        """Samples at a time."""
        return max(1, PIECE // (4 * math.prod(self.shape)))

    def _parts(self, stored: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lo and step (N, C, 1, 1), q (N, C, H, W), padding (N, ...): views of the bytes."""
        channels, end = self.shape[0], 8 * self.shape[0] + math.prod(self.shape)
        pairs = stored.view(torch.float32)[:, : 2 * channels]
        lo, step = (pairs[:, k::2, None, None] for k in (0, 1))
        q = _as_samples(stored[:, 8 * channels : end], self.shape, self.channels_last)
        return lo, step, q, stored[:, end:]


class FiniteFlag:
    """Whether all batches so far were finite, kept on the device and looked at rarely: a look waits for the device."""

    LOOK = 64  # batches between two looks

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._batches = 0

    def add(self, finite: Tensor) -> None:
        """Takes a batch's flag; NonFiniteError now and then, and from `look`, once one was false."""
        self._finite = finite if self._finite is None else self._finite & finite
        self._batches += 1
        if self._batches % self.LOOK == 0:
            self.look()

    def look(self) -> None:
        if self._finite is not None and not bool(self._finite):
            raise NonFiniteError("a stored value is NaN or infinite")


def _finite(values: Tensor) -> Tensor:
    """Extremes are NaN where a value is; they need no mask as large as the values."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    least, most = values.aminmax()
    return torch.isfinite(least) & torch.isfinite(most)


def _as_samples(rows: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """(N, numel) in stored order -> (N, *shape), a view."""
    if channels_last:
        channels, height, width = shape
        return _as_samples(rows, (height, width, channels), False).permute(0, 3, 1, 2)
    values: Tensor = rows.unflatten(1, shape)  # type: ignore[no-untyped-call]
    return values

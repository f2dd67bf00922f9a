"""Preprocess: normalisation and augmentation on the device, drawn from a hash.

`Preprocess` turns uint8 or float images (B, C, H, W) into normalised float32 on the device that they are on. All
randomness is a hash of (seed, stream, sample id), so a sample's augmentation is the same whatever the batch, the order
or the device.
Source: the hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); pad, crop and flip as in He et al., arXiv 1512.03385.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nf_engine.device import LAYOUT
from nf_engine.errors import ConfigError, DataError

__all__ = ["AUGMENTATIONS", "Normalisation", "Preprocess", "counter_hash", "windows"]

AUGMENTATIONS = ("none", "flip", "crop-flip")
MASK64 = (1 << 64) - 1
GOLDEN, MIX1, MIX2 = (
    0x9E3779B97F4A7C15,
    0xBF58476D1CE4E5B9,
    0x94D049BB133111EB,
)  # SplitMix64's increment and multipliers


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of each channel: in units of 0..255 for uint8 images, 0 and 1 for float images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def counter_hash(counters: Tensor, *key: int) -> Tensor:
    """64 random bits for each counter: the number at that position of the SplitMix64 sequence that the key seeds.

    Args:
        counters: int64 of any shape, on any device.
        key: integers that name the purpose, such as (seed, epoch); none is seed 0.

    Returns:
        int64 of the same shape and device; all 64 bits are random, the sign too.

    Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = 0
    for part in key:
        state = _mix_int((state ^ part) + GOLDEN)
    z = counters * _signed(GOLDEN) + _signed(state + GOLDEN)  # int64 wraps, as the unsigned original
    z = (z ^ _shifted(z, 30)) * _signed(MIX1)
    z = (z ^ _shifted(z, 27)) * _signed(MIX2)
    return z ^ _shifted(z, 31)


def _mix_int(z: int) -> int:
    z &= MASK64
    z = (z ^ (z >> 30)) * MIX1 & MASK64
    z = (z ^ (z >> 27)) * MIX2 & MASK64
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    return (value & MASK64) - ((value << 1) & (1 << 64))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class Preprocess:
    """Turns batches of `ImageData` into normalised, augmented images on the device that they are on."""

    def __init__(
        self, normalisation: Normalisation, augment: str = "none", seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        """Chooses the augmentation.

        Args:
            normalisation: of the training data.
            augment: "none"; "flip", mirrored with probability 1/2; "crop-flip", also shifted by up to H // 8 pixels
                (4 at 32, at least 1) each way, the border filled with the mean.
            seed: any integer.
            dtype: of what comes out; everything is computed in float32.

        Raises:
            ConfigError: the augmentation is unknown.
        """
        if augment not in AUGMENTATIONS:
            close = difflib.get_close_matches(augment, AUGMENTATIONS, 1) or ["none"]
            raise ConfigError(
                f"expected augment as one of {', '.join(AUGMENTATIONS)}, found {augment!r}; did you mean {close[0]}"
            )
        self._normalisation, self._augment, self._seed, self._dtype = normalisation, augment, seed, dtype
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __copy__(self) -> Preprocess:
        """The same preprocessing without the tensors that this one keeps on its devices."""
        return Preprocess(self._normalisation, self._augment, self._seed, self._dtype)

    def __call__(self, x: Tensor, ids: Tensor | None, *, stream: int) -> Tensor:
        """Augments and normalises one batch.

        Args:
            x: (B, C, H, W) uint8 or float, on any device.
            ids: (B,) int64 sample ids, on any device; None: no augmentation.
            stream: the pass over the data, such as the epoch: each sample is augmented anew in each.

        Returns:
            (B, C, H, W), channels_last, on x's device; of one sample, it depends on (seed, stream, id) alone.

        Raises:
            DataError: x has other channels than the normalisation, or ids another length than x.
        """
        channels = len(self._normalisation.mean)
        if x.ndim != 4 or x.shape[1] != channels or (ids is not None and ids.shape != x.shape[:1]):
            found = f"{tuple(x.shape)} and {None if ids is None else tuple(ids.shape)}"
            raise DataError(f"expected images (B, {channels}, H, W) and ids (B,) or None, found {found}")
        if ids is None or self._augment == "none":
            return self._normalised(x)
        draws = counter_hash(ids.to(x.device, non_blocking=True), self._seed, stream)
        x = _flipped(x, (draws >> 48) & 1)
        if self._augment == "flip":
            return self._normalised(x)
        height, width = x.shape[2:]
        pad = max(1, height // 8)
        # 24 bits each: uniform in [0, 2 * pad]
        down, right = ((draws >> shift & 0xFFFFFF) * (2 * pad + 1) >> 24 for shift in (0, 24))
        x = windows(F.pad(x, (pad, pad, pad, pad)), down, right, height, width)  # in uint8: a quarter of the bytes
        inside = _inside(down - pad, height)[:, None, :, None] * _inside(right - pad, width)[:, None, None, :]
        return self._normalised(x).mul_(inside.to(self._dtype))  # the border becomes the mean, 0

    def _normalised(self, x: Tensor) -> Tensor:
        if x.device not in self._constants:
            mean, std = (
                torch.tensor(v, device=x.device).view(-1, 1, 1)
                for v in (self._normalisation.mean, self._normalisation.std)
            )
            self._constants[x.device] = (mean, std)
        mean, std = self._constants[x.device]
        images = x.to(torch.float32, copy=True, memory_format=LAYOUT)
        return images.sub_(mean).div_(std).to(self._dtype)  # divided: a multiply-add would round differently on a GPU


def _flipped(x: Tensor, flip: Tensor) -> Tensor:
    """Mirrors the images whose flip is 1; index_select from both copies takes a fifth of the time of torch.where."""
    count = len(x)
    both = torch.cat([x, x.flip(3)])
    return both.index_select(0, torch.arange(count, device=x.device) + count * flip)


def _inside(offset: Tensor, size: int) -> Tensor:
    """(N, size) float32: 1 where a window at this offset, (N,), lies on the image, 0 where it lies on the padding."""
    position = offset[:, None] + torch.arange(size, device=offset.device)
    return ((position >= 0) & (position < size)).float()


def windows(x: Tensor, down: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Cuts one window out of each image at its own offset, as a copy of whole pixel rows.

    Args:
        x: (N, C, H, W) of any dtype, contiguous, on any device.
        down: (N,) int64 on x's device, in [0, H - height].
        right: (N,) int64 on x's device, in [0, W - width].
        height: of the windows, in pixels.
        width: of the windows, in pixels.

    Returns:
        (N, C, height, width), of x's dtype.

    The rows are read from an overlapping view of the flat pixels, so that only a start is needed for each row, not an
    index for each pixel.
    """
    count, channels, full_height, full_width = x.shape
    planes = torch.arange(count * channels, device=x.device).view(count, channels, 1) * (full_height * full_width)
    rows = torch.arange(height, device=x.device) * full_width
    starts = planes + rows + (down * full_width + right).view(count, 1, 1)  # (N, C, height)
    return x.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view(count, channels, height, width)

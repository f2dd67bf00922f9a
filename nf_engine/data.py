"""Data: images and labels in, batches out; which samples are held out, and how large the images are.

Images stay uint8 until they are on the device: `ImageData.batch` gives uint8 (N, C, H, W) on the CPU, and
`preprocess.Preprocess` turns it into normalised float32 there. Float images are taken as they are. What is held out is
chosen by a hash of sample ids, so it is the same whatever the order. Where images come from: sources.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nf_engine.errors import ConfigError, DataError
from nf_engine.preprocess import Normalisation, counter_hash

CHUNK = 1000  # images handled at once where a whole set is walked through
DIGEST_SAMPLES = 16


class Items(Protocol):
    """Images that are read sample by sample."""

    name: str

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The images (B, C, H, W) at these positions, (B,) int64; DataError where their labels are not these."""
        ...


class ImageData:
    """Labelled images in host memory, or read from a Dataset sample by sample; made by `sources.as_image_data`.

    Attributes:
        classes: number of classes K.
        shape: (C, H, W) of each image.
        normalisation: what `Preprocess` subtracts and divides by.
        labels: (N,) int64 on the CPU, each in [0, K).
    """

    def __init__(
        self,
        source: Tensor | Items,
        labels: Tensor,
        *,
        classes: int,
        shape: tuple[int, int, int],
        normalisation: Normalisation,
        index: Tensor | None = None,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.classes, self.shape, self.normalisation, self.labels = classes, shape, normalisation, labels
        self._source = source
        self._index = index  # positions in the source, where this is a subset of it
        self._view = view  # applied to each batch of a Dataset

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor | None:
        """(N, C, H, W) uint8 or float32 when in memory, None for a Dataset; a subset's are copied at each call."""
        if not isinstance(self._source, Tensor):
            return None
        return self._source if self._index is None else self._source.index_select(0, self._index)

    @property
    def in_memory(self) -> bool:
        """Whether the images are one array; a Dataset may give others each time it is read."""
        return isinstance(self._source, Tensor)

    @property
    def dtype(self) -> torch.dtype:
        """Of the images: uint8 or float32."""
        return self._source.dtype

    def batch(self, ids: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads the samples at these positions.

        Args:
            ids: (B,) int64 on the CPU, each in [0, N).
            out: (B, C, H, W) of the images' dtype, contiguous, on the CPU: where the images go.

        Returns:
            Images (B, C, H, W), uint8 or float32, and labels (B,) int64, both on the CPU.

        Raises:
            DataError: a Dataset gave an image of another shape or type, or another label, than at first.
        """
        labels = self.labels.index_select(0, ids)
        rows = ids if self._index is None else self._index.index_select(0, ids)
        if isinstance(self._source, Tensor):
            return torch.index_select(self._source, 0, rows, out=out), labels
        images = self._source.read(rows, labels)
        images = images if self._view is None else self._view(images)
        return images if out is None else out.copy_(images), labels

    def subset(self, ids: Tensor) -> ImageData:
        """The samples at these positions, (M,) int64 in [0, N): images are shared, its position i is ids[i] here."""
        rows = ids if self._index is None else self._index.index_select(0, ids)
        return self.replace(labels=self.labels.index_select(0, ids), index=rows)

    def digest(self) -> str:
        """SHA-256, hex, of classes, shape, dtype, labels and pixels.

        Of a Dataset: its type's name and the pixels of 16 samples, left out where reading them twice gives two results,
        as under random transforms.
        """
        digest = hashlib.sha256(f"{self.classes} {self.shape} {len(self)}".encode())
        digest.update(self.labels.numpy().data)
        if isinstance(self._source, Tensor):
            digest.update(str(self._source.dtype).encode())
            for ids in chunks(len(self), CHUNK):
                digest.update(self.batch(ids)[0].numpy().data)
            return digest.hexdigest()
        digest.update(self._source.name.encode())
        ids = torch.arange(min(DIGEST_SAMPLES, len(self))) * len(self) // min(DIGEST_SAMPLES, len(self))
        once, again = self.batch(ids)[0], self.batch(ids)[0]
        if torch.equal(once, again):
            digest.update(str(once.dtype).encode() + once.numpy().tobytes())
        return digest.hexdigest()

    def replace(self, **changes: Any) -> ImageData:
        """The same but for these arguments of the constructor."""
        fields: dict[str, Any] = {
            "source": self._source,
            "labels": self.labels,
            "classes": self.classes,
            "shape": self.shape,
            "normalisation": self.normalisation,
            "index": self._index,
            "view": self._view,
        }
        return ImageData(**(fields | changes))


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """The ids 0 to count - 1, (size,) int64 at a time; the last ones may be fewer."""
    return (torch.arange(start, min(start + size, count)) for start in range(0, count, size))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Holds out the same fraction of each class, chosen by a hash of (seed, sample id).

    Args:
        labels: (N,) int64, 0 or more.
        fraction: share of each class to hold out, 0 < fraction < 1, rounded to whole samples; one at least is kept.
        seed: any integer.

    Returns:
        Kept ids and held-out ids, int64, each ascending.

    Raises:
        ConfigError: the fraction is out of range.
        DataError: no class is large enough for one held-out sample.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"expected a fraction between 0 and 1 to hold out, found {fraction}")
    by_hash = counter_hash(torch.arange(len(labels)), seed).argsort(stable=True)
    order = by_hash[labels[by_hash].argsort(stable=True)]  # by class, within a class by hash
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    take = (counts.double() * fraction).round().long().minimum(counts - 1)
    held_out = rank < take.repeat_interleave(counts)
    if not held_out.any():
        largest = int(counts.max()) if len(counts) else 0
        raise DataError(
            f"expected a class with a sample to hold out at {fraction}, the largest has {largest}; raise the fraction"
        )
    return order[~held_out].sort().values, order[held_out].sort().values


def fit_to(data: ImageData, *, size: int, channels: int) -> ImageData:
    """The same samples as (channels, size, size): enlarged by the largest whole factor, padded with 0, gray repeated.

    Args:
        data: images (C, H, W), H and W at most `size`, C of 1 or `channels`.
        size: height and width wanted, in pixels.
        channels: channels wanted.

    Returns:
        Data with the normalisation of the images before padding; in memory if `data` is, else fitted when read.

    Raises:
        DataError: the images are larger than `size`, or neither gray nor of that many channels.
    """
    source_channels, height, width = data.shape
    if max(height, width) > size or source_channels not in (1, channels):
        raise DataError(
            f"expected images of at most {size}x{size} with 1 or {channels} channels, "
            f"found {source_channels}x{height}x{width}; resize them first"
        )
    if data.shape == (channels, size, size):
        return data
    repeats = channels // source_channels
    normalisation = Normalisation(data.normalisation.mean * repeats, data.normalisation.std * repeats)
    changes: dict[str, Any] = {"shape": (channels, size, size), "normalisation": normalisation}
    if data.images is not None:
        return data.replace(source=_fitted(data.images, size, channels), index=None, **changes)

    def view(images: Tensor, before: Callable[[Tensor], Tensor] | None = data._view) -> Tensor:
        return _fitted(images if before is None else before(images), size, channels)

    return data.replace(view=view, **changes)


def _fitted(images: Tensor, size: int, channels: int) -> Tensor:
    """(N, C, H, W) -> (N, channels, size, size); an odd pixel of padding goes to the bottom and the right."""
    height, width = images.shape[2:]
    factor = size // max(height, width)
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    down, right = size - height * factor, size - width * factor
    padded = F.pad(large, (right // 2, right - right // 2, down // 2, down - down // 2))
    return padded.expand(-1, channels, -1, -1).contiguous()

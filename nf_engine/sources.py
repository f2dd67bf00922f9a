"""Sources: what users have as data, made ImageData: arrays, Datasets, loaders and spec strings.

Types, shapes, labels and finite pixels are checked here, once, from end to end; each later read of a Dataset against
the first. A synthetic image is a hash of its sample's id, so it is the same whatever the order.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate, default_convert

from nf_engine import datafiles
from nf_engine.data import CHUNK, ImageData, chunks, stratified_split
from nf_engine.errors import ConfigError, DataError
from nf_engine.preprocess import Normalisation, counter_hash, windows

SYNTHETIC_CLASSES = 10


def as_image_data(source: object, *, classes: int | None = None) -> ImageData:
    """Takes whatever a user has as training data.

    Args:
        source: an ImageData; a tuple (x, y) of numpy arrays or tensors, x (N, C, H, W) or (N, H, W), numpy also
            (N, H, W, C) with C of 1 or 3, uint8 or float, y (N,) integers; a map-style Dataset of (image, label) items,
            the image a tensor (C, H, W), a PIL image or an array (H, W, C); a DataLoader, whose dataset and collate_fn
            are used; a spec string as for `load_split`. Arrays are shared, not copied, where their dtype allows.
        classes: number of classes K; None: the source's own, else the largest label + 1.

    Raises:
        DataError: the data is empty, of an unknown type or shape, not finite, or has labels outside [0, K).
        ConfigError: a spec string of an unknown kind.

    A uint8 set is normalised by its own mean and std: `Preprocess` validation data with the training data's. A Dataset
    is read once, from end to end, for its labels and statistics.
    """
    if isinstance(source, str):
        source = load_split(source)[0]
    if isinstance(source, ImageData):
        wanted = source.classes if classes is None else classes
        _check_labels(source.labels, wanted, "data")
        return source.replace(classes=wanted)
    collate = None
    if isinstance(source, DataLoader):
        collate = None if source.collate_fn in (default_collate, default_convert) else source.collate_fn
        source = source.dataset
    if isinstance(source, TensorDataset) and len(source.tensors) == 2 and collate is None:
        source = source.tensors
    if isinstance(source, tuple) and len(source) == 2:
        return _from_arrays(source[0], source[1], classes, "data")
    has_items = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if isinstance(source, IterableDataset | Mapping) or not has_items:
        raise DataError(
            "expected a tuple (x, y) of arrays, a map-style Dataset with a length, a DataLoader of one or a spec, "
            f"found {type(source).__name__}"
        )
    return _from_dataset(source, collate, classes)


def _from_arrays(x: object, y: object, classes: int | None, where: str) -> ImageData:
    images = _as_nchw(x, where)
    labels = _as_labels(y, where)
    if len(images) != len(labels):
        raise DataError(f"{where}: expected one label for each of {len(images)} images, found {len(labels)} labels")
    if images.numel() == 0:
        raise DataError(f"{where}: expected at least one image, found shape {tuple(images.shape)}")
    if images.is_floating_point() and not math.isfinite(images.sum(dtype=torch.float64)):
        raise DataError(f"{where}: expected finite pixels, found NaN or infinity")
    classes = int(labels.max()) + 1 if classes is None else classes
    _check_labels(labels, classes, where)
    normalisation = _from_histogram(_histogram(images)) if images.dtype == torch.uint8 else _identity(images.shape[1])
    channels, height, width = images.shape[1:]
    return ImageData(images, labels, classes=classes, shape=(channels, height, width), normalisation=normalisation)


def _as_nchw(x: object, where: str) -> Tensor:
    """The images as a contiguous (N, C, H, W) uint8 or float32 tensor on the CPU."""
    if isinstance(x, Tensor):
        images = x.detach().cpu()
    else:
        array = _as_array(x, where)
        if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.dtype != np.uint8:
            if array.dtype.kind != "f":
                raise DataError(f"{where}: expected uint8 or float images, found {array.dtype}; convert them")
            array = array.astype(np.float32, copy=False)
        images = torch.from_numpy(
            np.require(array, requirements=["C", "W"])
        )  # torch warns about arrays it could not write
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise DataError(f"{where}: expected images (N, C, H, W) or (N, H, W), found shape {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"{where}: expected uint8 or float images, found {images.dtype}; convert them")
    return (images if images.dtype == torch.uint8 else images.float()).contiguous()


def _as_array(value: object, where: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise DataError(f"{where}: expected an array, found rows of different sizes ({error})") from error


def _as_labels(y: object, where: str) -> Tensor:
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else _as_array(y, where)
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras stores CIFAR
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        hint = "take argmax(1) of one-hot rows" if labels.ndim == 2 else "convert them to int64"
        raise DataError(f"{where}: expected integer labels (N,), found {labels.dtype} of shape {labels.shape}; {hint}")
    return torch.from_numpy(labels.astype(np.int64))


def _check_labels(labels: Tensor, classes: int, where: str) -> None:
    bad = ((labels < 0) | (labels >= classes)).nonzero()
    if len(bad):
        sample = int(bad[0])
        raise DataError(f"{where}: expected labels 0 to {classes - 1}, sample {sample} has {int(labels[sample])}")


def _histogram(images: Tensor) -> Tensor:  # (N, C, H, W) uint8 -> (C, 256) int64
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for start in range(0, len(images), CHUNK):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(images[start : start + CHUNK, channel].flatten(), minlength=256)
    return counts


def _from_histogram(counts: Tensor) -> Normalisation:
    """Exact mean and population std: the sums are Python integers."""
    mean, std = [], []
    for row in counts.tolist():
        n, total, squares = sum(row), sum(v * k for v, k in enumerate(row)), sum(v * v * k for v, k in enumerate(row))
        mean.append(total / n)
        std.append(
            max(1.0, math.sqrt(n * squares - total * total) / n)
        )  # floor: a constant channel must not divide by 0
    return Normalisation(tuple(mean), tuple(std))


def _identity(channels: int) -> Normalisation:
    return Normalisation((0.0,) * channels, (1.0,) * channels)


class _Items:
    """The images of a map-style Dataset; each read is checked against the first."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate  # None: stacked here, as torch's default knows neither PIL nor arrays (H, W, C)
        self._expected: tuple[torch.dtype, torch.Size] | None = None
        self.name = f"{type(dataset).__module__}.{type(dataset).__qualname__}"

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def dtype(self) -> torch.dtype:
        assert self._expected is not None, "read once, for its labels"
        return self._expected[0]

    def read(self, ids: Tensor, labels: Tensor) -> Tensor:
        images, found = self.read_labelled(ids)
        if not torch.equal(found, labels):
            at = int((found != labels).nonzero()[0])
            raise DataError(
                f"{self.name}: expected label {int(labels[at])} for sample {int(ids[at])} as at first, "
                f"found {int(found[at])}; labels may not change between reads"
            )
        return images

    def read_labelled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        items = [self._pair(self._dataset[sample], f"item {sample}") for sample in ids.tolist()]
        if self._collate is not None:
            images, labels = self._pair(self._collate(items), "the collate_fn's batch")
            images = _as_nchw(images, self.name)
        else:
            images = self._stack([_as_image(image, self.name) for image, _ in items], ids)
            labels = [label for _, label in items]
        self._expected = self._expected or (images.dtype, images.shape[1:])
        if (images.dtype, images.shape[1:]) != self._expected or len(images) != len(ids):
            dtype, shape = self._expected
            raise DataError(
                f"{self.name}: expected {len(ids)} images {tuple(shape)} {dtype}, "
                f"found {tuple(images.shape)} {images.dtype}; resize or convert them in the Dataset"
            )
        return images, _as_labels(labels, self.name)

    def _pair(self, item: Any, what: str) -> Any:
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise DataError(f"{self.name}: expected (image, label) as {what}, found {type(item).__name__}")
        return item

    def _stack(self, images: list[Tensor], ids: Tensor) -> Tensor:
        for image, sample in zip(images, ids.tolist(), strict=True):
            if (image.dtype, image.shape) != (images[0].dtype, images[0].shape):
                raise DataError(
                    f"{self.name}: expected images of one size and type, found {tuple(images[0].shape)} "
                    f"{images[0].dtype} as item {int(ids[0])} and {tuple(image.shape)} {image.dtype} as item {sample}; "
                    "resize or convert them in the Dataset"
                )
        return torch.stack(images)


def _as_image(image: Any, where: str) -> Tensor:  # -> (C, H, W)
    if isinstance(image, Tensor):
        return _as_nchw(image[None] if image.ndim == 3 else image[None, None], where)[0]
    if hasattr(image, "convert") and hasattr(image, "mode"):  # PIL: a palette's numbers are no pixels
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return _as_nchw(np.asarray(image)[None], where)[0]


def _from_dataset(dataset: Any, collate: Callable[[list[Any]], Any] | None, classes: int | None) -> ImageData:
    """One walk through the Dataset: labels of all samples, shape, and for uint8 the statistics."""
    items = _Items(dataset, collate)
    if len(items) == 0:
        raise DataError(f"{items.name}: expected at least one sample, found none")
    labels, counts = [], None
    for ids in chunks(len(items), CHUNK // 4):
        images, found = items.read_labelled(ids)
        labels.append(found)
        if images.dtype == torch.uint8:
            counts = _histogram(images) if counts is None else counts + _histogram(images)
    joined = torch.cat(labels)
    classes = int(joined.max()) + 1 if classes is None else classes
    _check_labels(joined, classes, items.name)
    channels, height, width = images.shape[1:]
    normalisation = _identity(channels) if counts is None else _from_histogram(counts)
    return ImageData(items, joined, classes=classes, shape=(channels, height, width), normalisation=normalisation)


def load_split(spec: str) -> tuple[ImageData, ImageData | None]:
    """Loads the training and the test data that a spec string names; both carry the training data's normalisation.

    Args:
        spec: "cifar10:DIR", "cifar100:DIR", "idx:DIR" (also "fashion:DIR"), "npz:FILE", "folder:DIR", "digits", or
            "synthetic:N": N procedural 3x32x32 images of 10 classes, and N // 5 more as test data.

    Returns:
        Training data, and test data or None where the files hold none.

    Raises:
        ConfigError: the kind is unknown, or its path or count is missing.
        DataError: a file is not what it should be.
        MissingExtraError: Pillow (folder) or scikit-learn (digits) is not installed.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _READERS:
        close = difflib.get_close_matches(kind, _READERS, 1)
        hint = f"did you mean {close[0]}" if close else "the paths of files go after the kind and a colon"
        raise ConfigError(f"expected data as one of {', '.join(_READERS)}, found {spec!r}; {hint}")
    if bool(argument) == (kind == "digits"):
        raise ConfigError(
            f"expected {kind} {'alone' if argument else 'with a colon and a path or count'}, found {spec!r}"
        )
    return _READERS[kind](argument)


def _from_splits(splits: tuple[datafiles.Split, datafiles.Split | None]) -> tuple[ImageData, ImageData | None]:
    stored_train, stored_test = splits
    train = _from_arrays(stored_train.images, stored_train.labels, stored_train.classes, stored_train.name)
    if stored_test is None:
        return train, None
    test = _from_arrays(stored_test.images, stored_test.labels, train.classes, stored_test.name)
    (dtype, shape), (test_dtype, test_shape) = (
        (data.batch(torch.tensor([0]))[0].dtype, data.shape) for data in (train, test)
    )
    if (dtype, shape) != (test_dtype, test_shape):
        raise DataError(
            f"{stored_test.name}: expected images {shape} {dtype} as for training, found {test_shape} {test_dtype}; "
            "convert them"
        )
    return train, test.replace(normalisation=train.normalisation)


def _load_digits(_: str) -> tuple[ImageData, ImageData | None]:
    digits = datafiles.read_digits()
    ids = [part.numpy() for part in stratified_split(_as_labels(digits.labels, digits.name), 0.2, seed=0)]
    train, test = (digits._replace(images=digits.images[part], labels=digits.labels[part]) for part in ids)
    return _from_splits((train, test))


def _load_synthetic(argument: str) -> tuple[ImageData, ImageData | None]:
    if not (argument.isascii() and argument.isdigit() and int(argument) > 0):
        raise ConfigError(f"expected synthetic:N with N images, 1 or more, found {argument!r}")
    count = int(argument)
    train = _from_arrays(*_synthetic(0, count), SYNTHETIC_CLASSES, "synthetic")
    if count < 5:
        return train, None
    test = _from_arrays(*_synthetic(1 << 32, count // 5), SYNTHETIC_CLASSES, "synthetic")
    return train, test.replace(normalisation=train.normalisation)


def _synthetic(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Images of samples first, first + 1, ...: the class's coarse pattern, shifted by 0 to 15 pixels, and noise."""
    patterns = counter_hash(torch.arange(SYNTHETIC_CLASSES * 432), 1).remainder(129).view(SYNTHETIC_CLASSES, 3, 12, 12)
    wide = patterns.to(torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)  # (K, 3, 48, 48)
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    for rows in chunks(count, CHUNK):
        samples = rows + first
        draws = counter_hash(samples, 2)
        base = windows(wide.index_select(0, rows % SYNTHETIC_CLASSES), draws & 15, (draws >> 8) & 15, 32, 32)
        noise = counter_hash(samples[:, None] * 384 + torch.arange(384), 3).view(torch.uint8).view_as(base) >> 1
        images[rows[0] : rows[-1] + 1] = base + noise  # 128 + 127 at most
    return images, torch.arange(count) % SYNTHETIC_CLASSES


_READERS: dict[str, Callable[[str], tuple[ImageData, ImageData | None]]] = {
    "cifar10": lambda path: _from_splits(datafiles.read_cifar(path, 10)),
    "cifar100": lambda path: _from_splits(datafiles.read_cifar(path, 100)),
    "idx": lambda path: _from_splits(datafiles.read_idx(path)),
    "fashion": lambda path: _from_splits(datafiles.read_idx(path)),
    "npz": lambda path: _from_splits(datafiles.read_npz(path)),
    "folder": lambda path: _from_splits(datafiles.read_folder(path)),
    "digits": _load_digits,
    "synthetic": _load_synthetic,
}

"""Data files: readers of the usual image sets' own file formats, into memory; nothing is downloaded or unpickled.

A reader takes a folder (or a file) and returns the training split and, where the files hold one, the test split.
Images are (N, C, H, W) uint8 (npz: as stored), labels (N,), both numpy. A header is never believed: sizes are compared
with the file first, and of a compressed file at most the announced bytes and one more are read.
Source: IDX as at Y. LeCun's MNIST page; CIFAR binary version as at https://www.cs.toronto.edu/~kriz/cifar.html;
Tiny ImageNet's folders as in Stanford's CS231n.
"""

from __future__ import annotations

import gzip
import importlib
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nf_engine.errors import DataError, MissingExtraError

__all__ = ["Split", "read_cifar", "read_digits", "read_folder", "read_idx", "read_npz"]

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_DEFLATE_RATIO = 1032  # zlib: no compressed byte gives more, so a header that announces more is false
READ_SIZE = 1 << 20


class Split(NamedTuple):
    """One split as stored, its number of classes (None: the largest label decides) and the file that errors name."""

    images: NDArray[Any]
    labels: NDArray[Any]
    classes: int | None
    name: str


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise DataError(
            f"{path}: expected a folder with the data set, found {found}; give the folder that holds the files"
        )
    return folder


# --- IDX: MNIST, Fashion-MNIST --------------------------------------------------------------------------------------


def read_idx(path: str) -> tuple[Split, Split | None]:
    """Reads `train-*` and, if there, `t10k-*` of an IDX folder, plain or .gz; gray images (N, 1, H, W) as in the file.

    Raises:
        DataError: a file is missing, has a wrong magic number or length, or images and labels differ in count.
    """
    folder = _folder(path)
    train = _read_idx_split(folder, "train")
    has_test = any(folder.glob("t10k-*"))
    return train, _read_idx_split(folder, "t10k") if has_test else None


def _read_idx_split(folder: Path, prefix: str) -> Split:
    image_file, label_file = (
        _find_idx(folder, f"{prefix}-{name}") for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    images, labels = _read_idx_file(image_file, 3), _read_idx_file(label_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{label_file}: expected {len(images)} labels, one for each image of {image_file.name}, "
            f"found {len(labels)}; the files belong to different sets"
        )
    return Split(images[:, None], labels, None, str(label_file))


def _find_idx(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(f"{folder}: expected {name} or {name}.gz, found neither; give the folder that holds the IDX files")


def _read_idx_file(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes: magic 0x0000080D with D dimensions, D big-endian sizes, the bytes."""
    size = path.stat().st_size
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            header = _read_at_most(file, 4 + 4 * ndim)
            shape = _idx_shape(path, header, ndim)
            expected = math.prod(shape)
            if expected > size * (MAX_DEFLATE_RATIO if packed else 1):
                raise DataError(
                    f"{path}: expected {expected} bytes of data for {shape}, the whole file has {size}; copy it again"
                )
            data = _read_at_most(file, expected + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a complete gzip file, found a damaged one ({error}); copy it again"
        ) from error
    if len(data) != expected:
        found = f"{len(data)}" if len(data) < expected else "more"
        raise DataError(f"{path}: expected {expected} bytes of data for {shape}, found {found}; copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytearray, ndim: int) -> tuple[int, ...]:
    expected = 0x800 + ndim
    if len(header) < 4 + 4 * ndim:
        raise DataError(f"{path}: expected an IDX header of {4 + 4 * ndim} bytes, found {len(header)}; copy it again")
    magic, *shape = struct.unpack(f">{1 + ndim}I", header)
    if magic != expected:
        raise DataError(
            f"{path}: expected the IDX magic number 0x{expected:08x}, found 0x{magic:08x}; this is another file"
        )
    return tuple(shape)


def _read_at_most(file: BinaryIO | gzip.GzipFile, count: int) -> bytearray:
    """Up to `count` bytes, in pieces: memory follows what the file holds, not what its header says."""
    data = bytearray()
    while len(data) < count and (piece := file.read(min(count - len(data), READ_SIZE))):
        data += piece
    return data


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def read_cifar(path: str, classes: int) -> tuple[Split, Split | None]:
    """Reads the binary version of CIFAR-10 or CIFAR-100 (fine labels): (N, 3, 32, 32) uint8.

    Args:
        path: the folder of the .bin files, or the one that holds cifar-10-batches-bin or cifar-100-binary.
        classes: 10 or 100.

    Raises:
        DataError: files are missing, are the pickled python version, or hold a partial record or a label out of range.
    """
    folder = _folder(path)
    inner = folder / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder = inner if inner.is_dir() else folder
    train_pattern, test_name = ("data_batch_*.bin", "test_batch.bin") if classes == 10 else ("train.bin", "test.bin")
    train = sorted(folder.glob(train_pattern))
    if not train:
        raise DataError(_no_cifar(folder, classes, train_pattern))
    test = folder / test_name
    return _read_cifar_files(train, classes), _read_cifar_files([test], classes) if test.is_file() else None


def _no_cifar(folder: Path, classes: int, wanted: str) -> str:
    for pickled in ("cifar-10-batches-py", "data_batch_1") if classes == 10 else ("cifar-100-python", "train"):
        if (folder / pickled).exists():
            return (
                f"{folder / pickled}: expected the binary version of CIFAR-{classes} ({wanted}), "
                f"found the pickled python version, which can run code when read; get cifar-{classes}-binary.tar.gz"
            )
    return (
        f"{folder}: expected {wanted} of CIFAR-{classes}'s binary version, found none; give the folder that holds them"
    )


def _read_cifar_files(files: list[Path], classes: int) -> Split:
    """Joins the files; a record is the label byte (CIFAR-100: coarse, then fine) and 3 planes of 32x32, row by row."""
    label_bytes = 1 if classes == 10 else 2
    record = label_bytes + 3072
    counts = [_cifar_records(file, record) for file in files]
    images, labels = np.empty((sum(counts), 3072), np.uint8), np.empty(sum(counts), np.uint8)
    start = 0
    for file, count in zip(files, counts, strict=True):
        records = np.fromfile(file, np.uint8, count=count * record).reshape(count, record)
        labels[start : start + count] = records[:, label_bytes - 1]
        images[start : start + count] = records[:, label_bytes:]
        if (bad := np.flatnonzero(labels[start : start + count] >= classes)).size:
            label = labels[start + bad[0]]
            raise DataError(
                f"{file}: expected labels 0 to {classes - 1}, record {bad[0]} has {label}; this is another file"
            )
        start += count
    return Split(images.reshape(-1, 3, 32, 32), labels, classes, str(files[0]))


def _cifar_records(file: Path, record: int) -> int:
    count, rest = divmod(file.stat().st_size, record)
    if rest or not count:
        found = f"{count * record + rest} bytes"
        raise DataError(f"{file}: expected one or more records of {record} bytes, found {found}; copy it again")
    return count


# --- .npz and .npy --------------------------------------------------------------------------------------------------


def read_npz(path: str) -> tuple[Split, Split | None]:
    """Reads x, y or x_train, y_train, x_test, y_test from an .npz file, or from a folder of .npy files of those names.

    Raises:
        DataError: the file or a name is missing, or an array is damaged or pickled.
    """
    source = Path(path)
    names = ("x", "y", "x_train", "y_train", "x_test", "y_test")
    if source.is_dir():
        arrays = {name: _load_npy(file) for name in names if (file := source / f"{name}.npy").is_file()}
    elif source.suffix == ".npz" and source.is_file():
        arrays = _load_npz(source, names)
    else:
        found = "another file" if source.exists() else "nothing there"
        raise DataError(f"{path}: expected an .npz file or a folder with x.npy and y.npy, found {found}")
    train = "_train" if "x_train" in arrays else ""
    has_test = "x_test" in arrays or "y_test" in arrays
    return _npz_split(path, arrays, train), _npz_split(path, arrays, "_test") if has_test else None


def _load_npz(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file:  # opened here: np.load leaves it open where it fails
        archive = _plain(path, lambda: np.load(file, allow_pickle=False))
        if isinstance(archive, np.ndarray):
            raise DataError(
                f"{path}: expected an archive of arrays, found one array; rename it to x.npy beside a y.npy"
            )
        return {
            name: _plain(f"{path}: {name}", partial(archive.__getitem__, name)) for name in names if name in archive
        }


def _load_npy(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        array = _plain(path, lambda: np.load(file, allow_pickle=False))
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: expected one array, found an archive; rename it to .npz")
    return array


def _plain(where: object, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where}: expected plain numpy arrays, found a damaged or pickled file ({error})") from error


def _npz_split(path: str, arrays: dict[str, NDArray[Any]], suffix: str) -> Split:
    for name in (f"x{suffix}", f"y{suffix}"):
        if name not in arrays:
            raise DataError(
                f"{path}: expected arrays x and y, or x_train and y_train, found no {name}, only {sorted(arrays)}"
            )
    return Split(arrays[f"x{suffix}"], arrays[f"y{suffix}"], None, f"{path} (x{suffix}, y{suffix})")


# --- folders of class folders ---------------------------------------------------------------------------------------


def read_folder(path: str) -> tuple[Split, Split | None]:
    """Reads class folders of images as RGB: DIR/train and DIR/val (or DIR/test) where they exist, else DIR itself.

    Classes are numbered in the sorted order of the training folders. Images may lie deeper (train/<class>/images/), and
    val may be flat beside a val_annotations.txt, as in Tiny ImageNet.

    Raises:
        DataError: there is no image, a class of val is unknown, a file is no image, or sizes differ.
        MissingExtraError: Pillow is not installed.
    """
    folder = _folder(path)
    if not (folder / "train").is_dir():
        classes = _class_index(folder)
        return _read_images(folder, _files_by_class(folder, classes), len(classes)), None
    train = folder / "train"
    classes = _class_index(train)
    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    test_files = _test_files(test, classes) if test else []
    train_split = _read_images(train, _files_by_class(train, classes), len(classes))
    return train_split, _read_images(test, test_files, len(classes)) if test else None


def _class_index(folder: Path) -> dict[str, int]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: expected one folder for each class, found none")
    return {name: label for label, name in enumerate(names)}


def _files_by_class(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    return [(file, label) for name, label in classes.items() for file in _image_files(folder / name)]


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _test_files(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    annotations = folder / "val_annotations.txt"
    if annotations.is_file():
        return _annotated_files(annotations, classes)
    found = _class_index(folder)
    if unknown := sorted(found.keys() - classes.keys()):
        raise DataError(
            f"{folder}: expected the classes of {folder.parent / 'train'}, found {unknown[0]}, which is not there"
        )
    return _files_by_class(folder, {name: classes[name] for name in found})


def _annotated_files(annotations: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    """Lines of file name, class name, ... (tabs between), for the images beside or in images/."""
    folder = annotations.parent
    images = folder / "images" if (folder / "images").is_dir() else folder
    files = []
    for number, line in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = classes.get(rest.partition("\t")[0])
        if label is None:
            raise DataError(
                f"{annotations}: line {number}: expected a file, a tab and a class of train, found {line[:60]!r}"
            )
        files.append((images / name, label))
    return files


def _read_images(folder: Path, files: list[tuple[Path, int]], classes: int) -> Split:
    if not files:
        raise DataError(
            f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in the class folders, found none"
        )
    first = _read_image(files[0][0])
    images = np.empty((len(files), 3, *first.shape[:2]), np.uint8)
    for row, (file, _) in enumerate(files):
        pixels = _read_image(file)  # (H, W, 3)
        if pixels.shape != first.shape:
            raise DataError(
                f"expected images of one size, found {_size(first)} in {files[0][0]} and {_size(pixels)} in {file}; "
                "resize them, or give a Dataset that does"
            )
        images[row] = pixels.transpose(2, 0, 1)
    return Split(images, np.array([label for _, label in files]), classes, str(folder))


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _read_image(file: Path) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("folder data needs Pillow; install nf_engine[images]") from error
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{file}: expected an image that Pillow reads, found {error}; remove it or copy it again"
        ) from error


# --- digits ---------------------------------------------------------------------------------------------------------


def read_digits() -> Split:
    """Reads scikit-learn's 1,797 digits: (N, 1, 8, 8), their 0..16 scaled to 0..255.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")  # it has no types
    except ImportError as error:
        raise MissingExtraError("the digits come with scikit-learn; install nf_engine[demo]") from error
    digits = datasets.load_digits()
    return Split(np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8), digits.target, 10, "digits")

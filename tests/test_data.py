"""Tests of data: files written here byte by byte, crops sliced sample by sample, statistics by numpy in float64."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from nf_engine.data import ImageData, fit_to, stratified_split
from nf_engine.errors import ConfigError, DataError, MissingExtraError
from nf_engine.preprocess import Normalisation, Preprocess, counter_hash
from nf_engine.sources import as_image_data, load_split

RNG = np.random.default_rng(7)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def all_of(data: ImageData) -> tuple[np.ndarray, list[int]]:
    images, labels = data.batch(torch.arange(len(data)))
    return images.numpy(), labels.tolist()


# --- files ----------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def idx_folder(folder: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    train, test = pixels(12, 5, 4), pixels(3, 5, 4)
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", train)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", np.arange(12, dtype=np.uint8) % 4)
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", test)
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", np.array([3, 0, 1], np.uint8))
    return train, test


@pytest.mark.parametrize("kind", ["idx", "fashion"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_give_the_pixels_and_labels_written(tmp_path, kind, suffix):
    train_pixels, test_pixels = idx_folder(tmp_path, suffix)
    train, test = load_split(f"{kind}:{tmp_path}")
    assert train.shape == (1, 5, 4)
    assert (train.classes, test.classes) == (4, 4)
    np.testing.assert_array_equal(all_of(train)[0][:, 0], train_pixels)
    np.testing.assert_array_equal(all_of(test)[0][:, 0], test_pixels)
    assert all_of(train)[1] == [0, 1, 2, 3] * 3
    assert all_of(test)[1] == [3, 0, 1]
    assert test.normalisation == train.normalisation  # not its own


def test_idx_without_test_files_has_no_test_data(tmp_path):
    idx_folder(tmp_path)
    for file in tmp_path.glob("t10k-*"):
        file.unlink()
    assert load_split(f"idx:{tmp_path}")[1] is None


IDX_FAULTS = {
    "short": (lambda b: b[:-1], "expected 240 bytes of data for .12, 5, 4., found 239"),
    "long": (lambda b: b + b"x", "expected 240 bytes of data for .12, 5, 4., found more"),
    "magic": (lambda b: b"\0\0\x0d\x03" + b[4:], "expected the IDX magic number 0x00000803, found 0x00000d03"),
    "header": (lambda b: b[:9], "expected an IDX header of 16 bytes, found 9"),
    "claim": (lambda b: b[:4] + b"\xff" * 12, "bytes of data for .4294967295, .*, the whole file has"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_a_faulty_idx_file_is_named_with_expected_and_found(tmp_path, suffix, fault):
    idx_folder(tmp_path, suffix)
    spoil, message = IDX_FAULTS[fault]
    file = tmp_path / f"train-images-idx3-ubyte{suffix}"
    pack, unpack = (gzip.compress, gzip.decompress) if suffix else (bytes, bytes)
    file.write_bytes(pack(spoil(unpack(file.read_bytes()))))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte{suffix}: .*{message}"):
        load_split(f"idx:{tmp_path}")


def test_a_plain_idx_file_that_claims_more_than_it_has_is_found_by_its_size(tmp_path):
    idx_folder(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(struct.pack(">4I", 0x803, 40, 10, 10))
    with pytest.raises(DataError, match=r"expected 4000 bytes .*, the whole file has 16"):
        load_split(f"idx:{tmp_path}")


def test_a_gzip_bomb_is_not_unpacked_beyond_the_announced_length(tmp_path, monkeypatch):
    idx_folder(tmp_path, ".gz")
    header = struct.pack(">4I", 0x803, 12, 5, 4)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(20_000_000)))
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: taken.append(n) or read(self, n))
    with pytest.raises(DataError, match=r"expected 240 bytes of data .* found more"):
        load_split(f"idx:{tmp_path}")
    assert min(taken) > 0
    assert sum(taken) == 16 + 241


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"not gzip" + b,
        lambda b: b[:10] + b"\xff" * 40,
        lambda b: b[:-8] + bytes(8),
    ],
)
def test_a_damaged_gzip_file_is_a_data_error(tmp_path, damage):
    idx_folder(tmp_path, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte.gz: expected a complete gzip file, found a damaged one"
    ):
        load_split(f"idx:{tmp_path}")


def test_idx_images_and_labels_of_different_counts_are_refused(tmp_path):
    idx_folder(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(11, np.uint8))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: expected 12 labels, .* found 11"):
        load_split(f"idx:{tmp_path}")


def test_a_test_label_that_training_does_not_have_is_refused(tmp_path):
    idx_folder(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([0, 9, 1], np.uint8))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: expected labels 0 to 3, sample 1 has 9"):
        load_split(f"idx:{tmp_path}")


def test_test_images_of_another_size_are_refused(tmp_path):
    idx_folder(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", pixels(3, 4, 4))
    with pytest.raises(DataError, match=r"expected images \(1, 5, 4\) torch.uint8 as for training, found \(1, 4, 4\)"):
        load_split(f"idx:{tmp_path}")


def cifar_file(path: Path, labels: list[int], coarse: bool = False) -> np.ndarray:
    images = pixels(len(labels), 3, 32, 32)
    prefix = b"\x07" if coarse else b""
    path.write_bytes(
        b"".join(prefix + bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    )
    return images


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10_joins_its_batches_in_order(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    second = cifar_file(folder / "data_batch_2.bin", [4, 9])
    first = cifar_file(folder / "data_batch_1.bin", [3, 0, 1])
    held_out = cifar_file(folder / "test_batch.bin", [2])
    train, test = load_split(f"cifar10:{tmp_path}")
    np.testing.assert_array_equal(all_of(train)[0], np.concatenate([first, second]))
    np.testing.assert_array_equal(all_of(test)[0], held_out)
    assert (all_of(train)[1], all_of(test)[1]) == ([3, 0, 1, 4, 9], [2])
    assert (train.classes, test.classes) == (10, 10)


def test_cifar100_takes_the_fine_label(tmp_path):
    (tmp_path / "cifar-100-binary").mkdir()
    images = cifar_file(tmp_path / "cifar-100-binary" / "train.bin", [99, 5], coarse=True)
    train, test = load_split(f"cifar100:{tmp_path}")
    np.testing.assert_array_equal(all_of(train)[0], images)
    assert (all_of(train)[1], train.classes, test) == ([99, 5], 100, None)


def test_a_partial_cifar_record_is_refused(tmp_path):
    cifar_file(tmp_path / "data_batch_1.bin", [1, 2])
    with (tmp_path / "data_batch_1.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        DataError, match=r"data_batch_1.bin: expected one or more records of 3073 bytes, found 6147 bytes"
    ):
        load_split(f"cifar10:{tmp_path}")


def test_an_empty_cifar_file_is_refused(tmp_path):
    (tmp_path / "data_batch_1.bin").touch()
    with pytest.raises(DataError, match=r"expected one or more records of 3073 bytes, found 0 bytes"):
        load_split(f"cifar10:{tmp_path}")


def test_a_cifar_label_out_of_range_names_file_and_record(tmp_path):
    cifar_file(tmp_path / "data_batch_1.bin", [1])
    cifar_file(tmp_path / "data_batch_2.bin", [1, 10])
    with pytest.raises(DataError, match=r"data_batch_2.bin: expected labels 0 to 9, record 1 has 10"):
        load_split(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "pickled"),
    [
        ("cifar10", "data_batch_1"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "train"),
        ("cifar100", "cifar-100-python"),
    ],
)
def test_the_pickled_cifar_is_refused_by_name(tmp_path, kind, pickled):
    (tmp_path / pickled).mkdir()
    with pytest.raises(
        DataError, match=rf"{pickled}: expected the binary version .*pickled.*get cifar-{kind[5:]}-binary"
    ):
        load_split(f"{kind}:{tmp_path}")


def test_a_folder_without_cifar_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"expected data_batch_\*.bin of CIFAR-10's binary version, found none"):
        load_split(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "idx", "fashion", "folder"])
def test_a_missing_folder_is_a_data_error(tmp_path, kind):
    with pytest.raises(DataError, match="nowhere: expected a folder with the data set, found nothing there"):
        load_split(f"{kind}:{tmp_path / 'nowhere'}")


def test_missing_idx_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"expected train-images-idx3-ubyte or train-images-idx3-ubyte.gz, found neither"
    ):
        load_split(f"idx:{tmp_path}")


@pytest.mark.parametrize("as_folder", [False, True])
def test_npz_gives_both_splits(tmp_path, as_folder):
    arrays = {
        "x_train": pixels(6, 4, 4, 3),
        "y_train": np.arange(6)[:, None] % 3,  # (N, 1), as Keras stores it
        "x_test": pixels(2, 4, 4, 3),
        "y_test": np.array([2, 0], np.uint8),
    }
    path = tmp_path / "set" if as_folder else tmp_path / "set.npz"
    if as_folder:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    else:
        np.savez_compressed(path, **arrays)
    train, test = load_split(f"npz:{path}")
    assert train.shape == (3, 4, 4)
    np.testing.assert_array_equal(all_of(train)[0], np.moveaxis(arrays["x_train"], 3, 1))
    np.testing.assert_array_equal(all_of(test)[0], np.moveaxis(arrays["x_test"], 3, 1))
    assert (all_of(train)[1], all_of(test)[1], test.classes) == ([0, 1, 2] * 2, [2, 0], 3)


def test_npz_of_x_and_y_has_no_test_data(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 1, 2, 2), np.float64), y=np.array([0, 1, 0]))
    train, test = load_split(f"npz:{tmp_path / 'a.npz'}")
    assert test is None
    assert train.images.dtype == torch.float32
    assert train.normalisation == Normalisation((0.0,), (1.0,))


def test_a_pickled_array_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}, {}], object), y=np.array([0, 1]))
    with pytest.raises(DataError, match=r"a.npz: x: expected plain numpy arrays, found a damaged or pickled file"):
        load_split(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04."])
def test_a_damaged_npz_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a.npz: expected plain numpy arrays, found a damaged or pickled file"):
        load_split(f"npz:{tmp_path / 'a.npz'}")


def test_a_damaged_npy_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", pixels(9, 4, 4))
    np.save(tmp_path / "y.npy", np.arange(9))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"x.npy: expected plain numpy arrays, found a damaged or pickled file"):
        load_split(f"npz:{tmp_path}")


def test_an_archive_under_the_name_of_an_npy_is_refused(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, x=pixels(3, 3, 3))
    with pytest.raises(DataError, match=r"x.npy: expected one array, found an archive"):
        load_split(f"npz:{tmp_path}")


def test_a_single_array_under_the_name_of_an_npz_is_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, pixels(3, 3))
    with pytest.raises(DataError, match=r"a.npz: expected an archive of arrays, found one array"):
        load_split(f"npz:{tmp_path / 'a.npz'}")


def test_npz_without_labels_names_what_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", x=pixels(3, 2, 2), z=np.zeros(3))
    with pytest.raises(DataError, match=r"expected arrays x and y, or x_train and y_train, found no y, only \['x'\]"):
        load_split(f"npz:{tmp_path / 'a.npz'}")


def test_a_missing_npz_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"expected an .npz file or a folder with x.npy and y.npy, found nothing there"):
        load_split(f"npz:{tmp_path / 'a.npz'}")


def save_image(file: Path, image: np.ndarray) -> np.ndarray:
    pil = pytest.importorskip("PIL.Image")
    file.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(image).save(file)
    return image


def test_class_folders_are_read_as_rgb_in_sorted_order(tmp_path):
    cat = save_image(tmp_path / "cat" / "b.png", pixels(4, 5, 3))
    gray = save_image(tmp_path / "cat" / "c.png", pixels(4, 5))
    ant = save_image(tmp_path / "ant" / "z.PNG", pixels(4, 5, 3))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    train, test = load_split(f"folder:{tmp_path}")
    expected = np.stack([ant, cat, np.repeat(gray[:, :, None], 3, 2)])
    np.testing.assert_array_equal(all_of(train)[0], expected.transpose(0, 3, 1, 2))
    assert (all_of(train)[1], train.classes, test) == ([0, 1, 1], 2, None)


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_folder_beside_train_is_the_test_data(tmp_path, name):
    for label in ("a", "b"):
        save_image(tmp_path / "train" / label / "1.png", pixels(4, 4, 3))
    image = save_image(tmp_path / name / "b" / "1.png", pixels(4, 4, 3))
    train, test = load_split(f"folder:{tmp_path}")
    assert (all_of(train)[1], all_of(test)[1], test.classes) == ([0, 1], [1], 2)
    np.testing.assert_array_equal(all_of(test)[0][0], image.transpose(2, 0, 1))


def test_tiny_imagenet_takes_its_test_labels_from_the_annotations(tmp_path):
    for wnid in ("n01", "n02"):
        save_image(tmp_path / "train" / wnid / "images" / f"{wnid}_0.png", pixels(8, 8, 3))
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    for number in range(2):
        save_image(tmp_path / "val" / "images" / f"val_{number}.png", pixels(8, 8, 3))
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png\tn02\t0\t0\t9\t9\nval_1.png\tn01\t0\t0\t9\t9\n")
    train, test = load_split(f"folder:{tmp_path}")
    assert (len(train), all_of(test)[1]) == (2, [1, 0])
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png\tn77\t0\n")
    with pytest.raises(DataError, match=r"val_annotations.txt: line 1: expected a file, a tab and a class of train"):
        load_split(f"folder:{tmp_path}")


def test_images_of_mixed_sizes_name_the_first_two(tmp_path):
    save_image(tmp_path / "a" / "1.png", pixels(4, 5, 3))
    save_image(tmp_path / "b" / "2.png", pixels(6, 5, 3))
    with pytest.raises(DataError, match=r"found 5x4 in .*1.png and 5x6 in .*2.png"):
        load_split(f"folder:{tmp_path}")


def test_a_file_that_is_no_image_is_named(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("hello")
    with pytest.raises(DataError, match=r"1.png: expected an image that Pillow reads"):
        load_split(f"folder:{tmp_path}")


def test_a_cut_off_image_is_named(tmp_path):
    save_image(tmp_path / "a" / "1.png", pixels(40, 40, 3))
    file = tmp_path / "a" / "1.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"1.png: expected an image that Pillow reads"):
        load_split(f"folder:{tmp_path}")


def test_folders_without_classes_or_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected one folder for each class, found none"):
        load_split(f"folder:{tmp_path}")
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"expected images \(.bmp, .*\) in the class folders, found none"):
        load_split(f"folder:{tmp_path}")


def test_a_test_class_that_training_does_not_have_is_named(tmp_path):
    save_image(tmp_path / "train" / "a" / "1.png", pixels(4, 4, 3))
    save_image(tmp_path / "val" / "zebra" / "1.png", pixels(4, 4, 3))
    with pytest.raises(DataError, match=r"val: expected the classes of .*train, found zebra"):
        load_split(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "module", "extra"), [("folder", "PIL", "images"), ("digits", "sklearn.datasets", "demo")]
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, spec, module, extra):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    monkeypatch.setitem(sys.modules, module, None)  # what an import of a package that is not there meets
    with pytest.raises(MissingExtraError, match=rf"install nf_engine\[{extra}\]"):
        load_split(spec if spec == "digits" else f"{spec}:{tmp_path}")


def test_digits_are_split_by_class_and_scaled_to_bytes():
    datasets = pytest.importorskip("sklearn.datasets")
    original = {
        (image * 255 / 16).round().astype(np.uint8).tobytes(): int(label)
        for image, label in zip(*(lambda d: (d.images, d.target))(datasets.load_digits()), strict=True)
    }
    train, test = load_split("digits")
    assert len(train) + len(test) == 1797
    assert (train.shape, train.classes) == ((1, 8, 8), 10)
    share = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert ((share - 0.2).abs() < 0.005).all()
    seen = set()
    for data in (train, test):
        for image, label in zip(*all_of(data), strict=True):
            assert original[image.tobytes()] == label
            seen.add(image.tobytes())
    assert seen == set(original)  # each digit is in one of the two


def test_synthetic_images_are_repeatable_and_their_number_changes_no_image():
    train, test = load_split("synthetic:60")
    again, _ = load_split("synthetic:60")
    larger, _ = load_split("synthetic:1200")  # more than one chunk
    assert (len(train), len(test), train.shape, train.classes) == (60, 12, (3, 32, 32), 10)
    assert train.digest() == again.digest()
    np.testing.assert_array_equal(all_of(train)[0], all_of(larger)[0][:60])
    assert not any(np.array_equal(all_of(test)[0][0], image) for image in all_of(train)[0])
    assert load_split("synthetic:4")[1] is None


def test_synthetic_classes_can_be_learned():
    train, test = load_split("synthetic:2000")
    means = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.labels).double().mean() > 0.6


SPEC_ERRORS = {
    "cifar:x": "did you mean cifar10",
    "imagnet:x": "expected data as one of cifar10, cifar100, idx",
    "cifar10": "expected cifar10 with a colon and a path or count",
    "digits:x": "expected digits alone",
    "synthetic:many": "expected synthetic:N with N images, 1 or more, found 'many'",
    "synthetic:0": "expected synthetic:N with N images, 1 or more, found '0'",
}


@pytest.mark.parametrize("spec", SPEC_ERRORS)
def test_an_unknown_spec_says_what_is_known(spec):
    with pytest.raises(ConfigError, match=SPEC_ERRORS[spec]):
        load_split(spec)


# --- arrays and Datasets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((7, 3, 6, 5), (3, 6, 5)),
        ((7, 6, 5, 3), (3, 6, 5)),
        ((7, 6, 5, 1), (1, 6, 5)),
        ((7, 1, 6, 3), (1, 6, 3)),
        ((7, 6, 5), (1, 6, 5)),
        ((7, 4, 6, 5), (4, 6, 5)),
    ],
    ids=str,
)
def test_arrays_are_recognised_by_their_shape(shape, expected):
    x, y = pixels(*shape), np.array([0, 1, 2, 0, 1, 2, 0], np.int16)
    data = as_image_data((x, y))
    truth = np.moveaxis(x, 3, 1) if len(shape) == 4 and shape[1:] != expected else x.reshape(7, *expected)
    assert data.shape == expected
    np.testing.assert_array_equal(all_of(data)[0], truth)
    assert (all_of(data)[1], data.classes, len(data)) == (y.tolist(), 3, 7)


def test_tensors_are_channels_first_and_shared():
    x = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    data = as_image_data((x, torch.tensor([0, 1, 1, 0])))
    assert data.shape == (8, 8, 3)
    assert data.images.data_ptr() == x.data_ptr()


def test_a_read_only_array_is_taken_without_a_warning():
    x = pixels(4, 1, 3, 3)
    x.flags.writeable = False
    np.testing.assert_array_equal(as_image_data((x, [0, 1, 0, 1])).images.numpy(), x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_images_become_float32_with_the_identity_as_normalisation(dtype):
    x = RNG.standard_normal((4, 2, 3, 5)).astype(dtype)
    data = as_image_data((x, [0, 1, 0, 1]))
    assert data.images.dtype == torch.float32
    np.testing.assert_array_equal(data.images.numpy(), x.astype(np.float32))
    assert data.normalisation == Normalisation((0.0, 0.0), (1.0, 1.0))


def test_mean_and_std_are_exact():
    x = pixels(1234, 3, 5, 6)  # more than one chunk
    x[:, 1] //= 7
    found = as_image_data((x, np.arange(1234) % 2)).normalisation
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.std, x.astype(np.float64).std((0, 2, 3)), rtol=1e-12)


def test_the_std_of_a_constant_channel_is_one():
    x = pixels(5, 2, 4, 4)
    x[:, 1] = 9
    found = as_image_data((x, [0, 1, 0, 1, 0])).normalisation
    assert (found.mean[1], found.std[1]) == (9.0, 1.0)


NAN = np.zeros((2, 1, 2, 2), np.float32)
NAN[1, 0, 1, 0] = np.nan
GOOD = np.zeros((2, 1, 2, 2), np.uint8)
ARRAY_ERRORS = {
    "labels": ((GOOD, [0, 1, 0]), {}, "expected one label for each of 2 images, found 3 labels"),
    "range": ((GOOD, [0, 5]), {"classes": 3}, "expected labels 0 to 2, sample 1 has 5"),
    "negative": ((GOOD, [0, -1]), {}, "sample 1 has -1"),
    "float labels": ((GOOD, [0.0, 1.0]), {}, r"expected integer labels \(N,\), found float64 of shape \(2,\)"),
    "bool labels": ((GOOD, [True, False]), {}, "expected integer labels .*, found bool"),
    "one-hot": ((GOOD, np.eye(2, dtype=int)), {}, "argmax"),
    "ragged": ((GOOD, [[0], [1, 2]]), {}, "found rows of different sizes"),
    "empty": ((GOOD[:0], []), {}, "expected"),
    "no pixels": ((GOOD[:, :, :0], [0, 1]), {}, r"expected at least one image, found shape \(2, 1, 0, 2\)"),
    "int pixels": ((GOOD.astype(np.int64), [0, 1]), {}, "expected uint8 or float images, found int64"),
    "int tensor": ((torch.zeros(2, 1, 2, 2, dtype=torch.int32), [0, 1]), {}, "found torch.int32"),
    "flat": ((GOOD.reshape(2, 4), [0, 1]), {}, r"expected images \(N, C, H, W\) or \(N, H, W\), found shape \(2, 4\)"),
    "nan": ((NAN, [0, 1]), {}, "expected finite pixels, found NaN or infinity"),
    "dict": ({"x": GOOD}, {}, "expected a tuple .*, found dict"),
    "none": (None, {}, "expected a tuple .*, found NoneType"),
    "array alone": (GOOD, {}, r"expected \(image, label\) as item 0, found ndarray"),
    "no samples": (
        torch.utils.data.Subset(TensorDataset(torch.zeros(1)), []),
        {},
        "expected at least one sample, found none",
    ),
}


@pytest.mark.parametrize("name", ARRAY_ERRORS)
def test_what_is_no_image_data_is_refused(name):
    source, arguments, message = ARRAY_ERRORS[name]
    with pytest.raises(DataError, match=message):
        as_image_data(source, **arguments)


def test_classes_can_be_named_for_labels_that_are_not_all_there():
    data = as_image_data((GOOD, [0, 1]), classes=10)
    assert data.classes == 10
    assert as_image_data(data, classes=5).classes == 5
    assert as_image_data(data).classes == 10
    with pytest.raises(DataError, match=r"expected labels 0 to 0, sample 1 has 1"):
        as_image_data(data, classes=1)


class Listed(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


def kinds_of_item(x: np.ndarray) -> dict[str, list]:
    pil = pytest.importorskip("PIL.Image")
    return {
        "tensor": [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in x],
        "array": list(x),
        "PIL": [pil.fromarray(image) for image in x],
        "palette": [pil.fromarray(image).quantize(256) for image in x // 128 * 128],
    }


@pytest.mark.parametrize("kind", ["tensor", "array", "PIL", "palette"])
@pytest.mark.parametrize("label", [int, np.uint8, torch.tensor])
def test_a_dataset_gives_the_same_as_arrays(kind, label):
    x = pixels(9, 6, 5, 3)
    y = [0, 1, 2] * 3
    items = kinds_of_item(x)[kind]
    data = as_image_data(Listed([(image, label(k)) for image, k in zip(items, y, strict=True)]))
    arrays = as_image_data((x // 128 * 128 if kind == "palette" else x, y))
    ids = torch.tensor([8, 0, 3])
    torch.testing.assert_close(data.batch(ids)[0], arrays.batch(ids)[0], rtol=0, atol=0)
    assert data.batch(ids)[1].tolist() == [2, 0, 0]
    assert data.images is None
    assert (data.shape, data.classes, data.normalisation) == (arrays.shape, arrays.classes, arrays.normalisation)
    part = data.subset(torch.tensor([5, 8])).subset(torch.tensor([1]))
    torch.testing.assert_close(part.batch(torch.tensor([0]))[0], arrays.batch(torch.tensor([8]))[0], rtol=0, atol=0)


def test_float_items_are_taken_as_they_are():
    x = torch.randn(3, 1, 4, 4)
    data = as_image_data(Listed([(image, 0) for image in x]))
    assert data.normalisation == Normalisation((0.0,), (1.0,))
    torch.testing.assert_close(data.batch(torch.arange(3))[0], x, rtol=0, atol=0)


def test_a_loader_gives_its_dataset_through_its_collate_function():
    items = [(float(k), f"class {k % 2}") for k in range(5)]

    def collate(batch: list) -> tuple[Tensor, list[int]]:
        return torch.tensor([[[[value]]] for value, _ in batch]), [int(name[-1]) for _, name in batch]

    loader = DataLoader(Listed(items), batch_size=2, shuffle=True, drop_last=True, collate_fn=collate)
    data = as_image_data(loader)
    images, labels = all_of(data)
    assert images.ravel().tolist() == [0, 1, 2, 3, 4]
    assert labels == [0, 1, 0, 1, 0]


def test_a_collate_function_is_applied_to_a_loader_of_tensors_too():
    def doubled(batch: list) -> tuple[Tensor, Tensor]:
        return 2 * torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])

    x = torch.randn(5, 1, 2, 2)
    data = as_image_data(DataLoader(TensorDataset(x, torch.arange(5)), collate_fn=doubled))
    torch.testing.assert_close(data.batch(torch.arange(5))[0], 2 * x, rtol=0, atol=0)


def test_a_loader_of_tensors_is_taken_whole():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    data = as_image_data(DataLoader(TensorDataset(x, torch.arange(5)), batch_size=2))
    assert data.images.data_ptr() == x.data_ptr()


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("source", [Endless(), DataLoader(Endless())], ids=["dataset", "loader"])
def test_an_iterable_dataset_is_refused(source):
    with pytest.raises(DataError, match=r"map-style Dataset with a length.*found Endless"):
        as_image_data(source)


def test_a_dataset_of_mixed_sizes_names_the_first_two():
    items = [(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), 0), (torch.zeros(3, 5, 4), 0)]
    with pytest.raises(
        DataError, match=r"found \(3, 4, 4\) torch.float32 as item 0 and \(3, 5, 4\) torch.float32 as item 2"
    ):
        as_image_data(Listed(items))


def test_a_dataset_that_changes_its_mind_is_an_error():
    dataset = Listed([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 4, 4), 1)])
    data = as_image_data(dataset)
    dataset.items[1] = (torch.zeros(1, 4, 4), 0)
    with pytest.raises(DataError, match=r"expected label 1 for sample 1 as at first, found 0"):
        data.batch(torch.tensor([0, 1]))
    dataset.items[1] = (torch.zeros(1, 5, 4), 1)
    with pytest.raises(DataError, match=r"expected 1 images \(1, 4, 4\) torch.float32, found \(1, 1, 5, 4\)"):
        data.batch(torch.tensor([1]))


@pytest.mark.parametrize("item", [torch.zeros(1, 2, 2), (torch.zeros(1, 2, 2), 1, 2)], ids=["bare", "triple"])
def test_items_that_are_no_pairs_are_refused(item):
    with pytest.raises(DataError, match=r"expected \(image, label\) as item 0"):
        as_image_data(Listed([item]))


def test_a_subset_is_numbered_from_zero():
    x = pixels(10, 1, 3, 3)
    data = as_image_data((x, np.arange(10)))
    part = data.subset(torch.tensor([7, 2, 5])).subset(torch.tensor([2, 0]))
    assert (len(part), part.labels.tolist(), part.classes) == (2, [5, 7], 10)
    np.testing.assert_array_equal(part.images.numpy(), x[[5, 7]])
    np.testing.assert_array_equal(part.batch(torch.tensor([1]))[0].numpy(), x[[7]])
    assert part.normalisation == data.normalisation


def test_a_position_beyond_a_subset_is_an_error():
    part = as_image_data((pixels(10, 1, 3, 3), np.arange(10))).subset(torch.tensor([7, 2]))
    with pytest.raises((IndexError, RuntimeError)):
        part.batch(torch.tensor([2]))


def test_the_digest_follows_pixels_labels_shape_type_and_classes():
    x, y = pixels(5, 1, 2, 8), [0, 1, 0, 1, 1]
    changed = x.copy()
    changed[4, 0, 1, 7] ^= 1
    digests = [
        as_image_data((x, y)).digest(),
        as_image_data((changed, y)).digest(),
        as_image_data((x, [0, 1, 0, 1, 0])).digest(),
        as_image_data((x.reshape(5, 1, 4, 4), y)).digest(),
        as_image_data((x.astype(np.float32), y)).digest(),
        as_image_data((x, y), classes=3).digest(),
        as_image_data((x[:4], y[:4])).digest(),
    ]
    assert len(set(digests)) == len(digests)
    whole = as_image_data((x, y))
    assert whole.digest() == digests[0] == as_image_data((x.copy(), y)).digest()
    assert whole.subset(torch.arange(4)).digest() == as_image_data((x[:4], y[:4]), classes=2).digest()
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)


def test_the_digest_of_a_dataset_is_stable_even_with_random_transforms():
    items = [(torch.randn(1, 4, 4), k % 2) for k in range(40)]

    class Jittered(Listed):
        def __getitem__(self, index: int) -> object:
            image, label = self.items[index]
            return image + torch.rand(()), label

    class Renamed(Listed):
        pass

    def digest(dataset: Dataset) -> str:
        return as_image_data(dataset).digest()

    assert digest(Listed(items)) == digest(Listed(list(items)))
    assert digest(Jittered(items)) == digest(Jittered(items)) != digest(Listed(items))
    assert digest(Listed(items)) != digest(Listed([(torch.zeros(1, 4, 4), label) for _, label in items]))
    assert digest(Listed(items)) != digest(Listed(items[:39]))
    assert digest(Listed(items)) != digest(Renamed(items))


# --- splits and sizes -----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(-(2**70), 2**70),
)
def test_a_split_holds_out_its_share_of_every_class(labels, fraction, seed):
    counts = {label: labels.count(label) for label in set(labels)}
    expected = {label: min(round(n * fraction), n - 1) for label, n in counts.items()}
    if not any(expected.values()):
        with pytest.raises(DataError, match="raise the fraction"):
            stratified_split(torch.tensor(labels), fraction, seed)
        return
    kept, held_out = stratified_split(torch.tensor(labels), fraction, seed)
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    assert {label: sum(labels[i] == label for i in held_out) for label in counts} == expected


def test_a_split_is_fixed_by_its_seed_and_no_global_state():
    labels = torch.arange(200) % 7
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = stratified_split(labels, 0.3, 5)[1]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, stratified_split(labels, 0.3, 5)[1])
    assert not torch.equal(first, stratified_split(labels, 0.3, 6)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(ConfigError, match=r"expected a fraction between 0 and 1"):
        stratified_split(torch.arange(10) % 2, fraction, 0)


@pytest.mark.parametrize("lazy", [False, True])
def test_gray_28_is_padded_to_32_and_repeated(lazy):
    x = pixels(4, 1, 28, 28)
    y = [0, 1, 0, 1]
    source = Listed([(torch.from_numpy(image), k) for image, k in zip(x, y, strict=True)]) if lazy else (x, y)
    data = as_image_data(source)
    fitted = fit_to(data, size=32, channels=3)
    expected = np.zeros((4, 3, 32, 32), np.uint8)
    expected[:, :, 2:30, 2:30] = x
    np.testing.assert_array_equal(all_of(fitted)[0], expected)
    assert (fitted.shape, all_of(fitted)[1]) == ((3, 32, 32), y)
    assert fitted.normalisation == Normalisation(data.normalisation.mean * 3, data.normalisation.std * 3)
    again = fit_to(fitted, size=61, channels=3).batch(torch.tensor([2]))[0]  # from 32, where 28 would be doubled
    np.testing.assert_array_equal(again.numpy(), np.pad(expected[2:3], ((0, 0), (0, 0), (14, 15), (14, 15))))


def test_small_images_are_enlarged_by_a_whole_factor():
    x = pixels(3, 1, 8, 7)
    fitted = fit_to(as_image_data((x, [0, 1, 2])), size=33, channels=1)
    large = x.repeat(4, axis=2).repeat(4, axis=3)  # (3, 1, 32, 28)
    np.testing.assert_array_equal(fitted.images.numpy(), np.pad(large, ((0, 0), (0, 0), (0, 1), (2, 3))))


def test_fit_to_follows_a_subset():
    x = pixels(5, 1, 4, 4)
    part = fit_to(as_image_data((x, np.arange(5))).subset(torch.tensor([4, 1])), size=8, channels=1)
    np.testing.assert_array_equal(part.images.numpy(), x[[4, 1]].repeat(2, axis=2).repeat(2, axis=3))


@pytest.mark.parametrize(("shape", "size", "channels"), [((1, 9, 4), 8, 1), ((3, 8, 8), 8, 1), ((2, 8, 8), 8, 3)])
def test_images_that_do_not_fit_are_refused(shape, size, channels):
    data = as_image_data((pixels(2, *shape), [0, 1]) if shape[0] != 2 else (torch.zeros(2, *shape), [0, 1]))
    with pytest.raises(
        DataError, match=f"expected images of at most {size}x{size} with 1 or {channels} channels, found"
    ):
        fit_to(data, size=size, channels=channels)


# --- on the device --------------------------------------------------------------------------------------------------

NORM = Normalisation((120.5, 60.25, 200.0), (50.0, 33.0, 71.5))


def splitmix64(seed: int, count: int) -> list[int]:
    """The sequence as in the paper, in Python integers."""
    numbers = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_hash_is_splitmix64():
    found = [number % 2**64 for number in counter_hash(torch.arange(1000)).tolist()]
    assert found == splitmix64(0, 1000)
    assert found[:2] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # published


def test_each_part_of_the_key_matters():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,), (0, 0, 0)]
    numbers = {tuple(counter_hash(torch.arange(4), *key).tolist()) for key in keys}
    assert len(numbers) == len(keys)


def randoms(
    augment: str, x: Tensor, ids: Tensor | None, stream: int = 0, seed: int = 3, norm: Normalisation = NORM
) -> Tensor:
    return Preprocess(norm, augment, seed)(x, ids, stream=stream)


def normalised(x: Tensor) -> np.ndarray:
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (NORM.mean, NORM.std))
    return (x.numpy().astype(np.float32) - mean) / std


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_ids_only_normalisation_happens(augment, dtype):
    x = torch.from_numpy(pixels(5, 3, 8, 6)).to(dtype)
    before = x.clone()
    found = randoms(augment, x, None)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), normalised(x.float()))
    assert torch.equal(x, before)


def offsets_of(cut: np.ndarray, image: np.ndarray, pad: int) -> tuple[int, int, int]:
    """Finds by trying all which shift and flip of this one image the cut is; exactly one must do."""
    height, width = image.shape[1:]
    fits = []
    for flip in (0, 1):
        framed = np.pad(image[:, :, ::-1] if flip else image, ((0, 0), (pad, pad), (pad, pad)))
        for down in range(2 * pad + 1):
            for right in range(2 * pad + 1):
                if np.array_equal(framed[:, down : down + height, right : right + width], cut):
                    fits.append((down, right, flip))
    assert len(fits) == 1
    return fits[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (17, 24, 2), (5, 7, 1)])
def test_every_augmented_image_is_a_shift_and_flip_with_zeros_around(height, width, pad, dtype):
    x = torch.from_numpy(pixels(20, 3, height, width)).to(dtype)
    found = randoms("crop-flip", x, torch.arange(20)).numpy()
    assert found.dtype == np.float32
    kinds = {offsets_of(cut, image, pad) for cut, image in zip(found, normalised(x), strict=True)}
    assert len(kinds) > 5


def test_flip_alone_moves_nothing():
    x = torch.from_numpy(pixels(30, 3, 6, 8))
    found, plain = randoms("flip", x, torch.arange(30)).numpy(), normalised(x)
    flips = [np.array_equal(image, truth[:, :, ::-1]) for image, truth in zip(found, plain, strict=True)]
    kept = [np.array_equal(image, truth) for image, truth in zip(found, plain, strict=True)]
    assert [a != b for a, b in zip(flips, kept, strict=True)] == [True] * 30
    assert 5 < sum(flips) < 25


@pytest.mark.parametrize("augment", ["flip", "crop-flip"])
def test_a_sample_is_augmented_alike_in_every_batch(augment):
    x, ids = torch.from_numpy(pixels(40, 3, 16, 16)), torch.randint(0, 2**40, (40,))
    whole = randoms(augment, x, ids, stream=9)
    order = torch.randperm(40)
    torch.testing.assert_close(randoms(augment, x[order], ids[order], stream=9), whole[order], rtol=0, atol=0)
    for i in (0, 17, 39):
        torch.testing.assert_close(
            randoms(augment, x[i : i + 1], ids[i : i + 1], stream=9)[0], whole[i], rtol=0, atol=0
        )


@pytest.mark.parametrize("change", [{"stream": 1}, {"seed": 4}])
def test_another_pass_or_seed_augments_anew(change):
    x, ids = torch.from_numpy(pixels(1, 3, 32, 32)).expand(200, -1, -1, -1), torch.arange(200)
    same = (randoms("crop-flip", x, ids) == randoms("crop-flip", x, ids, **change)).flatten(1).all(1)
    assert same.sum() < 15  # 200 / 162 by chance


def test_augmentation_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    randoms("crop-flip", torch.from_numpy(pixels(4, 3, 8, 8)), torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_offsets_are_uniform_and_half_are_flipped():
    count = 16200
    ramp = torch.arange(1, 32 * 32 + 1, dtype=torch.float32).view(1, 1, 32, 32).expand(count, -1, -1, -1)
    found = (
        randoms("crop-flip", ramp, torch.arange(count), norm=Normalisation((0.0,), (1.0,)))[:, 0, 16, 14:16].long() - 1
    )
    flipped = found[:, 0] > found[:, 1]
    down = found[:, 0] // 32 - 16 + 4
    right = torch.where(flipped, 31 - found[:, 0] % 32, found[:, 0] % 32) - 14 + 4
    assert (down.min(), down.max(), right.min(), right.max()) == (0, 8, 0, 8)
    observed = torch.bincount((down * 9 + right) * 2 + flipped, minlength=162).double()
    chi_square = ((observed - count / 162) ** 2 / (count / 162)).sum()
    assert chi_square < 219  # 161 degrees of freedom: passed by chance once in 500
    assert chi_square > 113  # and this even is as unlikely
    assert abs(flipped.double().mean() - 0.5) < 0.012  # 3 standard deviations


def test_a_batch_with_other_channels_or_ids_is_refused():
    preprocess = Preprocess(NORM, "flip")
    with pytest.raises(DataError, match=r"expected images \(B, 3, H, W\) .* found \(2, 1, 4, 4\)"):
        preprocess(torch.zeros(2, 1, 4, 4), None, stream=0)
    with pytest.raises(DataError, match=r"found \(2, 3, 4, 4\) and \(3,\)"):
        preprocess(torch.zeros(2, 3, 4, 4), torch.arange(3), stream=0)


def test_an_unknown_augmentation_names_the_closest():
    with pytest.raises(
        ConfigError, match=r"expected augment as one of none, flip, crop-flip, found 'cropflip'; .* crop-flip"
    ):
        Preprocess(NORM, "cropflip")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_augments_as_the_cpu_does():
    x, ids = torch.from_numpy(pixels(64, 3, 32, 32)), torch.arange(64)
    preprocess = Preprocess(NORM, "crop-flip", 5)
    found = preprocess(x.cuda(), ids, stream=2)
    torch.testing.assert_close(found.cpu(), preprocess(x, ids, stream=2), rtol=0, atol=0)


# --- the real sets --------------------------------------------------------------------------------------------------


def real(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no folder")
    return os.environ[variable]


def test_fashion_mnist_is_read_whole():
    train, test = load_split(f"fashion:{real('NF_DATA_FASHION')}")
    assert (len(train), len(test), train.shape, train.classes) == (60000, 10000, (1, 28, 28), 10)
    assert torch.bincount(train.labels).tolist() == [6000] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    np.testing.assert_allclose(train.normalisation.mean, [0.2860 * 255], atol=0.02)  # the figures in common use
    np.testing.assert_allclose(train.normalisation.std, [0.3530 * 255], atol=0.02)


def test_cifar10_is_read_whole():
    train, test = load_split(f"cifar10:{real('NF_DATA_CIFAR10')}")
    assert (len(train), len(test), train.shape) == (50000, 10000, (3, 32, 32))
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    np.testing.assert_allclose(train.normalisation.mean, [125.307, 122.950, 113.865], atol=5e-4)
    np.testing.assert_allclose(train.normalisation.std, [62.993, 62.089, 66.705], atol=5e-4)

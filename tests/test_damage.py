"""Damage: each byte and each bit of a 64 KiB manifest, checkpoint and cache changed, every length, and wrong contents.

What is damaged here has no digest of its own making: that is the manifest's rules (test_manifest.py) and the tensors'
(the last part of this file). The sweeps go in steps that share no factor with a byte; the slow ones miss nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from nf_engine import checkpoint
from nf_engine.committed import go_back, read_run
from nf_engine.config import TrainConfig
from nf_engine.errors import CacheError, CorruptFileError, NFError
from nf_engine.heads import ModuleHead
from nf_engine.local_step import Unit
from nf_engine.manifest import FileEntry, Manifest, Position
from nf_engine.run_folder import NewFile, RunFolder
from nf_engine.storage import ActivationCache, CacheGeometry

SIZE, PAGE = 1 << 16, 4096
STEPS = [61, pytest.param(1, marks=pytest.mark.slow)]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: these tests write a file as often as it has bits."""
    path = Path(tempfile.mkdtemp(dir=next((p for p in ("/dev/shm",) if os.access(p, os.W_OK)), None)))
    yield path
    shutil.rmtree(path)


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A file by the description of the format: u64 length, JSON, bytes."""
    header, data = {}, b""
    for name, (dtype, shape, part) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def checkpoint_of(size: int) -> bytes:
    empty = len(safetensors({"unit0.body.weight": ("U8", [10_000], bytes(10_000))})) - 10_000
    data = bytes((i * 7 + i // 251) % 256 for i in range(size - empty))
    return safetensors({"unit0.body.weight": ("U8", [len(data)], data)})


def commit(path: Path, *checkpoints: bytes) -> RunFolder:
    """A run of one commit for each checkpoint."""
    run = RunFolder(path)
    run.begin("a" * 64, "b" * 64, {"torch": "2.13.0"}, [NewFile("config", b"lr = 0.1\n"), NewFile("plan", b"{}\n")])
    for step, data in enumerate(checkpoints, 1):
        run.add_metrics({"epoch": step})
        run.commit(Position(0, 0, step), [NewFile("train", data)])
    return run


def entry_of(run: RunFolder, role: str) -> FileEntry:
    assert run.manifest is not None
    (entry,) = run.manifest.of_role(role)
    return entry


def refuses(read: Callable[[], object], error: type[NFError] = CorruptFileError) -> bool:
    try:
        read()
    except error:
        return True
    return False


def bits(size: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, change) of every step-th bit."""
    return ((at // 8, 1 << at % 8) for at in range(0, 8 * size, step))


def whole_bytes(size: int, step: int) -> Iterator[tuple[int, int]]:
    return ((at, 0xFF) for at in range(0, size, step))


def sweep(path: Path, changes: Iterator[tuple[int, int]], refused: Callable[[int], bool]) -> tuple[int, int]:
    """How many changes of the file are refused, and how many there were; the file is as before after each."""
    data = path.read_bytes()
    reached = count = 0
    with path.open("r+b", buffering=0) as file:
        for at, change in changes:
            os.pwrite(file.fileno(), bytes([data[at] ^ change]), at)
            reached += refused(at)
            os.pwrite(file.fileno(), data[at : at + 1], at)
            count += 1
    assert path.read_bytes() == data
    return reached, count


# --- P9: changed bytes ---


def big_manifest() -> bytes:
    """As the 400th commit of a run of 350 blocks would write it, filled up to 64 KiB."""
    files = [FileEntry(f"b{i:03d}-g{i + 2:04d}.safetensors", "block", i, 1000 + i, f"{i:064x}") for i in range(350)]
    env = {"torch": "2.13.0", "fill": ""}
    short = Manifest(
        *("nf-manifest/1", 400, "a" * 64, "b" * 32, False, Position(350, 1, 2), "c" * 64, "d" * 64),
        *(env, tuple(files)),
    )
    room = SIZE - len(short.to_bytes())
    return dataclasses.replace(short, env={**env, "fill": "x" * room}).to_bytes()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("changes", [whole_bytes, bits])
def test_every_change_of_a_manifest_is_refused(changes, step, figure):
    data = big_manifest()
    assert len(data) == SIZE
    Manifest.parse(data, "m")
    damaged, reached, count = bytearray(data), 0, 0
    for at, change in changes(SIZE, step):
        damaged[at] ^= change
        reached += refuses(lambda: Manifest.parse(bytes(damaged), "m"))
        damaged[at] ^= change
        count += 1
    assert damaged == data
    figure("P9", f"{changes.__name__.removeprefix('whole_')} of a manifest changed, refused", reached, count)
    assert reached == count


def test_a_changed_manifest_is_refused_by_every_door(memory, figure):
    """The same through files."""
    path = memory / "run"
    commit(path, b"first", b"second").close()
    size = (path / "MANIFEST.json").stat().st_size
    step = 8 * size // 500

    def refused(_: int) -> bool:
        return refuses(lambda: RunFolder(path)) and refuses(lambda: read_run(path, ["plan"]))

    reached, count = sweep(path / "MANIFEST.json", bits(size, step), refused)
    some, of = sweep(path / "MANIFEST.prev.json", bits(size, step * 8), lambda _: refuses(lambda: go_back(path)))
    figure("P9", "bits of a manifest changed on the disk, refused by every reader", reached + some, count + of)
    assert (reached, some) == (count, of)
    RunFolder(path).close()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("changes", [whole_bytes, bits])
def test_every_change_of_a_checkpoint_is_refused(memory, changes, step, figure):
    with commit(memory / "run", checkpoint_of(SIZE)) as run:
        entry = entry_of(run, "train")
        assert entry.bytes == SIZE
        reached, count = sweep(run.path / entry.name, changes(SIZE, step), lambda _: refuses(lambda: run.read(entry)))
        assert run.read(entry) == checkpoint_of(SIZE)
    figure("P9", f"{changes.__name__.removeprefix('whole_')} of a checkpoint changed, refused", reached, count)
    assert reached == count


@contextlib.contextmanager
def big_cache(folder: Path):
    """13 chunks of one page, 52 samples, 64 KiB."""
    g = CacheGeometry(sample_shape=(250,), dtype="fp32", samples=52, chunk_bytes=4000)
    with ActivationCache.create(folder, "x000-g0001.nfc", g) as cache:
        cache.append(torch.arange(13_000.0).view(52, 250), torch.arange(52), torch.arange(52))
        record = cache.finish()
    assert (folder / record.name).stat().st_size == SIZE
    yield record


@pytest.mark.parametrize("step", [661, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [whole_bytes, bits])
def test_every_change_of_a_cache_is_refused(memory, changes, step, figure):
    with big_cache(memory) as record, ActivationCache.open(memory, record) as opened:

        def one_pass() -> None:
            for _ in opened.batches(0, 52, key=0):
                pass

        def refused(at: int) -> bool:
            """A chunk when it is read, all else when the file is opened."""
            if PAGE <= at < SIZE - 2 * PAGE:
                return refuses(one_pass, CacheError)
            return refuses(lambda: ActivationCache.open(memory, record).close(), CacheError)

        one_pass()
        reached, count = sweep(memory / record.name, changes(SIZE, step), refused)
        one_pass()
    figure("P9", f"{changes.__name__.removeprefix('whole_')} of a cache changed, refused", reached, count)
    assert reached == count


# --- P10: lengths ---


def lengths(path: Path, step: int) -> Iterator[int]:
    """The file grown to each length, then cut to each; whole again at the end. Not the length it has."""
    data = path.read_bytes()
    for size in range(len(data) + PAGE, -1, -1):
        if size == len(data) or size % step:
            continue
        os.truncate(path, size)
        yield size
    path.write_bytes(data)


@pytest.mark.parametrize("step", STEPS)
def test_every_other_length_of_a_checkpoint_is_refused(memory, step, figure):
    with commit(memory / "run", checkpoint_of(SIZE)) as run:
        entry = entry_of(run, "train")
        found = [refuses(lambda: run.read(entry)) for _ in lengths(run.path / entry.name, step)]
        assert run.read(entry) == checkpoint_of(SIZE)
    figure("P10", "other lengths of a checkpoint refused", sum(found), len(found))
    assert all(found)


@pytest.mark.parametrize("step", STEPS)
def test_every_other_length_of_a_manifest_is_refused(step, figure):
    data = big_manifest()
    grown = [data + more * size for size in range(1, PAGE + 1, step) for more in (b"\0", b"\n", b" ", b"}")]
    cut = (data[:size] for size in range(0, SIZE, step))
    found = [refuses(partial(Manifest.parse, other, "m")) for other in itertools.chain(cut, grown)]
    figure("P10", "other lengths of a manifest refused", sum(found), len(found))
    assert all(found)


@pytest.mark.parametrize("step", STEPS)
def test_every_other_length_of_a_cache_is_refused(memory, step, figure):
    with big_cache(memory) as record:
        found = [
            refuses(lambda: ActivationCache.open(memory, record).close(), CacheError)
            for _ in lengths(memory / record.name, step)
        ]
        ActivationCache.open(memory, record).close()
    figure("P10", "other lengths of a cache refused", sum(found), len(found))
    assert all(found)


# --- P10: files in each other's place ---


def test_files_in_each_others_place_are_refused(tmp_path, figure):
    """Files of equal length of two generations of a run, and of two runs; manifests of two runs."""
    first = commit(tmp_path / "a", b"first ", b"second")
    second = commit(tmp_path / "b", b"third ", b"fourth")
    with first, second:
        entry = entry_of(first, "train")
        whole = first.read(entry)
        for other in (tmp_path / "a" / "c0000002.safetensors", tmp_path / "b" / entry.name):
            shutil.copyfile(other, tmp_path / "a" / entry.name)
            with pytest.raises(CorruptFileError, match=rf"{entry.name}: expected 6 bytes with sha256 .*--recover"):
                first.read(entry)
        (tmp_path / "a" / entry.name).write_bytes(whole)
    shutil.copyfile(tmp_path / "b" / "MANIFEST.json", tmp_path / "a" / "MANIFEST.json")
    with pytest.raises(CorruptFileError, match=entry.name):
        read_run(tmp_path / "a", ["train"])
    shutil.copyfile(tmp_path / "b" / "MANIFEST.prev.json", tmp_path / "a" / "MANIFEST.prev.json")
    with pytest.raises(CorruptFileError, match=r"c0000002.safetensors"):
        go_back(tmp_path / "a")
    figure("P10", "files of other generations and runs refused", 4, 4)


# --- P10: tensors that are not the model's, whatever their digest ---

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
UNKNOWN = ["U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "float32", "", "O", "\0"]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("x", torch.zeros(shape, dtype=dtype))


def fill(model: nn.Module, data: bytes) -> None:
    checkpoint.fill({"m": model}, checkpoint.parse(data, "file"), "file")


def refused_untouched(model: Model, data: bytes) -> bool:
    """Whether the file is refused, by its name, with the model as it was."""
    with pytest.raises(CorruptFileError, match=r"^file: "):
        fill(model, data)
    return not model.x.any()


def claimed(dtype: str, shape: object, data: bytes, end: int | None = None) -> bytes:
    text = json.dumps({"m.x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data) if end is None else end]}})
    return struct.pack("<Q", len(text)) + text.encode() + data


def test_each_dtype_claimed_as_each_other_is_refused(figure):
    found = []
    for (name, dtype), other in itertools.product(DTYPES.items(), [*DTYPES, *UNKNOWN]):
        model = Model(dtype, (4,))
        if name == other:
            fill(model, claimed(name, [4], torch.ones(4, dtype=dtype).view(torch.uint8).numpy().tobytes()))
            assert model.x.all()
            continue
        as_is = torch.ones(4, dtype=dtype).view(torch.uint8).numpy().tobytes()
        found.append(refused_untouched(model, claimed(other, [4], as_is)))
        if other in DTYPES:  # the file is sound, but not the model's
            sound = torch.ones(4, dtype=DTYPES[other]).view(torch.uint8).numpy().tobytes()
            found.append(refused_untouched(model, claimed(other, [4], sound)))
    figure("P10", "dtypes claimed as others refused", sum(found), len(found))
    assert all(found)


SHAPES = [
    [],
    [0],
    [24],
    [1, 24],
    [24, 1],
    [3, 8],
    [6, 4],
    [2, 3, 4],
    [4, 6, 1],
    [1, 4, 6],
    [4, 0],
    [0, 6],
    [4, 5],
    [4, 7],
]
WRONG = [[-4, -6], [-1], [4.0, 6], [1 << 63], [1 << 64], [(1 << 64) - 1], [1 << 32, 1 << 32], [1 << 62, 4, 6]]
WRONG += [[4, 6, 1 << 63], [4, "6"], ["4", "6"], [[4, 6]], [4, None], [True, 24], [4, 6, 0], [1] * 100_000]
NO_SHAPES = ["46", None, 24, {"0": 4}, 1e999]


def test_each_wrong_shape_is_refused(figure):
    found = []
    ones = torch.ones(24).numpy().tobytes()
    for shape in [*SHAPES, *WRONG, *NO_SHAPES]:
        found.append(refused_untouched(Model(torch.float32, (4, 6)), claimed("F32", shape, ones)))
    for shape in SHAPES:  # the file is sound, but not the model's
        sound = torch.ones(shape).numpy().tobytes()
        found.append(refused_untouched(Model(torch.float32, (4, 6)), claimed("F32", shape, sound)))
    for end in (0, 95, 97, 1 << 32, 1 << 63, -96, 96.0, "96"):
        found.append(refused_untouched(Model(torch.float32, (4, 6)), claimed("F32", [4, 6], ones, end)))
    figure("P10", "shapes and offsets that are wrong refused", sum(found), len(found))
    assert all(found)


def test_a_key_that_is_there_twice_is_refused():
    """The library takes the last one, and may be given two of the same bytes."""
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    for keys, good in ((one, True), (one + b"," + one, False)):
        header = b"{" + keys + b"}"
        data = struct.pack("<Q", len(header)) + header + bytes(4)
        if good:
            assert checkpoint.parse(data, "it")["a"].tolist() == [0.0]
        else:
            assert refuses(lambda data=data: checkpoint.parse(data, "it"))


@pytest.mark.parametrize(
    "scores", [None, torch.zeros(3, 2).double(), torch.zeros(2, 3).double(), torch.zeros(4).double(), torch.zeros(2, 2)]
)
def test_scores_that_are_not_two_numbers_a_unit_are_refused(scores):
    assert checkpoint.scores_of({"scores": torch.tensor([[0.5, 1], [1, 2]]).double()}, 2, "it") == [[0.5, 1], [1, 2]]
    assert refuses(lambda: checkpoint.scores_of({} if scores is None else {"scores": scores}, 2, "it"))


def make_unit() -> tuple[Unit, torch.Tensor]:
    unit = Unit("unit0", [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], ModuleHead(nn.Linear(4, 2)))
    unit.prepare(TrainConfig(memory_budget=1 << 30, optimizer="adamw"))
    return unit, torch.zeros(1)


def trained_state() -> dict[str, torch.Tensor]:
    unit, losses = make_unit()
    unit.head(unit.body(torch.rand(2, 3, 8, 8)).mean((2, 3))).sum().backward()
    assert unit.optimizer is not None
    unit.optimizer.step()
    return {key: value.clone() for key, value in checkpoint.training_state(["unit0"], [unit], losses).items()}


def load(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of new units after loading these bytes."""
    unit, losses = make_unit()
    read = checkpoint.parse(checkpoint.to_bytes(state, {}), "file")
    checkpoint.load_training(["unit0"], [unit], losses, read, "file")
    return checkpoint.training_state(["unit0"], [unit], losses)


def test_a_training_state_that_is_not_the_models_is_refused(figure):
    """Each tensor left out, of another name, of another dtype, of another rank, longer; then one too many."""
    state = trained_state()
    loaded = load(state)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    wrong = [{**state, name: torch.zeros(1)} for name in ("unit1.body.x", "unit0.optimizer.99.step", "a", "\x1b[2J")]
    wrong += [
        {**state, f"unit0.optimizer.{i}.{name}": torch.zeros(1)} for i, name in ((0, "x"), (7, "step"), ("²", "y"))
    ]
    for key, value in state.items():
        rest = {k: v for k, v in state.items() if k != key}
        other = torch.int64 if value.dtype != torch.int64 else torch.int32
        wrong += [rest, {**rest, f"{key}_": value}, {**state, key: value.to(other)}, {**state, key: value[None]}]
        wrong += [{**state, key: torch.cat([value.flatten(), value.flatten()[:1]])}]
    found = []
    for damaged in wrong:
        with pytest.raises(CorruptFileError, match=r"^file: ") as caught:
            load(damaged)
        found.append(str(caught.value).isprintable())
    figure("P10", "training states that are not the model's refused", sum(found), len(found))
    assert all(found)

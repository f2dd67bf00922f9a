"""Golden files: what earlier versions wrote is read to the last bit, and what a later one writes is refused by name.

Each was written once by golden/make.py of its time. They are copied first: who owns a checkout is not theirs to say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

from nf_engine import _cache, checkpoint
from nf_engine.committed import go_back, read_run
from nf_engine.errors import CacheError, CorruptFileError
from nf_engine.manifest import Position
from nf_engine.run_folder import NewFile, RunFolder
from nf_engine.storage import ActivationCache, CacheGeometry, CacheRecord

GOLDEN = Path(__file__).with_name("golden")
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name.startswith("run-"))
BLOCK = {
    "unit0.body.0.weight": torch.tensor([i / 8 for i in range(24)]).view(2, 3, 4),
    "unit0.body.1.num_batches_tracked": torch.tensor(7),
    "unit0.head.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "unit0.head.bias": torch.tensor([0.1], dtype=torch.float16),
    "scores": torch.tensor([[0.5, 1.25]], dtype=torch.float64),
}


@pytest.fixture(params=VERSIONS)
def golden(request, tmp_path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    for file in (GOLDEN / request.param).iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[k].dtype, found[k].shape) == (v.dtype, v.shape) and torch.equal(found[k], v) for k, v in expected.items()
    )


def cache_record(path: Path, table_sha256: str) -> CacheRecord:
    return CacheRecord(
        name=path.name,
        tier="disk",
        geometry=CacheGeometry(sample_shape=(2, 3), dtype="fp32", samples=5, chunk_bytes=128),
        block=1,
        generation=3,
        fingerprint="00" * 32,
        order_key=0,
        seed_key=0,
        table_sha256=table_sha256,
    )


def test_a_run_of_each_version_is_read_and_goes_on(golden, figure):
    manifest, files = read_run(golden, ["config", "plan", "block", "initial", "metrics"])
    assert (manifest.generation, manifest.position, manifest.done) == (3, Position(1), False)
    assert (manifest.config_sha256, manifest.data_sha256) == ("c" * 64, "d" * 64)
    assert manifest.env == {"torch": "2.13.0", "device": "cpu"}
    assert files["config.toml"] == b"lr = 0.1\n"
    assert json.loads(files["metrics.jsonl"]) == {"block": 0, "epoch": 0, "loss": 2.5}
    assert same(checkpoint.parse(files["b000-g0003.safetensors"], "b"), BLOCK)
    assert same(checkpoint.parse(files["initial.safetensors"], "i"), {"stage0.weight": torch.tensor([0.0, 1.0, 2.0])})
    with RunFolder(golden) as run:
        assert run.strangers == []
        run.commit(Position(2), [NewFile("block", b"next", 1)])
        assert run.manifest is not None
        assert run.manifest.generation == 4
    figure("P27", "versions of run folders read", 1, 1)


def test_one_can_go_back_in_a_run_of_each_version(golden):
    assert go_back(golden).position == Position(0, 1, 2)
    with RunFolder(golden) as run:
        assert run.manifest is not None
        (entry,) = run.manifest.of_role("train")
        expected = {k: v for k, v in BLOCK.items() if k != "scores"}
        expected |= {"unit0.optimizer.0.step": torch.tensor(3.0), "losses": torch.tensor([2.5])}
        assert same(checkpoint.parse(run.read(entry), "c"), expected)


def test_a_cache_of_each_version_is_read(golden, figure):
    manifest, _ = read_run(golden, [])
    (entry,) = manifest.of_role("cache")
    record = cache_record(golden / entry.name, entry.sha256)
    assert (golden / entry.name).stat().st_size == entry.bytes == record.geometry.file_bytes
    with ActivationCache.open(golden, record) as cache:
        (batch,) = cache.batches(0, 5, key=0)
        order = batch.ids.argsort()
        assert batch.ids[order].tolist() == [100, 101, 102, 103, 104]
        assert batch.labels[order].tolist() == [0, 1, 2, -1, 4]
        assert torch.equal(batch.x[order].flatten(), torch.tensor([float(i) for i in range(30)]))
    figure("P27", "versions of caches read", 1, 1)


def test_newer_versions_are_refused_by_name(golden, figure):
    path = golden / "MANIFEST.json"
    text = path.read_bytes()
    body = text[: text.index(b',\n "self_sha256"')].replace(b"nf-manifest/1", b"nf-manifest/2") + b"\n}\n"
    seal = f',\n "self_sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
    path.write_bytes(body[:-3] + seal)
    for door in (RunFolder, lambda where: read_run(where, [])):
        with pytest.raises(
            CorruptFileError, match="expected nf-manifest/1, found 'nf-manifest/2'; read it with its own"
        ):
            door(golden)
    path.write_bytes(text)
    (entry,) = read_run(golden, [])[0].of_role("cache")
    data = bytearray((golden / entry.name).read_bytes())
    data[8:12] = struct.pack("<I", 2)
    data[4092:4096] = struct.pack("<I", _cache.crc32c(bytes(data[:4092])))
    (golden / entry.name).write_bytes(data)
    record = cache_record(golden / entry.name, entry.sha256)
    with pytest.raises(CacheError, match=r"version.*2"):
        ActivationCache.open(golden, record)
    with pytest.raises(CacheError):
        ActivationCache.open(golden, dataclasses.replace(record, table_sha256=""))
    figure("P27", "newer versions refused by name", 2, 2)


def test_the_golden_files_are_there_and_small():
    assert VERSIONS
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 100 << 10

"""The cache against the tensors written to it, and its bytes against a second reader and writer in plain Python."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import resource
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_engine import _cache
from nf_engine.errors import (
    CacheClosedError,
    CacheCorruptError,
    CacheError,
    CacheIncompleteError,
    CacheStaleError,
    DiskFullError,
    NonFiniteError,
    StorageError,
)
from nf_engine.storage import ActivationCache, CacheGeometry, CacheRecord, sample_order

GOLDEN_SHA256 = "fd7fba161d021181084f191015686092dea7b58f87ee75657e3e9c9048aa4116"
GOLDEN = CacheGeometry(sample_shape=(2, 3), dtype="fp32", samples=5, chunk_bytes=128)
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- A second implementation of format and order, from the specification alone -----------------------------------


def model_crc_of_a_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


MODEL_TABLE = [model_crc_of_a_byte(value) for value in range(256)]


def model_crc(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ MODEL_TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def model_up(value: int) -> int:
    return (value + 4095) // 4096 * 4096


def model_seal(page: bytes) -> bytes:
    page = page + bytes(4092 - len(page))
    return page + struct.pack("<I", model_crc(page))


def model_write(samples, ids, labels, copies, *, shape, dtype, spc, block, generation, n_copies, layout, fingerprint):
    """Bytes of a file that holds `samples`, each the bytes of one sample."""
    n, size = len(samples), len(samples[0])
    n_chunks, stride = -(-n // spc), model_up(spc * (size + 16))
    chunks = []
    for begin in range(0, n, spc):
        some = range(begin, min(begin + spc, n))
        data = b"".join(samples[i] for i in some).ljust(spc * size, b"\0")
        data += b"".join(struct.pack("<QiI", ids[i], labels[i], copies[i]) for i in some)
        chunks.append(data.ljust(stride, b"\0"))
    table = b"".join(struct.pack("<I", model_crc(chunk)) for chunk in chunks)
    table += bytes(model_up(len(table)) - len(table))
    table_at = 4096 + n_chunks * stride
    footer_at = table_at + len(table)
    header = b"\x89NFC\r\n\x1a\n" + struct.pack("<IIII", 1, 4096, 0x0A0B0C0D, 0)
    header += struct.pack("<HHHH", {"fp32": 1, "fp16": 2, "bf16": 3}[dtype], 0, layout, len(shape))
    header += struct.pack("<8Q", *shape, *[0] * (8 - len(shape)))
    header += struct.pack("<QQIIIIIHHQQ", size, n, spc, stride, n_chunks, n_copies, block, 0, 1, generation, 0)
    header += fingerprint + struct.pack("<QQQ", table_at, footer_at, footer_at + 4096)
    header = model_seal(header)
    footer = b"\x89NFE\r\n\x1a\n" + struct.pack("<II", 1, *struct.unpack("<I", header[4092:]))
    footer += struct.pack("<QIIQQ", n, n_chunks, model_crc(table), generation, footer_at + 4096) + fingerprint
    return header + b"".join(chunks) + table + model_seal(footer)


def model_read(data: bytes) -> list[tuple[bytes, int, int, int]]:
    """(sample, id, label, copy) of each position; every checksum asserted."""
    size, n, spc, stride, n_chunks = struct.unpack_from("<QQIII", data, 96)
    table_at, footer_at, total = struct.unpack_from("<QQQ", data, 184)
    assert len(data) == total
    for page in (data[:4096], data[footer_at:]):
        assert page == model_seal(page[:4092])
    found = []
    for i in range(n_chunks):
        chunk = data[4096 + i * stride : 4096 + (i + 1) * stride]
        assert struct.unpack_from("<I", data, table_at + 4 * i) == (model_crc(chunk),)
        for k in range(min(spc, n - i * spc)):
            found.append((chunk[k * size : (k + 1) * size], *struct.unpack_from("<QiI", chunk, spc * size + 16 * k)))
    return found


def model_plan(key: int, n: int, spc: int, window: int) -> list[int]:
    mask, count = (1 << 64) - 1, 0

    def mix(i: int) -> int:
        z = key + (i + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    def below(limit: int) -> int:
        nonlocal count
        while True:
            m = mix(count) * limit
            count += 1
            if m & mask >= ((1 << 64) - limit) % limit:
                return m >> 64

    chunks = list(range(-(-n // spc)))
    for j in range(len(chunks) - 1, 0, -1):
        k = below(j + 1)
        chunks[j], chunks[k] = chunks[k], chunks[j]
    members = {c: list(range(c * spc, min(n, (c + 1) * spc))) for c in chunks}
    left = {c: len(m) for c, m in members.items()}
    pool = [p for c in chunks[:window] for p in members[c]]
    waiting, out = chunks[window:], []
    while pool:
        j = below(len(pool))
        out.append(pool[j])
        pool[j] = pool[-1]
        pool.pop()
        left[out[-1] // spc] -= 1
        if left[out[-1] // spc] == 0 and waiting:
            pool += members[waiting.pop(0)]
    return out


# ---- Helpers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small changes would each reach the disk."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def thread_count(expected: int = -1) -> int:
    """All of the process, those of C++ among them. One that was joined may be listed for a moment: it is waited for."""
    for _ in range(500):
        count = len(os.listdir("/proc/self/task"))  # noqa: PTH208
        if expected in (-1, count):
            break
        time.sleep(0.01)
    return count


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def random_samples(geometry: CacheGeometry, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(geometry.samples, *geometry.sample_shape, generator=generator).to(TORCH[geometry.dtype])


def fill(cache: ActivationCache, x: torch.Tensor, batch: int = 7) -> CacheRecord:
    ids = 1000 + torch.arange(len(x))
    for i in range(0, len(x), batch):
        cache.append(x[i : i + batch], ids[i : i + batch] % 10 - 1, ids[i : i + batch])
    return cache.finish()


def write(folder: Path, geometry: CacheGeometry, name: str = "x004-g0001.nfc", **options) -> CacheRecord:
    with ActivationCache.create(folder, name, geometry, **options) as cache:
        return fill(cache, random_samples(geometry))


def read_back(
    cache: ActivationCache, batch: int, key: int, **options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options.setdefault("out_dtype", TORCH[cache.geometry.dtype])
    batches = [(b.x.clone(), b.labels, b.ids) for b in cache.batches(0, batch, key=key, **options)]
    x, labels, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return x, labels, ids


def golden_samples() -> torch.Tensor:
    data = (24 * np.arange(5)[:, None] + np.arange(24)[None]).astype(np.uint8)
    return torch.from_numpy(data.view(np.float32).reshape(5, 2, 3).copy())


def write_golden(folder: Path) -> CacheRecord:
    options = {"block": 4, "generation": 7, "fingerprint": bytes(range(32))}
    with ActivationCache.create(folder, "x004-g0007.nfc", GOLDEN, **options) as cache:
        cache.append(golden_samples(), torch.arange(5), 1000 + torch.arange(5))
        return cache.finish()


# ---- Format ------------------------------------------------------------------------------------------------------


def test_crc32c_has_its_known_values():
    for code in ("auto", "table"):
        assert _cache.crc32c(b"123456789", code=code) == 0xE3069283
        assert _cache.crc32c(bytes(32), code=code) == 0x8A9136AA
        assert _cache.crc32c(b"", code=code) == 0


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 40_000) | st.sampled_from([12_287, 12_288, 12_289, 24_576, 65_536]),
    at=st.integers(0, 9),
    cut=st.integers(0, 40_000),
    seed=st.integers(0, 1000),
)
def test_crc32c_paths_agree_and_continue(size, at, cut, seed):
    data = np.random.default_rng(seed).integers(0, 256, size + at, np.uint8).tobytes()[at:]
    whole = _cache.crc32c(data)
    assert whole == _cache.crc32c(data, code="table")
    for code in ("auto", "table"):
        assert _cache.crc32c(data[cut:], _cache.crc32c(data[:cut], code=code), code=code) == whole


def test_crc32c_of_long_data_matches_the_definition():
    data = np.random.default_rng(1).integers(0, 256, 30_001, np.uint8).tobytes()
    assert _cache.crc32c(data) == model_crc(data)
    assert _cache.crc32c(data, code="table") == model_crc(data)


def test_the_golden_file_has_its_sha256(tmp_path):
    record = write_golden(tmp_path)
    data = (tmp_path / record.name).read_bytes()
    assert len(data) == 24_576
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    assert [p.name for p in tmp_path.iterdir()] == [record.name]
    assert (tmp_path / record.name).stat().st_mode & 0o777 == 0o600


def test_the_model_writes_the_golden_file_too():
    samples = [bytes((24 * i + j) & 255 for j in range(24)) for i in range(5)]
    data = model_write(
        *(samples, [1000 + i for i in range(5)], list(range(5)), [0] * 5),
        shape=(2, 3),
        dtype="fp32",
        spc=2,
        block=4,
        generation=7,
        n_copies=1,
        layout=0,
        fingerprint=bytes(range(32)),
    )
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256


def test_geometry_has_the_sizes_of_the_specification():
    g = CacheGeometry(sample_shape=(64, 16, 16), dtype="fp16", samples=50_000)
    assert (g.samples_per_chunk, g.chunk_stride, g.chunks, g.file_bytes) == (32, 1_052_672, 1563, 1_645_342_720)
    g = CacheGeometry(sample_shape=(64, 56, 56), dtype="fp16", samples=1_281_167)
    assert (g.samples_per_chunk, g.chunk_stride, g.chunks) == (2, 806_912, 640_584)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"dtype": "fp8"}, {"samples": 0}, {"sample_shape": ()}, {"sample_shape": (0,)}, {"sample_shape": (1 << 25,)}),
        *({"copies": 0}, {"copies": 65536}, {"channels_last": True}, {"samples": 1 << 41}, {"chunk_bytes": 0}),
    ],
)
def test_a_geometry_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected|expects"):
        CacheGeometry(**{"sample_shape": (2, 3), "dtype": "fp32", "samples": 5, **wrong})


geometries = st.builds(
    CacheGeometry,
    sample_shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(sorted(TORCH)),
    samples=st.integers(1, 150),
    chunk_bytes=st.sampled_from([1, 256, 4096, 20_000, 1 << 20]),
)


@settings(max_examples=150, deadline=None)
@given(geometry=geometries, wrote=st.integers(1, 200), batch=st.integers(1, 200), key=st.integers(0, 2**64 - 1))
def test_what_is_written_is_read_bit_for_bit_and_the_ram_tier_is_equal(memory, geometry, wrote, batch, key):
    x = random_samples(geometry, key % 1000)
    results = []
    for tier in ("disk", "ram"):
        with ActivationCache.create(memory, "trip.nfc", geometry, tier=tier) as cache:
            fill(cache, x, wrote)
            results.append(read_back(cache, batch, key, window_bytes=3 * geometry.chunk_stride))
    order = torch.from_numpy(sample_order(key, geometry.samples, geometry, 3 * geometry.chunk_stride))
    for got, labels, ids in results:
        assert torch.equal(ids, 1000 + order)
        assert torch.equal(labels, ids % 10 - 1)
        assert torch.equal(bits(got), bits(x[order]))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    n=st.integers(1, 40),
    dtype=st.sampled_from(sorted(TORCH)),
    last=st.booleans(),
)
def test_the_model_reads_our_files_and_we_read_the_models(memory, shape, n, dtype, last):
    g = CacheGeometry(sample_shape=shape, dtype=dtype, samples=n, copies=3, channels_last=last, chunk_bytes=700)
    x = random_samples(g, n)
    stored = bits(x.permute(0, 2, 3, 1) if last else x).numpy()
    samples = [row.tobytes() for row in stored]
    ids, labels, copies = list(range(7, 7 + n)), [i % 3 - 1 for i in range(n)], [i % 3 for i in range(n)]
    with ActivationCache.create(memory, "both.nfc", g, block=9, generation=3) as cache:
        members = [torch.tensor(values) for values in (labels, ids, copies)]
        cache.append(x[:1], *(m[:1] for m in members[:2]), copies[0])
        cache.append(x[1:], *(m[1:] for m in members))
        record = cache.finish()
    path = memory / "both.nfc"
    data = path.read_bytes()
    assert model_read(data) == list(zip(samples, ids, labels, copies, strict=True))

    made = model_write(
        *(samples, ids, labels, copies),
        shape=shape,
        dtype=dtype,
        spc=g.samples_per_chunk,
        block=9,
        generation=3,
        n_copies=3,
        layout=int(last),
        fingerprint=bytes(32),
    )
    assert made == data
    path.write_bytes(made)
    with ActivationCache.open(memory, record) as cache:
        got, _, got_ids = read_back(cache, 5, 1)
        got_copies = torch.cat([b.copies for b in cache.batches(0, 5, key=1)])
    assert torch.equal(bits(got), bits(x[got_ids - 7]))
    assert torch.equal(got_copies, (got_ids - 7) % 3)


def test_the_record_survives_json(tmp_path):
    record = write(tmp_path, GOLDEN, seed_key=2**64 - 1)
    assert CacheRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_a_batch_has_the_dtype_and_memory_format_asked_for(tmp_path, out_dtype):
    g = CacheGeometry(sample_shape=(3, 4, 5), dtype="fp16", samples=10, channels_last=True)
    with ActivationCache.create(tmp_path, "a.nfc", g) as cache:
        x = torch.randn(10, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        fill(cache, x)
        for batch in cache.batches(0, 4, key=1, out_dtype=out_dtype):
            assert batch.x.dtype == out_dtype
            assert not batch.x.requires_grad
            assert batch.x.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.x, x[batch.ids - 1000].detach().half().to(out_dtype))


# ---- Order -------------------------------------------------------------------------------------------------------


def test_the_order_has_its_golden_values():
    assert _cache.mix(1, 0) == 0x910A2DEC89025CC1
    assert _cache.plan_order(1, 10, 3, 2).tolist() == [2, 5, 3, 4, 1, 0, 8, 6, 7, 9]
    assert _cache.plan_order(2, 10, 3, 2).tolist() == [4, 1, 5, 2, 3, 0, 7, 6, 9, 8]


@settings(max_examples=200, deadline=None)
@given(key=st.integers(0, 2**64 - 1), n=st.integers(0, 400), spc=st.integers(1, 50), window=st.integers(1, 40))
def test_the_order_is_the_models_and_a_permutation(key, n, spc, window):
    order = _cache.plan_order(key, n, spc, window).tolist()
    assert order == model_plan(key, n, spc, window)
    assert sorted(order) == list(range(n))


def test_an_epoch_that_starts_later_continues_the_same_order(tmp_path):
    g = CacheGeometry(sample_shape=(4,), dtype="fp32", samples=103, chunk_bytes=640)
    with ActivationCache.create(tmp_path, "a.nfc", g) as cache:
        fill(cache, random_samples(g))
        _, _, ids = read_back(cache, 10, 3)
        before = cache.stats().bytes_read
        for start in range(11):
            _, _, rest = read_back(cache, 10, 3, start=start)
            assert torch.equal(rest, ids[10 * start :])
        assert list(cache.batches(0, 10, key=3, start=11)) == []
        assert [len(b.ids) for b in cache.batches(0, 10, key=3, drop_last=True)] == [10] * 10
        # 11 chunks; an epoch begun at its last 3 samples reads no more than 3 of them
        assert cache.stats().bytes_read - before < 12 * 11 * g.chunk_stride
        _, _, other = read_back(cache, 10, 4)
        assert not torch.equal(other, ids)


def settled(count, quiet: float = 0.1) -> int:
    """What count() gives once it has not changed for a while."""
    now, since = count(), time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(0.01)
        if count() != now:
            now, since = count(), time.monotonic()
    return now


def test_the_window_bounds_what_is_read_ahead(tmp_path):
    g = CacheGeometry(sample_shape=(1024,), dtype="fp32", samples=300, chunk_bytes=16_384)
    with ActivationCache.create(tmp_path, "a.nfc", g) as cache:
        fill(cache, random_samples(g))
        batches = cache.batches(0, 1, key=1, window_bytes=3 * g.chunk_stride)
        for taken in range(1, 40):
            next(batches)
            # The ring holds two batches more; each of these samples may have been the last of its chunk.
            most = min(3 + 4 + (taken + 2) // 4, g.chunks) * g.chunk_stride
            assert settled(lambda: cache.stats().bytes_read, 0.01) <= most
        batches.close()
        _, _, ids = read_back(cache, 200, 1, window_bytes=2 * g.chunk_stride)  # a batch of more chunks than the window
        assert sorted(ids.tolist()) == list(range(1000, 1300))


# ---- Damage ------------------------------------------------------------------------------------------------------


def use(folder: Path, record: CacheRecord) -> None:
    with ActivationCache.open(folder, record) as cache:
        for _ in cache.batches(0, 5, key=0):
            pass


def test_every_changed_byte_is_refused(memory):
    record = write_golden(memory)
    path = memory / record.name
    data = path.read_bytes()
    use(memory, record)
    changes = np.random.default_rng(0).integers(1, 256, len(data))
    refused = 0
    with path.open("r+b", buffering=0) as file, ActivationCache.open(memory, record) as opened:
        for at, change in enumerate(changes.tolist()):
            os.pwrite(file.fileno(), bytes([data[at] ^ change]), at)
            try:
                if 4096 <= at < GOLDEN.table_offset:
                    list(opened.batches(0, 5, key=0))
                else:
                    ActivationCache.open(memory, record).close()
            except CacheError:
                refused += 1
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert refused == 24_576
    use(memory, record)


def test_every_other_length_is_refused(memory):
    record = write_golden(memory)
    path = memory / record.name
    data = path.read_bytes()
    for size in (*range(0, len(data), 61), len(data) - 1, *range(len(data) + 1, len(data) + 8193, 127)):
        path.write_bytes(data.ljust(size, b"\0")[:size])
        with pytest.raises(CacheIncompleteError, match=r"expected (24576|at least 16384) bytes, got"):
            ActivationCache.open(memory, record)


def test_swapped_chunks_are_refused(tmp_path):
    record = write_golden(tmp_path)
    path = tmp_path / record.name
    data = path.read_bytes()
    path.write_bytes(data[:4096] + data[8192:12288] + data[4096:8192] + data[12288:])
    with pytest.raises(
        CacheCorruptError, match=r"CRC32C (4d9329ab, expected b740062c|b740062c, expected 4d9329ab), twice"
    ):
        use(tmp_path, record)


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    record = write_golden(tmp_path)
    with ActivationCache.open(tmp_path, record) as cache:
        os.truncate(tmp_path / record.name, 9000)
        threads = thread_count()
        with pytest.raises(CacheIncompleteError, match="ends at byte") as caught:
            list(cache.batches(0, 5, key=0))
        assert caught.tb is not None  # holds the frames of the epoch alive, yet not its thread
        assert thread_count(threads) == threads


@pytest.mark.parametrize(
    "change",
    [
        *({"fingerprint": "ff" * 32}, {"generation": 8}, {"block": 5}, {"order_key": 1}, {"table_sha256": "00" * 32}),
        {"geometry": dataclasses.replace(GOLDEN, copies=2)},
    ],
)
def test_a_sound_file_of_another_record_is_stale(tmp_path, change):
    record = write_golden(tmp_path)
    with pytest.raises(CacheStaleError, match="expected"):
        ActivationCache.open(tmp_path, dataclasses.replace(record, **change))


def test_a_file_that_was_never_finished_is_incomplete(tmp_path):
    record = write_golden(tmp_path)
    path = tmp_path / record.name
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
    with pytest.raises(CacheIncompleteError, match="stopped early"):
        ActivationCache.open(tmp_path, record)


@pytest.mark.parametrize("at", [8, 12, 16, 24, 28, 32, 40, 48, 79, 80, 4091])
def test_a_footer_of_another_file_is_refused_though_its_checksum_holds(tmp_path, at):
    record = write_golden(tmp_path)
    path = tmp_path / record.name
    data = bytearray(path.read_bytes())
    footer = data[-4096:]
    footer[at] ^= 1
    path.write_bytes(bytes(data[:-4096]) + model_seal(bytes(footer[:4092])))
    with pytest.raises(CacheCorruptError, match=r"footer: expected|table: the checksum"):
        ActivationCache.open(tmp_path, record)


def test_links_and_folders_are_refused(tmp_path):
    record = write_golden(tmp_path)
    path = tmp_path / record.name
    os.link(path, tmp_path / "second")
    with pytest.raises(CacheCorruptError, match="one link, got 2 links"):
        ActivationCache.open(tmp_path, record)
    path.unlink()
    path.symlink_to("second")
    with pytest.raises(StorageError) as caught:
        ActivationCache.open(tmp_path, record)
    assert (caught.value.op, caught.value.path, caught.value.errno) == ("open", str(path), errno.ELOOP)
    for name in ("../x.nfc", "", ".", "..", "a/b", "/x", "-x", "X", "x" * 65):
        with pytest.raises(ValueError, match="expected a file name"):
            ActivationCache.open(tmp_path, dataclasses.replace(record, name=name))


# ---- Failures ----------------------------------------------------------------------------------------------------


def test_a_missing_or_unwritable_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError) as caught:
        ActivationCache.create(tmp_path / "none", "a.nfc", GOLDEN)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(StorageError, match=r"/proc/a\.nfc\.tmp: open failed"):
        ActivationCache.create(Path("/proc"), "a.nfc", GOLDEN)


def test_a_tmp_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "a.nfc.tmp").write_bytes(b"someone's")
    with pytest.raises(StorageError) as caught:
        ActivationCache.create(tmp_path, "a.nfc", GOLDEN)
    assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "a.nfc.tmp").read_bytes() == b"someone's"


def test_a_cache_larger_than_the_disk_is_refused_before_any_work(memory):
    g = CacheGeometry(sample_shape=(1 << 18,), dtype="fp32", samples=8_000_000)  # 8 TB
    with pytest.raises(DiskFullError) as caught:
        ActivationCache.create(memory, "big.nfc", g)
    assert caught.value.needed == g.file_bytes
    assert 0 < caught.value.free < g.file_bytes
    assert not (memory / "big.nfc.tmp").exists()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Python ignores SIGXFSZ, so that a write beyond the limit fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    with file_size_limit(8192), pytest.raises(DiskFullError):
        ActivationCache.create(tmp_path, "a.nfc", GOLDEN)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_is_raised_again_by_every_call_and_leaves_nothing(tmp_path):
    g = CacheGeometry(sample_shape=(1024,), dtype="fp32", samples=64, chunk_bytes=8192)
    x, ids = random_samples(g), torch.arange(64)
    with ActivationCache.create(tmp_path, "a.nfc", g) as cache:
        cache.append(x[:4], ids[:4], ids[:4])

        def write_the_rest():
            cache.append(x[4:], ids[4:], ids[4:])  # chunk 5 fails, perhaps after the last one has found a slab
            cache.finish()

        with file_size_limit(4096 + 5 * g.chunk_stride), pytest.raises(DiskFullError) as caught:
            write_the_rest()
        for call in (cache.finish, lambda: cache.append(x[:1], ids[:1], ids[:1]), lambda: cache.batches(0, 1, key=0)):
            with pytest.raises(DiskFullError) as again:
                call()
            assert again.value is caught.value
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tier", ["disk", "ram"])
@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        ("fp16", 70_000.0, "block 3 overflows fp16, up to 7e\\+04; set cache_dtype = bf16"),
        ("fp32", float("nan"), "block 3 is NaN or infinite before it is stored as fp32"),
        ("bf16", float("-inf"), "block 3 is NaN or infinite before it is stored as bf16"),
    ],
)
def test_a_value_that_is_not_finite_ends_the_cache(tmp_path, tier, dtype, value, says):
    g = CacheGeometry(sample_shape=(100,), dtype=dtype, samples=200, chunk_bytes=4096)
    ids = torch.arange(200)
    for at in (0, 7, 199):
        x = torch.full((200, 100), 60_000.0)
        x[at, 99] = value
        with ActivationCache.create(tmp_path, "a.nfc", g, tier=tier, block=3) as cache:
            with pytest.raises(NonFiniteError, match=says):
                cache.append(x, ids, ids)
            with pytest.raises(NonFiniteError):
                cache.finish()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_every_finite_extreme_is_stored(tmp_path, dtype):
    info = torch.finfo(TORCH[dtype])
    x = torch.tensor([[info.max], [info.min], [info.smallest_normal], [-0.0]], dtype=TORCH[dtype])
    with ActivationCache.create(tmp_path, "a.nfc", CacheGeometry(sample_shape=(1,), dtype=dtype, samples=4)) as cache:
        fill(cache, x)
        got, _, ids = read_back(cache, 4, 0)
    assert torch.equal(bits(got), bits(x[ids - 1000]))


def test_the_count_of_samples_must_match(tmp_path):
    with ActivationCache.create(tmp_path, "a.nfc", GOLDEN) as cache:
        cache.append(torch.zeros(3, 2, 3), torch.zeros(3, dtype=torch.int64), torch.arange(3))
        with pytest.raises(CacheIncompleteError, match="expected 5 samples, got 3"):
            cache.finish()
        with pytest.raises(CacheIncompleteError, match="before it was finished"):
            cache.batches(0, 1, key=0)
        with pytest.raises(CacheIncompleteError, match="expected 5 samples, got 6"):
            cache.append(torch.zeros(3, 2, 3), torch.zeros(3, dtype=torch.int64), torch.arange(3))
        cache.append(torch.zeros(2, 2, 3), torch.zeros(2, dtype=torch.int64), torch.arange(2))
        cache.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.nfc"]


def test_arguments_that_do_not_fit_are_refused_and_nothing_is_appended(tmp_path):
    x, ids = torch.zeros(2, 2, 3), torch.arange(2)
    wrong = [
        (torch.zeros(2, 3, 2), ids, ids, 0),
        (torch.zeros(2, 6), ids, ids, 0),
        (x.long(), ids, ids, 0),
        (x, ids[:1], ids, 0),
        (x, ids, ids.int(), 0),
        (x, ids - 2, ids, 0),
        (x, ids + (1 << 31), ids, 0),
        (x, ids, ids - 1, 0),
        (x, ids, ids, 1),
        (x, ids, ids, ids),
        (x, ids, ids, ids[:1]),
    ]
    with ActivationCache.create(tmp_path, "a.nfc", GOLDEN) as cache:
        for arguments in wrong:
            with pytest.raises(ValueError, match="expected"):
                cache.append(*arguments)
        fill(cache, golden_samples())
        for options in ({"key": -1}, {"key": 1 << 64}, {"key": 0, "start": -1}):
            with pytest.raises(ValueError, match="expected"):
                cache.batches(0, 1, **options)
        with pytest.raises(ValueError, match="expected batch_size"):
            cache.batches(0, 0, key=0)
    for options in ({"tier": "tape"}, {"fingerprint": b"short"}, {"block": 65536}, {"order_key": -1}):
        with pytest.raises(ValueError, match="expected"):
            ActivationCache.create(tmp_path, "b.nfc", GOLDEN, **options)


@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_leaving_early_removes_the_tmp_and_a_closed_cache_says_so(tmp_path, tier):
    with ActivationCache.create(tmp_path, "a.nfc", GOLDEN, tier=tier) as cache:
        cache.append(torch.zeros(3, 2, 3), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    cache.close()
    cache.abort()
    assert list(tmp_path.iterdir()) == []
    ids = torch.arange(1)
    for call in (
        cache.finish,
        lambda: cache.append(torch.zeros(1, 2, 3), ids, ids),
        lambda: cache.batches(0, 1, key=0),
    ):
        with pytest.raises(CacheClosedError, match="used after close"):
            call()


@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_closing_during_an_epoch_ends_it_with_an_error(tmp_path, tier):
    cache = ActivationCache.create(tmp_path, "a.nfc", GOLDEN, tier=tier)
    fill(cache, golden_samples())
    batches = cache.batches(0, 1, key=0)
    next(batches)
    cache.close()
    with pytest.raises(CacheClosedError):
        next(batches)


def test_a_ram_cache_cannot_be_opened_again(tmp_path):
    record = write(tmp_path, GOLDEN, tier="ram")
    with pytest.raises(CacheIncompleteError, match="ends with its process"):
        ActivationCache.open(tmp_path, record)


def test_an_abandoned_epoch_leaves_no_thread_and_no_descriptor(tmp_path):
    g = CacheGeometry(sample_shape=(512,), dtype="fp32", samples=200, chunk_bytes=4096)
    record = write(tmp_path, g)
    threads, descriptors = thread_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        with ActivationCache.open(tmp_path, record) as cache:
            batches = cache.batches(0, 3, key=1)
            next(batches)
            batches.close()
            cache.batches(0, 3, key=1)  # never begun
        with ActivationCache.create(tmp_path, "b.nfc", g) as cache:
            cache.append(random_samples(g)[:50], torch.arange(50), torch.arange(50))
    assert thread_count(threads) == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


def test_a_forked_child_cannot_use_or_remove_the_parents_cache(tmp_path):
    with ActivationCache.create(tmp_path, "a.nfc", GOLDEN) as cache:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
            child = os.fork()
        if child == 0:
            status = 1
            try:
                cache.finish()
            except CacheClosedError:
                cache.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / "a.nfc.tmp").exists()
        fill(cache, golden_samples())


# ---- The C++ module itself ---------------------------------------------------------------------------------------


def test_unaligned_requests_are_refused(tmp_path):
    file = _cache.io.Folder(str(tmp_path)).create("a")
    buffer = memoryview(_cache.AlignedBuffer(8192))
    file.write_chunk(0, buffer)
    for offset, view in ((1, buffer), (0, buffer[:100]), (0, buffer[512:4608]), (0, buffer[:0])):
        with pytest.raises(ValueError, match="multiples of 4096"):
            file.write_chunk(offset, view)
        with pytest.raises(ValueError, match="multiples of 4096"):
            file.read(offset, view)
    with pytest.raises((BufferError, TypeError)):
        file.read(0, bytes(4096))
    file.fsync()
    file.close()
    with pytest.raises(CacheClosedError):
        file.write_chunk(0, buffer)


def test_gather_checks_its_offsets():
    source = np.arange(100, dtype=np.uint8)
    out = np.zeros((3, 10), np.uint8)
    _cache.gather(source, np.array([90, 0, 45]), out)
    assert out[:, 0].tolist() == [90, 0, 45]
    assert out[:, 9].tolist() == [99, 9, 54]
    for offset in (-1, 91, 1 << 62, -(1 << 62)):
        with pytest.raises(IndexError, match="expected offsets"):
            _cache.gather(source, np.array([0, offset, 0]), out)


def test_other_threads_run_while_the_module_works():
    buffer = _cache.AlignedBuffer(1 << 29)
    stop, counted = threading.Event(), 0

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    before = counted
    _cache.crc32c(buffer, code="table")  # 512 MiB, a good part of a second
    during = counted - before
    stop.set()
    thread.join()
    assert during > 20


def test_build_info_says_what_was_built():
    info = _cache.build_info()
    assert info["build"] == "release"
    assert info["crc32c"] in ("streams", "serial", "table")

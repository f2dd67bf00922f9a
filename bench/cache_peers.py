"""The candidates of bench_cache: the activation cache and its peers, each as a writer and a reader of the same batches.

Both are generators. The first step opens the files and yields None, there the clock starts; the writer's second step
appends every batch and returns, the reader yields every sample once, in an order of its key.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nf_engine.cache_format import MIB, CacheGeometry, CacheRecord
from nf_engine.storage import ActivationCache, EngineOptions, sample_order

SHAPE = (64, 16, 16)
SAMPLE = 2 * 64 * 16 * 16  # bytes
BATCH = 64
GEOMETRY = CacheGeometry(sample_shape=SHAPE, dtype="fp16", samples=1 << 20)  # any number: 32 samples a chunk
CHUNK = GEOMETRY.samples_per_chunk
WINDOW = 64 * MIB // GEOMETRY.chunk_stride + 4  # chunks that the cache holds, the read-ahead among them


class Batch(NamedTuple):
    x: Tensor  # (N, 64, 16, 16), float16
    labels: Tensor  # (N,), int64
    ids: Tensor  # (N,), int64


Write = Callable[[Path, list[Batch]], Iterator[None]]  # yields once when its files are open; the clock starts there
Read = Callable[[Path, int], Iterator[Batch | None]]  # likewise None, then every sample once, in an order of the key


@dataclass(frozen=True)
class Candidate:
    """A way to store samples. needs: its package; direct: past the page cache; share: part of the samples, if slow."""

    name: str
    shuffle: str
    write: Write
    read: Read
    needs: str = "nf_engine"
    direct: bool = False
    durable: bool = True
    share: float = 1.0


def samples(count: int) -> list[Batch]:
    """`count` samples, no two alike, each batch in memory of its own, ids in no order."""
    rng = np.random.default_rng(0)
    base = np.maximum(rng.standard_normal((2048, *SHAPE), np.float32), 0).astype(np.float16)
    ids = torch.from_numpy(rng.permutation(count))
    made = []
    for start in range(0, count, BATCH):
        rows = np.arange(start, min(start + BATCH, count))
        x = np.roll(base[rows % len(base)], int(start // len(base)), axis=3)  # a later turn is another sample
        made.append(Batch(torch.from_numpy(x), torch.from_numpy(rows % 10), ids[rows].clone()))
    return made


# --- candidates: the cache ------------------------------------------------------------------------------------------


def write_cache(folder: Path, batches: list[Batch], chunk_bytes: int = MIB, durable: bool = True) -> Iterator[None]:
    count = sum(len(b.x) for b in batches)
    geometry = CacheGeometry(sample_shape=SHAPE, dtype="fp16", samples=count, chunk_bytes=chunk_bytes)
    with ActivationCache.create(folder, "x.nfc", geometry, options=EngineOptions(durable=durable)) as cache:
        yield
        for batch in batches:
            cache.append(*batch)
        cache.finish().save(folder / "record.json")


def read_cache(folder: Path, key: int) -> Iterator[Batch | None]:
    with ActivationCache.open(folder, CacheRecord.load(folder / "record.json")) as cache:
        yield None
        for x, labels, ids, _ in cache.batches(0, BATCH, key=key, out_dtype=torch.float16):
            yield Batch(x, labels, ids)


# --- candidates: one array, shuffled by sample ----------------------------------------------------------------------


def tags_of(batches: list[Batch]) -> np.ndarray:
    """(N, 2) int64: label and id of each sample."""
    return torch.cat([torch.stack((b.labels, b.ids), 1) for b in batches]).numpy()


def rows_of_batches(count: int, key: int) -> list[np.ndarray]:
    order = np.random.default_rng(key).permutation(count)
    return [order[start : start + BATCH] for start in range(0, count, BATCH)]


def tagged(x: np.ndarray, tags: np.ndarray) -> Batch:
    labels, ids = torch.from_numpy(np.ascontiguousarray(tags.T))
    return Batch(torch.from_numpy(x), labels, ids)


def write_memmap(folder: Path, batches: list[Batch]) -> Iterator[None]:
    count = sum(len(b.x) for b in batches)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (count, *SHAPE))
    yield
    for k, batch in enumerate(batches):
        x[k * BATCH : k * BATCH + len(batch.x)] = batch.x.numpy()
    x.flush()
    np.save(folder / "tags.npy", tags_of(batches))


def read_memmap(folder: Path, key: int) -> Iterator[Batch | None]:
    x, tags = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "tags.npy")
    yield None
    for rows in rows_of_batches(len(tags), key):
        yield tagged(x[rows], tags[rows])


def write_h5py(folder: Path, batches: list[Batch], **options: Any) -> Iterator[None]:
    import h5py

    tags = tags_of(batches)
    with h5py.File(folder / "x.h5", "w", **options) as file:
        x = file.create_dataset("x", (len(tags), *SHAPE), np.float16)
        yield
        for k, batch in enumerate(batches):
            x[k * BATCH : k * BATCH + len(batch.x)] = batch.x.numpy()
        file["tags"] = tags


def read_h5py(folder: Path, key: int, into: bool = False) -> Iterator[Batch | None]:
    import h5py

    with h5py.File(folder / "x.h5", "r") as file:
        x, tags = file["x"], file["tags"][:]
        yield None
        for rows in rows_of_batches(len(tags), key):
            out = np.empty((len(rows), *SHAPE), np.float16)
            for k, row in enumerate(rows):
                if into:
                    x.read_direct(out, np.s_[row], np.s_[k])
                else:
                    out[k] = x[row]
            yield tagged(out, tags[rows])


def write_lmdb(folder: Path, batches: list[Batch], append: bool = False, **options: Any) -> Iterator[None]:
    import lmdb

    size = 2 * sum(len(b.x) for b in batches) * SAMPLE  # a value takes whole pages
    with contextlib.closing(lmdb.open(str(folder / "db"), map_size=size, **options)) as env:
        yield
        position = 0
        for batch in batches:
            tags = tags_of([batch])
            with env.begin(write=True) as transaction:
                for x, tag in zip(batch.x.numpy(), tags, strict=True):
                    transaction.put(position.to_bytes(8, "big"), x.tobytes() + tag.tobytes(), append=append)
                    position += 1
        env.sync(True)


def read_lmdb(folder: Path, key: int, buffers: bool = False, **options: Any) -> Iterator[Batch | None]:
    import lmdb

    with (
        contextlib.closing(lmdb.open(str(folder / "db"), readonly=True, **options)) as env,
        env.begin(buffers=buffers) as transaction,
    ):
        count = env.stat()["entries"]
        yield None
        for rows in rows_of_batches(count, key):
            x, tags = np.empty((len(rows), *SHAPE), np.float16), np.empty((len(rows), 2), np.int64)
            for k, row in enumerate(rows):
                value = transaction.get(int(row).to_bytes(8, "big"))
                x[k] = np.frombuffer(value, np.float16, SAMPLE // 2).reshape(SHAPE)
                tags[k] = np.frombuffer(value, np.int64, 2, SAMPLE)
            yield tagged(x, tags)


def aligned(count: int) -> np.ndarray:
    """Memory for some samples at the start of a page, as O_DIRECT needs it."""
    return np.frombuffer(mmap.mmap(-1, count * SAMPLE), np.float16).reshape(count, *SHAPE)


def whole(done: int, wanted: int) -> None:
    if done != wanted:
        raise OSError(f"expected {wanted} bytes, got {done}")


def write_direct(folder: Path, batches: list[Batch], threads: int = 1) -> Iterator[None]:
    buffers = [aligned(BATCH) for _ in range(2 * threads)]
    fd = os.open(folder / "x", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, sum(len(b.x) for b in batches) * SAMPLE)

    def put(k: int, piece: np.ndarray) -> None:
        whole(os.pwrite(fd, piece.data, k * BATCH * SAMPLE), piece.nbytes)

    yield
    with ThreadPoolExecutor(threads) as pool:
        pending: list[Future[None]] = []
        for k, batch in enumerate(batches):
            if k >= len(buffers):
                pending[k - len(buffers)].result()
            piece = buffers[k % len(buffers)][: len(batch.x)]
            piece[:] = batch.x.numpy()
            pending.append(pool.submit(put, k, piece))
        for done in pending:
            done.result()
    os.close(fd)
    np.save(folder / "tags.npy", tags_of(batches))


def read_direct(folder: Path, key: int, threads: int = 1) -> Iterator[Batch | None]:
    tags, out = np.load(folder / "tags.npy"), aligned(BATCH)
    fd = os.open(folder / "x", os.O_RDONLY | os.O_DIRECT)

    def get(k: int, row: int) -> None:
        whole(os.preadv(fd, [out[k].data], row * SAMPLE), SAMPLE)

    yield None
    with ThreadPoolExecutor(threads) as pool:
        each = map if threads == 1 else pool.map
        for rows in rows_of_batches(len(tags), key):
            list(each(get, range(len(rows)), rows.tolist()))
            yield tagged(out[: len(rows)], tags[rows])
    os.close(fd)


def kvikio_file(path: Path, flags: str, **options: Any) -> Any:
    import kvikio
    import kvikio.defaults

    kvikio.defaults.set(options)
    return kvikio.CuFile(path, flags)


def write_kvikio(folder: Path, batches: list[Batch], **options: Any) -> Iterator[None]:
    with kvikio_file(folder / "x", "w", **options) as file:
        yield
        sent = [file.pwrite(b.x.numpy(), b.x.nbytes, k * BATCH * SAMPLE) for k, b in enumerate(batches)]
        for done, batch in zip(sent, batches, strict=True):
            whole(done.get(), batch.x.nbytes)
    np.save(folder / "tags.npy", tags_of(batches))


def read_kvikio(folder: Path, key: int, **options: Any) -> Iterator[Batch | None]:
    tags = np.load(folder / "tags.npy")
    with kvikio_file(folder / "x", "r", **options) as file:
        yield None
        for rows in rows_of_batches(len(tags), key):
            x = np.empty((len(rows), *SHAPE), np.float16)
            sent = [file.pread(x[k], SAMPLE, int(row) * SAMPLE) for k, row in enumerate(rows)]
            for done in sent:
                whole(done.get(), SAMPLE)
            yield tagged(x, tags[rows])


# --- candidates: an array in chunks, shuffled by chunk --------------------------------------------------------------


def chunk_shuffled(load: Callable[[int], np.ndarray], tags: np.ndarray, key: int) -> Iterator[Batch]:
    """The order of the cache on another store: two threads read at most as many chunks ahead as the cache holds."""
    count = len(tags)
    order = sample_order(key, count, GEOMETRY)
    chunk_of, slot_of = np.divmod(order, CHUNK)
    chunks, first = np.unique(chunk_of, return_index=True)
    to_load = iter(chunks[np.argsort(first)].tolist())
    last = dict(zip(chunk_of.tolist(), range(count), strict=True))
    held: dict[int, Future[np.ndarray]] = {}
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, count, BATCH):
            rows = order[start : start + BATCH]
            x = np.empty((len(rows), *SHAPE), np.float16)
            for k in range(len(rows)):
                while len(held) < WINDOW and (chunk := next(to_load, None)) is not None:
                    held[chunk] = pool.submit(load, chunk)
                chunk = int(chunk_of[start + k])
                x[k] = held[chunk].result()[slot_of[start + k]]
                if last[chunk] == start + k:
                    del held[chunk]
            yield tagged(x, tags[rows])


def write_zarr(folder: Path, batches: list[Batch], **options: Any) -> Iterator[None]:
    import zarr

    tags = tags_of(batches)
    shape, chunks = (len(tags), *SHAPE), (CHUNK, *SHAPE)
    x = zarr.create_array(store=folder / "x.zarr", shape=shape, chunks=chunks, dtype="float16", **options)
    yield
    for k, batch in enumerate(batches):
        x[k * BATCH : k * BATCH + len(batch.x)] = batch.x.numpy()
    np.save(folder / "tags.npy", tags)


def read_zarr(folder: Path, key: int) -> Iterator[Batch | None]:
    import zarr

    x, tags = zarr.open_array(folder / "x.zarr", mode="r"), np.load(folder / "tags.npy")
    yield None
    yield from chunk_shuffled(lambda c: np.asarray(x[c * CHUNK : (c + 1) * CHUNK]), tags, key)


def open_tensorstore(folder: Path, sync: bool, **options: Any) -> Any:
    import tensorstore

    store = {"driver": "file", "path": str(folder / "x.zarr")}
    spec = {"driver": "zarr3", "kvstore": store, "context": {"file_io_sync": sync}, **options}
    return tensorstore.open(spec, create=bool(options)).result()


def write_tensorstore(folder: Path, batches: list[Batch], sync: bool = True) -> Iterator[None]:
    tags = tags_of(batches)
    grid = {"name": "regular", "configuration": {"chunk_shape": [CHUNK, *SHAPE]}}
    metadata = {"shape": [len(tags), *SHAPE], "data_type": "float16", "chunk_grid": grid}
    x = open_tensorstore(folder, sync, metadata=metadata)
    yield
    pending: list[Any] = []
    for k, batch in enumerate(batches):
        if k >= 8:
            pending[k - 8].result()
        pending.append(x[k * BATCH : k * BATCH + len(batch.x)].write(batch.x.numpy()))
    for done in pending:
        done.result()
    np.save(folder / "tags.npy", tags)


def read_tensorstore(folder: Path, key: int) -> Iterator[Batch | None]:
    x, tags = open_tensorstore(folder, sync=True), np.load(folder / "tags.npy")
    yield None
    yield from chunk_shuffled(lambda c: x[c * CHUNK : min((c + 1) * CHUNK, len(tags))].read().result(), tags, key)


# --- candidates: a file a batch, shuffled by file -------------------------------------------------------------------


def write_torch(folder: Path, batches: list[Batch], crc32: bool = True) -> Iterator[None]:
    torch.serialization.set_crc32_options(crc32)
    yield
    for k, batch in enumerate(batches):
        torch.save(batch._asdict(), folder / f"{k:06}.pt")


def read_torch(folder: Path, key: int, mapped: bool = False) -> Iterator[Batch | None]:
    files = sorted(folder.glob("*.pt"))
    yield None
    for k in np.random.default_rng(key).permutation(len(files)):
        found = torch.load(files[k], mmap=mapped)
        yield Batch(**{name: t.clone() if mapped else t for name, t in found.items()})


def write_safetensors(folder: Path, batches: list[Batch]) -> Iterator[None]:
    from safetensors.torch import save_file

    yield
    for k, batch in enumerate(batches):
        save_file(batch._asdict(), folder / f"{k:06}.safetensors")


def read_safetensors(folder: Path, key: int) -> Iterator[Batch | None]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    yield None
    for k in np.random.default_rng(key).permutation(len(files)):
        yield Batch(**load_file(files[k]))


def candidates() -> list[Candidate]:
    """In the order of the table: shuffled by chunk, by sample, by file."""
    part = functools.partial
    lmdb_write, lmdb_read = {"sync": False, "writemap": True}, {"lock": False, "readahead": False}
    kvikio_best = {"num_threads": 4, "auto_direct_io_read": True, "auto_direct_io_write": True}
    one_sample = part(write_cache, chunk_bytes=SAMPLE)
    quarter = {"share": 0.25}
    return [
        Candidate("nf_engine", "chunk", write_cache, read_cache, direct=True),
        Candidate(
            "nf_engine, no fsync", "chunk", part(write_cache, durable=False), read_cache, direct=True, durable=False
        ),
        Candidate("zarr, zstd", "chunk", write_zarr, read_zarr, "zarr", **quarter),
        Candidate("zarr, no compressor", "chunk", part(write_zarr, compressors=None), read_zarr, "zarr", **quarter),
        Candidate("tensorstore zarr3", "chunk", write_tensorstore, read_tensorstore, "tensorstore"),
        Candidate(
            "tensorstore, sync off", "chunk", part(write_tensorstore, sync=False), read_tensorstore, "tensorstore"
        ),
        Candidate("nf_engine, a sample a chunk", "sample", one_sample, read_cache, direct=True),
        Candidate("numpy.memmap", "sample", write_memmap, read_memmap),
        Candidate("h5py", "sample", write_h5py, read_h5py, "h5py", **quarter),
        Candidate(
            "h5py, latest, read_direct", "sample", part(write_h5py, libver="latest"), part(read_h5py, into=True),
            "h5py", **quarter,
        ),
        Candidate("lmdb", "sample", write_lmdb, read_lmdb, "lmdb", **quarter),
        Candidate(
            "lmdb, writemap, no readahead", "sample", part(write_lmdb, append=True, **lmdb_write),
            part(read_lmdb, buffers=True, **lmdb_read), "lmdb", **quarter,
        ),
        Candidate("kvikio", "sample", write_kvikio, read_kvikio, "kvikio"),
        Candidate(
            "kvikio, 4 threads, direct", "sample", part(write_kvikio, **kvikio_best),
            part(read_kvikio, **kvikio_best), "kvikio", direct=True,
        ),
        Candidate("Python pwrite, preadv", "sample", write_direct, read_direct, direct=True),
        Candidate(
            "Python, 4 threads", "sample", part(write_direct, threads=4), part(read_direct, threads=4), direct=True
        ),
        Candidate("torch.save", "file", write_torch, read_torch),
        Candidate(
            "torch.save, no crc, mmap", "file", part(write_torch, crc32=False), part(read_torch, mapped=True)
        ),
        Candidate("safetensors", "file", write_safetensors, read_safetensors, "safetensors"),
    ]  # fmt: skip

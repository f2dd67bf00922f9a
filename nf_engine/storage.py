"""Storage: the activation cache between two blocks.

A trained block's outputs are written once, in chunks of whole samples, then read in shuffled order in every epoch of
the next block. Tier "disk" is one .nfc file, tier "ram" the same chunks in memory: the tier changes time, not numbers.

`cache_format` lays out the file. It is written as <name>.tmp into space that was reserved first, renamed when complete,
and not synced: a cache can be derived again, so that a mismatch after a power cut means rebuild.
Shapes: samples (C, H, W), batches (N, C, H, W).

Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Storage, fed by the Worker).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nf_engine import _cache
from nf_engine.cache_format import (
    DTYPES,
    MIB,
    PAGE,
    SAMPLE_RECORD,
    CacheGeometry,
    CacheRecord,
    check_file,
    check_range,
    pack_footer,
    pack_header,
    page_up,
    write_part,
)
from nf_engine.errors import (
    CacheClosedError,
    CacheIncompleteError,
    NFError,
    NonFiniteError,
)

__all__ = ["ActivationCache", "Batch", "CacheGeometry", "CacheRecord", "CacheStats", "build_info", "sample_order"]

log = logging.getLogger(__name__)

READ_AHEAD = 4  # chunks beyond the window, so that the disk works while the window drains


@dataclasses.dataclass(slots=True)
class CacheStats:
    """Counts since the cache was created or opened: bytes moved to and from chunks, seconds that callers waited for the
    disk, chunks read a second time, and whether the disk is reached past the page cache."""

    bytes_written: int = 0
    bytes_read: int = 0
    write_stall: float = 0.0
    read_stall: float = 0.0
    rereads: int = 0
    direct: bool = False


class Batch(NamedTuple):
    x: Tensor  # (N, *sample_shape), overwritten by the next step
    labels: Tensor  # (N,), int64, -1 where a sample has none
    ids: Tensor  # (N,), int64, on the CPU
    copies: Tensor  # (N,), int64, on the CPU: number of the augmented copy, what `append` takes to pass it on


def sample_order(key: int, samples: int, geometry: CacheGeometry, window_bytes: int = 64 * MIB) -> NDArray[np.int64]:
    """Positions in the order of writing, in the order in which `batches` hands them out, on every tier.

    Args:
        key: in [0, 2**64), drawn for this epoch.
        samples: how many positions there are.
        geometry: gives the samples of a chunk and its bytes.
        window_bytes: chunks within so many bytes are mixed with each other; at least two chunks.

    Returns:
        (samples,) int64, a permutation.
    """
    if not 0 <= key < 1 << 64:
        raise ValueError(f"expected key in [0, 2**64), got {key}")
    return _cache.plan_order(key, samples, geometry.samples_per_chunk, _window_chunks(geometry, window_bytes))


def build_info() -> dict[str, str]:
    """How the compiled module was built and what it uses on this machine, as name -> text."""
    return _cache.build_info()


def _window_chunks(geometry: CacheGeometry, window_bytes: int) -> int:
    return max(2, window_bytes // geometry.chunk_stride)


class ActivationCache:
    """The outputs of one block on their way to the next.

    Made by `create`, filled by `append`, completed by `finish`, read by `batches`; or made by `open` and read. As a
    context manager it is closed at the end, and leaves nothing behind if it was not finished.
    """

    def __init__(self, record: CacheRecord, chunks: _DiskChunks | _RamChunks, *, complete: bool) -> None:
        """Use `create` or `open`."""
        self._record = record
        self._chunks = chunks
        self._complete = complete
        self._appended = record.geometry.samples if complete else 0
        self._slab: _Slab | None = None
        self._error: NFError | None = None
        self._closed = False
        self._process = os.getpid()

    @property
    def record(self) -> CacheRecord:
        return self._record

    @property
    def geometry(self) -> CacheGeometry:
        return self._record.geometry

    @classmethod
    def create(
        cls,
        folder: Path,
        name: str,
        geometry: CacheGeometry,
        *,
        tier: str = "disk",
        block: int = 0,
        generation: int = 1,
        fingerprint: bytes = bytes(32),
        order_key: int = 0,
        seed_key: int = 0,
    ) -> ActivationCache:
        """Reserves a new cache in full, before anyone works for it.

        Args:
            folder: where tier "disk" puts its file; unused by tier "ram".
            name: of the file, [a-z0-9][a-z0-9_.-]*, at most 60 characters.
            geometry: what will be appended.
            tier: "disk" or "ram".
            block: number of the block whose inputs these are.
            generation: counts rebuilds.
            fingerprint: 32 bytes that stand for whatever the samples are made from.
            order_key: key of the order in which the samples come.
            seed_key: key of the randomness of the producing pass; kept in the record only.

        Raises:
            DiskFullError: the file does not fit; nothing is left behind.
            StorageError: another failure of the file system, such as a .tmp of that name left by a killed run.
        """
        if tier not in ("disk", "ram"):
            raise ValueError(f"expected tier disk or ram, got {tier!r}")
        if len(fingerprint) != 32:
            raise ValueError(f"expected a fingerprint of 32 bytes, got {len(fingerprint)}")
        record = CacheRecord(
            name=name,
            tier=tier,
            geometry=geometry,
            block=block,
            generation=generation,
            fingerprint=fingerprint.hex(),
            order_key=order_key,
            seed_key=seed_key,
        )
        header = pack_header(record)  # also checks the ranges, on every tier
        chunks = _RamChunks(geometry) if tier == "ram" else _DiskChunks.create(folder, record, header)
        return cls(record, chunks, complete=False)

    @classmethod
    def open(cls, folder: Path, record: CacheRecord) -> ActivationCache:
        """Opens a finished file; its header, length, table and footer are checked now, each chunk whenever it is read.

        Raises:
            CacheIncompleteError: the file is shorter or longer than it should be, or was not finished.
            CacheCorruptError: a checksum does not hold.
            CacheStaleError: the file is sound, but not the one of the record.
            StorageError: the file cannot be read.
        """
        if record.tier != "disk":
            raise CacheIncompleteError(f"{record.name}: a {record.tier} cache ends with its process; rebuild it")
        return cls(record, _DiskChunks.open(folder, record), complete=True)

    def append(self, x: Tensor, labels: Tensor, ids: Tensor, copy: int | Tensor = 0) -> None:
        """Adds samples; everything is copied before the return, the disk is waited for only when it is behind.

        Args:
            x: (N, *sample_shape), any float dtype and device; stored in the dtype of the geometry.
            labels: (N,), int64 on the CPU, -1 for none.
            ids: (N,), int64 on the CPU, not negative.
            copy: number of the augmented copy that these belong to, one for all or (N,) int64 on the CPU.

        Raises:
            ValueError: a shape, dtype or range does not fit.
            CacheIncompleteError: more samples than the geometry has.
            NonFiniteError: a stored value is NaN or infinite. This and any error of the disk end the cache: its file is
                removed, and every later call raises the same error.
        """
        self._check_filling()
        copies = copy if isinstance(copy, Tensor) else torch.full((len(ids),), copy)
        self._check_batch(x, labels, ids, copies)
        with _Latch(self):
            self._fill(x.detach(), _records(labels, ids, copies))

    def finish(self) -> CacheRecord:
        """Completes the cache, which can then be read.

        Raises:
            CacheIncompleteError: fewer samples were appended than the geometry has.
            DiskFullError, StorageError: as for append.
        """
        self._check_filling()
        if self._appended != self.geometry.samples:
            raise CacheIncompleteError(
                f"{self._record.name}: expected {self.geometry.samples} samples, got {self._appended}; append the rest"
            )
        with _Latch(self):
            self._put_slab()
            self._record = self._chunks.finish(self._record)
        self._complete = True
        log.debug("%s: finished, %s", self._record.name, self._chunks.stats)
        return self._record

    def batches(
        self,
        epoch: int,
        batch_size: int,
        *,
        key: int,
        start: int = 0,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        out_dtype: torch.dtype = torch.float32,
        window_bytes: int = 64 * MIB,
    ) -> Iterator[Batch]:
        """Every sample once, in the order of `sample_order`, read ahead by one thread.

        Args:
            epoch: named in the log; the order depends on `key` alone.
            batch_size: samples a batch; the last one may have fewer.
            key: in [0, 2**64), drawn for this epoch.
            start: number of the batch to begin with; the ones before are not read.
            drop_last: leave out a last batch that is not full.
            device: for x and labels.
            out_dtype: of x.
            window_bytes: bounds the memory (four chunks are added), and part of the order.

        Returns:
            An iterator of batches; the x of one is overwritten by the next.

        Raises:
            CacheCorruptError, CacheIncompleteError, StorageError: while iterating, a chunk cannot be read right.
            CacheClosedError: the cache was closed.
        """
        self._check_open()
        if not self._complete:
            raise CacheIncompleteError(f"{self._record.name}: read before it was finished; call finish() first")
        check_range("batch_size", batch_size, 1, 1 << 40)
        check_range("start", start, 0, 1 << 40)
        order = sample_order(key, self.geometry.samples, self.geometry, window_bytes)[start * batch_size :]
        if drop_last:
            order = order[: len(order) // batch_size * batch_size]
        log.debug("%s: epoch %d, %d samples from batch %d", self._record.name, epoch, len(order), start)
        return self._read(order, batch_size, torch.device(device), out_dtype, window_bytes)

    def stats(self) -> CacheStats:
        """A copy of the counts so far."""
        return dataclasses.replace(self._chunks.stats)

    def close(self) -> None:
        """Releases everything; a cache that was not finished is removed. Can be called again.

        Raises:
            StorageError: the file cannot be closed or removed.
        """
        if self._closed:
            return
        self._closed = True
        if self._process != os.getpid():
            return  # a forked child: the file and the threads are the parent's
        self._slab = None
        self._chunks.close()

    def abort(self) -> None:
        """Gives up what was not finished and removes its .tmp; the same as close() on a finished cache."""
        self.close()

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed or self._process != os.getpid():
            raise CacheClosedError(f"{self._record.name}: used after close or fork; open it again")

    def _check_filling(self) -> None:
        self._check_open()
        if self._complete:
            raise CacheClosedError(f"{self._record.name}: already finished; create another cache to write")

    def _check_batch(self, x: Tensor, labels: Tensor, ids: Tensor, copies: Tensor) -> None:
        shape = self.geometry.sample_shape
        if tuple(x.shape[1:]) != shape or x.ndim != len(shape) + 1 or not x.is_floating_point():
            raise ValueError(f"expected x (N, {str(shape)[1:-1]}) of a float dtype, got {tuple(x.shape)} {x.dtype}")
        members = (
            ("labels", labels, -1, (1 << 31) - 1),
            ("ids", ids, 0, (1 << 63) - 1),
            ("copy", copies, 0, self.geometry.copies - 1),
        )
        for name, values, low, high in members:
            if values.shape != x.shape[:1] or values.dtype != torch.int64 or values.device.type != "cpu":
                found = f"{tuple(values.shape)} {values.dtype} on {values.device}"
                raise ValueError(f"expected {name} ({len(x)},) int64 on the CPU, got {found}")
            if len(x) and not (low <= int(values.min()) and int(values.max()) <= high):
                found = f"{int(values.min())}..{int(values.max())}"
                raise ValueError(f"expected {name} in {low}..{high}, got {found}")
        if self._appended + len(x) > self.geometry.samples:
            raise CacheIncompleteError(
                f"{self._record.name}: expected {self.geometry.samples} samples, got {self._appended + len(x)}; "
                "create the cache with the right number"
            )

    def _fill(self, x: Tensor, records: NDArray[np.void]) -> None:
        spc, done = self.geometry.samples_per_chunk, 0
        while done < len(x):
            first = self._appended % spc
            if self._slab is None:
                self._slab = _Slab(self.geometry, self._chunks.slab(self._appended // spc))
            take = min(spc - first, len(x) - done)
            piece = slice(done, done + take)
            self._slab.put(first, x[piece], records[piece])
            if not self._slab.finite(first, take):
                raise NonFiniteError(self._explain_non_finite(x[piece]))
            self._appended += take
            done += take
            if first + take == spc:
                self._put_slab()

    def _put_slab(self) -> None:
        if self._slab is not None:
            self._slab.clear_from((self._appended - 1) % self.geometry.samples_per_chunk + 1)
            self._slab = None
            self._chunks.put((self._appended - 1) // self.geometry.samples_per_chunk)

    def _explain_non_finite(self, x: Tensor) -> str:
        name, dtype = self._record.name, self.geometry.dtype
        block = f"{name}: an input of block {self._record.block}"
        if dtype == "fp16" and torch.isfinite(x).all():
            return f"{block} overflows fp16, up to {float(x.abs().max()):.4g}; set cache_dtype = bf16"
        return f"{block} is NaN or infinite before it is stored as {dtype}; lower the learning rate"

    def _read(
        self, order: NDArray[np.int64], batch_size: int, device: torch.device, out_dtype: torch.dtype, window_bytes: int
    ) -> Iterator[Batch]:
        out = _BatchTensors(self.geometry, min(batch_size, len(order)), device, out_dtype)
        spc = self.geometry.samples_per_chunk
        chunk_of, slot_of = np.divmod(order, spc)
        window = self._chunks.window(chunk_of, _window_chunks(self.geometry, window_bytes))
        try:
            for begin in range(0, len(order), batch_size):
                done, end = begin, min(begin + batch_size, len(order))
                while done < end:  # more than once only where a batch spans more chunks than fit the window
                    self._check_open()
                    ready = window.ready(end)
                    piece = slice(done, ready)
                    out.gather(window.buffer, window.base[chunk_of[piece]], slot_of[piece], done - begin)
                    window.release(ready)
                    done = ready
                yield out.batch(end - begin)
        finally:
            window.close()


class _Latch:
    """The first error of the disk, or of the values, ends the cache: later calls raise it, and the .tmp goes."""

    def __init__(self, cache: ActivationCache) -> None:
        self.cache = cache

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> Literal[False]:
        if isinstance(error, NFError):
            self.cache._error = error
            self.cache._slab = None
            self.cache._chunks.close()
        return False


def _records(labels: Tensor, ids: Tensor, copies: Tensor) -> NDArray[np.void]:
    records = np.empty(len(ids), SAMPLE_RECORD)
    records["id"], records["label"], records["copy"] = ids.numpy(), labels.numpy(), copies.numpy()
    return records


class _Slab:
    """One chunk in memory while it is filled: samples, then their records, then zeros."""

    def __init__(self, geometry: CacheGeometry, memory: memoryview) -> None:
        self._memory = memory
        self._geometry = geometry
        samples = geometry.samples_per_chunk * geometry.sample_bytes
        flat = torch.frombuffer(memory[:samples], dtype=DTYPES[geometry.dtype])
        self._rows = _as_samples(flat, geometry)
        self._records = np.frombuffer(memory, SAMPLE_RECORD, geometry.samples_per_chunk, offset=samples)

    def put(self, first: int, x: Tensor, records: NDArray[np.void]) -> None:
        self._rows[first : first + len(x)].copy_(x)  # casts and changes the layout in the same pass
        self._records[first : first + len(x)] = records

    def finite(self, first: int, count: int) -> bool:
        """Looks at what is stored, since a finite value can overflow in the cast."""
        size = self._geometry.sample_bytes
        return _cache.all_finite(self._memory[first * size : (first + count) * size], self._geometry.dtype)

    def clear_from(self, filled: int) -> None:
        """Zeros where an earlier chunk may have left its bytes: unused samples, unused records, padding."""
        memory = np.frombuffer(self._memory, np.uint8)
        spc, size = self._geometry.samples_per_chunk, self._geometry.sample_bytes
        memory[filled * size : spc * size] = 0
        memory[spc * size + filled * SAMPLE_RECORD.itemsize :] = 0


def _as_samples(flat: Tensor, geometry: CacheGeometry) -> Tensor:
    """(N * numel,) in stored order -> (N, *sample_shape)."""
    if geometry.channels_last:
        c, h, w = geometry.sample_shape
        return flat.view(-1, h, w, c).permute(0, 3, 1, 2)
    return flat.view(-1, *geometry.sample_shape)


class _BatchTensors:
    """The one batch that all steps of an epoch reuse."""

    def __init__(self, geometry: CacheGeometry, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._geometry = geometry
        memory = torch.empty(size * geometry.sample_bytes, dtype=torch.uint8)
        self._bytes = memory.numpy().reshape(size, geometry.sample_bytes)
        self._records = np.empty(size, SAMPLE_RECORD)
        self._stored = _as_samples(memory.view(DTYPES[geometry.dtype]), geometry)
        self._out = torch.empty_like(self._stored, dtype=dtype, device=device)
        if self._out.dtype == self._stored.dtype and device.type == "cpu":
            self._out = self._stored

    def gather(
        self, buffer: _cache.AlignedBuffer, base: NDArray[np.int64], slot: NDArray[np.int64], first: int
    ) -> None:
        rows = slice(first, first + len(slot))
        size, spc = self._geometry.sample_bytes, self._geometry.samples_per_chunk
        _cache.gather(buffer, base + slot * size, self._bytes[rows].data)
        _cache.gather(
            buffer, base + spc * size + slot * SAMPLE_RECORD.itemsize, self._records[rows].view(np.uint8).data
        )

    def batch(self, count: int) -> Batch:
        if self._out is not self._stored:
            self._out[:count].copy_(self._stored[:count])
        fields = (self._records[name][:count].astype(np.int64) for name in ("label", "id", "copy"))
        labels, ids, copies = (torch.from_numpy(field) for field in fields)
        return Batch(self._out[:count], labels.to(self._out.device), ids, copies)


class _RamChunks:
    """All chunks in memory, laid out as in the file."""

    def __init__(self, geometry: CacheGeometry) -> None:
        self.stats = CacheStats()
        self._stride = geometry.chunk_stride
        self._chunks = geometry.chunks
        self._buffer: _cache.AlignedBuffer | None = _cache.AlignedBuffer(self._chunks * self._stride)

    def slab(self, chunk: int) -> memoryview:
        assert self._buffer is not None
        return memoryview(self._buffer)[chunk * self._stride : (chunk + 1) * self._stride]

    def put(self, chunk: int) -> None:
        self.stats.bytes_written += self._stride

    def finish(self, record: CacheRecord) -> CacheRecord:
        return record

    def window(self, chunk_of: NDArray[np.int64], window_chunks: int) -> _RamWindow:
        assert self._buffer is not None
        return _RamWindow(self._buffer, np.arange(self._chunks) * self._stride)

    def close(self) -> None:
        self._buffer = None


@dataclasses.dataclass(slots=True)
class _RamWindow:
    """Every chunk, all the time."""

    buffer: _cache.AlignedBuffer
    base: NDArray[np.int64]

    def ready(self, end: int) -> int:
        return end

    def release(self, end: int) -> None:
        return None

    def close(self) -> None:
        return None


class _DiskChunks:
    """The chunks of one file. While it is filled, two slabs and one thread, so that writing overlaps with computing."""

    def __init__(self, folder: _cache.Folder, file: _cache.File, record: CacheRecord) -> None:
        self.stats = CacheStats(direct=file.direct)
        self._folder = folder
        self._file = file
        self._name = record.name
        self._geometry = record.geometry
        self._table = np.zeros(page_up(4 * record.geometry.chunks) // 4, "<u4")
        self._writer: _Writer | None = None
        self._unfinished = False  # there is a .tmp, ours to remove
        if not file.direct:
            log.warning("%s: the file system refuses O_DIRECT; the cache goes through the page cache", file.path)

    @classmethod
    def create(cls, path: Path, record: CacheRecord, header: bytes) -> _DiskChunks:
        folder = _cache.Folder(str(path))
        self = cls(folder, folder.create(record.name + ".tmp"), record)
        self._unfinished = True
        try:
            self._file.reserve(record.geometry.file_bytes)
            write_part(self._file, 0, header)
            self._writer = _Writer(record.geometry, self._write)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def open(cls, path: Path, record: CacheRecord) -> _DiskChunks:
        folder = _cache.Folder(str(path))
        self = cls(folder, folder.open(record.name), record)
        try:
            self._table = check_file(self._file, record)
        except BaseException:
            self.close()
            raise
        return self

    def slab(self, chunk: int) -> memoryview:
        assert self._writer is not None
        begun = time.perf_counter()
        slab = self._writer.slab(chunk)
        self.stats.write_stall += time.perf_counter() - begun
        return slab

    def put(self, chunk: int) -> None:
        assert self._writer is not None
        self._writer.put(chunk)

    def _write(self, chunk: int, slab: memoryview) -> None:
        self._table[chunk] = self._file.write_chunk(PAGE + chunk * self._geometry.chunk_stride, slab)
        self.stats.bytes_written += len(slab)

    def finish(self, record: CacheRecord) -> CacheRecord:
        assert self._writer is not None
        self._writer.drain()
        self._writer.close()
        self._writer = None
        table = self._table.tobytes()
        record = dataclasses.replace(record, table_sha256=hashlib.sha256(table).hexdigest())
        write_part(self._file, record.geometry.table_offset, table)
        write_part(self._file, record.geometry.footer_offset, pack_footer(record, _cache.crc32c(table)))
        self._file.close()  # may report a failed write
        self._folder.rename(self._name + ".tmp", self._name)
        self._unfinished = False
        self._file = self._folder.open(self._name)
        self._table = check_file(self._file, record)
        return record

    def window(self, chunk_of: NDArray[np.int64], window_chunks: int) -> _DiskWindow:
        return _DiskWindow(self._geometry, chunk_of, window_chunks, self._load, self.stats)

    def _load(self, chunk: int, slab: memoryview) -> None:
        offset = PAGE + chunk * self._geometry.chunk_stride
        rereads = self._file.read_chunk(offset, slab, int(self._table[chunk]))
        self.stats.bytes_read += len(slab) * (1 + rereads)
        if rereads:
            self.stats.rereads += rereads
            log.warning("%s: chunk %d had a wrong checksum, and the right one when read again", self._file.path, chunk)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        try:
            self._file.close()
        finally:
            if self._unfinished:
                self._unfinished = False
                self._folder.unlink(self._name + ".tmp")
            self._folder.close()


class _Writer:
    """Two slabs: one is filled while a thread writes the other."""

    def __init__(self, geometry: CacheGeometry, write: Callable[[int, memoryview], None]) -> None:
        stride = geometry.chunk_stride
        memory = memoryview(_cache.AlignedBuffer(2 * stride))
        self._slabs = (memory[:stride], memory[stride:])
        self._pending: list[Future[None] | None] = [None, None]
        self._write = write
        self._thread = ThreadPoolExecutor(1, "nf-write")

    def slab(self, chunk: int) -> memoryview:
        pending = self._pending[chunk % 2]
        if pending is not None:
            pending.result()
        return self._slabs[chunk % 2]

    def put(self, chunk: int) -> None:
        self._pending[chunk % 2] = self._thread.submit(self._write, chunk, self._slabs[chunk % 2])

    def drain(self) -> None:
        for pending in self._pending:
            if pending is not None:
                pending.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class _DiskWindow:
    """Chunks in memory while their samples are handed out, read in the order of first use by one thread.

    Of the chunks that have been used, the order leaves at most `window_chunks` unfinished at any time, so that reading
    in order of first use into that many slabs never blocks itself. READ_AHEAD slabs more keep the disk busy.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        chunk_of: NDArray[np.int64],
        window_chunks: int,
        load: Callable[[int, memoryview], None],
        stats: CacheStats,
    ) -> None:
        self._stride = geometry.chunk_stride
        first, last = np.full((2, geometry.chunks), -1)
        first[chunk_of[::-1]] = np.arange(len(chunk_of))[::-1]  # of equal indices numpy keeps the last assignment
        last[chunk_of] = np.arange(len(chunk_of))
        used = np.flatnonzero(last >= 0)
        self._to_load = used[np.argsort(first[used])]
        self._first = np.append(first[self._to_load], len(chunk_of))
        self._to_drain = used[np.argsort(last[used])]
        self._last = np.append(last[self._to_drain], len(chunk_of))
        self._submitted = self._loaded = self._drained = 0
        self.base = np.full(geometry.chunks, -1)
        slabs = max(1, min(window_chunks + READ_AHEAD, len(used)))
        self.buffer = _cache.AlignedBuffer(slabs * self._stride)
        self._free = list(range(0, slabs * self._stride, self._stride))
        self._pending: deque[Future[None]] = deque()
        self._load = load
        self._stats = stats
        self._thread = ThreadPoolExecutor(1, "nf-read")

    def ready(self, end: int) -> int:
        """Waits for what can be had of the positions before `end`; returns how far the chunks are there."""
        self._submit()
        begun = time.perf_counter()
        while self._pending and self._first[self._loaded] < end:
            self._pending.popleft().result()
            self._loaded += 1
        self._stats.read_stall += time.perf_counter() - begun
        return min(end, int(self._first[self._loaded]))

    def release(self, end: int) -> None:
        """Everything before position `end` has been copied out."""
        while self._last[self._drained] < end:
            self._free.append(int(self.base[self._to_drain[self._drained]]))
            self._drained += 1
        self._submit()

    def _submit(self) -> None:
        memory = memoryview(self.buffer)
        while self._free and self._submitted < len(self._to_load):
            chunk, base = int(self._to_load[self._submitted]), self._free.pop()
            self.base[chunk] = base
            self._pending.append(self._thread.submit(self._load, chunk, memory[base : base + self._stride]))
            self._submitted += 1

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

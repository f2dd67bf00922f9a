"""Disk tier: one .nfc file through the C++ engine, on the CPU and on CUDA.

    write   x -> staging slot (the codec, the only extra pass) -> slab of one chunk -> disk, by threads
    read    disk, by threads -> window of chunks -> input ring, one slot in use and the next being filled
On CUDA staging and ring are device memory at fixed addresses and the copies run on streams of the engine; on the CPU
both are host memory beside the budget. One engine serves all caches of a device: its host memory is the bound on pinned
bytes, and what does not fit is an error, not a wait.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nf_engine import _cache
from nf_engine.cache_format import MIB, PAGE, SAMPLE_RECORD, CacheRecord, CacheStats, Pass, check_file
from nf_engine.codec import Codec, FiniteFlag
from nf_engine.device import free_ram
from nf_engine.errors import CacheClosedError
from nf_engine.records import ENGINE_SLOTS

__all__ = ["DiskTier", "EngineOptions", "cuda_status", "direct_io", "engine_report"]

log = logging.getLogger(__name__)

RING = {"cpu": 3, "cuda": ENGINE_SLOTS}  # slots that batches are handed out from


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine reaches the disk.

    Attributes:
        pinned_bytes: host memory for all copies to and from a device and all writes; pinned where there is a device.
        write_threads, read_threads: that check-sum and write, read and verify; one more gathers.
        durable: sync the file before it counts as finished; a cache can be derived again, so the default is not to.
        io_timeout: seconds after which a request to the disk is an error.
    """

    pinned_bytes: int = 64 * MIB
    write_threads: int = 2
    read_threads: int = 2
    durable: bool = False
    io_timeout: float = 300.0


def cuda_status() -> tuple[bool, str]:
    """Whether the engine found a CUDA driver, and its version or what is missing."""
    return _cache.cuda_status()


def engine_report(device: torch.device, options: EngineOptions | None = None) -> dict[str, Any]:
    """Host memory and pinned bytes of the engine of a device, its threads, and the CUDA driver that it found."""
    options = options or EngineOptions()
    engine = _engine(device, options)
    return {
        "memory": engine.memory,
        "pinned": engine.pinned,
        "write_threads": options.write_threads,
        "read_threads": options.read_threads,
        "cuda": cuda_status()[1],
    }


def direct_io(folder: Path) -> tuple[bool, str]:
    """Whether files of this folder are reached past the page cache, and why or why not."""
    found = _cache.io.Folder(str(folder)).probe()
    return found.direct, found.reason


def _engine(device: torch.device, options: EngineOptions) -> _cache.Engine:
    number = -1 if device.type == "cpu" else device.index or 0
    return _make_engine(os.getpid(), number, options.pinned_bytes, options.io_timeout)


@cache
def _make_engine(process: int, device: int, pinned_bytes: int, io_timeout: float) -> _cache.Engine:
    """One engine a process and device. No more than a quarter of the free memory, in whole pages."""
    allowed = min(pinned_bytes, free_ram() // 4) // PAGE * PAGE
    if allowed < pinned_bytes // PAGE * PAGE:
        log.warning("pinned_bytes is %d, but a quarter of the free memory is %d: that is used", pinned_bytes, allowed)
    engine = _cache.Engine(max(PAGE, allowed), device, io_timeout)
    if engine.note:
        log.warning("%s", engine.note)
    return engine


class DiskTier:
    """The file of one cache, while it is written and after."""

    def __init__(
        self,
        folder: Path | _cache.io.Folder,
        record: CacheRecord,
        codec: Codec,
        device: torch.device,
        options: EngineOptions,
    ) -> None:
        """folder: opened, it stays the caller's to close."""
        self._shares_folder = isinstance(folder, _cache.io.Folder)
        self._folder = folder if isinstance(folder, _cache.io.Folder) else _cache.io.Folder(str(folder))
        self._codec, self._device, self._options = codec, device, options
        self._size = record.geometry.sample_bytes
        self._name = record.name
        self._engine = _engine(device, options)
        self._writer: _cache.Writer | None = None
        self._reader: _cache.Reader | None = None
        self._written: dict[str, Any] = {}
        self._staging: list[Tensor] = []
        self._finite = FiniteFlag()
        self._batches = 0
        self._closed = False

    @classmethod
    def create(
        cls,
        folder: Path | _cache.io.Folder,
        record: CacheRecord,
        header: bytes,
        codec: Codec,
        device: torch.device,
        options: EngineOptions,
    ) -> DiskTier:
        tier = cls(folder, record, codec, device, options)
        tier._writer = tier._engine.create(
            tier._folder, record.name, header, options.write_threads, ENGINE_SLOTS, options.durable
        )
        tier._warn_if_buffered(tier._writer.direct)
        return tier

    @classmethod
    def open(
        cls,
        folder: Path | _cache.io.Folder,
        record: CacheRecord,
        codec: Codec,
        device: torch.device,
        options: EngineOptions,
    ) -> DiskTier:
        tier = cls(folder, record, codec, device, options)
        tier._open(record)
        return tier

    def append(self, x: Tensor, records: NDArray[np.void]) -> None:
        assert self._writer is not None
        if self._device.type == "cpu":
            stored = x if self._codec.is_stored(x) else self._encode(x, 0)
            self._writer.append(stored.data_ptr(), len(x), records.data)
            return
        stream, slot = torch.cuda.current_stream(self._device).cuda_stream, self._batches % ENGINE_SLOTS
        self._writer.fence(slot, stream)
        stored = self._encode(x, slot)
        finite = self._codec.finite(stored)
        self._writer.append_device(stored.data_ptr(), len(x), records.data, stream, slot)
        self._batches += 1
        self._finite.add(finite)

    def _encode(self, x: Tensor, slot: int) -> Tensor:
        """The batch as stored, (N, sample_bytes) uint8, in a staging slot."""
        if not self._staging or len(self._staging[0]) < len(x):
            self._staging = _slots(1 if self._device.type == "cpu" else ENGINE_SLOTS, len(x), self._size, self._device)
        stored = self._staging[slot][: len(x)]
        self._codec.encode(x, stored)
        return stored

    def finish(self, record: CacheRecord) -> CacheRecord:
        assert self._writer is not None
        self._finite.look()
        table = self._writer.finish()
        record = dataclasses.replace(record, table_sha256=hashlib.sha256(table).hexdigest())
        self._written, self._writer, self._staging = self._writer.stats(), None, []
        self._open(record)
        return record

    def _open(self, record: CacheRecord) -> None:
        self._reader = self._engine.open(self._folder, record.name)
        try:
            check_file(self._reader.path, self._reader.header, self._reader.table, record)
        except BaseException:
            self._reader.close()
            raise
        self._warn_if_buffered(self._reader.direct)

    def _warn_if_buffered(self, direct: bool) -> None:
        if not direct:
            _warn_buffered(self._folder.path)

    def read(self, reading: Pass) -> Iterator[tuple[Tensor, NDArray[np.void]]]:
        if self._reader is None:
            raise CacheClosedError(f"{self._name}: used after close; open it again")
        ring = _slots(RING[self._device.type], reading.batch, self._size, self._device)
        on_device = self._device.type != "cpu"
        epoch = self._reader.start(
            reading.key,
            reading.batch,
            reading.window,
            reading.first,
            reading.drop_last,
            [slot.data_ptr() for slot in ring],
            on_device,
            self._stream(),
            self._options.read_threads,
        )
        interrupted = False
        try:
            while True:
                slot, count, records = epoch.next(self._stream())
                for note in self._reader.take_notes():
                    log.warning("%s", note)
                if count == 0:
                    return
                yield ring[slot][:count], np.frombuffer(records, SAMPLE_RECORD)
        except KeyboardInterrupt:
            interrupted = True  # is not made to wait for the disk; close() does, or the end of the epoch
            raise
        finally:
            if not interrupted:
                epoch.stop()

    def _stream(self) -> int:
        return 0 if self._device.type == "cpu" else int(torch.cuda.current_stream(self._device).cuda_stream)

    def stats(self) -> CacheStats:
        found = dict(self._written)
        source = self._writer or self._reader
        if source is not None:
            now = source.stats()
            found = {name: found.get(name, 0) + value for name, value in now.items()} | {"direct": source.direct}
        return CacheStats(**found, pinned=self._engine.pinned)

    def close(self) -> None:
        if self._closed:
            return  # by another thread, which may not be done and needs the folder
        self._closed = True
        if self._reader is not None:
            self._written, self._reader = self._now_closed(self._reader), None
        writer, self._writer, self._staging = self._writer, None, []
        try:
            if writer is not None:
                writer.abort()
        finally:
            if not self._shares_folder:
                self._folder.close()

    def _now_closed(self, reader: _cache.Reader) -> dict[str, Any]:
        last = dataclasses.asdict(self.stats())
        del last["pinned"]
        reader.close()
        return last


@cache
def _warn_buffered(folder: str) -> None:
    """Once a folder."""
    log.warning("%s: the caches go through the page cache, which is slower: %s", folder, direct_io(Path(folder))[1])


def _slots(count: int, samples: int, sample_bytes: int, device: torch.device) -> list[Tensor]:
    """(samples, sample_bytes) uint8 each; on the CPU host memory that no operator made, beside the budget."""
    if device.type != "cpu":
        return [torch.empty(samples, sample_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
    each = -(-samples * sample_bytes // 64) * 64
    memory = torch.frombuffer(_cache.AlignedBuffer(count * each), dtype=torch.uint8)
    return [memory[k * each : k * each + samples * sample_bytes].view(samples, sample_bytes) for k in range(count)]

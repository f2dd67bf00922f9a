"""Storage: the activation cache between two blocks.

A trained block's outputs are written once, then read in shuffled order in every epoch of the next block. Tier "disk" is
one .nfc file, written behind and read ahead by the C++ engine; tiers "ram" and "device" keep the samples in memory. The
tier changes time, not numbers: codec, order and batches are the same.

The file is written as <name>.tmp into space reserved first, renamed when complete, and not synced unless asked:
a cache can be derived again, so that a mismatch after a power cut means rebuild.
Shapes: samples (C, H, W), batches (N, C, H, W).

Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Storage, fed by the Worker).
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nf_engine import _cache
from nf_engine.cache_format import (
    MIB,
    SAMPLE_RECORD,
    CacheGeometry,
    CacheRecord,
    CacheStats,
    Pass,
    check_range,
    pack_header,
)
from nf_engine.codec import Codec, make_codec
from nf_engine.disk_tier import DiskTier, EngineOptions, cuda_status, direct_io, engine_report
from nf_engine.errors import CacheClosedError, CacheIncompleteError, NFError, NonFiniteError
from nf_engine.memory_tier import MemoryTier

__all__ = [
    "ActivationCache",
    "Batch",
    "CacheGeometry",
    "CacheRecord",
    "CacheStats",
    "EngineOptions",
    "build_info",
    "cuda_status",
    "direct_io",
    "engine_report",
    "sample_order",
]

log = logging.getLogger(__name__)

_open: weakref.WeakSet[ActivationCache] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Threads end and unfinished files go before the interpreter does."""
    for cache in list(_open):
        cache.close()


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


class Tier(Protocol):
    """Where the stored samples of one cache are."""

    def append(self, x: Tensor, records: NDArray[np.void]) -> None: ...
    def finish(self, record: CacheRecord) -> CacheRecord: ...
    def read(self, reading: Pass) -> Iterator[tuple[Tensor, NDArray[np.void]]]:
        """Stored rows (N, sample_bytes) uint8 on the device, valid until the next step, and their records."""
        ...

    def stats(self) -> CacheStats: ...
    def close(self) -> None: ...


class ActivationCache:
    """The outputs of one block on their way to the next.

    Made by `create`, filled by `append`, completed by `finish`, read by `batches`; or made by `open` and read. As a
    context manager it is closed at the end, and leaves nothing behind if it was not finished.
    """

    def __init__(self, record: CacheRecord, tier: Tier, codec: Codec, device: torch.device, *, complete: bool) -> None:
        """Use `create` or `open`."""
        self._record = record
        self._tier = tier
        self._codec = codec
        self._device = device
        self._complete = complete
        self._appended = record.geometry.samples if complete else 0
        self._error: NFError | None = None
        self._closed = False
        self._process = os.getpid()
        _open.add(self)

    @property
    def record(self) -> CacheRecord:
        return self._record

    @property
    def geometry(self) -> CacheGeometry:
        return self._record.geometry

    @classmethod
    def create(
        cls,
        folder: Path | _cache.io.Folder,
        name: str,
        geometry: CacheGeometry,
        *,
        tier: str = "disk",
        block: int = 0,
        generation: int = 1,
        fingerprint: bytes = bytes(32),
        order_key: int = 0,
        seed_key: int = 0,
        device: torch.device | str = "cpu",
        options: EngineOptions | None = None,
    ) -> ActivationCache:
        """Reserves a new cache in full, before anyone works for it.

        Args:
            folder: where tier "disk" puts its file, a path or opened; unused by the others.
            name: of the file, [a-z0-9][a-z0-9_.-]*, at most 60 characters.
            geometry: what will be appended.
            tier: "disk", "ram" or "device".
            block: number of the block whose inputs these are.
            generation: counts rebuilds.
            fingerprint: 32 bytes that stand for whatever the samples are made from.
            order_key: key of the order in which the samples come.
            seed_key: key of the randomness of the producing pass; kept in the record only.
            device: where samples come from and batches go.
            options: of the engine, for tier "disk".

        Raises:
            DiskFullError: the file does not fit; nothing is left behind.
            StorageError: another failure of the file system, such as a .tmp of that name left by a killed run.
            CacheError: two chunks do not fit the engine's host memory.
            DeviceLostError: the CUDA driver reports an error.
        """
        if tier not in ("disk", "ram", "device"):
            raise ValueError(f"expected tier disk, ram or device, got {tier!r}")
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
        codec, where = _codec(geometry), torch.device(device)
        made: Tier
        if tier == "disk":
            made = DiskTier.create(folder, record, header, codec, where, options or EngineOptions())
        else:
            made = MemoryTier(record, header, codec, where, on_device=tier == "device")
        return cls(record, made, codec, where, complete=False)

    @classmethod
    def open(
        cls,
        folder: Path | _cache.io.Folder,
        record: CacheRecord,
        *,
        device: torch.device | str = "cpu",
        options: EngineOptions | None = None,
    ) -> ActivationCache:
        """Opens a finished file; its header, length, table and footer are checked now, each chunk whenever it is read.

        Raises:
            CacheIncompleteError: the file is shorter or longer than it should be, or was not finished.
            CacheCorruptError: a checksum or a rule of the format does not hold.
            CacheStaleError: the file is sound, but not the one of the record.
            StorageError: the file cannot be read.
        """
        if record.tier != "disk":
            raise CacheIncompleteError(f"{record.name}: a {record.tier} cache ends with its process; rebuild it")
        codec, where = _codec(record.geometry), torch.device(device)
        tier = DiskTier.open(folder, record, codec, where, options or EngineOptions())
        return cls(record, tier, codec, where, complete=True)

    def append(self, x: Tensor, labels: Tensor, ids: Tensor, copy: int | Tensor = 0) -> None:
        """Adds samples; x may be overwritten after the return, the disk is waited for only when it is behind.

        Args:
            x: (N, *sample_shape), any float dtype, on the device of the cache; stored in the dtype of the geometry.
            labels: (N,), int64 on the CPU, -1 for none.
            ids: (N,), int64 on the CPU, not negative.
            copy: number of the augmented copy that these belong to, one for all or (N,) int64 on the CPU.

        Raises:
            ValueError: a shape, dtype, device or range does not fit.
            CacheIncompleteError: more samples than the geometry has.
            NonFiniteError: a stored value is NaN or infinite; from a device seen up to 64 batches later. This and any
                error of the disk end the cache: its file is removed, and every later call raises the same error.
        """
        self._check_filling()
        copies = copy if isinstance(copy, Tensor) else torch.full((len(ids),), copy)
        self._check_batch(x, labels, ids, copies)
        if len(x) == 0:
            return
        with _Latch(self):
            try:
                self._tier.append(x.detach(), _records(labels, ids, copies))
            except NonFiniteError:
                raise NonFiniteError(self._explain_non_finite(x)) from None
        self._appended += len(x)

    def finish(self) -> CacheRecord:
        """Completes the cache, which can then be read.

        Raises:
            CacheIncompleteError: fewer samples were appended than the geometry has.
            DiskFullError, StorageError, NonFiniteError: as for append.
        """
        self._check_filling()
        if self._appended != self.geometry.samples:
            raise CacheIncompleteError(
                f"{self._record.name}: expected {self.geometry.samples} samples, got {self._appended}; append the rest"
            )
        with _Latch(self):
            try:
                self._record = self._tier.finish(self._record)
            except NonFiniteError:
                raise NonFiniteError(self._explain_non_finite(None)) from None
        self._complete = True
        log.debug("%s: finished, %s", self._record.name, self._tier.stats())
        return self._record

    def batches(
        self,
        epoch: int,
        batch_size: int,
        *,
        key: int,
        start: int = 0,
        drop_last: bool = False,
        out_dtype: torch.dtype = torch.float32,
        window_bytes: int = 64 * MIB,
    ) -> Iterator[Batch]:
        """Every sample once, in the order of `sample_order`, read ahead of the caller.

        Args:
            epoch: named in the log; the order depends on `key` alone.
            batch_size: samples a batch; the last one may have fewer.
            key: in [0, 2**64), drawn for this epoch.
            start: number of the batch to begin with; the ones before are not read.
            drop_last: leave out a last batch that is not full.
            out_dtype: of x.
            window_bytes: bounds the memory (four chunks are added), and part of the order.

        Returns:
            An iterator of batches on the device of the cache; the x of one is overwritten by the next.

        Raises:
            CacheCorruptError, CacheIncompleteError, StorageError: while iterating, a chunk cannot be read right.
            CacheClosedError: the cache was closed.
        """
        self._check_open()
        if not self._complete:
            raise CacheIncompleteError(f"{self._record.name}: read before it was finished; call finish() first")
        check_range("batch_size", batch_size, 1, 1 << 40)
        check_range("start", start, 0, 1 << 40)
        check_range("key", key, 0, (1 << 64) - 1)
        samples, window = self.geometry.samples, _window_chunks(self.geometry, window_bytes)
        # A window beyond the file adds nothing; a batch beyond it would only cost memory.
        window, batch = min(window, self.geometry.chunks + 1), min(batch_size, samples)
        if start * batch_size >= samples or (drop_last and batch_size > samples):
            return iter(())
        log.debug("%s: epoch %d, %d samples from batch %d", self._record.name, epoch, samples, start)
        return self._read(Pass(key, batch, window, start, drop_last), out_dtype)

    def stats(self) -> CacheStats:
        """The counts so far."""
        return self._tier.stats()

    def close(self) -> None:
        """Releases everything; a cache that was not finished is removed. Can be called again.

        Raises:
            StorageError: the file cannot be closed or removed.
        """
        if self._closed:
            return
        self._closed = True
        if self._process == os.getpid():  # in a forked child the file and the threads are the parent's
            self._tier.close()

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
        if x.device.type != self._device.type:
            raise ValueError(f"expected x on {self._device}, where the cache was created, got {x.device}")
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

    def _explain_non_finite(self, x: Tensor | None) -> str:
        name, dtype = self._record.name, self.geometry.dtype
        block = f"{name}: an input of block {self._record.block}"
        if x is not None and torch.isfinite(x).all():
            return f"{block} overflows {dtype}, up to {float(x.abs().max()):.4g}; set cache_dtype = bf16"
        if x is None:
            return f"{block} is NaN, infinite or too large for {dtype}; lower lr or set cache_dtype = bf16"
        return f"{block} is NaN or infinite before it is stored as {dtype}; lower the learning rate"

    def _read(self, reading: Pass, out_dtype: torch.dtype) -> Iterator[Batch]:
        shape = (reading.batch, *self.geometry.sample_shape)
        form = torch.channels_last if self.geometry.channels_last else torch.contiguous_format
        out: Tensor | None = None
        for stored, records in self._tier.read(reading):
            self._check_open()
            direct = self._codec.view(stored) if self._device.type == "cpu" else None
            if direct is not None and direct.dtype == out_dtype:
                x = direct
            else:
                if out is None:
                    out = torch.empty(shape, dtype=out_dtype, device=self._device, memory_format=form)
                x = out[: len(stored)]
                self._codec.decode(stored, x)
            fields = (records[name].astype(np.int64) for name in ("label", "id", "copy"))
            labels, ids, copies = (torch.from_numpy(field) for field in fields)
            yield Batch(x, labels.to(self._device, non_blocking=True), ids, copies)
            self._check_open()


def _codec(geometry: CacheGeometry) -> Codec:
    return make_codec(geometry.dtype, geometry.sample_shape, geometry.channels_last)


class _Latch:
    """The first error of the disk, of the device, or of the values, ends the cache: later calls raise it again."""

    def __init__(self, cache: ActivationCache) -> None:
        self.cache = cache

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> Literal[False]:
        if isinstance(error, NFError):
            self.cache._error = error
            try:
                self.cache._tier.close()
            except NFError as second:  # the first error says more than a failed clean-up
                log.warning("%s: not cleaned up: %s", self.cache._record.name, second)
        return False


def _records(labels: Tensor, ids: Tensor, copies: Tensor) -> NDArray[np.void]:
    records = np.empty(len(ids), SAMPLE_RECORD)
    records["id"], records["label"], records["copy"] = ids.numpy(), labels.numpy(), copies.numpy()
    return records

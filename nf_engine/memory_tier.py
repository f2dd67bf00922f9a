"""Memory tier: the stored samples of a cache in host memory ("ram") or on the device ("device").

The same codec and the same order as on disk, without chunks: rows (N, sample_bytes) in the order of writing. In host
memory beside the budget; on the device within it, in the room that the plan has found beside the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nf_engine import _cache
from nf_engine.cache_format import SAMPLE_RECORD, CacheRecord, CacheStats, Pass
from nf_engine.codec import Codec, FiniteFlag
from nf_engine.errors import CacheClosedError

__all__ = ["MemoryTier"]


class MemoryTier:
    """All samples of one cache."""

    def __init__(
        self, record: CacheRecord, header: bytes, codec: Codec, device: torch.device, *, on_device: bool
    ) -> None:
        self._record, self._header, self._codec, self._device = record, header, codec, device
        geometry = record.geometry
        self._memory: _cache.AlignedBuffer | None = None
        self._rows: Tensor | None
        if on_device and device.type != "cpu":
            self._rows = torch.empty(geometry.samples, geometry.sample_bytes, dtype=torch.uint8, device=device)
        else:
            self._memory = _cache.AlignedBuffer(geometry.samples * geometry.sample_bytes)
            self._rows = torch.frombuffer(self._memory, dtype=torch.uint8).view(geometry.samples, -1)
        self._records = np.empty(geometry.samples, SAMPLE_RECORD)
        self._filled = self._written = self._read = 0
        self._finite = FiniteFlag()

    def append(self, x: Tensor, records: NDArray[np.void]) -> None:
        rows = self._all()[self._filled : self._filled + len(x)]
        if self._device.type == "cpu":
            self._copy_host(x, rows)
        else:
            stored = rows if rows.device == x.device else torch.empty_like(rows, device=x.device)
            self._codec.encode(x, stored)
            if stored is not rows:
                rows.copy_(stored)
            self._finite.add(self._codec.finite(stored))
        self._records[self._filled : self._filled + len(x)] = records
        self._filled += len(x)
        self._written += rows.nbytes

    def _copy_host(self, x: Tensor, rows: Tensor) -> None:
        stored = x
        if not self._codec.is_stored(x):
            self._codec.encode(x, rows)
            stored = rows
        _cache.copy_finite(rows.numpy().data, stored.data_ptr(), len(x), self._header)

    def finish(self, record: CacheRecord) -> CacheRecord:
        self._finite.look()
        return record

    def read(self, reading: Pass) -> Iterator[tuple[Tensor, NDArray[np.void]]]:
        geometry = self._record.geometry
        order = _cache.plan_order(reading.key, geometry.samples, geometry.samples_per_chunk, reading.window)
        end = len(order) // reading.batch * reading.batch if reading.drop_last else len(order)
        picked = self._pick_on_device if self._memory is None else self._pick_on_host(reading.batch)
        for first in range(reading.first * reading.batch, end, reading.batch):
            positions = order[first : min(first + reading.batch, end)]
            self._read += len(positions) * geometry.sample_bytes
            yield picked(positions), self._records[positions]

    def _pick_on_device(self, positions: NDArray[np.int64]) -> Tensor:
        return self._all()[torch.from_numpy(positions).to(self._device, non_blocking=True)]

    def _pick_on_host(self, batch: int) -> _HostPick:
        self._all()
        assert self._memory is not None
        return _HostPick(self._memory, batch, self._record.geometry.sample_bytes, self._device)

    def _all(self) -> Tensor:
        if self._rows is None:
            raise CacheClosedError(f"{self._record.name}: used after close; make it again")
        return self._rows

    def stats(self) -> CacheStats:
        return CacheStats(bytes_written=self._written, bytes_read=self._read)

    def close(self) -> None:
        self._rows = self._memory = None


class _HostPick:
    """Rows at positions, gathered on the host; towards a device through two pinned slots, each with its event."""

    def __init__(self, memory: _cache.AlignedBuffer, batch: int, size: int, device: torch.device) -> None:
        self._memory, self._size, self._device = memory, size, device
        self._turn = 0
        if device.type == "cpu":
            self._slots = [torch.frombuffer(_cache.AlignedBuffer(batch * size), dtype=torch.uint8).view(batch, size)]
        else:
            self._slots = [torch.empty(batch, size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._out = [torch.empty_like(slot, device=device) for slot in self._slots]
            self._copied = [torch.cuda.Event() for _ in self._slots]  # type: ignore[no-untyped-call]

    def __call__(self, positions: NDArray[np.int64]) -> Tensor:
        turn = self._turn % len(self._slots)
        self._turn += 1
        slot = self._slots[turn][: len(positions)]
        if self._device.type != "cpu":
            self._copied[turn].synchronize()
        _cache.gather(self._memory, positions * self._size, slot.numpy().data)
        if self._device.type == "cpu":
            return slot
        out = self._out[turn][: len(positions)]
        out.copy_(slot, non_blocking=True)
        self._copied[turn].record(torch.cuda.current_stream(self._device))
        return out

"""Feed: batches of images on their way from host memory to the device.

    Gathered      on the CPU: the rows as the data gives them
    Prefetched    on a device: while it computes, a thread gathers the next batch into pinned memory, from where it is
                  copied on a stream of its own into a ring of slots
    Resident      on a device with room for all images: batches are gathered there

All give the same batches, as they are stored: (N, C, H, W), uint8 or float32.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams (memory that two streams use).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nf_engine.data import CHUNK, ImageData
from nf_engine.records import IMAGE_SLOTS

Pair = tuple[Tensor, Tensor]  # the same bytes in host memory and on the device


class Piece(NamedTuple):
    """One batch: images (N, C, H, W), labels and ids (N,) int64 on the device, and the ids on the host.

    Images and ids last until the next piece is asked for, labels are the reader's to keep.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    host_ids: Tensor


class Feed(Protocol):
    def pieces(self, parts: Sequence[Tensor]) -> Generator[Piece, None, None]:
        """The samples of each part, (N,) int64 ids on the host, in this order. Closed early, it stops at once."""
        ...


def feed_to(device: torch.device, data: ImageData) -> Feed:
    """The feed of a device where not all images lie on it."""
    return Prefetched(data, lambda: CudaLane(device)) if device.type == "cuda" else Gathered(data)


class Gathered:
    """Rows of the data, on the CPU."""

    def __init__(self, data: ImageData) -> None:
        self._data = data

    def pieces(self, parts: Sequence[Tensor]) -> Generator[Piece, None, None]:
        for ids in parts:
            yield self._piece(ids)  # named here, images would outlive the reader's use of them

    def _piece(self, ids: Tensor) -> Piece:
        return Piece(*self._data.batch(ids), ids, ids)


class Resident:
    """All images and labels on the device."""

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self._device = device
        self._labels = data.labels.to(device)
        self._images = torch.empty(len(data), *data.shape, dtype=data.dtype, device=device)
        for ids in torch.arange(len(data)).split(CHUNK):  # type: ignore[no-untyped-call]
            self._images[ids[0] : ids[-1] + 1].copy_(data.batch(ids)[0])

    def pieces(self, parts: Sequence[Tensor]) -> Generator[Piece, None, None]:
        if not parts:
            return
        order = torch.cat([*parts])
        if self._device.type == "cuda":
            order = order.pin_memory().to(self._device, non_blocking=True)  # of the pass: no step waits for its own
        for ids, there in zip(parts, order.split([len(p) for p in parts]), strict=True):  # type: ignore[no-untyped-call]
            yield Piece(self._images.index_select(0, there), self._labels.index_select(0, there), there, ids)


class Lane(Protocol):
    """Copies to the device beside its computation. A slot is sent, received and released in turn, any number of times.

    `await_sent` and `send` are called by one thread, everything else by another, which also computes.
    """

    def pair(self, shape: tuple[int, ...], dtype: torch.dtype) -> Pair: ...

    def await_sent(self, slot: int) -> None:
        """Waits until the last copy of the slot is done: its host memory may be overwritten."""
        ...

    def send(self, slot: int, pairs: Sequence[Pair]) -> None:
        """Starts copies, host to device, behind all that was computed when the slot was released."""
        ...

    def receive(self, slot: int) -> None:
        """What is computed from here on waits for the copies of the slot."""
        ...

    def release(self, slot: int) -> None:
        """All that reads the slot was handed to the device."""
        ...

    def close(self) -> None:
        """No copy is under way when what is computed from here on runs: memory of the slots may be used again."""
        ...


class CudaLane:
    """Pinned memory, a stream of its own, and two events a slot."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Blocking: the thread sleeps while it waits. An event that was never recorded holds up nobody.
        self._sent = [torch.cuda.Event(blocking=True) for _ in range(IMAGE_SLOTS)]  # type: ignore[no-untyped-call]
        self._released = [torch.cuda.Event() for _ in range(IMAGE_SLOTS)]  # type: ignore[no-untyped-call]

    def pair(self, shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
        host = torch.empty(shape, dtype=dtype, pin_memory=True)
        there = torch.empty(shape, dtype=dtype, device=self._device)
        # What used this memory before may still run on the stream that it was taken from.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return host, there

    def await_sent(self, slot: int) -> None:
        self._sent[slot].synchronize()

    def send(self, slot: int, pairs: Sequence[Pair]) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released[slot])
            for host, there in pairs:
                there.copy_(host, non_blocking=True)
            self._sent[slot].record(self._stream)

    def receive(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._sent[slot])

    def release(self, slot: int) -> None:
        self._released[slot].record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Slot:
    """Room for one batch on both sides: images, and in `tickets` (2, N) their ids and labels."""

    def __init__(self, data: ImageData, size: int, lane: Lane) -> None:
        self._data = data
        self._images = lane.pair((size, *data.shape), data.dtype)
        self._tickets = lane.pair((2, size), torch.int64)

    def gather(self, ids: Tensor) -> Sequence[Pair]:
        """Reads samples into the host's side; what is to be copied."""
        count = len(ids)
        host, there = (side[:count] for side in self._images)
        self._tickets[0][0, :count] = ids
        self._tickets[0][1, :count] = self._data.batch(ids, out=host)[1]
        return (host, there), self._tickets

    def piece(self, ids: Tensor) -> Piece:
        count = len(ids)
        tickets = self._tickets[1][:, :count]
        return Piece(self._images[1][:count], tickets[1].clone(), tickets[0], ids)


class Prefetched:
    """Batches that are gathered and copied ahead of their use. No thread outlives a pass."""

    def __init__(self, data: ImageData, lane: Callable[[], Lane]) -> None:
        """lane: makes that of one pass."""
        self._data, self._lane = data, lane

    def pieces(self, parts: Sequence[Tensor]) -> Generator[Piece, None, None]:
        if not parts:
            return
        lane = self._lane()
        ring = [_Slot(self._data, max(map(len, parts)), lane) for _ in range(IMAGE_SLOTS)]

        def fill(number: int) -> None:
            slot = number % IMAGE_SLOTS
            lane.await_sent(slot)
            lane.send(slot, ring[slot].gather(parts[number]))

        thread = ThreadPoolExecutor(1, "nf-images")
        try:
            filled = deque(thread.submit(fill, k) for k in range(min(IMAGE_SLOTS, len(parts))))
            for number, ids in enumerate(parts):
                slot = number % IMAGE_SLOTS
                filled.popleft().result()
                lane.receive(slot)
                yield ring[slot].piece(ids)
                lane.release(slot)
                if number + IMAGE_SLOTS < len(parts):
                    filled.append(thread.submit(fill, number + IMAGE_SLOTS))
        finally:
            thread.shutdown(cancel_futures=True)
            lane.close()

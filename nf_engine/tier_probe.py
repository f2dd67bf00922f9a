"""Tier probe: the rates and rooms of the places where a cache may lie, measured where it would lie.

A file is written and read through the activation cache itself, with the threads and the pinned memory that a training
would use; RAM by gathering rows; copies to and from the device by copying.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from nf_engine.cache_format import CacheRecord
from nf_engine.config import TrainConfig, parse_bytes
from nf_engine.device import LAYOUT, free_ram
from nf_engine.records import TierProbe, stored_bytes
from nf_engine.seconds import seconds_of
from nf_engine.storage import ActivationCache, CacheGeometry, EngineOptions

PROBE_BYTES = 256 * 2**20  # most bytes of a file that a probe writes
PROBE_WINDOW = 8 * 2**20  # a full window would take longer to fill than a measurement
PROBE_SECONDS = 0.3  # of each measurement of a probe
PROBE_NAME = "probe.nfc"
PROBE_THREADS = (1, 2, 4, 8)


def probe_tiers(
    shape: tuple[int, ...],
    batch: int,
    folder: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    seconds: float = PROBE_SECONDS,
    fetch: float = 0.0,
) -> TierProbe:
    """Rates of disk, RAM and copies to the device, and how many bytes disk and RAM may hold; about 9 x `seconds`.

    Args:
        shape: of one sample. batch: samples of an append and of a read.
        folder: where the run's caches will lie.
        config: how samples are stored, bounds of the caches and of the engine's memory.
        device: where the samples come from and go to.
        seconds: of each measurement.
        fetch: seconds to bring one image to the device, measured by the caller.
    """
    bound = 1 << 62 if config.max_cache_bytes is None else parse_bytes(config.max_cache_bytes, "max_cache_bytes")
    room = {
        "ram": min(bound, free_ram() // 2),
        "disk": min(bound, psutil.disk_usage(str(folder)).free * 9 // 10),
    }
    options = EngineOptions(parse_bytes(config.pinned_bytes, "pinned_bytes"), io_timeout=config.io_timeout)
    place = _ProbeFile(folder, device, options, batch, seconds)
    write, read = (0.0, options.write_threads), (0.0, options.read_threads)
    size = stored_bytes(shape, config.stored_dtype)
    if room["disk"] < 2 * batch * size:  # half of it for records and padding
        room["disk"] = 0  # too little to measure is too little to use
    else:
        most = min(int(PROBE_BYTES * seconds / PROBE_SECONDS), room["disk"] // 2)
        geometry = CacheGeometry(
            sample_shape=shape, dtype=config.stored_dtype, samples=max(batch, most // size), channels_last=True
        )
        write = _fewest(lambda n: place.write(geometry, n)[0])
        count = max(batch, min(geometry.samples, int(write[0] * seconds / size)))
        _, record = place.write(replace(geometry, samples=count), write[1], finish=True)
        assert record is not None, "finished"
        try:
            read = _fewest(partial(place.read, record))
        finally:
            (folder / PROBE_NAME).unlink()
    gather = _gather_rate(size, batch, seconds / 3)
    up, down = _copy_rates(size * batch, device) if device.type == "cuda" else (gather, gather)
    return TierProbe(write[0], read[0], up, down, gather, fetch, room, write[1], read[1])


def _fewest(rate: Callable[[int], float]) -> tuple[float, int]:
    """The rate of the fewest threads within 5 % of the best, and their number."""
    rates = {n: rate(n) for n in PROBE_THREADS}
    threads = next(n for n, r in rates.items() if r >= 0.95 * max(rates.values()))
    return rates[threads], threads


@dataclass(frozen=True)
class _ProbeFile:
    """A cache that is written and read only to see how fast that is. Rates are bytes a second that passed the disk."""

    folder: Path
    device: torch.device
    options: EngineOptions
    batch: int
    seconds: float

    def write(self, geometry: CacheGeometry, threads: int, *, finish: bool = False) -> tuple[float, CacheRecord | None]:
        """Appends until the time is over or the file is full; `finish`: until it is full, and keeps it."""
        options = replace(self.options, write_threads=threads)
        x = torch.rand(self.batch, *geometry.sample_shape, device=self.device).contiguous(memory_format=LAYOUT)
        with ActivationCache.create(self.folder, PROBE_NAME, geometry, device=self.device, options=options) as cache:
            started, record = time.perf_counter(), None
            for start in range(0, geometry.samples, self.batch):
                ids = torch.arange(start, min(start + self.batch, geometry.samples))
                cache.append(x[: len(ids)], torch.zeros_like(ids), ids)
                if not finish and time.perf_counter() > started + self.seconds:
                    break
            else:
                record = cache.finish()
            rate = cache.stats().bytes_written / (time.perf_counter() - started)
        if record is not None and not finish:
            (self.folder / PROBE_NAME).unlink()
        return rate, record

    def read(self, record: CacheRecord, threads: int) -> float:
        """Reads shuffled epochs until the time is over."""
        options = replace(self.options, read_threads=threads)
        with ActivationCache.open(self.folder, record, device=self.device, options=options) as cache:
            epochs = (cache.batches(k, self.batch, key=k, window_bytes=PROBE_WINDOW) for k in itertools.count())
            started = time.perf_counter()
            for _ in itertools.chain.from_iterable(epochs):
                if time.perf_counter() > started + self.seconds:
                    break
            return cache.stats().bytes_read / (time.perf_counter() - started)


def _gather_rate(size: int, batch: int, seconds: float) -> float:
    """Bytes a second at which one thread collects random samples in RAM.

    In numpy's memory: like the engine's chunks it is no tensor, so that it does not count against a budget on the CPU.
    """
    samples = np.full((max(batch, PROBE_BYTES // (4 * size)), size), 1, np.uint8)
    out = np.zeros((batch, size), np.uint8)
    order = np.random.default_rng(0).permutation(len(samples))
    started, moved = 0.0, -out.nbytes  # the first round only touches the memory
    while moved <= 0 or time.perf_counter() < started + seconds:
        started = time.perf_counter() if moved == 0 else started
        start = moved // size % (len(order) - batch + 1)
        np.take(samples, order[start : start + batch], axis=0, out=out, mode="clip")
        moved += out.nbytes
    return moved / (time.perf_counter() - started)


def _copy_rates(size: int, device: torch.device) -> tuple[float, float]:
    """Bytes a second of copies of a batch from pinned memory to the device, and back."""
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    up = seconds_of(lambda: there.copy_(host, non_blocking=True), device)
    return size / up, size / seconds_of(lambda: host.copy_(there, non_blocking=True), device)

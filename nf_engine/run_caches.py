"""RunCaches: what the cache before each block of a run is. All of it follows from the plan and the manifest.

Its tier, its size, the samples that it holds and their order, the fingerprint of what they were made from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from nf_engine.config import parse_bytes
from nf_engine.data import ImageData
from nf_engine.job import Job
from nf_engine.manifest import digest_of
from nf_engine.precision import compute_dtype
from nf_engine.storage import ActivationCache, CacheGeometry, CacheRecord, EngineOptions, sample_order
from nf_engine.worker import CacheInputs, counter_key, image_order

TRAIN, HELD = "x", "v"  # first letter of a cache's name


class RunCaches:
    """The caches of one run. A block's number names the cache before it, a prefix the images: TRAIN or HELD."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def tier(self, number: int) -> str:
        return self._job.plan.blocks[number].cache.tier

    def data(self, prefix: str) -> ImageData:
        return self._job.data if prefix == TRAIN else self._job.held_out

    def copies(self, number: int, prefix: str) -> int:
        """Copies of the data set in the cache before a block: as many as the first cache after the images has."""
        if prefix == HELD or number >= len(self._job.plan.blocks):
            return 1
        if number > 1 and self.tier(number - 1) != "recompute":
            return self.copies(number - 1, prefix)
        return self._job.plan.blocks[number].cache.copies

    def geometry(self, number: int, samples: int, copies: int) -> CacheGeometry:
        shape = self._job.cut.stages[self._job.plan.blocks[number].first - 1].output_shape
        dtype = self._job.config.stored_dtype
        return CacheGeometry(sample_shape=shape, dtype=dtype, samples=samples, copies=copies, channels_last=True)

    def cache_geometry(self, number: int, prefix: str) -> CacheGeometry:
        copies = self.copies(number, prefix)
        return self.geometry(number, len(self.data(prefix)) * copies, copies)

    def key(self, number: int, prefix: str) -> int:
        """Key of the order in which the cache before a block is written."""
        return counter_key(self._job.config.seed, "write", prefix, number)

    def record(self, number: int, prefix: str, name: str) -> CacheRecord:
        """Held-out samples wait in RAM where those of the training wait on the device: no plan counts them there."""
        tier = self.tier(number)
        return CacheRecord(
            name=name,
            tier="ram" if prefix == HELD and tier == "device" else tier,
            geometry=self.cache_geometry(number, prefix),
            block=number,
            generation=int(name.rpartition("-g")[2].removesuffix(".nfc")),
            fingerprint=self.fingerprint(number),
            order_key=self.key(number, prefix),
            seed_key=0,
        )

    def reader(self, number: int, prefix: str, cache: ActivationCache) -> CacheInputs:
        job = self._job
        return CacheInputs(
            cache,
            job.config.seed,
            number,
            len(self.data(prefix)),
            self.copies(number, prefix),
            self.ids(number, prefix),
            job.plan.blocks[number].cache.window,
            compute_dtype(job.config),
        )

    def ids(self, number: int, prefix: str) -> NDArray[np.int64]:
        """Sample ids in the order in which a cache before a block holds them, all copies."""
        before, key = number - 1, self.key(number, prefix)
        samples = len(self.data(prefix))
        if before == 0:
            once = image_order(key, samples)
        else:
            ids = self.ids(before, prefix)
            geometry = self.cache_geometry(before, prefix)
            if self.tier(before) == "recompute":
                ids, geometry = once_each(ids), self.geometry(before, samples, 1)
            once = ids[sample_order(key, len(ids), geometry, self._job.plan.blocks[before].cache.window)]
        return np.tile(once, self.copies(number, prefix) * samples // len(once))

    def fingerprint(self, number: int) -> str:
        """Of all that decides what a cache before a block holds: settings, images, software, and finished blocks."""
        now = self._job.folder.manifest_now
        made_from = {
            "config": now.config_sha256,
            "data": now.data_sha256,
            "env": now.env,
            "blocks": [(asdict(b)["units"], b.batch, b.lr) for b in self._job.plan.blocks[:number]],
            "weights": [e.sha256 for e in now.of_role("block") if e.block < number],
        }
        return digest_of(json.dumps(made_from, sort_keys=True).encode())

    def options(self) -> EngineOptions:
        config, probe = self._job.config, self._job.plan.probe
        options = EngineOptions(
            pinned_bytes=parse_bytes(config.pinned_bytes, "pinned_bytes"),
            durable=config.durable_cache,
            io_timeout=config.io_timeout,
        )
        if probe is None:
            return options
        return replace(options, write_threads=probe.write_threads, read_threads=probe.read_threads)

    def bytes_after(self, number: int) -> int:
        """Bytes on the disk of the caches that a block will leave."""
        following = number + 1
        if following == len(self._job.plan.blocks) or self.tier(following) != "disk":
            return 0
        return sum(self.cache_geometry(following, prefix).file_bytes for prefix in (TRAIN, HELD))


def once_each(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of one copy, in the order of their first appearance."""
    return ids[np.sort(np.unique(ids, return_index=True)[1])]

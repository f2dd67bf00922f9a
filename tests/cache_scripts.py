"""Scenes of the activation cache that need a process of their own: faults read at import, kills, forks, signals, exits.

As a program this file loads torch once, then forks a child for each case that it reads, and prints what came of it; the
child leaves as any interpreter does. `Program` is the other side. Each scene returns what it saw; the tests judge.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the module reads NF_FAULT when it is loaded, which is in the child
    from torch import Tensor

    from nf_engine.storage import ActivationCache, CacheGeometry

NAME = "x001-g0001.nfc"

# ---- What is written, and the check of what is read --------------------------------------------------------------


def small(samples: int = 150) -> CacheGeometry:
    """5 chunks of two pages, the last one not full."""
    from nf_engine.storage import CacheGeometry

    return CacheGeometry(sample_shape=(64,), dtype="fp16", samples=samples, chunk_bytes=4096)


def large(samples: int = 96) -> CacheGeometry:
    """Chunks of 64 KiB and a page, one sample each."""
    from nf_engine.storage import CacheGeometry

    return CacheGeometry(sample_shape=(16, 32, 32), dtype="fp32", samples=samples, chunk_bytes=65_536)


def samples_of(geometry: CacheGeometry) -> Tensor:
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    generator = torch.Generator().manual_seed(geometry.samples)
    return torch.randn(geometry.samples, *geometry.sample_shape, generator=generator).to(types[geometry.dtype])


def fill(cache: ActivationCache, x: Tensor, batch: int = 40, first: int = 0, last: int | None = None) -> None:
    """Appends samples first..last; id = 7 + position, label and copy follow from it."""
    import torch

    ids = 7 + torch.arange(len(x))
    end = len(x) if last is None else last
    for i in range(first, end, batch):
        part = ids[i : min(i + batch, end)]
        cache.append(x[i : min(i + batch, end)], part % 10 - 1, part)


def check(cache: ActivationCache, x: Tensor, batch: int = 30, key: int = 5, window: int = 0) -> int:
    """Reads a pass and asserts order and every bit; returns the samples seen."""
    from nf_engine.storage import sample_order

    geometry = cache.geometry
    options = {"window_bytes": window or 2 * geometry.chunk_stride}
    order = sample_order(key, geometry.samples, geometry, **options).tolist()
    seen = []
    for got in cache.batches(0, batch, key=key, out_dtype=x.dtype, **options):
        seen += (got.ids - 7).tolist()
        check_batch(got, x)
    assert seen == order
    return len(seen)


def check_batch(got: Any, x: Tensor) -> None:
    import torch

    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    expected = x[got.ids - 7].contiguous()
    assert torch.equal(got.x.contiguous().view(kind), expected.view(kind))
    assert torch.equal(got.labels, got.ids % 10 - 1)
    assert not got.copies.any()


def one_thread(**options: Any) -> Any:
    from nf_engine.storage import EngineOptions

    return EngineOptions(**{"write_threads": 1, "read_threads": 1, "pinned_bytes": 1 << 20, **options})


# ---- Scenes ------------------------------------------------------------------------------------------------------


def write(folder: Path, **options: Any) -> dict[str, Any]:
    from nf_engine.storage import ActivationCache

    geometry = small()
    with ActivationCache.create(folder, NAME, geometry, options=one_thread(**options)) as cache:
        fill(cache, samples_of(geometry))
        return {"record": cache.finish().to_json()}


def story(folder: Path, **options: Any) -> dict[str, Any]:
    """Written, read, opened again and read again."""
    from nf_engine.storage import ActivationCache

    geometry = small()
    x = samples_of(geometry)
    with ActivationCache.create(folder, NAME, geometry, options=one_thread(**options)) as cache:
        fill(cache, x)
        record = cache.finish()
        check(cache, x)
        rereads, direct = cache.stats().rereads, cache.stats().direct
    with ActivationCache.open(folder, record, options=one_thread(**options)) as cache:
        check(cache, x)
        rereads += cache.stats().rereads
    return {"rereads": rereads, "direct": direct, "table": record.table_sha256}


def aborted(folder: Path) -> dict[str, Any]:
    from nf_engine.storage import ActivationCache

    geometry = small()
    with ActivationCache.create(folder, NAME, geometry, options=one_thread()) as cache:
        fill(cache, samples_of(geometry)[:90])
    return {}


def write_three(folder: Path) -> dict[str, Any]:
    """Three files of 3 MiB one after the other, for kills at any time."""
    from nf_engine.storage import ActivationCache

    geometry = large(48)
    x, begun = samples_of(geometry), time.monotonic()
    records = []
    for i in range(3):
        options = one_thread(write_threads=4)
        with ActivationCache.create(folder, f"x{i}.nfc", geometry, options=options) as cache:
            fill(cache, x, 5)
            records.append(cache.finish().to_json())
    return {"records": records, "seconds": time.monotonic() - begun}


def with_size_limits(folder: Path, limits: list[int]) -> dict[str, Any]:
    """One cache under each limit on the size of files."""
    results = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        results.append(outcome(story, folder))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for path in folder.iterdir():
            results[-1].setdefault("left", []).append(path.name)
            path.unlink()
    return {"results": results}


def on_a_small_disk(folder: Path, mount: list[str], cases: list[list[Any]]) -> dict[str, Any]:
    """Caches on a file system of its own, mounted for this process alone; case: [samples, bytes taken by a file]."""
    from nf_engine.storage import ActivationCache

    refused = mount_for_this_process(mount, folder)
    if refused:
        return {"result": "skip", "text": refused}
    results = []
    for samples, taken in cases:
        geometry = large(samples)
        x, other = samples_of(geometry), folder / "other"
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        with other.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, taken))

        def work(geometry: CacheGeometry = geometry, x: Tensor = x) -> dict[str, Any]:
            with ActivationCache.create(folder, NAME, geometry, options=one_thread()) as cache:
                fill(cache, x)
                cache.finish()
                check(cache, x)
            (folder / NAME).unlink()
            return {}

        results.append(
            {
                **outcome(work),
                "file": geometry.file_bytes,
                "space": free - taken,
                "left": [p.name for p in folder.iterdir() if p.name not in ("other", "lost+found")],
            }
        )
        other.unlink()
    return {"results": results}


def filled_under_way(folder: Path, mount: list[str]) -> dict[str, Any]:
    """The space could not be reserved, and somebody else takes it while the cache is written."""
    from nf_engine.storage import ActivationCache

    refused = mount_for_this_process(mount, folder)
    if refused:
        return {"result": "skip", "text": refused}
    geometry = large(40)

    def work() -> dict[str, Any]:
        with ActivationCache.create(folder, NAME, geometry, options=one_thread()) as cache:
            fill(cache, samples_of(geometry), 1, 0, 10)
            with contextlib.suppress(OSError), (folder / "other").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(65_536))
            fill(cache, samples_of(geometry), 1, 10)
            cache.finish()
        return {}

    return {**outcome(work), "left": [p.name for p in folder.iterdir()]}


def mount_for_this_process(mount: list[str], folder: Path) -> str:
    """Mounts where no other process sees it, so that it ends with this one; why not, if it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        return os.strerror(ctypes.get_errno())
    for command in (["mount", "--make-rprivate", "/"], ["mount", *mount, str(folder)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        if done.returncode != 0:
            return done.stderr
    return ""


def on_a_mount(folder: Path, mount: list[str]) -> dict[str, Any]:
    refused = mount_for_this_process(mount, folder)
    return {"result": "skip", "text": refused} if refused else story(folder)


def under_strace(folder: Path, inject: str, **options: Any) -> dict[str, Any]:
    """The story while strace makes a system call of this process fail."""
    if shutil.which("strace") is None:
        return {"result": "skip", "text": "no strace"}
    command = ["strace", "-f", "-q", "-o", "/dev/null", "-e", f"inject={inject}", "-p", str(os.getpid())]
    libc = ctypes.CDLL(None)
    libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, any: where Yama restricts it
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    while "TracerPid:\t0" in Path("/proc/self/status").read_text():
        if tracer.poll() is not None:
            return {"result": "skip", "text": tracer.stderr.read()}
        time.sleep(0.005)
    try:
        return outcome(lambda: story(folder, **options))
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
        tracer.stderr.close()


def counting(folder: Path) -> dict[str, Any]:
    """How fast another Python thread counts while this one sleeps, and while it waits in append; best of 5 each."""
    from nf_engine.storage import ActivationCache

    geometry = small(32 * 100)
    x, count, stop = samples_of(geometry), 0, threading.Event()

    def run() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=run)
    best: dict[str, float] = {"free": 0.0, "blocked": 0.0}
    options = one_thread(pinned_bytes=2 * geometry.chunk_stride)
    with ActivationCache.create(folder, NAME, geometry, options=options) as cache:
        thread.start()
        for i in range(5):
            for kind in best:
                before, begun = count, time.monotonic()
                if kind == "free":
                    time.sleep(0.2)
                else:
                    fill(cache, x, 32 * 5, 32 * 5 * i, 32 * 5 * (i + 1))
                best[kind] = max(best[kind], (count - before) / (time.monotonic() - begun))
        stall = cache.stats().write_stall
        stop.set()
        thread.join()
    return {**best, "stall": stall}


def interrupted(folder: Path, where: str) -> dict[str, Any]:
    """Ctrl-C while append, finish or next waits for a slow disk."""
    from nf_engine.storage import ActivationCache

    geometry = small()
    x, sent = samples_of(geometry), [0.0]
    slow = one_thread(pinned_bytes=2 * geometry.chunk_stride)

    def interrupt() -> None:
        sent[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    facts: dict[str, Any] = {}
    cache = ActivationCache.create(folder, NAME, geometry, options=slow)
    if where == "next":
        fill(cache, x)
        cache.finish()
        batches = cache.batches(0, 30, key=5, window_bytes=2 * geometry.chunk_stride)
    elif where == "finish":
        fill(cache, x[:32])
        begin_rest = 32
    timer = threading.Timer(0.25, interrupt)
    timer.start()
    try:
        if where == "append":
            fill(cache, x, 150)
        elif where == "finish":
            fill(cache, x, 150, begin_rest)
            cache.finish()
        else:
            for _ in batches:
                pass
        facts["interrupt"] = None
    except KeyboardInterrupt:
        facts["interrupt"] = time.monotonic() - sent[0]
    timer.join()
    return {**facts, **after_interrupt(cache, x, where)}


def after_interrupt(cache: ActivationCache, x: Tensor, where: str) -> dict[str, Any]:
    """append: the batch again, which C++ has in part, must not make a file; then abort."""
    facts: dict[str, Any] = {}
    if where == "append":

        def again() -> dict[str, Any]:
            fill(cache, x, 150)
            cache.finish()
            return {}

        facts["again"] = outcome(again)
    begun = time.monotonic()
    cache.abort()
    return {**facts, "abort": time.monotonic() - begun}


def finished_after_interrupt(folder: Path) -> dict[str, Any]:
    """finish() that was interrupted may be called again."""
    from nf_engine.storage import ActivationCache

    geometry = small()
    x = samples_of(geometry)
    with ActivationCache.create(folder, NAME, geometry, options=one_thread()) as cache:
        fill(cache, x)
        threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            cache.finish()
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        cache.finish()
        check(cache, x)
    return {"interrupted": interrupted}


def timed_out(folder: Path, where: str, io_timeout: float) -> dict[str, Any]:
    """A request that takes longer than io_timeout; how long until the error, and then until close() returned."""
    from nf_engine.storage import ActivationCache

    geometry = small()
    x, options = samples_of(geometry), one_thread(io_timeout=io_timeout)
    cache = ActivationCache.create(folder, NAME, geometry, options=options)

    def work() -> dict[str, Any]:
        fill(cache, x)
        cache.finish()
        check(cache, x)
        return {}

    begun = time.monotonic()
    facts = outcome(work)
    failed = time.monotonic()
    again = outcome(cache.finish) if where == "pwrite" else {"result": ""}
    cache.close()
    return {**facts, "waited": failed - begun, "closed": time.monotonic() - failed, "again": again["result"]}


def stuck(folder: Path) -> dict[str, Any]:
    """How long close() waits for a request that does not end, and io_timeout is not over."""
    from nf_engine.storage import ActivationCache

    geometry = small()
    cache = ActivationCache.create(folder, NAME, geometry, options=one_thread())
    fill(cache, samples_of(geometry), last=40)
    time.sleep(0.2)
    begun = time.monotonic()
    cache.close()
    return {"closed": time.monotonic() - begun}


def memory_on_a_slow_disk(folder: Path) -> dict[str, Any]:
    """Growth of the resident memory against what the engine is said to hold, writing and then reading."""
    import torch

    from nf_engine.storage import ActivationCache, CacheGeometry, engine_report

    geometry = CacheGeometry(sample_shape=(1 << 18,), dtype="fp32", samples=128, chunk_bytes=8 << 20)
    x = torch.ones(1, 1 << 18)
    story(folder)  # everything has been used once
    pinned = 8 * geometry.chunk_stride
    facts = []
    before = resident()
    options = one_thread(pinned_bytes=pinned, write_threads=2, read_threads=2)
    with ActivationCache.create(folder, "a.nfc", geometry, options=options) as cache:
        reset_peak()
        for i in range(geometry.samples):
            cache.append(x, torch.zeros(1, dtype=torch.int64), torch.tensor([i]))
        cache.finish()
        facts.append({"expected": pinned, "grown": peak() - before})
        slabs = cache.stats().peak_slabs
        window, batch = 4, 4
        before = resident()
        reset_peak()
        for _ in cache.batches(0, batch, key=1, window_bytes=window * geometry.chunk_stride):
            pass
        expected = (window + 4) * geometry.chunk_stride + 3 * batch * geometry.sample_bytes
        facts.append({"expected": expected, "grown": peak() - before})
        memory = engine_report(torch.device("cpu"), options)["memory"]
    return {"facts": facts, "memory": memory, "asked": pinned, "slabs": slabs}


def lifetimes(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Caches and epochs closed, aborted, dropped and left in any order; whatever is read on the way is checked."""
    from nf_engine.errors import CacheClosedError
    from nf_engine.storage import ActivationCache

    rng, geometry = random.Random(seed), small()
    x = samples_of(geometry)
    closed = seen = 0
    before = descriptors(), threads()
    holder: dict[str, ActivationCache] = {}
    epochs: dict[int, Any] = {}
    for _ in range(rounds):
        holder["cache"] = ActivationCache.create(folder, NAME, geometry, options=one_thread(read_threads=2))
        count = rng.choice([0, 1, 33, 150, 150, 150])
        fill(holder["cache"], x[:count], rng.choice([1, 40, 150]) if count < 150 else 40)
        if count == 150 and rng.random() < 0.9:
            holder["cache"].finish()
            for i in range(rng.randrange(3)):
                epochs[i] = holder["cache"].batches(0, 30, key=i, out_dtype=x.dtype, window_bytes=1)
                for got in itertools.islice(epochs[i], rng.randrange(6)):
                    check_batch(got, x)
                    seen += len(got.ids)
        steps: list[Callable[[], Any]] = [
            lambda: holder["cache"].close(),
            lambda: holder["cache"].abort(),
            lambda: holder.pop("cache"),
            lambda: holder["cache"].__exit__(None, None, None),
            lambda: fill(holder["cache"], x[:1]),
            lambda: holder["cache"].finish(),
            *(lambda i=i: check_batch(next(epochs[i]), x) for i in epochs),
            *(lambda i=i: epochs[i].close() for i in epochs),
            *(lambda i=i: epochs.pop(i) for i in epochs),
        ]
        for step in rng.sample(steps, rng.randrange(len(steps) + 1)):
            try:
                step()
            except CacheClosedError:
                closed += 1
            except (KeyError, StopIteration):
                continue  # dropped, or at its end, before
            except Exception as error:
                if type(error).__name__ != "CacheIncompleteError":  # finish() of one that is not full
                    raise
        # A cache kept alive here goes with its last reference, as one that was forgotten.
        epochs.clear()
        holder.clear()
        if (folder / f"{NAME}.tmp").exists():
            return {"result": "left", "text": f"{NAME}.tmp after {count} samples"}
        (folder / NAME).unlink(missing_ok=True)
    return {"leaks": [descriptors() - before[0], threads() - before[1]], "closed": closed, "samples": seen}


def opened_and_closed(folder: Path, rounds: int) -> dict[str, Any]:
    from nf_engine.storage import ActivationCache, CacheRecord

    record = CacheRecord.from_json(write(folder)["record"])
    x = samples_of(record.geometry)

    def once() -> None:
        with ActivationCache.open(folder, record, options=one_thread()) as cache:
            check(cache, x)

    for _ in range(50):
        once()
    gc.collect()
    before = resident(), descriptors(), threads()
    for _ in range(rounds):
        once()
    gc.collect()
    return {"grown": resident() - before[0], "leaks": [descriptors() - before[1], threads() - before[2]]}


def forked(folder: Path, rounds: int) -> dict[str, Any]:
    """Children born while four threads write: their parent's cache is dead for them, one of their own works."""
    from nf_engine.errors import CacheClosedError
    from nf_engine.storage import ActivationCache

    geometry = large(rounds * 4)
    x, good = samples_of(geometry), 0
    with ActivationCache.create(folder, NAME, geometry, options=one_thread(write_threads=4)) as cache:
        for i in range(rounds):
            fill(cache, x, 4, 4 * i, 4 * i + 3)
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # one that waits for a lost lock ends here
                status = 1
                try:
                    dead = 0
                    for call in (cache.finish, lambda: fill(cache, x[:1]), lambda: cache.batches(0, 1, key=0)):
                        try:
                            call()
                        except CacheClosedError:
                            dead += 1
                    cache.close()
                    own = folder / f"child{i}"
                    own.mkdir()
                    story(own)
                    status = 0 if dead == 3 else 2
                finally:
                    os._exit(status)
            fill(cache, x, 4, 4 * i + 3, 4 * i + 4)
            good += os.waitpid(child, 0)[1] == 0
        cache.finish()
        samples = check(cache, x, window=1 << 20)
    return {"good": good, "samples": samples}


kept: list[Any] = []  # alive when the interpreter goes


def leave(folder: Path, how: str) -> dict[str, Any]:
    """Returns with work under way, so that the interpreter ends in the middle of it."""
    from nf_engine.storage import ActivationCache

    geometry = small()
    x = samples_of(geometry)
    cache = ActivationCache.create(folder, NAME, geometry, options=one_thread(pinned_bytes=2 * geometry.chunk_stride))
    kept.append(cache)
    if how == "blocked":
        threading.Thread(target=fill, args=(cache, x, 150), daemon=True).start()
        time.sleep(0.15)
        return {}
    fill(cache, x, 40, 0, 120)
    if how == "writing":
        return {}
    fill(cache, x, 30, 120)
    cache.finish()
    batches = cache.batches(0, 3, key=1)
    next(batches)
    kept.append(batches)
    if how == "next":

        def read() -> None:
            for _ in batches:
                time.sleep(0)

        threading.Thread(target=read, daemon=True).start()
        time.sleep(0.15)
    return {}


def without_libcuda(folder: Path) -> dict[str, Any]:
    from nf_engine.storage import cuda_status

    available, reason = cuda_status()
    return {**story(folder), "available": available, "reason": reason}


def on_the_stand_in(folder: Path, pinned: int, threads: int = 2, seeds: int = 1) -> dict[str, Any]:
    """Device memory written and read through the engine's own interface, on the stand-in driver."""
    from nf_engine import _cache
    from nf_engine.cache_format import CacheGeometry, CacheRecord, pack_header

    driver = ctypes.CDLL(os.environ["NF_LIBCUDA"])
    context, stream = ctypes.c_void_p(), ctypes.c_void_p()
    engine = _cache.Engine(pinned, 0, 300.0)
    cuda(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    cuda(driver.cuCtxSetCurrent(context))
    cuda(driver.cuStreamCreateWithPriority(ctypes.byref(stream), 1, 0))
    geometry = CacheGeometry(sample_shape=(500,), dtype="fp16", samples=203, chunk_bytes=16_384)
    batch, size = 24, geometry.sample_bytes
    slots = [ctypes.c_ulonglong() for _ in range(4)]
    for slot in slots:
        cuda(driver.cuMemAlloc_v2(ctypes.byref(slot), ctypes.c_size_t(batch * size)))
    staging, ring = slots[:2], slots[2:]
    wrong = samples = 0
    registered = report(driver)["registered_bytes"]
    for seed in range(seeds):
        name = f"g{seed}.nfc"
        header = pack_header(
            CacheRecord(
                name=name,
                tier="disk",
                geometry=geometry,
                block=1,
                generation=1,
                fingerprint="00" * 32,
                order_key=0,
                seed_key=0,
            )
        )
        target = _cache.io.Folder(str(folder))
        writer = engine.create(target, name, header, threads, 2, False)
        for number, first in enumerate(range(0, geometry.samples, batch)):
            ids = range(first, min(first + batch, geometry.samples))
            slot = number % 2
            writer.fence(slot, stream.value or 0)
            cuda(driver.nf_fake_launch_fill(stream, staging[slot], len(ids) * size, pattern(first, size)))
            writer.append_device(staging[slot].value, len(ids), records(ids), stream.value or 0, slot)
        writer.finish()
        reader = engine.open(target, name)
        addresses = [slot.value for slot in ring]
        epoch = reader.start(seed, batch, 3, 0, False, addresses, True, stream.value or 0, threads)
        mismatches = []
        while True:
            slot, count, members = epoch.next(stream.value or 0)
            if count == 0:
                break
            for k in range(count):
                i = int.from_bytes(members[16 * k : 16 * k + 8], "little")
                mismatches.append(ctypes.c_int(-1))
                where = at(ring[slot], k * size)
                found = ctypes.byref(mismatches[-1])
                cuda(driver.nf_fake_launch_check(stream, where, size, pattern(i, size), found))
        driver.nf_fake_drain()
        wrong += sum(found.value != 0 for found in mismatches)
        samples += len(mismatches)
        del epoch, writer
        reader.close()
        target.close()
        (folder / name).unlink()
    memory, note, pinned_bytes = engine.memory, engine.note, engine.pinned
    del reader, engine
    gc.collect()
    for slot in slots:
        cuda(driver.cuMemFree_v2(slot))
    cuda(driver.cuStreamDestroy_v2(stream))
    return {
        "memory": memory,
        "pinned": pinned_bytes,
        "note": note,
        "registered": registered,
        "wrong": wrong,
        "samples": samples,
        "report": report(driver),
    }


def pattern(sample: int, size: int) -> ctypes.c_ulonglong:
    """Seed that begins the driver's pattern, mix(seed, i), where samples that follow each other have got to."""
    return ctypes.c_ulonglong(sample * (size // 8) * 0x9E3779B97F4A7C15 % 2**64)


def at(pointer: ctypes.c_ulonglong, offset: int) -> ctypes.c_ulonglong:
    return ctypes.c_ulonglong(pointer.value + offset)


def records(ids: range) -> bytes:
    return b"".join(i.to_bytes(8, "little") + bytes(8) for i in ids)


def cuda(code: int) -> None:
    assert code == 0, f"CUDA error {code}"


class Report(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("streams", "events", "registrations", "allocations", "pending")),
        *((name, ctypes.c_long) for name in ("violations", "registered_bytes", "copied_d2h", "copied_h2d")),
        ("text", ctypes.c_char * 8192),
    ]


def report(driver: ctypes.CDLL) -> dict[str, Any]:
    found = Report()
    cuda(driver.nf_fake_get_report(ctypes.byref(found)))
    numbers = {name: getattr(found, name) for name, _ in Report._fields_[:-1]}
    return {**numbers, "text": found.text.decode()}


def train(folder: Path) -> dict[str, Any]:
    """nf-engine train on a tiny data set, its caches on disk."""
    from nf_engine import cli

    arguments = "train --data synthetic:160 --model vgg11 --width 0.125 --memory-budget 6MiB --epochs 1 --cache disk"
    return {"code": cli.main([*arguments.split(), "--progress", "none", "--output-dir", str(folder / "run")])}


# ---- The process -------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def outcome(work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What came of it: "done", or the error's name, text and numbers."""
    from nf_engine.errors import NFError

    try:
        return {"result": "done", **(work(*arguments) or {})}
    except (NFError, AssertionError, MemoryError, KeyboardInterrupt) as error:
        names = [name for name in ("op", "path", "offset", "errno", "needed", "free") if hasattr(error, name)]
        numbers = {name: getattr(error, name) for name in names}
        return {"result": type(error).__name__, "text": str(error), **numbers}


def play(case: dict[str, Any]) -> dict[str, Any]:
    """One case in this process, whose module is loaded here."""
    for name in [name for name in os.environ if name.startswith("NF_")]:
        del os.environ[name]
    os.environ.update(case["env"])
    import nf_engine.storage  # noqa: F401

    notes: list[str] = []

    class Notes(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            notes.append(entry.getMessage())

    handler = Notes(logging.WARNING)
    logging.getLogger("nf_engine").addHandler(handler)
    begun = case["ready"]
    before = descriptors(), threads()
    if begun is not None:
        os.write(begun, b"!")
    facts = outcome(lambda: globals()[case["scene"]](Path(case["folder"]), **case["arguments"]))
    gc.collect()
    deadline = time.monotonic() + 1
    while not case["leave"] and threads() > before[1] and time.monotonic() < deadline:
        time.sleep(0.005)  # one that was joined may still be on its way out of the kernel
    return {**facts, "log": notes, "leaked": [descriptors() - before[0], threads() - before[1]]}


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Forks a child for a case; its facts, exit status and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for name in case["preload"]:
            importlib.import_module(name)
        ready, case["ready"] = os.pipe() if case["kill_after"] is not None else (None, None)
        child = os.fork()
        if child == 0:
            os.dup2(err.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            if case["limit"]:
                signal.alarm(case["limit"])
            os.write(out.fileno(), json.dumps(play(case)).encode())
            if case["leave"]:
                sys.exit(0)  # as a program does
            if "NF_FAULT_COUNT" in case["env"]:
                ctypes.CDLL(None).exit(0)  # prints them
            os._exit(0)  # torch's clean-up takes longer than most cases
        if ready is not None:
            os.close(case["ready"])
            os.read(ready, 1)
            os.close(ready)
            time.sleep(case["kill_after"])
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        text = out.read()
        seen = json.loads(text) if text else {"result": signal.Signals(-status).name if status < 0 else "nothing"}
        return {**seen, "status": status, "stderr": err.read().decode(errors="replace")}


def main() -> None:
    import numpy
    import psutil
    import torch

    import nf_engine.codec
    import nf_engine.records

    del numpy, psutil, nf_engine
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


class Program:
    """This file as a program, asked one case after the other."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("nf_engine")
        assert found is not None
        assert found.origin is not None
        path = os.pathsep.join([str(Path(found.origin).parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self,
        scene: str,
        folder: Path,
        env: dict[str, str] | None = None,
        *,
        fault: str = "",
        limit: int = 60,
        kill_after: float | None = None,
        leave: bool = False,
        preload: Sequence[str] = (),
        **arguments: Any,
    ) -> dict[str, Any]:
        """Facts of a scene, and what it left in its folder.

        Args:
            fault: NF_FAULT of the child.
            limit: seconds after which the child is killed by SIGALRM; 0: none.
            kill_after: seconds after the begin of the scene at which it is killed by SIGKILL.
            leave: the interpreter is finalised in the end.
            preload: modules loaded before the fork, once for all cases.
        """
        folder.mkdir(exist_ok=True)
        env = {**(env or {}), **({"NF_TESTING": "1", "NF_FAULT": fault} if fault else {})}
        case = {"scene": scene, "folder": str(folder), "env": env, "limit": limit, "arguments": arguments}
        case |= {"kill_after": kill_after, "leave": leave, "preload": preload}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        seen: dict[str, Any] = json.loads(self.process.stdout.readline())
        return {"left": sorted(path.name for path in folder.iterdir()), **seen}

    def counts(self, scene: str, folder: Path, path: str = "*", **arguments: Any) -> dict[str, int]:
        """How often a scene makes each operation on files like `path`."""
        env = {"NF_TESTING": "1", "NF_FAULT_COUNT": "1", "NF_FAULT": f"path={path}"}
        seen = self(scene, folder, env, **arguments)
        line = next(line for line in seen["stderr"].splitlines() if line.startswith("NF_FAULT_COUNT"))
        return {name: int(count) for name, count in (pair.split("=") for pair in line.split()[1:])}

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@contextlib.contextmanager
def program() -> Iterator[Program]:
    made = Program()
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of cases would each wait for the disk."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        yield Path(name)


if __name__ == "__main__":
    main()

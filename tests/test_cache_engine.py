"""The cache engine from Python: order, tiers, threads, signals, forks, exits, memory, and the stand-in CUDA driver.

What needs a process of its own is a scene of `cache_scripts.py`, played in a child.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_engine import _cache
from nf_engine.errors import CacheError, CacheIncompleteError
from nf_engine.storage import ActivationCache, CacheGeometry, EngineOptions, sample_order


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


scripts = load("cache_scripts")
model = load("test_storage")  # of the order and of the format
NAME = scripts.NAME
PAGE, MIB = 4096, 1 << 20
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# A slow disk: each chunk, but not the header, takes this long.
SLOW_WRITES = "op=pwrite; path=*.nfc.tmp; n=2; sticky=1; mode=delay:{}"
SLOW_READS = "op=pread; path=*.nfc; n=4; sticky=1; mode=delay:{}"


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    with scripts.program() as program:
        yield program


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with scripts.folder_in_memory() as folder:
        yield folder


def threads_of(count: int, **options: Any) -> EngineOptions:
    return EngineOptions(write_threads=count, read_threads=count, **options)


# ---- Order -------------------------------------------------------------------------------------------------------


def random_geometry(rng: random.Random) -> CacheGeometry:
    size = rng.choice([1, 3, 16, 100])
    chunk = rng.choice([64, 700, 4096, 20_000])
    return CacheGeometry(sample_shape=(size,), dtype="fp32", samples=rng.randint(1, 80), chunk_bytes=chunk)


@pytest.mark.parametrize("n", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_the_order_is_the_models_for_any_number_of_threads_and_from_any_batch(memory, n):
    rng = random.Random(n)
    passes = 0
    for i in range(n):
        geometry, key = random_geometry(rng), rng.getrandbits(64)
        window, batch = rng.randint(1, 6), rng.randint(1, 20)
        options = {"key": key, "window_bytes": window * geometry.chunk_stride, "drop_last": rng.random() < 0.3}
        order = model.model_plan(key, geometry.samples, geometry.samples_per_chunk, max(2, window))
        assert sorted(order) == list(range(geometry.samples))
        x = scripts.samples_of(geometry)
        with ActivationCache.create(memory, f"{i}.nfc", geometry) as cache:
            scripts.fill(cache, x, rng.randint(1, 90))
            record = cache.finish()
        assert sample_order(key, geometry.samples, geometry, options["window_bytes"]).tolist() == order
        end = len(order) // batch * batch if options["drop_last"] else len(order)
        expected = [order[k : k + batch] for k in range(0, end, batch)]
        for threads in (1, 2, 4, 8):
            with ActivationCache.open(memory, record, options=threads_of(threads)) as cache:
                starts = range(len(expected) + 1) if threads == 2 else [0]
                for start in starts:
                    got = []
                    for b in cache.batches(0, batch, start=start, **options):
                        scripts.check_batch(b, x)
                        got.append((b.ids - 7).tolist())
                    assert got == expected[start:], (geometry, key, window, batch, threads, start)
                    passes += 1
        (memory / record.name).unlink()
    print(f"order, exact and equal for 1/2/4/8 threads and from every batch: {n}/{n} geometries, {passes} passes")


def test_the_planner_is_the_models_in_larger_files():
    rng, n = random.Random(1), 500
    for _ in range(n):
        arguments = rng.getrandbits(64), rng.randint(1, 2000), rng.randint(1, 64), rng.randint(1, 40)
        order = _cache.plan_order(*arguments).tolist()
        assert order == model.model_plan(*arguments), arguments
    print(f"C++ planner equals the model: {n}/{n}")


def test_two_writes_by_other_threads_and_batches_have_one_table(memory):
    geometry = scripts.small(32 * 30 + 5)  # the last chunk, not full, lies in a slab that has been used
    x, tables = scripts.samples_of(geometry), set()
    for threads, batch in ((1, 7), (4, 7), (4, 100), (2, 1)):
        with ActivationCache.create(memory, "a.nfc", geometry, options=threads_of(threads)) as cache:
            scripts.fill(cache, x, batch)
            tables.add(cache.finish().table_sha256)
        data = (memory / "a.nfc").read_bytes()
        (memory / "a.nfc").unlink()
    assert len(tables) == 1
    ids, labels = range(7, 972), [i % 10 - 1 for i in range(7, 972)]
    samples = [row.tobytes() for row in x.numpy()]
    layout = {"shape": (64,), "dtype": "fp16", "spc": 32, "block": 0, "generation": 1, "n_copies": 1, "layout": 0}
    assert data == model.model_write(samples, ids, labels, [0] * 965, fingerprint=bytes(32), **layout)
    with ActivationCache.create(memory, "a.nfc", geometry) as cache:
        scripts.fill(cache, -x)
        assert cache.finish().table_sha256 not in tables


# ---- Tiers and round trips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "u8"])
def test_one_plan_gives_the_same_batches_on_every_tier(memory, dtype, channels_last):
    geometry = CacheGeometry(
        sample_shape=(6, 8, 9), dtype=dtype, samples=103, chunk_bytes=9000, channels_last=channels_last, copies=2
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(103, 6, 8, 9, generator=generator).relu()
    ids, labels = torch.randperm(103, generator=generator), torch.randint(-1, 10, (103,), generator=generator)
    copies = torch.randint(0, 2, (103,), generator=generator)
    found = {}
    for tier in ("device", "ram", "disk"):
        with ActivationCache.create(memory, "a.nfc", geometry, tier=tier) as cache:
            for part in torch.arange(103).split(20):
                cache.append(x[part], labels[part], ids[part], copies[part])
            cache.finish()
            found[tier] = [
                tuple(t.clone() for t in b) for b in cache.batches(0, 16, key=9, window_bytes=3 * geometry.chunk_stride)
            ]
    assert [len(b[0]) for b in found["disk"]] == [16] * 6 + [7]
    order = torch.from_numpy(sample_order(9, 103, geometry, 3 * geometry.chunk_stride))
    for tier, batches in found.items():
        for got, other in zip(batches, found["disk"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True)), tier
            assert got[0].view(torch.int32).equal(other[0].view(torch.int32))
        got_x, got_labels, got_ids, got_copies = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(got_ids, ids[order])
        assert torch.equal(got_labels, labels[order])
        assert torch.equal(got_copies, copies[order])
        if dtype == "u8":
            step = (x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True)) / 255
            assert ((got_x - x[order]).abs() <= step[order] * 0.501).all()
        else:
            assert torch.equal(got_x, x[order].to(TORCH[dtype]).float())


@st.composite
def trips(draw: st.DrawFn) -> tuple[CacheGeometry, int, int, int]:
    """Samples of 2 bytes to 8 MiB, spread evenly over the powers of two; at most 16 MiB in all."""
    size = int(2 ** draw(st.floats(0, 22))) + draw(st.integers(0, 7))
    size = min(size, 4 * MIB)  # elements of 2 bytes
    samples = draw(st.integers(1, max(1, min(3000, 8 * MIB // size))))
    chunk = draw(st.sampled_from([PAGE, 5000, 1 << 16, 300_000, MIB, 8 * MIB]))
    geometry = CacheGeometry(sample_shape=(size,), dtype="fp16", samples=samples, chunk_bytes=chunk)
    return geometry, draw(st.integers(1, 1000)), draw(st.integers(1, 1000)), draw(st.integers(1, 4))


def round_trip(folder: Path, trip: tuple[CacheGeometry, int, int, int]) -> None:
    geometry, wrote, batch, threads = trip
    shape = (geometry.samples, *geometry.sample_shape)
    generator = torch.Generator().manual_seed(geometry.samples)
    # Any bits but those of infinities and NaNs: exponents 0..15.
    x = (torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16) & -0x4001).view(
        torch.float16
    )
    options = threads_of(threads, pinned_bytes=160 * MIB)
    with ActivationCache.create(folder, "trip.nfc", geometry, options=options) as cache:
        scripts.fill(cache, x, wrote)
        record = cache.finish()
        assert (folder / "trip.nfc").stat().st_size == geometry.file_bytes
    with ActivationCache.open(folder, record, options=options) as cache:
        assert scripts.check(cache, x, batch, window=3 * geometry.chunk_stride) == geometry.samples


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_round_trips_of_any_geometry_are_exact(memory, n):
    good = 0

    @settings(max_examples=n, deadline=None, database=None)
    @given(trip=trips())
    def trip(trip: tuple[CacheGeometry, int, int, int]) -> None:
        nonlocal good
        round_trip(memory, trip)
        good += 1

    trip()
    assert good >= n
    print(f"round trips, bit-exact: {good}/{good}")


def test_two_caches_at_once_do_not_disturb_each_other(memory):
    geometry = scripts.large(64)
    x = scripts.samples_of(geometry)
    with ActivationCache.create(memory, "x1.nfc", geometry) as first:
        scripts.fill(first, x)
        first.finish()
        for round_ in range(3):
            with ActivationCache.create(memory, f"y{round_}.nfc", geometry) as second:
                for number, b in enumerate(first.batches(0, 4, key=round_, window_bytes=1)):
                    scripts.check_batch(b, x)
                    scripts.fill(second, -x, 4, 4 * number, 4 * number + 4)
                second.finish()
                assert scripts.check(second, -x) == 64
                assert scripts.check(first, x) == 64


# ---- Where direct I/O, libcuda or host memory is missing ---------------------------------------------------------


def test_a_buffered_disk_gives_the_same_and_says_why(run, tmp_path):
    plain = run("story", tmp_path / "plain")
    buffered = run("story", tmp_path / "buffered", {"NF_TESTING": "1", "NF_DIRECT": "0"})
    assert (plain["result"], buffered["result"]) == ("done", "done"), buffered
    assert plain["table"] == buffered["table"]
    assert not buffered["direct"]
    (note,) = buffered["log"]
    assert str(tmp_path / "buffered") in note
    assert "page cache" in note
    assert note.endswith("NF_DIRECT=0")
    assert (tmp_path / "plain" / NAME).read_bytes() == (tmp_path / "buffered" / NAME).read_bytes()


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_file_system_in_memory_gives_the_same(run, tmp_path, kind):
    plain = run("story", tmp_path / "plain")
    seen = run("on_a_mount", tmp_path / "disk", mount=["-t", kind, "none"])
    if seen["result"] == "skip":
        pytest.skip(f"no file system may be mounted here: {seen['text']}")
    assert seen["result"] == "done", seen
    assert seen["table"] == plain["table"]
    assert seen["direct"] or "page cache" in seen["log"][0]
    print(f"{kind}: same table, direct {seen['direct']} {seen['log']}")


def test_without_libcuda_the_cpu_path_works_and_the_reason_is_said(run, memory):
    env = {"NF_TESTING": "1", "NF_LIBCUDA": "/nowhere/libcuda.so.1"}
    seen = run("without_libcuda", memory / "nocuda", env)
    assert (seen["result"], seen["available"]) == ("done", False)
    assert "/nowhere/libcuda.so.1: cannot open shared object file" in seen["reason"]


def test_too_little_host_memory_is_an_error_with_both_numbers(memory):
    geometry = scripts.large()
    for pinned in (2 * geometry.chunk_stride - 1, geometry.chunk_stride, PAGE):
        with pytest.raises(CacheError, match="raise pinned_bytes or lower chunk_bytes") as caught:
            ActivationCache.create(memory, "a.nfc", geometry, options=EngineOptions(pinned_bytes=pinned))
        for number in (f"2 x {geometry.chunk_stride} bytes", f"of {pinned // PAGE * PAGE} bytes"):
            assert number in str(caught.value)
        assert not (memory / "a.nfc.tmp").exists()
    options = EngineOptions(pinned_bytes=2 * geometry.chunk_stride)
    with ActivationCache.create(memory, "a.nfc", geometry, options=options) as cache:
        scripts.fill(cache, scripts.samples_of(geometry))
        with pytest.raises(CacheError, match="got 0 of"):  # all of it is lent
            ActivationCache.create(memory, "b.nfc", geometry, options=options)
        cache.finish()
        assert 1 <= cache.stats().peak_slabs <= 2


def test_an_append_that_was_refused_takes_no_part(memory):
    geometry = scripts.small()
    x = scripts.samples_of(geometry)
    with ActivationCache.create(memory, "a.nfc", geometry) as cache:
        scripts.fill(cache, x[:100])
        with pytest.raises(CacheIncompleteError, match="expected 150 samples, got 200"):
            scripts.fill(cache, torch.cat([x[:100], x[:100]]), 100, 100)
        with pytest.raises(ValueError, match="expected x"):
            cache.append(x[100:].view(-1, 8, 8), torch.zeros(50, dtype=torch.int64), torch.arange(50))
        scripts.fill(cache, x, 50, 100)
        cache.finish()
        assert scripts.check(cache, x) == 150


# ---- A slow disk -------------------------------------------------------------------------------------------------


def test_other_threads_run_while_append_waits(run, memory):
    seen = run("counting", memory / "counting", fault=SLOW_WRITES.format(40))
    assert seen["result"] == "done", seen
    assert seen["stall"] > 0.5  # it did wait
    share = seen["blocked"] / seen["free"]
    assert share >= 0.8
    print(f"a counting thread while append waits: {share:.0%} of its free speed")


@pytest.mark.parametrize("where", ["append", "finish", "next"])
def test_ctrl_c_ends_a_wait_at_once_and_abort_still_works(run, memory, where):
    fault = SLOW_READS if where == "next" else SLOW_WRITES
    folder = memory / f"interrupted-{where}"
    seen = run("interrupted", folder, fault=fault.format(700), where=where)
    assert seen["result"] == "done", seen
    assert seen["interrupt"] is not None
    assert seen["interrupt"] <= 0.3
    assert seen["abort"] <= 1.0
    assert seen["left"] == ([NAME] if where == "next" else [])
    assert seen["leaked"] == [0, 0]
    if where == "append":  # C++ has the first part of that batch: appended again, it is one too many
        assert seen["again"]["result"] == "CacheIncompleteError", seen
    print(f"SIGINT in {where}: {seen['interrupt']:.2f} s")


def test_finish_can_be_called_again_after_ctrl_c(run, memory):
    seen = run("finished_after_interrupt", memory / "again", fault=SLOW_WRITES.format(100))
    assert (seen["result"], seen["interrupted"]) == ("done", True), seen


@pytest.mark.parametrize(
    ("where", "delay", "slowest"),
    [("pwrite", 1500, 1.0), ("pread", 1500, 1.0), pytest.param("pwrite", 14_000, 1.0, marks=pytest.mark.slow)],
)
def test_a_request_that_takes_too_long_is_an_error_and_close_does_not_hang(run, memory, where, delay, slowest):
    folder = memory / f"late-{where}"
    name = NAME if where == "pread" else f"{NAME}.tmp"
    n = 4 if where == "pread" else 2
    fault = f"op={where}; path={name}; n={n}; mode=delay:{delay}"
    seen = run("timed_out", folder, fault=fault, where=where, io_timeout=0.4, leave=True)
    assert (seen["result"], seen["errno"], seen["op"]) == ("StorageError", 110, where), seen
    assert seen["path"] == str(folder / name)
    assert seen["offset"] >= PAGE
    assert f"{where} at byte {seen['offset']} failed" in seen["text"]
    assert 0.4 <= seen["waited"] <= 1.4
    assert seen["closed"] <= slowest
    assert seen["again"] == ("StorageError" if where == "pwrite" else "")
    assert seen["left"] == ([NAME] if where == "pread" else [])
    assert seen["status"] == 0
    took = f"error after {seen['waited']:.2f} s, close {seen['closed']:.2f} s"
    print(f"io_timeout 0.4 s, {where} of {delay / 1000} s: {took}")


@pytest.mark.slow
def test_closing_leaves_a_stuck_request_behind_after_ten_seconds(run, memory):
    seen = run("stuck", memory / "stuck", fault=SLOW_WRITES.format(13_000), leave=True)
    assert seen["result"] == "done", seen
    assert 9.9 <= seen["closed"] <= 10.5
    assert (seen["left"], seen["status"]) == ([], 0)
    print(f"close() with a request of 13 s under way: {seen['closed']:.1f} s")


def test_the_engines_memory_is_what_it_says_on_a_slow_disk(run, memory):
    seen = run(
        "memory_on_a_slow_disk", memory / "rss", fault="op=pwrite; path=a.nfc.tmp; n=2; sticky=1; mode=delay:150"
    )
    assert seen["result"] == "done", seen
    assert seen["memory"] == seen["asked"]
    assert seen["slabs"] == 8  # the disk was behind
    for what, fact in zip(("writing", "reading"), seen["facts"], strict=True):
        assert fact["grown"] == pytest.approx(fact["expected"], rel=0.05)
        print(f"RSS {what}: {fact['grown'] / fact['expected']:.1%} of {fact['expected']} bytes")
    (memory / "rss" / "a.nfc").unlink()


# ---- Life and end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_closing_in_any_order_leaves_nothing(run, memory, n):
    seen = run("lifetimes", memory / f"lives{n}", rounds=n, seed=n, limit=300)
    assert seen["result"] == "done", seen
    assert seen["leaks"] == [0, 0]
    assert seen["left"] == []
    assert seen["closed"] > 0
    assert seen["samples"] > 10 * n
    print(f"close, abort, drop, exit in random orders: {n}/{n}, 0 descriptors, 0 threads left, {seen['samples']} right")


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_opening_and_closing_does_not_grow(run, memory, n):
    seen = run("opened_and_closed", memory / f"opened{n}", rounds=n, limit=300)
    assert seen["result"] == "done", seen
    assert seen["leaks"] == [0, 0]
    assert seen["grown"] < 4 * MIB
    print(f"open, read, close: {n}/{n}, RSS + {seen['grown'] / MIB:.2f} MiB")


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_forks_while_writing_harm_neither_side(run, memory, n):
    folder = memory / f"forks{n}"
    seen = run("forked", folder, rounds=n, limit=300)
    assert seen["result"] == "done", seen
    assert (seen["good"], seen["samples"]) == (n, 4 * n)
    assert not list(folder.rglob("*.tmp"))
    shutil.rmtree(folder)
    print(f"forks while writing: {n}/{n} children well, 0 wrong bytes")


@pytest.mark.parametrize("how", ["writing", "reading", "blocked", "next"])
def test_the_interpreter_may_end_at_any_time(run, memory, how):
    fault = {"blocked": SLOW_WRITES.format(200), "next": SLOW_READS.format(200)}.get(how, "")
    folder = memory / f"exit-{how}"
    begun = time.monotonic()
    seen = run("leave", folder, fault=fault, how=how, leave=True, limit=30)
    assert (seen["result"], seen["status"]) == ("done", 0), seen
    assert seen["left"] == ([] if how in ("writing", "blocked") else [NAME])
    assert time.monotonic() - begun < 10


# ---- The stand-in CUDA driver ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = Path(__file__).parents[1] / "csrc"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or not sources.exists():
        pytest.skip("needs a C++ compiler and csrc/")
    library = tmp_path_factory.mktemp("driver") / "libnf_fake_cuda.so"
    files = [str(sources / "tests" / name) for name in ("fake_cuda.cpp", "fake_device.cpp")]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{sources}", *files, "-o", str(library)]
    subprocess.run([*command, "-pthread", "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    ("setting", "share", "seeds"),
    [
        ("", 1, 3),
        ("call=cuMemHostRegister_v2; n=1; error=2", 2, 1),  # refused once: half is pinned
        ("pageable=1; call=cuMemHostRegister_v2; sticky=1; error=2", 0, 1),  # always: none is
        pytest.param("", 1, 30, marks=pytest.mark.slow),
    ],
    ids=["pinned", "half", "none", "many"],
)
def test_device_memory_goes_there_and_back_on_the_stand_in_driver(run, memory, stand_in, setting, share, seeds):
    env = {
        "NF_TESTING": "1",
        "NF_LIBCUDA": str(stand_in),
        "NF_FAKE_CUDA": f"seed={seeds}; max_delay_us=3000; {setting}",
    }
    asked = 16 * MIB
    seen = run("on_the_stand_in", memory / "gpu", env, pinned=asked, seeds=seeds)
    assert seen["result"] == "done", seen
    assert (seen["wrong"], seen["samples"]) == (0, 203 * seeds)
    expected = asked // share if share else 0
    assert seen["pinned"] == seen["registered"] == expected
    assert seen["memory"] == (expected or asked)
    assert (seen["note"] == "") == (share == 1)
    assert share == 1 or f"pinned {expected} of {asked} bytes" in seen["note"]
    report = seen["report"]
    assert report["copied_d2h"] == report["copied_h2d"] == 203 * 1000 * seeds
    left = {name: report[name] for name in ("streams", "events", "registrations", "allocations", "pending")}
    assert left == dict.fromkeys(left, 0)
    assert report["violations"] == 0, report["text"]
    assert seen["left"] == []
    print(f"stand-in driver: {seen['samples']}/{203 * seeds} samples right, 0 violations, {expected} bytes pinned")

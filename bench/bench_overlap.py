"""Overlap: how much of the cache's reading and writing hides behind computing.

    python -m bench.bench_overlap --json bench/results/overlap.json

For each case the same batches three times, in turn: T compute alone, T I/O alone, T both;
    hidden = (T compute + T I/O - T both) / min(T compute, T I/O)          1: the shorter one costs nothing
Cases: a device whose kernels take `ratio` times as long as the disk, for ratio above and below 1. On a machine without
a GPU it is the stand-in driver of csrc/tests: its kernels sleep, its copies take bytes / 12 GB/s and move nothing (what
they move is tested there), the files, threads and waits are real. "cpu" computes in one torch thread on the cores that
the I/O uses, too. With CUDA, "cuda" is real.
"exposed" is what of writing is left when the last batch has been appended: draining the slabs, table, footer, rename.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import plots
from bench.timing import arguments, check, finish
from nf_engine import _cache
from nf_engine.cache_format import MIB, SAMPLE_RECORD, CacheGeometry, CacheRecord, pack_header
from nf_engine.storage import ActivationCache, EngineOptions

SHAPE, BATCH = (64, 16, 16), 256  # fp16: 32 KiB a sample, 8 MiB a batch
RATIOS = (1.3, 0.7)  # compute over I/O
PCIE = 12e9
ROOT = Path(__file__).parent.parent
THREADS = 4


def stand_in() -> ctypes.CDLL | None:
    """The stand-in driver, built if need be and made the engine's; None where there is no CMake."""
    build = ROOT / "build" / "tests"
    try:
        import cmake
        import ninja
    except ImportError:
        return None
    tool = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    make = f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"
    configure = [tool, "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", make, "-DNF_TESTS=ON"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tool, "--build", build, "--target", "nf_fake_cuda"], check=True, stdout=subprocess.DEVNULL)
    library = build / "libnf_fake_cuda.so"
    os.environ |= {"NF_TESTING": "1", "NF_LIBCUDA": str(library)}
    fake = ctypes.CDLL(str(library))
    fake.nf_fake_configure(f"mode=threads; max_delay_us=0; bandwidth={PCIE:.0f}; dry=1".encode())
    return fake


class StandIn:
    """The batches of one cache through the engine, on device memory and a stream of the stand-in driver."""

    def __init__(self, fake: ctypes.CDLL, folder: Path, batches: int) -> None:
        self.fake, self.folder, self.batches = fake, _cache.io.Folder(str(folder)), batches
        geometry = CacheGeometry(sample_shape=SHAPE, dtype="fp16", samples=batches * BATCH)
        self.bytes = geometry.file_bytes
        record = CacheRecord(name="overlap.nfc", tier="disk", geometry=geometry, block=0, generation=1,
                             fingerprint="00" * 32, order_key=0, seed_key=0)  # fmt: skip
        self.header, self.stride = pack_header(record), geometry.chunk_stride
        self.engine = _cache.Engine(64 * MIB, 0, 300.0)
        self.stream = ctypes.c_void_p()
        context = ctypes.c_void_p()
        fake.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        fake.cuCtxSetCurrent(context)
        fake.cuStreamCreateWithPriority(ctypes.byref(self.stream), 1, 0)
        self.slots = [self._allocate(BATCH * geometry.sample_bytes) for _ in range(2)]
        self.records = np.zeros(BATCH, SAMPLE_RECORD)

    def _allocate(self, size: int) -> int:
        pointer = ctypes.c_ulonglong()
        assert self.fake.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
        return pointer.value

    def compute(self, seconds: float) -> None:
        if seconds:
            self.fake.nf_fake_launch_sleep(self.stream, ctypes.c_long(round(seconds * 1e6)))

    def drain(self) -> None:
        self.fake.nf_fake_drain()

    def clear(self) -> None:
        """Removes the file, so that no timing contains the end of an earlier one."""
        with suppress(FileNotFoundError):
            (Path(self.folder.path) / "overlap.nfc").unlink()

    def write(self, seconds: float) -> float:
        """`seconds` of computing a batch; returns the seconds that finish() took."""
        stream = self.stream.value or 0
        writer = self.engine.create(self.folder, "overlap.nfc", self.header, THREADS, 2, False)
        for k in range(self.batches):
            self.compute(seconds)
            writer.fence(k % 2, stream)
            writer.append_device(self.slots[k % 2], BATCH, self.records.data, stream, k % 2)
        begun = time.perf_counter()
        writer.finish()
        return time.perf_counter() - begun

    def read(self, seconds: float) -> float:
        stream = self.stream.value or 0
        reader = self.engine.open(self.folder, "overlap.nfc")
        epoch = reader.start(1, BATCH, 64 * MIB // self.stride, 0, False, self.slots, True, stream, THREADS)
        while epoch.next(stream)[1]:
            self.compute(seconds)
        epoch.stop()
        reader.close()
        self.drain()
        return 0.0


class Real:
    """The batches of one cache on torch's own device, computing by matrix products."""

    def __init__(self, device: torch.device, folder: Path, batches: int) -> None:
        self.device, self.folder, self.batches = device, folder, batches
        self.geometry = CacheGeometry(sample_shape=SHAPE, dtype="fp16", samples=batches * BATCH)
        self.bytes = self.geometry.file_bytes
        self.x = torch.randn((BATCH, *SHAPE), device=device).half()
        side = 2048 if device.type == "cuda" else 128  # of matrices: some 0.1 ms a product
        self.left = torch.randn(side, side, device=device)
        self.options = EngineOptions(write_threads=THREADS, read_threads=THREADS)
        self.record: CacheRecord | None = None
        self.one = self._one_product()

    def _one_product(self) -> float:
        self._products(20)
        begun = time.perf_counter()
        self._products(100)
        return (time.perf_counter() - begun) / 100

    def _products(self, count: int) -> None:
        for _ in range(count):
            self.left @ self.left
        self.drain()

    def compute(self, seconds: float) -> None:
        for _ in range(round(seconds / self.one)):
            self.left @ self.left

    def drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        (self.folder / "real.nfc").unlink(missing_ok=True)

    def write(self, seconds: float) -> float:
        cache = ActivationCache.create(self.folder, "real.nfc", self.geometry, device=self.device, options=self.options)
        with cache:
            for k in range(self.batches):
                self.compute(seconds)
                ids = torch.arange(k * BATCH, (k + 1) * BATCH)
                cache.append(self.x, ids % 10, ids)
            begun = time.perf_counter()
            self.record = cache.finish()
            return time.perf_counter() - begun

    def read(self, seconds: float) -> float:
        assert self.record is not None
        with ActivationCache.open(self.folder, self.record, device=self.device, options=self.options) as cache:
            for _ in cache.batches(0, BATCH, key=1, out_dtype=torch.float16):
                self.compute(seconds)
        self.drain()
        return 0.0


def timed(call: Callable[[], object], before: Callable[[], None] | None = None) -> tuple[float, Any]:
    if before is not None:
        before()
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def only_compute(work: StandIn | Real, seconds: float) -> None:
    for _ in range(work.batches):
        work.compute(seconds)
    work.drain()


def measure(name: str, work: StandIn | Real, rounds: int) -> list[dict[str, Any]]:
    """One row for each direction and ratio; medians over rounds of compute, I/O, both, in turn."""
    rows = []
    for direction in ("write", "read"):
        move = work.write if direction == "write" else work.read
        clear = work.clear if direction == "write" else None
        alone = statistics.median(timed(partial(move, 0.0), clear)[0] for _ in range(3))  # also warms up
        for ratio in RATIOS:
            each = ratio * alone / work.batches

            times: dict[str, list[float]] = {"compute": [], "io": [], "both": []}
            exposed = []
            for _ in range(rounds):
                times["compute"].append(timed(partial(only_compute, work, each))[0])
                times["io"].append(timed(partial(move, 0.0), clear)[0])
                both, tail = timed(partial(move, each), clear)
                times["both"].append(both)
                exposed.append(tail)
            compute, io, both = (statistics.median(times[k]) for k in ("compute", "io", "both"))
            hidden = [
                (c + i - b) / min(c, i) for c, i, b in zip(*(times[k] for k in ("compute", "io", "both")), strict=True)
            ]
            rows.append({
                "case": name, "direction": direction, "ratio": ratio, "bytes": work.bytes,
                "compute": compute, "io": io, "both": both, "hidden": statistics.median(hidden),
                "hidden_rounds": hidden, "exposed": statistics.median(exposed), "gb_per_second": work.bytes / io / 1e9,
            })  # fmt: skip
            row = rows[-1]
            print(f"{name:<9}{direction:<7}{compute / io:>6.2f}{compute:>9.3f}{io:>9.3f}{both:>9.3f}"
                  f"{row['hidden']:>8.2f}{row['exposed'] * 1e3:>9.1f}", flush=True)  # fmt: skip
    return rows


@contextmanager
def place(folder: Path | None):
    with tempfile.TemporaryDirectory(prefix="nf-overlap-", dir=folder or Path.cwd()) as made:
        yield Path(made)


def draw(rows: list[dict[str, Any]]) -> Callable[..., None]:
    def on(*axes: Any) -> None:
        for side, direction in zip(axes, ("write", "read"), strict=True):
            chosen = [r for r in rows if r["direction"] == direction]
            for at, row in enumerate(chosen):
                for k, part in enumerate(("compute", "io", "both")):
                    label = {"compute": "compute alone", "io": "I/O alone", "both": "both"}[part] if at == 0 else None
                    side.bar(at + 0.27 * (k - 1), row[part], 0.25, color=plots.COLOURS[k], label=label)
                highest = max(row[p] for p in ("compute", "io", "both"))
                side.text(at, highest, f"{row['hidden']:.0%} hidden", ha="center", va="bottom", fontsize=8)
            side.set_xticks(range(len(chosen)), [f"{r['case']}\ncompute / I/O {r['ratio']:g}" for r in chosen])
            side.set_title(f"{direction}, {chosen[0]['bytes'] / 1e9:.1f} GB")
            side.set_ylabel("seconds")
            side.legend(loc="upper right")
            side.margins(y=0.2)

    return on


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder here by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    batches, rounds = (64, 3) if args.quick else (512, 3)
    print(f"{'case':<9}{'':<7}{'ratio':>6}{'compute':>9}{'I/O':>9}{'both':>9}{'hidden':>8}{'exposed ms':>11}")
    rows: list[dict[str, Any]] = []
    fake = None if torch.cuda.is_available() else stand_in()
    with place(args.folder) as folder:
        if fake is not None:
            rows += measure("stand-in", StandIn(fake, folder, batches), rounds)
        if torch.cuda.is_available():
            rows += measure("cuda", Real(torch.device("cuda"), folder, batches), rounds)
        else:
            rows += measure("cpu", Real(torch.device("cpu"), folder, batches), rounds)

    def least(case: str, direction: str) -> float | None:
        found = [r["hidden"] for r in rows if r["case"] == case and r["direction"] == direction and r["ratio"] > 1]
        return min(found) if found else None

    checks = {
        f"hidden, {case}, {direction}, disk faster than compute": check(least(case, direction), ">= 0.95")
        for case in ("stand-in", "cuda")  # on the CPU an append copies in the caller's own thread: nothing hides that
        for direction in ("write", "read")
    }
    finish(args, rows, checks)
    plots.save(args.json, "Overlap of cache I/O with computing", 2, (11, 4.5), draw(rows))


if __name__ == "__main__":
    main()

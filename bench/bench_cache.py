"""The activation cache against fio and against the peers that install from PyPI: the same samples on the same disk.

    python -m bench.bench_cache --json bench/results/cache.json

16,384 samples of 32 KiB (64x16x16, fp16, post-ReLU), each with its label and its id, are appended in batches of 64 and
handed out once in shuffled batches of 64, as tensors of their own in memory. Every candidate runs in a forked process
of its own between two fio runs; the candidates take turns, and the rounds are repeated. In the first round each is
read once more, unclocked, and compared with what was written.
    write   from the first append until fsync returned for every file and folder; one row of ours without the fsync
    cold    after POSIX_FADV_DONTNEED on every file;  warm: once more, where the page cache is used
    of fio  GB/s divided by the mean of the two fio runs around it: O_DIRECT, blocks of one chunk, the best I/O engine
Candidates that shuffle by sample, by chunk (32 samples, mixed within a window of 64 MiB, two reading threads) and by
whole files of a batch are not ranked together. A second mode of a peer is the one that its documentation names for
speed. GB = 10^9 bytes of samples, padding and labels not counted; CPU seconds are the process's, not the kernel's
writeback threads'; peak RSS counts from the fork and holds the pages of mapped files; nothing is pinned without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cache_peers import BATCH, GEOMETRY, SAMPLE, Batch, Candidate, candidates, samples, whole
from bench.plots import COLOURS, ranges, save
from bench.timing import arguments, check, finish
from nf_engine.cache_format import MIB

PATIENCE = 300  # seconds for one candidate in one round
GRACE = 10  # and then for its process to end
WARM_UP = 8  # batches


# --- one candidate, one round ---------------------------------------------------------------------------------------


def entries(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def sync(folder: Path) -> None:
    """fsync of every file and folder."""
    for path in entries(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(folder: Path) -> None:
    """Drops the clean pages of every file from the page cache."""
    for path in entries(folder):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def clocked(name: str, size: int, call: Callable[[], None]) -> dict[str, float]:
    """GB/s and CPU seconds a GB of a call that moves `size` bytes."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    before, started = cpu(), time.perf_counter()
    call()
    seconds, spent = time.perf_counter() - started, cpu() - before
    return {f"{name}_gb_s": size / seconds / 1e9, f"{name}_cpu_s_gb": spent / size * 1e9}


def warm_up(candidate: Candidate, batches: list[Batch], folder: Path) -> None:
    """A small round that nobody clocks, and a look at every page of the samples: in a forked process the first touch of
    a page costs a copy or an update of the page table, which is not the candidate's."""
    folder.mkdir()
    for batch in batches:
        int(batch.x.numpy().view(np.uint8).reshape(-1)[:: mmap.PAGESIZE].sum())
    for _ in candidate.write(folder, batches[:WARM_UP]):
        pass
    for _ in candidate.read(folder, 0):
        pass
    shutil.rmtree(folder)


def measure(candidate: Candidate, batches: list[Batch], folder: Path, key: int, compare: bool) -> dict[str, Any]:
    """Writes and reads once, cold and warm; with `compare`, then holds what is read against what was written."""
    size = sum(b.x.nbytes for b in batches)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    row: dict[str, Any] = {"samples": size // SAMPLE, "direct": candidate.direct, "pinned": 0}

    def write() -> None:
        for _ in writer:
            raise RuntimeError("a writer yields once")
        if candidate.durable:
            sync(folder)

    def read() -> None:
        moved = sum(batch.x.nbytes for batch in reader if batch is not None)
        whole(moved, size)

    warm_up(candidate, batches, folder / "warm-up")
    writer = candidate.write(folder, batches)
    next(writer)
    row |= clocked("write", size, write)
    sync(folder)
    forget(folder)
    for name in ("read",) if candidate.direct else ("read", "warm"):
        reader = candidate.read(folder, key)
        next(reader)
        row |= clocked(name, size, read)
    row["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    if compare:
        row["right"] = is_right(batches, candidate.read(folder, key + 1))
    return row


def is_right(batches: list[Batch], found: Iterator[Batch | None]) -> bool:
    """Whether every sample comes once, its bytes and its label those that were written under its id."""
    place = {int(i): (b, k) for b in batches for k, i in enumerate(b.ids)}
    for batch in found:
        for x, label, i in zip(*batch, strict=True) if batch is not None else ():
            written, k = place.pop(int(i), (None, 0))
            if written is None or int(label) != int(written.labels[k]):
                return False
            if not torch.equal(x.view(torch.int16), written.x[k].view(torch.int16)):
                return False
    return not place


def in_child(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The call's result in a forked process, or {"failed": why}: a peer that crashes or hangs costs only its row."""

    def report(to: Connection) -> None:
        try:
            to.send(call())
        except Exception as error:  # whatever a peer raises is its result
            to.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]})

    # Forked, so that the samples are shared, not sent. OpenMP hangs in a child whose parent has used its threads: the
    # parent makes the samples with numpy and runs no operator of torch on many values.
    context = multiprocessing.get_context("fork")
    end, other = context.Pipe(duplex=False)
    child = context.Process(target=report, args=(other,))
    child.start()
    other.close()
    try:
        result: dict[str, Any] = end.recv() if end.poll(PATIENCE) else {"failed": f"took over {PATIENCE} s"}
    except EOFError:
        child.join(GRACE)
        result = {"failed": f"ended with code {child.exitcode}"}
    child.join(GRACE)
    child.kill()  # does nothing to one that has ended
    child.join()
    return result


# --- fio ------------------------------------------------------------------------------------------------------------


ENGINES = {"io_uring": ("--iodepth=8",), "libaio": ("--iodepth=8",), "psync": ("--thread", "--numjobs=4")}


class Fio:
    """Runs of fio on one file of the benchmark's size, by the I/O engine that was fastest at the start."""

    def __init__(self, file: Path, size: int) -> None:
        self.file, self.block = file, GEOMETRY.chunk_stride
        self.blocks = -(-size // self.block // 4) * 4  # 4 jobs share them
        self.engine: dict[str, str] = {}
        if shutil.which("fio") is None:
            print("fio: not installed, no figure is held against it")
            return
        for mode in ("write", "randread"):
            rates = {e: max(self.run(e, mode) or 0.0 for _ in range(2)) for e in ENGINES}
            print(f"fio {mode}: " + ", ".join(f"{e} {r:.2f} GB/s" for e, r in rates.items()))
            if any(rates.values()):
                self.engine[mode] = max(rates, key=lambda e: rates[e])

    def run(self, engine: str, mode: str) -> float | None:
        """GB/s of one run, None where this engine is not to be had."""
        if mode == "write":
            self.file.unlink(missing_ok=True)  # new blocks, as a new cache gets them
        share = self.blocks * self.block // (4 if engine == "psync" else 1)
        split = (f"--offset_increment={share}", "--group_reporting") if engine == "psync" else ()
        job = ["--name=bracket", f"--filename={self.file}", f"--size={share}", f"--bs={self.block}", "--direct=1"]
        command = ["fio", *job, f"--rw={mode}", "--end_fsync=1", f"--ioengine={engine}", *ENGINES[engine], *split]
        done = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True, check=False)
        return parse_fio(done.stdout, mode) if done.returncode == 0 else None

    def bracket(self) -> dict[str, float]:
        found = {mode: self.run(engine, mode) for mode, engine in self.engine.items()}
        return {mode: rate for mode, rate in found.items() if rate is not None}


def parse_fio(text: str, mode: str) -> float:
    """GB/s of all jobs in fio's JSON, which may stand after notes.

    Raises:
        ValueError: no JSON, a job with an error, or nothing moved.
    """
    start = text.find("{")
    if start < 0:
        raise ValueError(f"expected JSON from fio, got {text[:80]!r}")
    jobs = json.loads(text[start:])["jobs"]
    if any(job["error"] for job in jobs):
        raise ValueError(f"fio {mode}: errors {[job['error'] for job in jobs]}")
    rate = sum(job["read" if mode == "randread" else mode]["bw_bytes"] for job in jobs) / 1e9
    if rate <= 0:
        raise ValueError(f"fio {mode}: nothing was moved")
    return rate


def of_fio(row: dict[str, Any], before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The candidate's rates as parts of the mean of fio's before and after it, where there are both."""
    found = {}
    for name, mode in (("write", "write"), ("read", "randread")):
        if f"{name}_gb_s" in row and mode in before and mode in after:
            found[f"{name}_of_fio"] = row[f"{name}_gb_s"] / statistics.mean((before[mode], after[mode]))
    return found


# --- rounds and report ----------------------------------------------------------------------------------------------


def run_rounds(rounds: int, batches: list[Batch], folder: Path, fio: Fio) -> list[dict[str, Any]]:
    """fio A fio B fio C fio, again and again; who failed is left out of the later rounds."""
    rows: list[dict[str, Any]] = []
    racing = []
    for candidate in candidates():
        if importlib.util.find_spec(candidate.needs) is None:
            rows.append({"candidate": candidate.name, "shuffle": candidate.shuffle, "failed": "not installed"})
        else:
            racing.append(candidate)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        before = fio.bracket()
        for candidate in list(racing):
            part = batches[: max(1, int(candidate.share * len(batches)))]
            place = folder / "candidate"
            place.mkdir()
            found = in_child(functools.partial(measure, candidate, part, place, number, number == 0))
            shutil.rmtree(place)
            after = fio.bracket()
            row = {"candidate": candidate.name, "shuffle": candidate.shuffle, "round": number}
            rows.append(row | found | of_fio(found, before, after) | {f"fio_{m}_gb_s": r for m, r in after.items()})
            before = after
            if "failed" in found:
                racing.remove(candidate)
    return rows


def values(rows: Sequence[dict[str, Any]], name: str, column: str) -> list[float]:
    return [r[column] for r in rows if r["candidate"] == name and column in r]


def median(rows: Sequence[dict[str, Any]], name: str, column: str) -> float | None:
    found = values(rows, name, column)
    return statistics.median(found) if found else None


def checks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = sum(not r["right"] for r in rows if "right" in r)
    return {
        "write and fsync / fio": check(median(rows, "nf_engine", "write_of_fio"), ">= 0.9"),
        "chunk-shuffled read / fio": check(median(rows, "nf_engine", "read_of_fio"), ">= 0.9"),
        "write from CPU tensors, CPU s/GB": check(median(rows, "nf_engine", "write_cpu_s_gb"), "<= 0.45"),
        "write from a device, CPU s/GB": check(None, "<= 0.25"),  # needs a GPU
        "candidates with wrong contents": check(wrong, "== 0"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A part for each kind of shuffle: median and range of GB/s, then medians."""
    lines = [
        f"{'GB/s: median (range)':<31}{'write':>18}{'of fio':>7}{'CPU s/GB':>9}{'cold read':>18}{'of fio':>7}"
        f"{'CPU s/GB':>9}{'warm':>7}{'peak RSS':>10}  through"
    ]
    for kind in dict.fromkeys(r["shuffle"] for r in rows):
        lines.append(f"-- shuffled by {kind}")
        lines += [line(rows, name) for name in dict.fromkeys(r["candidate"] for r in rows if r["shuffle"] == kind)]
    return "\n".join(lines)


def line(rows: list[dict[str, Any]], name: str) -> str:
    first = next(r for r in rows if r["candidate"] == name)
    if "write_gb_s" not in first:
        return f"{name:<31}{first['failed']}"

    def spread(column: str) -> str:
        seen = values(rows, name, column)
        return f"{statistics.median(seen):.2f} ({min(seen):.2f}-{max(seen):.2f})"

    def middle(column: str, form: str) -> str:
        value = median(rows, name, column)
        return "-" if value is None else format(value, form)

    text = f"{name:<31}"
    for phase in ("write", "read"):
        text += f"{spread(f'{phase}_gb_s'):>18}{middle(f'{phase}_of_fio', '.0%'):>7}"
        text += f"{middle(f'{phase}_cpu_s_gb', '.2f'):>9}"
    text += f"{middle('warm_gb_s', '.2f'):>7}{(median(rows, name, 'peak_rss') or 0) / MIB:>6.0f} MiB"
    return f"{text}  {'O_DIRECT' if first['direct'] else 'page cache'}, {first['samples']} samples"


def draw(rows: list[dict[str, Any]], write: Any, read: Any, cpu: Any) -> None:
    ran = [r for r in rows if "write_gb_s" in r]
    kinds = list(dict.fromkeys(r["shuffle"] for r in ran))
    names = list(dict.fromkeys(r["candidate"] for r in ran))
    kind_of = {r["candidate"]: r["shuffle"] for r in ran}
    colours = [COLOURS[kinds.index(kind_of[n])] for n in names]
    for axes, column, mode, title in (
        (write, "write_gb_s", "fio_write_gb_s", "Write, until fsync returned"),
        (read, "read_gb_s", "fio_randread_gb_s", "Shuffled read, cold"),
    ):
        ranges(
            axes,
            names if axes is write else [""] * len(names),
            [values(ran, n, column) for n in names],
            colours,
            "GB/s",
        )
        seen = [r[mode] for r in ran if mode in r]
        if seen:
            axes.axvspan(*np.percentile(seen, (10, 90)), color="black", alpha=0.1, zorder=0)
            axes.axvline(statistics.median(seen), color="black", linestyle=":")
            axes.text(statistics.median(seen), -0.7, "fio", ha="center", va="bottom", fontsize=8)
        axes.set_title(title, pad=14)
    ranges(cpu, [""] * len(names), [values(ran, n, "write_cpu_s_gb") for n in names], colours, "CPU s/GB, log scale")
    cpu.set_xscale("log")
    cpu.set_title("CPU of the write (less is better)", pad=14)
    for kind, colour in zip(kinds, COLOURS, strict=False):
        cpu.barh(0, 0, color=colour, label=f"shuffled by {kind}")
    cpu.figure.legend(loc="outside lower center", ncols=len(kinds))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files go; /tmp may be memory")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.samples = min(args.rounds, 2), min(args.samples, 4096)
    torch.set_num_threads(args.threads)
    batches = samples(args.samples)
    size = args.samples * SAMPLE
    print(
        f"{args.samples} samples of 32 KiB, {size / 1e9:.2f} GB, in batches of {BATCH}, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_cache_") as folder:
        fio = Fio(Path(folder) / "fio", size)
        rows = run_rounds(args.rounds, batches, Path(folder), fio)
    args.fio = fio.engine
    args.folder = None  # of this machine
    print(table(rows))
    title = f"{args.samples} samples of 32 KiB, {args.rounds} rounds: median and range; dotted and grey: fio, 10-90 %"
    finish(args, rows, checks(rows))
    save(args.json, title, 3, (13, 6), functools.partial(draw, rows))
    failed = [r for r in rows if r["candidate"].startswith("nf_engine") and "failed" in r]
    if failed:
        raise SystemExit(f"{failed[0]['candidate']}: {failed[0]['failed']}")


if __name__ == "__main__":
    main()

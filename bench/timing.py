"""Timing and reporting shared by the benches: arguments, machine, medians, and the JSON document of the last line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nf_engine.data import ImageData, fit_to
from nf_engine.sources import load_split


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every bench takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="about a minute on two cores")
    parser.add_argument("--json", type=Path, help="also write the document of the last line to this file")
    parser.add_argument("--data", default="synthetic:2000", help="cifar10:DIR, idx:DIR, synthetic:N, ...")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.set_defaults(commit=commit())  # of the code that runs: a long run may see others
    return parser


def images(spec: str, train: int | None = None, test: int | None = None) -> tuple[ImageData, ImageData]:
    """Training and test images of a data set, 3x32x32, cut to the first `train` and `test` samples."""
    data, held = load_split(spec)
    assert held is not None, f"{spec} has no test split"
    data = fit_to(data, size=32, channels=3)
    held = fit_to(held, size=32, channels=3)
    if train is not None and train < len(data):
        data = data.subset(torch.arange(train))
    if test is not None and test < len(held):
        held = held.subset(torch.arange(test))
    return data, held


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median of some runs after a warm-up."""
    times = []
    for k in range(repeats + 1):
        started = time.perf_counter()
        call()
        if k:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "gpu": gpu,
            "load": round(os.getloadavg()[0], 2)}  # fmt: skip


def versions() -> dict[str, str]:
    """Of what computes; CUDA's, cuDNN's and the driver's where there is a GPU."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    with suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version")
        lines = driver.read_text(encoding="utf-8").splitlines() if driver.exists() else ["unknown"]
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()), "driver": lines[0]}
    return found


def commit() -> str:
    """Of the tree, with a mark where it was changed; where git is not there, NF_COMMIT of the environment."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    if "NF_COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("NF_COMMIT", "unknown")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def check(value: float | None, target: str) -> dict[str, Any]:
    """One entry of `checks`: target is "<= 1.05", ">= 2" or "== 0"; value None: could not be measured here."""
    sign, _, bound = target.partition(" ")
    limit = float(bound)
    ok = None
    if value is not None:
        ok = bool({"<=": value <= limit, ">=": value >= limit, "==": value == limit, "<": value < limit}[sign])
    return {"value": value if value is None else round(value, 4), "target": target, "ok": ok}


def _kind(spec: str) -> str:
    """A data set without the folder of this machine: "idx:/somewhere" -> "idx:DIR"."""
    kind, _, place = spec.partition(":")
    return spec if place.isdigit() or not place else f"{kind}:DIR"


def finish(args: argparse.Namespace, rows: list[dict[str, Any]], checks: dict[str, Any]) -> None:
    """Prints the checks and, as the last line, the whole document; writes it where asked."""
    for name, entry in checks.items():
        print(f"check: {name}: {entry['value']} (target {entry['target']}): {entry['ok']}")
    document = {
        "machine": machine(),
        "versions": versions(),
        "commit": args.commit,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("json", "commit")} | {"data": _kind(args.data)},
        "rows": rows,
        "checks": checks,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))

"""Doctor: what this machine has for a training, and why what is missing is missing.

The disk is measured through the activation cache itself: 64 MiB written and read back once.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import nf_engine
from nf_engine import ops
from nf_engine.committed import go_back
from nf_engine.errors import NFError
from nf_engine.records import format_bytes
from nf_engine.storage import ActivationCache, CacheGeometry, build_info, direct_io, engine_report

EXTRAS = {"demo": "sklearn", "images": "PIL", "triton": "triton"}  # extra -> module that it brings
SAMPLES, BATCH, SHAPE = 2048, 128, (64, 16, 16)  # in float16: 64 MiB


def report(folder: str | Path = ".") -> dict[str, Any]:
    """Versions, processor, GPUs, kernels, extras, and the speed of the disk under `folder`, as JSON-ready values."""
    return {
        "versions": _versions(),
        "extension": build_info(),
        "cpu": {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "memory": psutil.virtual_memory().total,
            "available": psutil.virtual_memory().available,
        },
        "cuda": _cuda(),
        "engine": engine_report(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "kernels": _kernels(),
        "disk": _disk(Path(folder)),
        "extras": {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()},
    }


def text(found: dict[str, Any]) -> str:
    """A report as lines to read."""
    cpu, cuda, disk = found["cpu"], found["cuda"], found["disk"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows.append(("extension", ", ".join(f"{k} {v}" for k, v in found["extension"].items())))
    rows.append(("cpu", f"{cpu['threads']} threads of {cpu['cores']} cores"))
    rows.append(("memory", f"{format_bytes(cpu['memory'])}, {format_bytes(cpu['available'])} available"))
    for k, gpu in enumerate(cuda["devices"]):
        rows.append((f"cuda:{k}", f"{gpu['name']}, {format_bytes(gpu['memory'])}, {format_bytes(gpu['free'])} free"))
    if not cuda["devices"]:
        rows.append(("cuda", f"none: {cuda['why_not']}"))
    rows.append(("kernels", found["kernels"]))
    engine = found["engine"]
    rows.append(
        (
            "cache engine",
            f"{format_bytes(engine['memory'])} of host memory, {format_bytes(engine['pinned'])} pinned, "
            f"{engine['write_threads']} + {engine['read_threads']} threads; {engine['cuda']}",
        )
    )
    if "error" in disk:
        rows.append(("disk", f"{disk['folder']}: {disk['error']}"))
    else:
        rows.append(
            (
                "disk",
                f"{disk['folder']}: writes {format_bytes(disk['write'])}/s, reads {format_bytes(disk['read'])}/s, "
                f"{disk['access']}, {format_bytes(disk['free'])} free",
            )
        )
    rows.extend(
        (f"extra {extra}", "present" if here else f"missing: pip install 'nf-engine[{extra}]'")
        for extra, here in found["extras"].items()
    )
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def recover(run: Path) -> str:
    """Goes one commit back in a run folder; returns what to do next. Raises as committed.go_back."""
    position = go_back(run).position
    return (
        f"{run}: now at block {position.block + 1}, epoch {position.epoch}, step {position.step}; "
        "the command that began the run goes on from there"
    )


def _versions() -> dict[str, str | None]:
    names = ("torch", "triton", "numpy")
    versions: dict[str, str | None] = {"nf-engine": nf_engine.__version__, "python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cuda() -> dict[str, Any]:
    if torch.cuda.is_available():
        devices = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            devices.append({"name": torch.cuda.get_device_name(number), "memory": total, "free": free})
        return {"devices": devices, "why_not": None}
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    elif torch.cuda.device_count() == 0:
        why = f"torch is built for CUDA {torch.version.cuda}, but the driver shows no device"
    else:
        why = f"torch is built for CUDA {torch.version.cuda}, but cannot start it; is the driver older than that?"
    return {"devices": [], "why_not": why}


def _kernels() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "{} path of the heads ({})".format(*ops.head_path(device))


def _disk(folder: Path) -> dict[str, Any]:
    """Bytes a second; an error is part of the report, for it is what the doctor was asked to find."""
    try:
        with tempfile.TemporaryDirectory(prefix="nf-doctor-", dir=folder) as place:
            return {"folder": str(folder), **_disk_speed(Path(place))}
    except (OSError, NFError) as error:
        return {"folder": str(folder), "error": str(error)}


def _disk_speed(place: Path) -> dict[str, Any]:
    geometry = CacheGeometry(sample_shape=SHAPE, dtype="fp16", samples=SAMPLES)
    x = torch.randn((BATCH, *SHAPE)).half()
    labels = torch.zeros(BATCH, dtype=torch.int64)
    started = time.perf_counter()
    with ActivationCache.create(place, "doctor.nfc", geometry) as cache:
        for first in range(0, SAMPLES, BATCH):
            cache.append(x, labels, torch.arange(first, first + BATCH))
        cache.finish()
        written = time.perf_counter()
        for _ in cache.batches(0, BATCH, key=0, out_dtype=torch.float16):
            pass
        ended = time.perf_counter()
        stats = cache.stats()
    return {
        "write": stats.bytes_written / (written - started),
        "read": stats.bytes_read / (ended - written),
        "access": "past the page cache" if stats.direct else f"through the page cache ({direct_io(place)[1]})",
        "free": psutil.disk_usage(str(place)).free,
    }

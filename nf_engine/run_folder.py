"""Run folder: everything that a run leaves on disk, flat, each file written whole or not at all.

config.toml  plan.json  profile.json  exits.json  metrics.jsonl  log.jsonl  b000.safetensors ... (finished blocks with
their heads)  x001-g0001.nfc, v001-g0001.nfc (caches of training and held-out activations, deleted when used up).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from nf_engine.errors import ConfigError, DiskFullError, StorageError

DISK_FULL = {28, 122, 27}  # ENOSPC, EDQUOT, EFBIG


class RunFolder:
    """A new folder for one run; `path` is created, its owner alone may enter."""

    def __init__(self, path: str | Path | None, model: str) -> None:
        """Raises ConfigError where the folder holds files already, StorageError where it cannot be made."""
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model)
        self.path = Path(path) if path is not None else Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            taken = sorted(p.name for p in self.path.iterdir())
        except OSError as error:
            raise _failed(error, "mkdir", self.path) from None
        if taken:
            raise ConfigError(
                f"output_dir {self.path} holds {taken[0]} and {len(taken) - 1} more; name a new or empty folder"
            )

    def write(self, name: str, data: str | bytes) -> Path:
        """Writes one file whole, synced, under its final name only when complete."""
        path, part = self.path / name, self.path / f"{name}.tmp"
        try:
            with part.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _failed(error, "write", path) from None
        return path

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Appends one line of JSON to a log."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise _failed(error, "append", self.path / name) from None

    def log(self, event: str, **values: Any) -> None:
        self.append("log.jsonl", {"time": round(time.time(), 3), "event": event, **values})

    def write_weights(self, name: str, modules: dict[str, nn.Module], facts: dict[str, str]) -> Path:
        """Writes the state of some modules, keys prefixed by their names, as safetensors."""
        state: dict[str, torch.Tensor] = {}
        memory: set[int] = set()
        for prefix, module in modules.items():
            for key, value in module.state_dict().items():
                stored = value.detach().cpu().contiguous()
                if stored.untyped_storage().data_ptr() in memory:
                    stored = stored.clone()  # safetensors refuses tensors that share memory, as tied weights do
                memory.add(stored.untyped_storage().data_ptr())
                state[f"{prefix}.{key}"] = stored
        return self.write(name, to_safetensors(state, facts))

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


def _failed(error: OSError, op: str, path: Path) -> DiskFullError | StorageError:
    number = error.errno or 0
    if number in DISK_FULL:
        stat = os.statvfs(path.parent)
        free = stat.f_bavail * stat.f_frsize
        return DiskFullError(
            f"{path}: the disk is full, {free} bytes are free; free some space, or name another output_dir",
            path=str(path),
            needed=0,
            free=free,
        )
    return StorageError(
        f"{op} of {path} failed: {error.strerror}; check the disk and the rights of the folder",
        op=op,
        path=str(path),
        offset=-1,
        errno=number,
    )

"""Recovery: what to make of an error of the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nf_engine.config import parse_bytes
from nf_engine.errors import DeviceLostError, NFError

SHARES = (1.0, 0.9, 0.75, 0.5)  # of the planned batch, tried in this order
RECOVERING = ("cuda",)  # devices that can run out of memory: their blocks are rehearsed, and may start again


@contextmanager
def device_lost() -> Iterator[None]:
    """Errors of the device but out of memory, after which it can do nothing more for this process.

    Raises:
        DeviceLostError: instead of torch's AcceleratorError.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        raise DeviceLostError(
            f"the device failed: {first}; nothing was committed after it: run the same command again",
            call="torch",
            code=int(getattr(error, "error_code", 0) or 0),
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library that it calls, found too little memory on the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, NFError):
        return False
    return "CUDA error: out of memory" in str(error) or "STATUS_ALLOC_FAILED" in str(error)


def asked_bytes(error: BaseException) -> int | None:
    """The bytes that could not be had, where the error says so."""
    found = re.search(r"Tried to allocate ([\d.]+) (bytes|[KMG]iB)", str(error))
    if found is None:
        return None
    return int(found[1]) if found[2] == "bytes" else parse_bytes(f"{found[1]}{found[2]}", "bytes asked for")

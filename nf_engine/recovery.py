"""Recovery: what it takes to start a block again with a smaller batch after the device ran out of memory."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nf_engine.config import parse_bytes
from nf_engine.errors import NFError

SHARES = (1.0, 0.9, 0.75, 0.5)  # of the planned batch, tried in this order
RECOVERING = ("cuda",)  # devices that can run out of memory: a block's starting state is kept for them


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


class HostCopy:
    """Parameters and buffers of some modules as they are now, in host memory."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._values = [t.detach().to("cpu", copy=True) for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        """Looked up anew: a module that changes its device gets new buffers."""
        return [t for m in self._modules for t in (*m.parameters(), *m.buffers())]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes them back, wherever the modules are now, and drops gradients."""
        for tensor, value in zip(self._tensors(), self._values, strict=True):
            tensor.copy_(value)
            tensor.grad = None

"""Device: the bytes that tensors occupy, measured and bounded.

On CUDA the allocator counts. On the CPU, and under fake tensors for any device, `TensorBytes` counts the storages that
operators create: the same sum as torch's MemTracker gives, which cannot watch more than one training step.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nf_engine.config import TrainConfig, parse_bytes
from nf_engine.errors import ConfigError, NoDeviceError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
LAYOUT = torch.channels_last  # of maps and weights while they are trained: the libraries are fastest in it


class Meter(Protocol):
    """Counts the bytes of live tensors: `now` at this moment, `peak` the most since the last `reset`."""

    @property
    def now(self) -> int: ...
    @property
    def peak(self) -> int: ...
    def reset(self) -> None: ...


class TensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages made by operators while active, and those named by `add`, until they are freed.

    Storages made outside of operators (numpy arrays, I/O buffers) are host memory and not counted.
    """

    def __init__(self, resident: Iterable[Tensor] = (), fake: FakeTensorMode | None = None) -> None:
        """Counts real tensors, or those of one fake mode alone: a meter around a profiler does not see its fakes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self.now = 0
        self.peak = 0
        self._seen: dict[int, int] = {}
        self.add(resident)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type == "meta" or getattr(tensor, "fake_mode", None) is not self._fake:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._seen:
                self._seen[key] = storage.nbytes()
                self.now += self._seen[key]
                weakref.finalize(storage, self._freed, key).atexit = False
        self.peak = max(self.peak, self.now)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self._seen.pop(key)

    def reset(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and self._key(t) not in self._seen]
        if new:  # a view of memory that no operator made is still not ours
            given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            self.add(t for t in new if self._key(t) not in given)
        return result


class _CudaBytes:
    """The CUDA allocator's own counters."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        take_workspaces(device)
        self.reset()

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


@contextmanager
def meter(device: torch.device, resident: Iterable[Tensor] = ()) -> Iterator[Meter]:
    """A meter of the device's tensor bytes; `resident` are tensors that exist already (CUDA's allocator knows them)."""
    if device.type == "cuda":
        yield _CudaBytes(device)
        return
    with TensorBytes(resident) as counter:
        yield counter


def pick(name: str) -> torch.device:
    """The torch device of a setting "auto", "cpu" or "cuda"; NoDeviceError where CUDA is asked for and missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise NoDeviceError(
            "device is 'cuda', but torch finds no CUDA device; use device='cpu' or see `nf-engine doctor`"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def placed(module: M, device: torch.device) -> M:
    """The module itself, on the device, the weights of its convolutions in LAYOUT."""
    moved: M = module.to(device=device, memory_format=LAYOUT)  # type: ignore[call-overload]
    return moved


def free_bytes(device: torch.device) -> int:
    """Bytes that a new run could use: free device memory, or available RAM for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def take_workspaces(device: torch.device) -> None:
    """Lets the libraries take their workspaces for the current stream, which torch's allocator then holds for good.

    cuBLAS takes one for each thread that multiplies: this one, and autograd's. They are no block's memory.
    """
    a = torch.ones(8, 8, device=device, requires_grad=True)
    (a @ a).sum().backward()  # type: ignore[no-untyped-call]


class Cap(NamedTuple):
    """Bytes: what torch may reserve, what of it the process held before, what the driver counts beside it.

    held: also the workspaces of cuBLAS, some 64 MiB on a large GPU.
    beside: the CUDA context, and other programs on the device; never part of the budget.
    """

    reserved: int
    held: int
    beside: int


@contextmanager
def capped(device: torch.device, budget: int) -> Iterator[Cap | None]:
    """While it lasts, torch's allocator reserves at most `budget` bytes more on a CUDA device than it does now.

    All of it runs on a stream of its own, since a CUDA graph cannot be recorded on the default one, nor warmed up. A
    lower cap that was there stays; whatever was there comes back at the end. On other devices nothing happens.
    """
    if device.type != "cuda":
        yield None
        return
    gc.collect()  # what planning left behind
    caller = torch.cuda.current_stream(device)
    own = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # never one that copies images
    own.wait_stream(caller)
    with torch.cuda.stream(own):
        take_workspaces(device)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    # The allocator takes the share of total_memory and drops the fraction of a byte: never more than asked for.
    share = (budget + held) / torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        with torch.cuda.stream(own):
            yield Cap(budget + held, held, total - free - held)
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
        caller.wait_stream(own)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@contextmanager
def deterministic(device: torch.device, wanted: bool) -> Iterator[None]:
    """While it lasts, a CUDA device computes the same bits in every run; other devices always do.

    Raises:
        ConfigError: cuBLAS was not told to, which has to be done before the program starts; or the model has an
            operator that torch cannot run so.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        raise ConfigError(
            "deterministic=True needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before the program starts, "
            f"found {os.environ.get('CUBLAS_WORKSPACE_CONFIG')!r}"
        )
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, filled = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    memory.fill_uninitialized_memory = False  # nothing of ours reads it
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise ConfigError(
            f"deterministic=True: {str(error).partition(',')[0]}; leave it out, or change the model"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory = cudnn, filled


def room_bytes(device: torch.device) -> int:
    """Bytes that tensors could still get: on CUDA under the cap of the process."""
    if device.type != "cuda":
        return free_bytes(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    allowed = int(share * torch.cuda.get_device_properties(device).total_memory)
    return min(allowed - torch.cuda.memory_reserved(device), free_bytes(device))


def free_ram(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that can be taken: of the machine, and of each control group (version 2) that this process is in.

    A group counts its page cache as used, though the kernel gives up what has not been used lately: that is added.
    """
    free = int(psutil.virtual_memory().available)
    own = re.search(r"^0::/(.*)$", groups.read_text(encoding="utf-8"), re.MULTILINE) if groups.is_file() else None
    if own is None:
        return free
    for folder in (root / own[1], *(root / own[1]).parents):
        if not (folder / "memory.max").is_file():
            continue
        limit, used = ((folder / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        if limit.strip() != "max":
            idle = re.search(
                r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE
            )
            free = min(free, max(0, int(limit) - int(used) + (int(idle[1]) if idle else 0)))
    return free


def budget_bytes(config: TrainConfig, device: torch.device, total: int | None = None) -> int:
    """The budget of a configuration in bytes; shares are of `total`, or of the device's free memory.

    Raises:
        ConfigError: the budget is more than the device has.
    """
    budget = config.memory_budget
    available = total if total is not None else free_bytes(device)
    if budget == "auto":
        return int(0.9 * available)
    if isinstance(budget, float):
        return int(budget * available)
    need = parse_bytes(budget, "memory_budget")
    if need > available:
        raise ConfigError(
            f"memory_budget is {need} bytes, but {device} has {available} bytes free; lower it, or use 'auto'"
        )
    return need


def watched(batches: Iterator[T], counter: TensorBytes | None, count: int = 2) -> Generator[T, None, None]:
    """The batches; while the first few are made and used, `counter` counts the bytes of live tensors."""
    if counter is not None:
        with counter:
            yield from itertools.islice(batches, count)
    yield from batches


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

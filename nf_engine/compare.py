"""Compare: the training loops that a user would write instead, for the benches; same data, order, schedule, optimizer.

backpropagation    the whole network, end to end
checkpointed       the same, every stage but the last run again in backward; BatchNorm counts each batch once
compiled           torch.compile, whose partitioner recomputes until a share of the activations is left
offloaded          what autograd saves for backward waits in host memory
local              classic local learning: one unit a stage, each with 256 convolution filters as its head, one batch

All but `local` may accumulate the gradient of an update over several micro-batches. On CUDA an update is recorded as a
graph and replayed, as nf_engine's steps are; not for `offloaded`, which allocates host memory as it goes.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes, placed, watched
from nf_engine.feed import Resident
from nf_engine.local_step import make_optimizer
from nf_engine.partitioner import scaled_lr
from nf_engine.precision import LossScale, autocast_like, compute_dtype
from nf_engine.preprocess import Preprocess
from nf_engine.recompute import Body
from nf_engine.stages import Cut
from nf_engine.step_graph import WARM_UP, CudaRecorder, Recorder
from nf_engine.worker import ImageInputs, learning_rate

log = logging.getLogger(__name__)

KINDS = ("backpropagation", "checkpointed", "compiled", "offloaded", "local")
LOCAL_FILTERS = 256
METERED = 2  # updates that the meter of the CPU watches; the second one finds the optimizer's state there
# Inductor's partitioner and decompositions, run operator by operator: bytes can be counted, seconds say little.
CPU_BACKEND = "aot_eager_decomp_partition"


@dataclass(frozen=True)
class Arm:
    """One way to train the whole network.

    Attributes:
        kind: of KINDS.
        batch: samples of an update.
        parts: equal micro-batches that it is accumulated over.
        share: "compiled": activation_memory_budget, the share of the saved activations that may be kept.
    """

    kind: str
    batch: int
    parts: int = 1
    share: float = 1.0

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert self.batch % self.parts == 0, f"{self.batch} samples do not make {self.parts} equal parts"
        assert self.kind != "local" or self.parts == 1, "a unit's update comes before the next unit's forward"


@dataclass(frozen=True)
class PeerResult:
    """accuracies: on the scored data after each epoch, or after the last alone; epoch_seconds: without the scoring.

    peak: most bytes of tensors, by the meter (CPU) or the allocator (CUDA); reserved: of the allocator's pool, 0 on the
    CPU. eager: why updates were not recorded as a CUDA graph, "" where they were, or are not meant to be.
    """

    accuracies: tuple[float, ...]
    epoch_seconds: tuple[float, ...]
    peak: int
    reserved: int
    eager: str = ""

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


class Peer:
    """A network with its optimizers; `step` is one update. The modules of `cut` lie on the device."""

    def __init__(
        self, cut: Cut, arm: Arm, config: TrainConfig, device: torch.device, recorder: Recorder | None = None
    ) -> None:
        """recorder: of whole updates; None: each is eager."""
        self.arm, self.config, self.device, self._recorder = arm, config, device, recorder
        stages, classifier = [s.module for s in cut.stages], cut.classifier
        body = Body(stages, range(1, len(stages))) if arm.kind == "checkpointed" else nn.Sequential(*stages)
        self.network = nn.Sequential(body, classifier)
        self.units = [self.network]
        if arm.kind == "local":
            heads = [placed(_local_head(cut, k, config.seed), device) for k in range(len(stages) - 1)]
            self.units = [nn.Sequential(*pair) for pair in zip(stages, [*heads, classifier], strict=True)]
        for unit in self.units:
            unit.train()
        self.optimizers = [make_optimizer(unit.parameters(), config) for unit in self.units]
        self._scales = [LossScale(o) if compute_dtype(config) == torch.float16 else None for o in self.optimizers]
        self._rate = torch.zeros((), device=device)  # where updates are recorded: they read it
        self._recorded: list[tuple[Tensor, Tensor]] = []  # what the recording reads
        self._to_warm = WARM_UP
        if recorder is not None:
            for group in (g for o in self.optimizers for g in o.param_groups):
                group["lr"] = self._rate
        self._run: Callable[[Tensor], Tensor] = self.network
        if arm.kind == "compiled":
            torch._dynamo.reset()  # or earlier peers would count towards its limit of recompilations
            self._run = torch.compile(self.network, backend=self._compile, dynamic=False)

    def tensors(self) -> list[Tensor]:
        return [t for unit in self.units for t in (*unit.parameters(), *unit.buffers())]

    def set_rate(self, rate: float) -> None:
        if self._recorder is not None:
            self._rate.fill_(rate)
            return
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One update, from the next micro-batches (x (N, C, H, W), labels (N,)) on the device."""
        if self._recorder is None or self._recorder.refusal is not None or self._to_warm > 0:
            self._to_warm -= 1
            self._eager(batches)
            return
        given = list(itertools.islice(batches, self.arm.parts))
        if not self._recorded:
            reason = ""
            try:
                self._recorder.record(lambda: self._eager(iter(given)))
            except RuntimeError as error:  # nothing has run; no name for it, which would keep what it holds alive
                reason = str(error).partition("\n")[0] or type(error).__name__
            if reason:
                for optimizer, scale in zip(self.optimizers, self._scales, strict=True):
                    optimizer.zero_grad(set_to_none=True)
                    if scale is not None:
                        scale.forget_step()
                self._recorder.refuse(reason)
                self._eager(iter(given))
                return
            self._recorded = given
        for kept, new in zip(itertools.chain(*self._recorded), itertools.chain(*given), strict=True):
            if kept is not new:
                kept.copy_(new)
        self._recorder.replay()

    def end_epoch(self) -> None:
        """Gives the recording back where scoring would find no memory beside it; the next update records again."""
        if self._recorder is not None and self._recorded and not self._recorder.is_roomy:
            self._recorder.release()
            self._recorded = []

    def _eager(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        if self.arm.kind == "local":
            self._local_step(*next(batches))
            return
        for _ in range(self.arm.parts):
            x, labels = next(batches)
            with self._saving():
                logits = self._logits(x)
                del x  # a network that does not save its input frees it here
                self._backward(logits, labels, 0)
        self._update(0)

    def _logits(self, x: Tensor) -> Tensor:
        with autocast_like(x):
            return self._run(x)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        backend = torch._dynamo.lookup_backend("inductor" if self.device.type == "cuda" else CPU_BACKEND)
        with functorch.patch(activation_memory_budget=self.arm.share):
            return backend(graph, inputs)

    def _saving(self) -> AbstractContextManager[object]:
        if self.arm.kind != "offloaded":
            return nullcontext()
        return save_on_cpu(pin_memory=True) if self.device.type == "cuda" else saved_tensors_hooks(_to_host, _from_host)

    def _backward(self, logits: Tensor, labels: Tensor, unit: int) -> None:
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        if self.arm.parts > 1:
            loss = loss / self.arm.parts  # equal parts: the mean of their means is the batch's
        scale = self._scales[unit]
        (loss if scale is None else loss * scale.factor).backward()  # type: ignore[no-untyped-call]

    def _update(self, unit: int) -> None:
        optimizer, scale = self.optimizers[unit], self._scales[unit]
        if scale is None:
            optimizer.step()
        else:
            scale.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def _local_step(self, x: Tensor, labels: Tensor) -> None:
        for k, unit in enumerate(self.units):
            body, head = unit
            with autocast_like(x):
                h = body(x)
                logits = head(h)
            self._backward(logits, labels, k)
            self._update(k)
            x = h.detach()
            del h, logits


def _local_head(cut: Cut, stage: int, seed: int) -> nn.Module:
    """h (N, C, H, W) -> logits (N, K); its weights are a function of (seed, stage)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1000 + stage)
        conv = nn.Conv2d(cut.stages[stage].output_shape[0], LOCAL_FILTERS, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        linear = nn.Linear(LOCAL_FILTERS, cut.classes)
    norm, pool = nn.BatchNorm2d(LOCAL_FILTERS), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True), pool, nn.Flatten(), linear)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in memory that the meter leaves out, numpy's: on the CPU, save_on_cpu would not move a byte."""
    strides = torch.empty_like(tensor, device="meta").stride()
    memory = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), np.uint8))
    return memory.view(tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor.detach())


def _from_host(host: Tensor) -> Tensor:
    return host.clone()


class _Bytes(TensorBytes):  # type: ignore[no-untyped-call]
    """Counts inside of compiled functions, too: under any other mode torch.compile steps aside."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def train_peer(
    cut: Cut,
    data: ImageData,
    scored: ImageData,
    config: TrainConfig,
    arm: Arm,
    *,
    device: torch.device,
    budget: int | None = None,
    every_epoch: bool = False,
) -> PeerResult:
    """Trains the whole network, in place.

    Args:
        cut: stages of the network.
        data, scored: images to train on, and to take the accuracy from.
        config: optimizer, schedule, smoothing, epochs, augmentation, precision and seed, as nf_engine would use them.
        arm: how.
        budget: on the CPU, the bytes that tensors may take; on CUDA the cap is the caller's: device.capped.
        every_epoch: take the accuracy after each epoch.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    held = (0, 0)  # before it, of the caller and of the libraries
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    for module in (*(s.module for s in cut.stages), cut.classifier):
        placed(module, device)
    recorder = _recorder(device) if arm.kind != "offloaded" else None
    peer = Peer(cut, arm, config, device, recorder)
    counter = _Bytes(peer.tensors()) if device.type == "cpu" else None
    preprocess = partial(Preprocess, data.normalisation, dtype=compute_dtype(config))
    inputs = ImageInputs(data, preprocess(config.augment, config.seed), device, config.seed)
    if device.type == "cuda" and budget is None and data.in_memory:
        inputs.feed = Resident(data, device)  # as ours has them where there is room
    per_epoch = len(data) // arm.batch
    steps, warmup = per_epoch * config.epochs, round(per_epoch * min(config.warmup_epochs, config.epochs / 2))
    seconds, accuracies = [], []
    try:
        for epoch in range(config.epochs):
            started = time.perf_counter()
            source = inputs.train(epoch, arm.batch // arm.parts)
            batches = watched(source, None if epoch else counter, METERED * arm.parts)
            for k in range(per_epoch):
                peer.set_rate(learning_rate(epoch * per_epoch + k, steps, warmup, scaled_lr(config, arm.batch)))
                peer.step(batches)
                if epoch == k == 0 and arm.kind == "compiled" and device.type == "cuda":
                    _forget_tuning(device)
                if counter is not None and budget is not None and counter.peak > budget:
                    batches.close()
                    raise torch.OutOfMemoryError(f"{counter.peak} bytes of tensors, the budget is {budget}")
            batches.close()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
            peer.end_epoch()
            if every_epoch or epoch + 1 == config.epochs:
                accuracies.append(_accuracy(peer.network, scored, preprocess(), arm.batch // arm.parts, device))
    finally:
        if recorder is not None:
            recorder.release()
    eager = (recorder.refusal or "") if recorder is not None else ""
    if counter is not None:
        return PeerResult(tuple(accuracies), tuple(seconds), counter.peak, 0)
    used = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)  # scoring takes less
    return PeerResult(tuple(accuracies), tuple(seconds), used[0] - held[0], used[1] - held[1], eager)


def _forget_tuning(device: torch.device) -> None:
    """Inductor has tried its kernels in the first update, with buffers of its own: they are no need of the training."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _recorder(device: torch.device) -> Recorder | None:
    return CudaRecorder(device, log.info) if device.type == "cuda" else None


def largest_batch(peak: Callable[[int], float], budget: float, most: int) -> int:
    """The largest batch in 1..most whose measured peak fits the budget, within 2 %; 0 if there is none.

    Peaks are nearly straight lines of the batch, so a guess lies on the line between the two nearest known sizes; where
    that did not halve what is left, the next one lies in the middle.
    """
    if peak(most) <= budget:
        return most
    low, high = 1, most
    if peak(low) > budget:
        return 0
    halve = False
    while (width := high - low) > max(1, low // 50):
        share = 0.5 if halve else (budget - peak(low)) / (peak(high) - peak(low))
        middle = min(max(int(low + share * width), low + 1), high - 1)
        low, high = (middle, high) if peak(middle) <= budget else (low, middle)
        halve = not halve and 2 * (high - low) > width
    return low


def _accuracy(network: nn.Module, data: ImageData, plain: Preprocess, batch: int, device: torch.device) -> float:
    """Share of right answers; the network is left in train mode."""
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for ids in torch.arange(len(data)).split(batch):  # type: ignore[no-untyped-call]
            images, labels = data.batch(ids)
            x = plain(images.to(device), None, stream=0)
            with autocast_like(x):
                right += (network(x).argmax(1) == labels.to(device)).sum()
    network.train()
    return int(right) / len(data)

"""Step graph: the training step of a whole block, recorded once as a CUDA graph and replayed with one launch.

    first WARM_UP batches   eager, on the stream that will be recorded: optimisers make their state, libraries choose
    the batch after them    its tensors become the inputs of the graph: the step is recorded, then replayed on them
    every batch after it    copied into those tensors, then replayed; in the epoch of the recording a cache decodes
                            into them: nothing is copied

All of these are steps of the training, each batch counts once, and a replay computes what the eager step would. The
learning rate is a tensor that the recorded optimisers read; losses are added to one tensor. What a module keeps in
Python (a counter of its own calls) does not move in a replay.
The graph's memory is a pool of its own, within the budget, that nothing else can use: where there is no room for an
eval pass beside it, the graph is given up at the end of an epoch and recorded again in the next one.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs (warm-up, static inputs, private pools).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nf_engine.compiler import Compiler, reason_of
from nf_engine.device import room_bytes
from nf_engine.local_step import MOST, Unit, share, train_block

WARM_UP = 3  # eager steps before the recording, as torch's documentation has it


class Recorder(Protocol):
    """Records one step at a time; `refusal` says why it does not, None where it does.

    compiler: of bodies that are to be compiled, recorded or not.
    """

    refusal: str | None
    compiler: Compiler

    def record(self, step: Callable[[], object]) -> None:
        """Takes down what step() asks of the device, without doing it. RuntimeError: it cannot be recorded."""
        ...

    def replay(self) -> None:
        """Does what was recorded."""
        ...

    def release(self) -> None:
        """Gives the recording and its memory back, where there is one."""
        ...

    def refuse(self, reason: str) -> None:
        """No step of this run is recorded any more."""
        ...

    def note(self, text: str) -> None:
        """Told when the steps of a block stay eager."""
        ...

    @property
    def is_roomy(self) -> bool:
        """Whether an eval pass fits beside the recording."""
        ...


class CudaRecorder:
    """Records CUDA graphs on the current stream, which cannot be the default one: see device.capped.

    NF_GRAPHS=off in the environment keeps every step eager.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None]) -> None:
        """note: told the reason when steps are eager."""
        self._device, self.note = device, note
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = 0
        self.refusal: str | None = None
        self.compiler = Compiler(note)
        if os.environ.get("NF_GRAPHS", "on") == "off":
            self.refuse("NF_GRAPHS=off")

    def record(self, step: Callable[[], object]) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        one = torch.zeros((), device=self._device)
        # Threads of the cache engine may ask the driver for memory meanwhile, which "global" would take for ours.
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:  # such a recording has ended as others do
            raise
        except RuntimeError:
            # torch 2.11 leaves its random numbers in a recording that broke: one that ends well takes them out.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                one.add_(1)
            raise
        self._graph, self._pool = graph, torch.cuda.memory_reserved(self._device) - before

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def release(self) -> None:
        if self._graph is not None:
            self._graph.reset()
        self._graph = None

    def refuse(self, reason: str) -> None:
        self.refusal = reason
        self.note(f"training steps are not recorded as a CUDA graph: {reason}")

    @property
    def is_roomy(self) -> bool:
        """An eval step needs less than a training step, so the pool once more is enough."""
        return room_bytes(self._device) >= self._pool


class StepGraph:
    """The step of one block: eager at first, then recorded and replayed."""

    def __init__(self, units: Sequence[Unit], losses: Tensor, recorder: Recorder) -> None:
        """units: prepared, in train mode; losses: (units,), what train_block adds to."""
        self._units, self._losses, self._recorder = units, losses, recorder
        self._to_warm = WARM_UP
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._rates: dict[float, Tensor] = {}  # by their MOST, float32: what fused optimisers read on a GPU
        for group in _groups(units):
            group["lr"] = self._rates.setdefault(group[MOST], torch.zeros((), device=losses.device))
        for unit in units:
            if unit.compiles:
                unit.body.run = recorder.compiler.run

    def set_rate(self, rate: float, peak: float) -> None:
        """The learning rate of the next step, recorded or not, of a schedule with this peak."""
        for most, tensor in self._rates.items():
            tensor.fill_(rate * share(most, peak))

    def __call__(self, x: Tensor, labels: Tensor) -> bool:
        """Trains on one batch by a replay; False: not yet or not at all, the step is the caller's to run.

        x and labels may be kept, and overwritten with later batches.
        """
        if self._inputs is None:
            if self._to_warm > 0 or self._recorder.refusal is not None:
                self._to_warm -= 1
                return False
            if not self._record(x, labels):
                return False
            self._inputs = (x, labels)
        for kept, given in zip(self._inputs, (x, labels), strict=True):
            if kept.data_ptr() != given.data_ptr():
                assert kept.shape == given.shape, (kept.shape, given.shape)
                kept.copy_(given)
        self._recorder.replay()
        return True

    def _record(self, x: Tensor, labels: Tensor) -> bool:
        """Whether the step was recorded. Where not, nothing has run on the device and all state is as it was."""
        try:
            with _capturable(self._units):
                self._recorder.record(partial(train_block, self._units, [(x, labels)], self._losses))
        except torch.OutOfMemoryError:  # there is none for a pool beside the rest: this block does without
            self._to_warm = sys.maxsize
            self._recorder.note(f"block of {len(self._units)} units: no memory to record its step, it stays eager")
        except RuntimeError as error:  # where ending a broken recording fails, too, the first one says more
            self._recorder.refuse(reason_of(error.__context__ or error))
        else:
            return True
        for unit in self._units:
            unit.forget_step()
        return False

    def end_epoch(self) -> None:
        """Makes room for an eval pass, where there is none beside the graph."""
        if self._inputs is not None and not self._recorder.is_roomy:
            self._inputs = None
            self._recorder.release()


def _groups(units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
    for unit in units:
        assert unit.optimizer is not None
        yield from unit.optimizer.param_groups


@contextmanager
def _capturable(units: Sequence[Unit]) -> Iterator[None]:
    """AdamW wants to be told that it is recorded, and warns of it in eager steps; fused, it computes the same."""
    groups = [group for group in _groups(units) if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False

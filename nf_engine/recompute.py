"""Recompute: the body of a unit that runs some of its stages again in its own backward, to save what they would keep.

Stages i..j are cut into segments. Every segment but the last keeps its input alone; backward runs it again and then
through it. The last one is not: its backward would follow at once. One unit over all stages, recomputed, is
checkpointed backpropagation. Exact: what is computed again is bit for bit what was computed first, and the running
statistics of norms count each batch once. Other buffers that a module changes in its own forward are not known here.
Source: sublinear memory cost, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from nf_engine.precision import forward

Run = Callable[[nn.Module, Tensor], Tensor]


class Body(nn.Sequential):
    """Stages in order, (N, C, H, W) -> (N, C', H', W').

    Args:
        stages: modules of one input and one output.
        starts: numbers in `stages` at which the segments after the first begin, ascending; empty: nothing runs twice.
    """

    def __init__(self, stages: Sequence[nn.Module], starts: Sequence[int] = ()) -> None:
        super().__init__(*stages)
        assert all(0 < a < b for a, b in itertools.pairwise((*starts, len(stages)))), (starts, len(stages))
        self.starts = tuple(starts)
        self.run: Run = forward  # of a stage in a training step; an eval step takes forward

    def forward(self, x: Tensor) -> Tensor:
        trains = self.training and torch.is_grad_enabled()
        edges, run = ((0, *self.starts), self.run) if trains else ((0,), forward)
        for first, end in itertools.pairwise(edges):
            x = _recomputed(list(self)[first:end], run, x)
        for stage in list(self)[edges[-1] :]:
            x = run(stage, x)
        return x


def _recomputed(segment: Sequence[nn.Module], run: Run, x: Tensor) -> Tensor:
    def run_all(h: Tensor) -> Tensor:
        for stage in segment:
            h = run(stage, h)
        return h

    again: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
    again = partial(_contexts, segment)
    random = any(map(is_random, segment))  # else its state is left alone, which a CUDA graph could not save
    h: Tensor = checkpoint(run_all, x, use_reentrant=False, preserve_rng_state=random, context_fn=again)
    return h


def _contexts(segment: Sequence[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _without_statistics(segment)


@contextmanager
def _without_statistics(segment: Sequence[nn.Module]) -> Iterator[None]:
    """Norms normalise by the batch as before, and count it in copies of their statistics."""
    with ExitStack() as stack:
        for norm in (m for stage in segment for m in stage.modules() if isinstance(m, _NormBase)):
            held = {name: t for name, t in norm._buffers.items() if t is not None}
            stack.callback(norm._buffers.update, held)
            norm._buffers.update({name: t.clone() for name, t in held.items()})
        yield


def is_random(stage: nn.Module) -> bool:
    """Whether a stage draws random numbers while it is trained: a dropout module, or a traced call that names one."""
    for module in stage.modules():
        if isinstance(module, _DropoutNd):
            return True
        if isinstance(module, fx.GraphModule) and any(
            word in str(node.target) for node in module.graph.nodes for word in ("dropout", "rand", "bernoulli")
        ):
            return True
    return False

"""Compiler: torch.compile for the stages of units, in training steps on a CUDA device.

Each stage is compiled by itself: what can be fused (norm, activation, addition) lies inside one, as the next begins
with a convolution, and one that runs again in backward is the same code then. Eval passes stay eager: their last batch
is short, and a block's outputs have to be those that a later pass recomputes.
Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from nf_engine.precision import forward

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]


def inductor(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """torch's default backend, choosing no kernel by timing it.

    That takes a buffer as large as the device's cache, out of the budget, and may sum in another order in the next run.
    """
    import torch._inductor.config

    with torch._inductor.config.patch({"deterministic": True, "triton.autotune_pointwise": False}):
        made: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
    return made


class Compiler:
    """Compiles the stages of a run, each once for every batch size; after a failure no further one of them."""

    def __init__(self, note: Callable[[str], None], backend: Backend = inductor) -> None:
        """note: told the reason of the first failure."""
        self._note, self._backend = note, backend
        self._made: dict[nn.Module, Any] = {}  # what runs a stage: the stage itself, where it stays eager
        self._refused = False

    def run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """As precision.forward, of a stage in a training step."""
        if stage not in self._made:
            # Whole or not at all: a failure comes before the stage has run, or counted a batch.
            # `forward`, since the call of a GraphModule looks into exceptions, with which a recomputation ends early.
            made = torch.compile(stage.forward, backend=self._compile, fullgraph=True, dynamic=False)
            self._made[stage] = stage if self._refused else made
        try:
            return forward(self._made[stage], x)
        except Exception as error:
            if self._made[stage] is stage or not _is_compilers(error):
                raise
            reason = reason_of(getattr(error, "inner_exception", error))
        self._made[stage] = stage
        if not self._refused:
            self._note(f"no further stages are compiled: {reason}")
        self._refused = True
        return forward(stage, x)

    def _compile(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        import torch._functorch.config

        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):  # not first in the backward pass
            return self._backend(graph, inputs)


def _is_compilers(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit))


def reason_of(error: BaseException) -> str:
    """A name for the exception would keep what the failed step holds alive, through its frames."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""Local step: one update of one unit from its local loss.

x (N, C, H, W) -> body -> h (N, C', H', W') -> head -> loss. The head turns h into its gradient at once; the body's
graph is freed by its own backward, and the gradients by the optimiser step that follows, so that the peak of a block is
its largest unit, not the sum. The Profiler measures this very function, the Worker runs it.
Source: decoupled greedy learning, https://arxiv.org/abs/1901.08164; NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig


class Unit:
    """Consecutive stages trained by one local loss: body, head and their optimiser."""

    def __init__(self, name: str, stages: Sequence[nn.Module], head: nn.Module) -> None:
        self.name = name
        self.body = nn.Sequential(*stages)
        self.head = head
        self.optimizer: torch.optim.Optimizer | None = None

    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.body, self.head

    def parameters(self) -> list[nn.Parameter]:
        return [p for m in self.modules() for p in m.parameters()]

    def tensors(self) -> list[Tensor]:
        """Parameters, buffers and optimiser state."""
        state = self.optimizer.state.values() if self.optimizer else ()
        kept = [v for s in state for v in s.values() if isinstance(v, Tensor)]
        return [*self.parameters(), *(b for m in self.modules() for b in m.buffers()), *kept]


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimiser, fused: no temporary copies of the gradients, one pass over the weights."""
    trained = [p for p in parameters if p.requires_grad]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, **options)
    return torch.optim.SGD(trained, momentum=config.momentum, nesterov=config.momentum > 0, **options)


def local_step(unit: Unit, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Trains one unit on one batch.

    Args:
        unit: in train mode, with an optimiser.
        x: (N, C, H, W) input of the unit, without gradient.
        labels: (N,) int64.

    Returns:
        h (N, C', H', W') the unit's output before the update, detached; and its mean loss, 0-d, detached.
    """
    h = unit.body(x)
    loss, dh = unit.head.step(h.detach(), labels, None)  # type: ignore[operator]
    if h.requires_grad:
        torch.autograd.backward(h, dh)
    del dh
    assert unit.optimizer is not None
    unit.optimizer.step()
    unit.optimizer.zero_grad(set_to_none=True)
    return h.detach(), loss


def train_block(units: Sequence[Unit], batches: Iterable[tuple[Tensor, Tensor]], losses: Tensor) -> int:
    """Trains all units of a block on every batch; unit k + 1 reads what unit k gave.

    Args:
        units: in order.
        batches: of (x, labels) on the device.
        losses: (units,) float32 on the device; each unit's summed mean losses are added.

    Returns:
        The number of batches.
    """
    steps = 0
    for x, labels in batches:
        for k, unit in enumerate(units):
            x, loss = local_step(unit, x, labels)
            losses[k] += loss
        steps += 1
    return steps

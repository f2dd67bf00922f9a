"""Local step: one update of one unit from its local loss.

x (N, C, H, W) -> body -> h (N, C', H', W') -> head -> loss. The head turns h into its gradient at once; the body's
graph is freed by its own backward, and the gradients by the optimiser step that follows, so that the peak of a block is
its largest unit, not the sum. The Profiler measures this very function, the Worker runs it.
Source: decoupled greedy learning, https://arxiv.org/abs/1901.08164; NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig
from nf_engine.ops import IGNORE_INDEX
from nf_engine.precision import LossScale
from nf_engine.recompute import Body

MOST = "most"  # key of an optimiser's group: its largest peak of the learning rate


class Unit:
    """Consecutive stages trained by one local loss: body, head, their optimiser, and the loss scale of float16."""

    def __init__(self, name: str, stages: Sequence[nn.Module], head: nn.Module, starts: Sequence[int] = ()) -> None:
        """starts: numbers in `stages`, as in recompute.Body."""
        self.name = name
        self.body = Body(stages, starts)
        self.head = head
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss_scale: LossScale | None = None
        self.compiles = False  # whether the body is to be compiled where its steps may be recorded

    def prepare(self, config: TrainConfig) -> None:
        """Makes what a training needs beside the modules, on the device where they are now."""
        most: dict[nn.Parameter, float] = self.head.most_rates()  # type: ignore[operator]
        self.optimizer = make_optimizer(self.parameters(), config, most)
        self.loss_scale = LossScale(self.optimizer) if config.compute_dtype == "fp16" else None
        self.compiles = config.compile

    def set_rate(self, rate: float, peak: float) -> None:
        """The learning rate of the next step, of a schedule with this peak, where the step is not recorded."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate * share(group[MOST], peak)

    def forget_step(self) -> None:
        """Drops what a step that broke off has left: gradients, and a loss scale between two of its calls."""
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale is not None:
            self.loss_scale.forget_step()

    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.body, self.head

    def parameters(self) -> list[nn.Parameter]:
        return [p for m in self.modules() for p in m.parameters()]

    def tensors(self) -> list[Tensor]:
        """Parameters, buffers, optimiser state and loss scale: all that a step changes."""
        state = self.optimizer.state.values() if self.optimizer else ()
        kept = [v for s in state for v in s.values() if isinstance(v, Tensor)]
        scale = self.loss_scale.tensors() if self.loss_scale else []
        return [*self.parameters(), *(b for m in self.modules() for b in m.buffers()), *kept, *scale]


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig, most: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """The configured optimiser, fused: no temporary copies of the gradients, one pass over the weights.

    most: largest peak of SGD's learning rate for some parameters, the MOST of their group; a schedule with a higher one
        is scaled down for them. AdamW's steps are as large whatever the gradient is: there it is ignored.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    named = most if most is not None and config.optimizer == "sgd" else {}
    for p in parameters:
        if p.requires_grad:
            groups.setdefault(named.get(p, math.inf), []).append(p)
    trained = [{"params": group, MOST: rate, "lr": min(rate, config.lr)} for rate, group in groups.items()]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, **options)
    return torch.optim.SGD(trained, momentum=config.momentum, nesterov=config.momentum > 0, **options)


def share(most: float, peak: float) -> float:
    """Of a schedule with this peak, for parameters whose rate may rise to `most`."""
    return 1.0 if peak <= most else most / peak


def local_step(unit: Unit, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Trains one unit on one batch.

    Args:
        unit: in train mode, prepared.
        x: (N, C, H, W) input of the unit, without gradient; its dtype is the one that the unit computes in.
        labels: (N,) int64.

    Returns:
        h (N, C', H', W') the unit's output before the update, detached; and its mean loss, 0-d, detached.
    """
    h = unit.body(x)
    factor = unit.loss_scale.factor if unit.loss_scale else None
    scale = None if factor is None else factor / (labels != IGNORE_INDEX).sum()
    loss, dh = unit.head.step(h.detach(), labels, scale)  # type: ignore[operator]
    if factor is not None:
        loss = loss / factor  # before the update changes it
    if h.requires_grad:
        torch.autograd.backward(h, dh)
    del dh
    assert unit.optimizer is not None
    if unit.loss_scale is None:
        unit.optimizer.step()
    else:
        unit.loss_scale.step(unit.optimizer)
    unit.optimizer.zero_grad(set_to_none=True)
    return h.detach(), loss


def train_block(
    units: Sequence[Unit],
    batches: Iterable[tuple[Tensor, Tensor]],
    losses: Tensor,
    replay: Callable[[Tensor, Tensor], bool] | None = None,
) -> int:
    """Trains all units of a block on every batch; unit k + 1 reads what unit k gave.

    Args:
        units: in order.
        batches: of (x, labels) on the device, which nothing else reads later.
        losses: (units,) float32 on the device; each unit's summed mean losses are added.
        replay: trains on one batch by other means, or returns False and leaves it to this function.

    Returns:
        The number of batches.
    """
    steps = 0
    for x, labels in batches:
        steps += 1
        if replay is not None and replay(x, labels):
            continue
        for k, unit in enumerate(units):
            x, loss = local_step(unit, x, labels)
            losses[k] += loss
    return steps

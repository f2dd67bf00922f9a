"""Precision: the dtype of maps while a block trains, and the loss scale that float16 needs.

Maps carry the choice: images and cached inputs arrive in the compute dtype, and whatever reads a map (N, C, H, W) in
bfloat16 or float16 computes in that dtype, by autocast, from float32 weights. Float32 maps meet none of this, so that
the trained model can be evaluated in any precision.
Source: mixed precision with a loss scale, https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig

COMPUTED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What maps are while a block trains."""
    return COMPUTED[config.compute_dtype]


def autocast_like(x: Tensor) -> AbstractContextManager[object]:
    """The context in which float32 weights meet x; none of ours where x is no 16-bit map.

    Casts of weights are not kept for a second use: a pass uses each once, and would hold them all to its end.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(x.device.type, x.dtype, cache_enabled=False)


def forward(stage: nn.Module, x: Tensor) -> Tensor:
    """stage(x), (N, C, H, W) -> (N, C', H', W') in x's dtype, also where autocast leaves float32 (GroupNorm)."""
    with autocast_like(x):
        h: Tensor = stage(x)
    return h.to(x.dtype)


class LossScale:
    """The loss scale of one optimiser: torch's GradScaler, which a step moves without waiting for the device.

    It doubles after 2000 updates in a row. A gradient that is infinite or NaN leaves the update out and halves it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """optimizer: fused, so that it leaves an update out on the device; where its parameters will train."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        one = torch.ones((), device=parameters[0].device)
        self._optimizer = optimizer
        self._scaler = torch.amp.GradScaler(one.device.type)
        self._scaler.scale(one)  # makes its state now: a CUDA graph must find it where it stays
        if optimizer.defaults.get("momentum"):
            # torch would make these in the first update as empty memory, and read them though it was left out.
            for p in parameters:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @property
    def factor(self) -> Tensor:
        """What losses are multiplied by: 0-d float32, changed in place by `step`."""
        assert self._scaler._scale is not None
        return self._scaler._scale

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Updates by the gradients, divided by the factor; then moves the factor."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def forget_step(self) -> None:
        """After a step that broke off, the next one begins as any other."""
        self._scaler._per_optimizer_states.clear()
        for name in ("grad_scale", "found_inf"):  # GradScaler takes them back only where the update went well
            self._optimizer.__dict__.pop(name, None)

    def tensors(self) -> list[Tensor]:
        """Its state: the factor, and the updates since it last changed."""
        assert self._scaler._growth_tracker is not None
        return [self.factor, self._scaler._growth_tracker]

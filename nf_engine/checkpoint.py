"""Checkpoint: the state of a training as flat tensors in safetensors bytes, and back.

    initial.safetensors   stage{i}.*, head{k}.*                       weights and buffers before any training
    b003-....safetensors  unit{k}.body.*, unit{k}.head.*, scores      a finished block; scores (units, 2) float64
    c...safetensors       as a block's, and of each unit optimizer.{i}.{name} and scale.{j}; losses (units,) float32

No pickle, no random state: all randomness is a function of counters. A tensor comes back into the memory that the fresh
run would have it in, since the layout of a weight decides the last bits of a convolution.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from nf_engine.errors import CorruptFileError, NonFiniteError
from nf_engine.local_step import Unit

__all__ = ["assign", "check_finite", "fill", "load_training", "parse", "state_of", "to_bytes", "training_state"]

Parts = Mapping[str, nn.Module]  # prefix of the keys -> module
LOSSES, SCORES = "losses", "scores"


def state_of(parts: Parts) -> dict[str, Tensor]:
    """Weights and all buffers of some modules, keys prefixed by their names; a state_dict leaves some buffers out."""
    return {
        f"{prefix}.{key}": value.detach()
        for prefix, module in parts.items()
        for kind in (module.named_parameters, module.named_buffers)
        for key, value in kind(remove_duplicate=False)
    }


def to_bytes(state: Mapping[str, Tensor], facts: dict[str, str]) -> bytes:
    """safetensors; tensors that share memory, as tied weights do, are stored under each of their names."""
    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        stored[key] = tensor
    return to_safetensors(stored, facts)


def parse(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises CorruptFileError: it is no safetensors."""
    try:
        found = from_safetensors(data)
        end = 8 + int.from_bytes(data[:8], "little")
        keys = [key for key, _ in json.loads(data[8:end].decode(), object_pairs_hook=list)]
        if len(set(keys)) != len(keys):  # the format forbids it, its reader takes the last one
            raise ValueError("a key that is there twice")
        return found
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError, AssertionError) as error:
        raise CorruptFileError(
            f"{where}: expected safetensors, found: {error}; restore it, or write it again"
        ) from None


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raises CorruptFileError where a key, a shape or a dtype is not the model's."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise CorruptFileError(
            f"{where}: expected {len(expected)} tensors, found {len(found)}; {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; restore the file, or make the model as for training"
        )
    for key, tensor in expected.items():
        other = found[key]
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise CorruptFileError(
                f"{where}: {key}: expected {tuple(tensor.shape)} {tensor.dtype}, "
                f"found {tuple(other.shape)} {other.dtype}; restore the file, or make the model as for training"
            )


@torch.no_grad()
def fill(parts: Parts, state: Mapping[str, Tensor], where: str) -> None:
    """Copies the values of a file into some modules, wherever they are; every key, shape and dtype must be theirs."""
    own = state_of(parts)
    check_same(own, state, where)
    for key, tensor in own.items():
        tensor.copy_(state[key])


def assign(parts: Parts, state: Mapping[str, Tensor], where: str) -> None:
    """As fill, of modules that have no memory yet (meta): they get that of a copy of the file's tensors."""
    check_same(state_of(parts), state, where)
    for prefix, module in parts.items():
        # Copied: tensors read from bytes are aligned to nothing.
        module.load_state_dict({key: state[f"{prefix}.{key}"].clone() for key in module.state_dict()}, assign=True)
        for key, buffer in list(module.named_buffers(remove_duplicate=False)):
            if buffer.is_meta:  # a state_dict leaves it out
                owner, _, name = key.rpartition(".")
                module.get_submodule(owner)._buffers[name] = state[f"{prefix}.{key}"].clone()


def training_state(names: Sequence[str], units: Sequence[Unit], losses: Tensor) -> dict[str, Tensor]:
    """All that a step of a block changes.

    Args:
        names: of the units, such as "unit3".
        losses: (units,), summed over the steps of the epoch so far.
    """
    state = {LOSSES: losses}
    for name, unit in zip(names, units, strict=True):
        state |= state_of({f"{name}.body": unit.body, f"{name}.head": unit.head})
        state |= {f"{name}.{key}": value for key, value in _beside(unit).items()}
    return state


def load_training(
    names: Sequence[str], units: Sequence[Unit], losses: Tensor, state: Mapping[str, Tensor], where: str
) -> None:
    """Brings units that are prepared, and `losses`, to a state of `training_state`."""
    for name, unit in zip(names, units, strict=True):
        _make_optimizer_state(unit, f"{name}.optimizer.", state)
    own = training_state(names, units, losses)
    check_same(own, state, where)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def _beside(unit: Unit) -> dict[str, Tensor]:
    """State of the optimiser and of the loss scale, by parameter number and name."""
    assert unit.optimizer is not None
    parameters = [p for group in unit.optimizer.param_groups for p in group["params"]]
    found = {
        f"optimizer.{i}.{key}": value
        for i, p in enumerate(parameters)
        for key, value in unit.optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }
    scale = unit.loss_scale.tensors() if unit.loss_scale else []
    return found | {f"scale.{j}": tensor for j, tensor in enumerate(scale)}


def _make_optimizer_state(unit: Unit, prefix: str, state: Mapping[str, Tensor]) -> None:
    """Zeros for each parameter that the file has state of: an optimiser makes its own only in its first step."""
    assert unit.optimizer is not None
    for i, p in enumerate(p for group in unit.optimizer.param_groups for p in group["params"]):
        if any(key.startswith(f"{prefix}{i}.") for key in state):
            unit.optimizer.state[p].update(_first_state(unit.optimizer, p))


def _first_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """What the optimisers of local_step.make_optimizer keep of a parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.zeros((), device=p.device)
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    assert isinstance(optimizer, torch.optim.SGD)
    return {"momentum_buffer": torch.zeros_like(p)} if optimizer.defaults["momentum"] else {}


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises NonFiniteError naming the first tensor with NaN or infinity. On the host: no plan counts its masks."""
    floats = {key: t.cpu() for key, t in state.items() if t.is_floating_point()}
    flags = torch.stack([torch.isfinite(t).all() for t in floats.values()])
    if bool(flags.all()):
        return
    bad = next(key for key, good in zip(floats, flags.tolist(), strict=True) if not good)
    raise NonFiniteError(
        f"{where}: {bad} holds NaN or infinity; nothing was committed; lower lr, or raise warmup_epochs"
    )


def scores_of(state: dict[str, Tensor], units: int, where: str) -> list[list[float]]:
    """Takes the scores out of a block's tensors: accuracy and loss of each unit's exit."""
    scores = state.pop(SCORES, None)
    if scores is None or scores.shape != (units, 2) or scores.dtype != torch.float64:
        raise CorruptFileError(f"{where}: expected scores ({units}, 2) torch.float64; restore the file")
    return scores.tolist()

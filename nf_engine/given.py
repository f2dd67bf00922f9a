"""Given: what a caller hands over, made into what the engine works with, or refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig
from nf_engine.data import ImageData, stratified_split
from nf_engine.errors import ConfigError, DataError
from nf_engine.models import ModelSpec, build
from nf_engine.records import Plan, Profile
from nf_engine.sources import as_image_data
from nf_engine.stages import Cut


def settle(config: TrainConfig | str | Path | None, fields: dict[str, Any]) -> TrainConfig:
    """The configuration of a call: an object or a TOML file, with single fields replaced."""
    base = (
        config if isinstance(config, TrainConfig) else TrainConfig.load(config) if config is not None else TrainConfig()
    )
    return base.with_fields(fields)


def named_model(model: nn.Module | str, shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    """The model given, or the one of that name with weights that are a function of the seed."""
    if isinstance(model, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(model, classes=classes, input_size=shape[-1], channels=shape[0])
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be an nn.Module or a name, got {type(model).__name__}")
    return model


def name_of(network: nn.Module) -> str:
    """What plans and folders call it."""
    spec = getattr(network, "nf_spec", None)
    return spec.name if isinstance(spec, ModelSpec) else type(network).__name__


def uint8(data: ImageData) -> bool:
    """Whether its images are bytes; a Dataset is asked for one."""
    return data.batch(torch.zeros(1, dtype=torch.int64))[0].dtype == torch.uint8


def sample_shape(sample: Any) -> tuple[int, ...]:
    """(C, H, W) of an image, a batch of them, or either's shape."""
    shape = tuple(sample.shape) if isinstance(sample, Tensor) else tuple(int(v) for v in sample)
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ConfigError(f"sample must be an image (C, H, W), a batch of them, or its shape, got shape {shape}")
    return shape[-3:]


def split_data(train_data: Any, val_data: Any, settings: TrainConfig) -> tuple[ImageData, ImageData]:
    """Images to train on, and those that the exits are scored on."""
    data = as_image_data(train_data)
    if val_data is not None:
        held_out = as_image_data(val_data, classes=data.classes)
        if held_out.shape != data.shape:
            raise DataError(f"val_data has images {held_out.shape}, train_data {data.shape}; they must be of one shape")
        return data, held_out
    kept, held = stratified_split(data.labels, settings.val_fraction, settings.seed)
    if len(held) == 0 or len(kept) == 0:
        raise DataError(
            f"val_fraction {settings.val_fraction} of {len(data)} samples leaves {len(kept)} to train on, {len(held)} "
            "to choose the exit on; give more data, another val_fraction, or val_data"
        )
    return data.subset(kept), data.subset(held)


def check_classes(cut: Cut, data: ImageData) -> None:
    if cut.classes < data.classes:
        raise DataError(
            f"the model has {cut.classes} outputs, the labels go up to {data.classes - 1}; give it more outputs"
        )


def check_device(settings: TrainConfig, device: torch.device) -> None:
    """Refuses what the device cannot promise."""
    if settings.compile and device.type != "cuda":
        raise ConfigError(
            "compile=True needs a CUDA device: on a CPU the bytes of compiled code cannot be counted, and no budget be "
            "kept; leave it out"
        )


def check_made_for(record: Plan | Profile, settings: TrainConfig, names: Sequence[str]) -> None:
    """Refuses a record whose bytes were taken with other settings."""
    for name in names:
        was, now = getattr(record, name), getattr(settings, name)
        if was != now:
            kind = type(record).__name__.lower()
            raise ConfigError(f"the {kind} was made for {name}={was!r}, this is {name}={now!r}; make the {kind} again")


def given_plan(plan: Plan | str | Path, cut: Cut, settings: TrainConfig, samples: int, device: torch.device) -> Plan:
    """A plan or its file, held against the network, the settings, the number of samples and the device."""
    made = plan if isinstance(plan, Plan) else Plan.load(plan)
    if not made.blocks or not all(b.units for b in made.blocks):
        raise ConfigError("the plan has no blocks, or a block without units; make the plan again")
    if device.type == "cpu" and made.overhead == 0:
        raise ConfigError(
            "the plan was made for a device with memory of its own, on the CPU all weights share the budget; "
            "make it with device='cpu' and without device_memory"
        )
    check_made_for(made, settings, ("optimizer", "precision"))
    names = tuple(s.name for s in cut.stages)
    if made.stages != names:
        raise ConfigError(f"the plan was made for stages {made.stages}, the model has {names}; make the plan again")
    other = next((b for b in made.blocks[1:] if b.cache.dtype != settings.stored_dtype), None)
    if other is not None:
        raise ConfigError(
            f"the plan was made for caches in {other.cache.dtype}, cache_dtype={settings.cache_dtype!r} stores "
            f"{settings.stored_dtype}; make the plan again"
        )
    small = next((b for b in made.blocks if b.batch > samples), None)
    if small is not None:
        raise ConfigError(
            f"the plan trains at batch {small.batch}, the data has {samples} samples; make the plan again"
        )
    if any(b.cache.tier == "auto" for b in made.blocks):
        tier = "ram" if settings.cache == "auto" else settings.cache
        blocks = [replace(b, cache=replace(b.cache, tier=tier)) if b.cache.tier == "auto" else b for b in made.blocks]
        made = replace(made, blocks=tuple(blocks))
    return made

"""Engine: the stages of the job in order.

model, data -> split -> profile -> partition -> train block after block -> score the exits -> choose
Source: NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig, parse_bytes
from nf_engine.controller import BlockMemory, Controller
from nf_engine.data import ImageData, as_image_data, stratified_split
from nf_engine.device import budget_bytes, capped, pick
from nf_engine.errors import ConfigError, DataError
from nf_engine.exits import EarlyExitModel, Scaled, exits_table, select_exit, throughput
from nf_engine.models import ModelSpec, build
from nf_engine.partitioner import partition
from nf_engine.planner import Planner
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import BATCHES, flops_of, make_head
from nf_engine.progress import make_observer
from nf_engine.records import ExitScore, Plan, Profile, UnitPlan
from nf_engine.run_folder import RunFolder
from nf_engine.stages import Cut, split
from nf_engine.worker import Score


@dataclass(frozen=True)
class TrainResult:
    """What a training gives.

    Attributes:
        model: all exits, on the CPU, in eval mode.
        plan: what was done. exits: held-out score of each. best_exit: the one chosen.
        memory: predicted and measured bytes of each block. history: one entry for each block and epoch.
        timings: seconds of profile, plan, train, score and cache writes. run_dir: the run folder.
    """

    model: EarlyExitModel
    plan: Plan
    exits: list[ExitScore]
    best_exit: int
    memory: list[BlockMemory]
    history: list[dict[str, object]]
    timings: dict[str, float]
    run_dir: Path

    def select_exit(
        self, *, max_drop: float | None = None, min_accuracy: float | None = None, max_params: int | None = None
    ) -> int:
        """The smallest exit that is accurate enough; see exits.select_exit."""
        return select_exit(self.exits, max_drop=max_drop, min_accuracy=min_accuracy, max_params=max_params)

    def table(self) -> str:
        return exits_table(self.exits, self.best_exit)


def train(
    model: nn.Module | str,
    train_data: Any,
    val_data: Any = None,
    *,
    config: TrainConfig | str | Path | None = None,
    plan: Plan | str | Path | None = None,
    output_dir: str | Path | None = None,
    progress: str = "auto",
    keep_cache: bool = False,
    **fields: Any,
) -> TrainResult:
    """Trains a CNN inside a memory budget, block after block, each unit by its own local loss.

    Args:
        model: any CNN that torch.fx can trace, trained in place; or a name such as "resnet18".
        train_data: (x, y) arrays or tensors, a Dataset, a DataLoader, ImageData, or text such as "cifar10:DIR".
        val_data: as train_data, the exits are scored and chosen on it; None: val_fraction of train_data is held out.
        config: a TrainConfig, or the path of its TOML file. fields: single fields of it, which win.
        plan: made earlier, or the path of its JSON file; nothing is profiled then.
        output_dir: a new or empty folder; runs/<time>-<model> where None.
        progress: "auto" (a display on a terminal, else lines), "lines" or "none".
        keep_cache: leave the activation caches on disk.

    Returns:
        TrainResult.

    Raises:
        ConfigError, DataError, UnsupportedModelError, NoDeviceError: an argument is refused, before any work.
        InfeasibleBudgetError: no plan fits the budget; names the stage, its need and the budget.
        BudgetExceededError, NonFiniteError, DiskFullError, StorageError: while training.
    """
    settings = settle(config, fields)
    observer = make_observer(progress)
    data, held_out = _data(train_data, val_data, settings)
    network = named_model(model, data.shape, data.classes, settings.seed)
    network_name = name_of(network)
    device = pick(settings.device)
    timings: dict[str, float] = {}
    started = time.perf_counter()
    cut = split(network, data.shape, split_points=settings.split_points)
    _check_classes(cut, data)
    folder = RunFolder(output_dir, network_name)
    train_images = Preprocess(data.normalisation, settings.augment, settings.seed, compute_dtype(settings))
    plain = Preprocess(data.normalisation, dtype=compute_dtype(settings))
    if plan is None:
        budget = budget_bytes(settings, device)
        planner = Planner(
            cut,
            settings,
            train_images,
            uint8(data),
            device,
            len(data),
            network_name,
            folder.path,
            budget=budget,
            in_memory=data.in_memory,
        )
        made = planner.plan(budget)
        folder.write("profile.json", planner.profile.to_json())
    else:
        made = _given(plan, cut, settings, len(data), device)
    timings["plan"] = time.perf_counter() - started
    folder.write("config.toml", settings.to_toml())
    folder.write("plan.json", made.to_json())
    folder.log("start", model=network_name, samples=len(data), held_out=len(held_out), torch=str(torch.__version__))
    for number, block in enumerate(made.blocks[1:], 1):
        chosen = block.cache
        folder.log(
            "tier",
            number=number,
            tier=chosen.tier,
            seconds=chosen.seconds,
            dropped=chosen.dropped,
            reason=chosen.reason,
        )
    observer.planned(made)
    heads = [make_head(cut, u.head, u.last, settings) for u in made.units]
    controller = Controller(
        cut, heads, made, settings, data, held_out, train_images, plain, folder, device, observer, keep_cache=keep_cache
    )
    try:
        with capped(device, made.budget) as cap:
            if cap is not None:
                folder.log("cap", **cap._asdict())
                observer.note(f"{cap.beside} bytes of the device are outside the budget: CUDA context, other programs")
            scores = controller.run()
    finally:
        observer.close()
    made = controller.plan  # batches may have shrunk
    timings.update(controller.seconds)
    facts = _facts(network, network_name, cut, made, settings, data.normalisation, uint8(data))
    whole = assemble(cut, heads, made.units, data.normalisation, facts)
    exits = _exit_scores(whole, cut, made, scores, device, settings)
    best = select_exit(exits, max_drop=settings.max_drop)
    folder.write("exits.json", json.dumps({"chosen": best, "exits": [asdict(e) for e in exits]}, indent=1) + "\n")
    folder.write("model.json", json.dumps({**facts, "chosen": best}, indent=1) + "\n")
    folder.log("end", seconds=time.perf_counter() - started, **timings)
    observer.note(f"run folder {folder.path}")
    return TrainResult(whole, made, exits, best, controller.memory, controller.history, timings, folder.path)


def plan(
    model: nn.Module | str,
    sample: Any,
    *,
    config: TrainConfig | str | Path | None = None,
    device_memory: int | str | None = None,
    profile: Profile | None = None,
    samples: int = 50_000,
    classes: int = 10,
    **fields: Any,
) -> Plan:
    """What a training would do under a budget, without a device and without training.

    Args:
        model: as for train.
        sample: a batch or one image as tensor, or its shape (C, H, W).
        config, fields: as for train.
        device_memory: bytes of the device planned for: shares and "auto" are of it, and resting weights lie elsewhere.
            None: this machine's device; on the CPU all weights share the budget.
        profile: made earlier; nothing is measured then and unit peaks are sums over stages.
        samples: of the training data, for batch sizes and cache bytes.
        classes: of a model given by name.

    Raises:
        ConfigError, UnsupportedModelError, InfeasibleBudgetError: as for train.
    """
    settings = settle(config, fields)
    total = parse_bytes(device_memory, "device_memory") if device_memory is not None else None
    # A named device memory, or device="cuda", is a device with memory of its own; no CUDA device need be there.
    together = total is None and settings.device != "cuda" and pick(settings.device).type == "cpu"
    budget = budget_bytes(settings, torch.device("cpu"), total)
    if profile is not None:
        _check_made_for(profile, settings, ("optimizer", "augment", "precision"))
        return partition(profile, settings, budget=budget, samples=samples, together=together)
    planner = _planner(model, sample, settings, None, samples, classes, together=together)
    return planner.plan(budget)


def profile(
    model: nn.Module | str,
    sample: Any,
    *,
    batch_sizes: Sequence[int] = BATCHES,
    config: TrainConfig | str | Path | None = None,
    classes: int = 10,
    measure_time: bool = True,
    **fields: Any,
) -> Profile:
    """Bytes, FLOPs and seconds of every stage, as lines of the batch size with their residuals.

    Args:
        model, sample, config, fields, classes: as for plan.
        batch_sizes: three or more different ones.
        measure_time: run each stage on the device for its seconds; False: bytes and FLOPs alone, on fake tensors.
    """
    settings = settle(config, fields)
    if len(set(batch_sizes)) < 3 or min(batch_sizes) < 1:
        raise ConfigError(f"batch_sizes must be three or more different positive sizes, got {tuple(batch_sizes)}")
    device = pick(settings.device) if measure_time else None
    planner = _planner(model, sample, settings, device, 50_000, classes, tuple(batch_sizes))
    return planner.profile


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
    spec = getattr(network, "nf_spec", None)
    return spec.name if isinstance(spec, ModelSpec) else type(network).__name__


def uint8(data: ImageData) -> bool:
    return data.batch(torch.zeros(1, dtype=torch.int64))[0].dtype == torch.uint8


def _sample_shape(sample: Any) -> tuple[int, ...]:
    shape = tuple(sample.shape) if isinstance(sample, Tensor) else tuple(int(v) for v in sample)
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ConfigError(f"sample must be an image (C, H, W), a batch of them, or its shape, got shape {shape}")
    return shape[-3:]


def _planner(
    model: nn.Module | str,
    sample: Any,
    settings: TrainConfig,
    device: torch.device | None,
    samples: int,
    classes: int,
    batch_sizes: Sequence[int] = BATCHES,
    together: bool | None = None,
) -> Planner:
    shape = _sample_shape(sample)
    network = named_model(model, shape, classes)
    cut = split(network, shape, split_points=settings.split_points)
    identity = Normalisation((0.0,) * shape[0], (1.0,) * shape[0])
    preprocess = Preprocess(identity, settings.augment, settings.seed, compute_dtype(settings))
    return Planner(
        cut, settings, preprocess, True, device, samples, name_of(network), None, batch_sizes, together=together
    )


def _data(train_data: Any, val_data: Any, settings: TrainConfig) -> tuple[ImageData, ImageData]:
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


def _check_classes(cut: Cut, data: ImageData) -> None:
    if cut.classes < data.classes:
        raise DataError(
            f"the model has {cut.classes} outputs, the labels go up to {data.classes - 1}; give it more outputs"
        )


def _check_made_for(record: Plan | Profile, settings: TrainConfig, names: Sequence[str]) -> None:
    """Refuses a record whose bytes were taken with other settings."""
    for name in names:
        was, now = getattr(record, name), getattr(settings, name)
        if was != now:
            kind = type(record).__name__.lower()
            raise ConfigError(f"the {kind} was made for {name}={was!r}, this is {name}={now!r}; make the {kind} again")


def _given(plan: Plan | str | Path, cut: Cut, settings: TrainConfig, samples: int, device: torch.device) -> Plan:
    made = plan if isinstance(plan, Plan) else Plan.load(plan)
    if not made.blocks or not all(b.units for b in made.blocks):
        raise ConfigError("the plan has no blocks, or a block without units; make the plan again")
    if device.type == "cpu" and made.overhead == 0:
        raise ConfigError(
            "the plan was made for a device with memory of its own, on the CPU all weights share the budget; "
            "make it with device='cpu' and without device_memory"
        )
    _check_made_for(made, settings, ("optimizer", "precision"))
    names = tuple(s.name for s in cut.stages)
    if made.stages != names:
        raise ConfigError(f"the plan was made for stages {made.stages}, the model has {names}; make the plan again")
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


def assemble(
    cut: Cut,
    heads: Sequence[nn.Module],
    units: Sequence[UnitPlan],
    normalisation: Normalisation,
    facts: dict[str, Any],
) -> EarlyExitModel:
    """The cut model with one exit for each unit, in eval mode."""
    bodies = [nn.Sequential(*(s.module for s in cut.stages[u.first : u.last + 1])) for u in units]
    return EarlyExitModel(Scaled(normalisation), bodies, heads, facts).eval()


def _facts(
    network: nn.Module,
    name: str,
    cut: Cut,
    made: Plan,
    settings: TrainConfig,
    normalisation: Normalisation,
    is_uint8: bool,
) -> dict[str, Any]:
    """What `load` needs to rebuild the model: no code, no weights."""
    spec = getattr(network, "nf_spec", None)
    return {
        "format": "nf-model/1",
        "model": asdict(spec) if spec is not None else None,
        "name": name,
        "input_shape": list(cut.input_shape),
        "input_dtype": "uint8" if is_uint8 else "float32",
        "classes": cut.classes,
        "split_points": list(settings.split_points),
        "stages": [s.name for s in cut.stages],
        "normalisation": {"mean": list(normalisation.mean), "std": list(normalisation.std)},
        "exits": [{"first": u.first, "last": u.last, "head": asdict(u.head)} for u in made.units],
    }


def _exit_scores(
    model: EarlyExitModel, cut: Cut, made: Plan, scores: Sequence[Score], device: torch.device, settings: TrainConfig
) -> list[ExitScore]:
    found = []
    shape = cut.input_shape
    prefix = flops = 0
    batch = min(32, min(b.batch for b in made.blocks))
    for k, (unit, score) in enumerate(zip(made.units, scores, strict=True)):
        prefix += sum(p.numel() for p in model.bodies[k].parameters())
        for stage in cut.stages[unit.first : unit.last + 1]:
            flops += flops_of(stage.module, shape)
            shape = stage.output_shape
        head = model.heads[k]
        found.append(
            ExitScore(
                exit=k,
                stage=unit.last,
                name=cut.stages[unit.last].name,
                accuracy=score.accuracy,
                loss=score.loss,
                parameters=prefix + sum(p.numel() for p in head.parameters()),
                flops=flops + flops_of(head, shape),
                images_per_second=throughput(model, k, cut.input_shape, batch, torch.device("cpu")),
                batch=batch,
            )
        )
    return found


__all__ = [
    "Planner",
    "TrainResult",
    "assemble",
    "named_model",
    "plan",
    "profile",
    "settle",
    "train",
]

"""Assembly: the trained parts of a run as one model with an exit for each unit, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from nf_engine.config import TrainConfig
from nf_engine.exits import EarlyExitModel, Scaled, throughput
from nf_engine.instruments import flops_of
from nf_engine.preprocess import Normalisation
from nf_engine.records import ExitScore, Plan, UnitPlan
from nf_engine.stages import Cut
from nf_engine.worker import Score

__all__ = ["assemble", "exit_scores", "model_facts"]


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


def model_facts(
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


def exit_scores(model: EarlyExitModel, cut: Cut, made: Plan, scores: Sequence[Score]) -> list[ExitScore]:
    """The exits with their sizes, FLOPs and, on the CPU, images a second; scores: of their held-out samples."""
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

"""Unit heads: which head a unit gets that ends at a stage, and that head itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from nf_engine.config import TrainConfig
from nf_engine.heads import WIDEST, Shape, adaptive_width, build_head, clipped
from nf_engine.instruments import flops_of
from nf_engine.records import HeadSpec
from nf_engine.stages import Cut


def chw(shape: tuple[int, ...]) -> Shape:
    channels, height, width = shape
    return channels, height, width


def head_specs(cut: Cut, config: TrainConfig, flops: Sequence[int], widest: int = WIDEST) -> list[HeadSpec]:
    """The head that a unit ending at each stage gets; the last one is the model's own classifier."""
    specs = []
    modules = [*(s.module for s in cut.stages), cut.classifier]
    parameters = sum(p.numel() for m in modules for p in m.parameters())
    total = sum(flops) + flops_of(cut.classifier, chw(cut.stages[-1].output_shape))
    for stage in cut.stages[:-1]:
        shape = chw(stage.output_shape)
        spec = HeadSpec("deep" if config.head == "deep" else "linear", config.head_pool)
        if spec.kind == "deep":
            spec = replace(spec, depth=config.head_depth)
            width = config.head_width or adaptive_width(spec, shape, cut.classes, total, parameters, widest)
            spec = replace(spec, width=width)
        specs.append(clipped(spec, shape))
    return [*specs, HeadSpec("classifier", 1)]


def make_head(cut: Cut, spec: HeadSpec, stage: int, config: TrainConfig) -> nn.Module:
    """The head of a unit that ends at a stage, its weights a function of (seed, stage)."""
    classifier = cut.classifier if spec.kind == "classifier" else None
    return build_head(
        spec,
        chw(cut.stages[stage].output_shape),
        cut.classes,
        smoothing=config.label_smoothing,
        seed=config.seed * 1000 + stage,
        classifier=classifier,
    )

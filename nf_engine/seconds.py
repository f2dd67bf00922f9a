"""Seconds of each stage on the real device, as lines of the batch size, and of an image on its way there.

Clocks are noisy and warm-ups are slow: each figure is the median of a few runs after one that does not count.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from nf_engine.config import TrainConfig
from nf_engine.device import LAYOUT, placed
from nf_engine.instruments import fit
from nf_engine.precision import compute_dtype, forward
from nf_engine.preprocess import Preprocess
from nf_engine.records import StageProfile
from nf_engine.stages import Cut
from nf_engine.unit_heads import make_head

REPEATS = 3


def with_seconds(
    cut: Cut, number: int, stage: StageProfile, config: TrainConfig, device: torch.device, room: int | None
) -> StageProfile:
    """The record with measured seconds of training step, both forwards and head, at three batch sizes."""
    sizes = _timed_sizes(stage, room)
    shape = cut.stages[number - 1].output_shape if number else cut.input_shape
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        body = placed(copy.deepcopy(cut.stages[number].module), device)
        head = make_head(cut, stage.head.spec, number, config)
        head = copy.deepcopy(head) if stage.head.spec.kind == "classifier" else head
        head = placed(head, device)
        times: dict[str, list[float]] = {"train": [], "rerun": [], "forward": [], "head": []}
        for batch in sizes:
            x = torch.rand(batch, *shape, device=device).to(compute_dtype(config), memory_format=LAYOUT)
            x.requires_grad_(number > 0)
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            with torch.no_grad():
                h = forward(body.train(), x)
            dh = torch.rand_like(h)
            head.train()
            times["train"].append(seconds_of(partial(_forward_backward, body, x, dh), device))
            times["rerun"].append(seconds_of(partial(forward, body, x), device))
            times["head"].append(seconds_of(partial(_head_step, head, h, labels), device))
            body.eval()
            with torch.no_grad():
                times["forward"].append(seconds_of(partial(forward, body, x), device))
    lines = {k: fit(sizes, v) for k, v in times.items()}
    return replace(
        stage,
        seconds=lines["train"],
        forward_seconds=lines["forward"],
        rerun_seconds=lines["rerun"],
        head=replace(stage.head, seconds=lines["head"]),
    )


def _timed_sizes(stage: StageProfile, room: int | None) -> tuple[int, int, int]:
    """8, 16 and 32 samples, or less where a copy of the stage and its step would need more than `room` bytes."""
    copies = 2 * (stage.weights + stage.gradients + stage.head.weights + stage.head.gradients)
    for top in (32, 16, 8):
        step = stage.input.at(top) + stage.kept.at(top) + stage.transient.at(top) + 3 * stage.output * top
        if room is None or copies + step <= room:
            break
    return top // 4, top // 2, top


def _head_step(head: nn.Module, h: Tensor, labels: Tensor) -> None:
    head.step(h, labels, None)  # type: ignore[operator]


def _forward_backward(body: nn.Module, x: Tensor, dh: Tensor) -> None:
    h = forward(body, x)
    if h.requires_grad:
        torch.autograd.backward(h, dh)
    for p in body.parameters():
        p.grad = None
    x.grad = None


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs after a warm-up."""
    times = []
    for k in range(REPEATS + 1):
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        if k:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fetch_seconds(cut: Cut, preprocess: Preprocess, uint8: bool, batch: int, device: torch.device) -> float:
    """Seconds to bring one image from host memory through the preprocessing."""
    images = torch.ones(batch, *cut.input_shape, dtype=torch.uint8 if uint8 else torch.float32)
    preprocess, ids = copy.copy(preprocess), torch.arange(batch)
    return seconds_of(lambda: preprocess(images[ids].to(device), ids, stream=0), device) / batch

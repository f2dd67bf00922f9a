"""Compare: the training loops that a user would write instead, for the benches; same data, order, schedule, optimizer.

backpropagation    the whole network, end to end
checkpointed       the same, each stage recomputed in backward; BatchNorm momentum corrected, as each batch counts twice
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nf_engine.config import TrainConfig
from nf_engine.data import ImageData
from nf_engine.device import TensorBytes, placed, watched
from nf_engine.local_step import make_optimizer
from nf_engine.partitioner import scaled_lr
from nf_engine.preprocess import Preprocess
from nf_engine.stages import Cut
from nf_engine.worker import ImageInputs, learning_rate


@dataclass(frozen=True)
class PeerResult:
    """accuracy on the scored data, seconds of each epoch, and the measured peak of tensor bytes (CPU; 0 elsewhere)."""

    accuracy: float
    epoch_seconds: tuple[float, ...]
    peak: int


def train_peer(
    cut: Cut,
    data: ImageData,
    scored: ImageData,
    config: TrainConfig,
    *,
    batch: int,
    checkpointed: bool,
    device: torch.device,
) -> PeerResult:
    """Trains the whole network by (checkpointed) backpropagation, in place.

    Args:
        cut: stages of the network; they are its segments where checkpointed.
        data, scored: images to train on, and to take the accuracy from at the end.
        config: optimizer, schedule, smoothing, epochs, augmentation and seed, as nf_engine would use them.
        batch: samples a step.
    """
    stages = [placed(s.module, device) for s in cut.stages]
    classifier = placed(cut.classifier, device)
    network = nn.Sequential(*stages, classifier).train()
    optimizer = make_optimizer(network.parameters(), config)
    counter = TensorBytes([*network.parameters(), *network.buffers()]) if device.type == "cpu" else None
    inputs = ImageInputs(data, Preprocess(data.normalisation, config.augment, config.seed), device, config.seed)
    per_epoch = len(data) // batch
    steps, warmup = per_epoch * config.epochs, round(per_epoch * min(config.warmup_epochs, config.epochs / 2))
    momenta = _norms(stages) if checkpointed else {}
    for norm, momentum in momenta.items():
        norm.momentum = 1 - math.sqrt(1 - momentum)
    seconds = []
    for epoch in range(config.epochs):
        started = time.perf_counter()
        batches = watched(inputs.train(epoch, batch), None if epoch else counter)
        for k in range(per_epoch):
            x, labels = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * per_epoch + k, steps, warmup, scaled_lr(config, batch))
            logits = classifier(_forward(stages, x, checkpointed))
            F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del x, logits
        batches.close()
        seconds.append(time.perf_counter() - started)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    accuracy = _accuracy(network.eval(), scored, Preprocess(data.normalisation), batch, device)
    return PeerResult(accuracy, tuple(seconds), counter.peak if counter is not None else 0)


def _norms(stages: Sequence[nn.Module]) -> dict[nn.modules.batchnorm._BatchNorm, float]:
    norms = (m for s in stages for m in s.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return {m: m.momentum for m in norms if m.momentum is not None}


def _forward(stages: Sequence[nn.Module], x: Tensor, checkpointed: bool) -> Tensor:
    for stage in stages:
        x = checkpoint(stage, x, use_reentrant=False) if checkpointed else stage(x)
    return x


def _accuracy(network: nn.Module, data: ImageData, plain: Preprocess, batch: int, device: torch.device) -> float:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for ids in torch.arange(len(data)).split(batch):  # type: ignore[no-untyped-call]
            images, labels = data.batch(ids)
            yield plain(images.to(device), None, stream=0), labels.to(device)

    with torch.no_grad():
        return sum(int((network(x).argmax(1) == y).sum()) for x, y in batches()) / len(data)

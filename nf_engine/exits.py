"""Exits: every head is a classifier, so each prefix that ends with a head is a model. Scores them, chooses, runs them.

images (N, C, H, W), uint8 or float32 as trained -> logits (N, K). The model normalises its input itself.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (output: the early-exit model); confidence policy as in BranchyNet,
https://arxiv.org/abs/1709.01686.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf_engine.errors import ConfigError
from nf_engine.preprocess import Normalisation
from nf_engine.records import ExitScore
from nf_engine.sources import as_image_data


class Prediction(NamedTuple):
    """labels (N,) int64, probabilities (N, K) float32, exits (N,) int64: the exit that answered for each sample."""

    labels: Tensor
    probabilities: Tensor
    exits: Tensor


class Scaled(nn.Module):
    """(x - mean) / std for each channel: images as stored -> the first stage's input, float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        for name, values in (("mean", normalisation.mean), ("std", normalisation.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.float32) - self.mean) / self.std


class EarlyExitModel(nn.Module):
    """A trained network with a classifier at the end of each unit.

    Args:
        scaled: normalisation of the images.
        bodies: one for each exit: the stages between the exit before and this one.
        heads: one for each exit.
        facts: what `save_pretrained` writes beside the weights, so that `load` can rebuild the model.
    """

    def __init__(
        self, scaled: Scaled, bodies: Sequence[nn.Sequential], heads: Sequence[nn.Module], facts: dict[str, Any]
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.bodies = nn.ModuleList(bodies)
        self.heads = nn.ModuleList(heads)
        self.facts = facts

    @property
    def exits(self) -> int:
        return len(self.heads)

    def _exit(self, number: int) -> int:
        if not -self.exits <= number < self.exits:
            raise ConfigError(f"exit must be in 0..{self.exits - 1} (or negative, from the end), got {number}")
        return number % self.exits

    def forward(self, x: Tensor, *, exit: int = -1) -> Tensor:
        """Logits (N, K) of one exit; only the stages before it run."""
        last = self._exit(exit)
        h = self.scaled(x)
        for body in self.bodies[: last + 1]:
            h = body(h)
        logits: Tensor = self.heads[last](h)
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor, *, policy: str = "fixed:-1") -> Prediction:
        """Classifies a batch of images.

        Args:
            x: (N, C, H, W), of the dtype and range that the model was trained on.
            policy: "fixed:K" answers all samples at exit K; "confidence:T" lets a sample leave at the first exit whose
                largest probability is at least T: the survivors are compacted, so later stages run on fewer samples.

        Raises:
            ConfigError: the policy is unknown.
        """
        kind, _, text = policy.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if kind == "fixed" and value.is_integer():
            number = self._exit(int(value))
            probabilities = F.softmax(self(x, exit=number).float(), 1)
            return Prediction(probabilities.argmax(1), probabilities, torch.full((len(x),), number, device=x.device))
        if kind != "confidence" or not 0 < value <= 1:
            raise ConfigError(f"policy must be 'fixed:EXIT' or 'confidence:T' with T in (0, 1], got {policy!r}")
        return self._by_confidence(x, value)

    def _by_confidence(self, x: Tensor, threshold: float) -> Prediction:
        left = torch.arange(len(x), device=x.device)
        exits = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        found: Tensor | None = None
        h = self.scaled(x)
        for number, (body, head) in enumerate(zip(self.bodies, self.heads, strict=True)):
            h = body(h)
            probabilities = F.softmax(head(h).float(), 1)
            if found is None:
                found = torch.zeros((len(x), probabilities.shape[1]), device=x.device)
            leaves = probabilities.amax(1) >= threshold
            if number == self.exits - 1:
                leaves = torch.ones_like(leaves)
            found[left[leaves]] = probabilities[leaves]
            exits[left[leaves]] = number
            left, h = left[~leaves], h[~leaves]
            if len(left) == 0:
                break
        assert found is not None
        return Prediction(found.argmax(1), found, exits)

    def truncate(self, exit: int) -> EarlyExitModel:
        """The model that ends at an exit: one exit, without later stages and other heads; shares its weights."""
        last = self._exit(exit)
        stages = (stage for body in self.bodies[: last + 1] for stage in cast(nn.Sequential, body))
        facts = self.facts
        if facts:  # the one unit that is left starts where the first did
            facts = {**facts, "exits": [{**facts["exits"][last], "first": facts["exits"][0]["first"]}]}
        return EarlyExitModel(self.scaled, [nn.Sequential(*stages)], [self.heads[last]], facts).train(self.training)


@dataclass(frozen=True)
class EvalResult:
    """accuracy 0..1 and mean cross-entropy over `samples`; share of the samples that each exit answered."""

    accuracy: float
    loss: float
    samples: int
    coverage: tuple[float, ...]
    images_per_second: float


@torch.no_grad()
def evaluate(model: EarlyExitModel, data: Any, *, policy: str = "fixed:-1", batch_size: int = 256) -> EvalResult:
    """Accuracy of a model on images that it has not seen.

    Args:
        model: moved nowhere; it runs where its weights are.
        data: images and labels, in any form that train takes.
        policy: as for EarlyExitModel.predict.
        batch_size: samples at a time.
    """
    data = as_image_data(data)
    device = next(model.parameters()).device
    model.eval()
    right, loss, seconds = 0, 0.0, 0.0
    answered = torch.zeros(model.exits, dtype=torch.int64)
    for ids in torch.split(torch.arange(len(data)), batch_size):
        images, labels = data.batch(ids)
        started = time.perf_counter()
        result = model.predict(images.to(device), policy=policy)
        found = result.labels.cpu()
        seconds += time.perf_counter() - started
        right += int((found == labels).sum())
        chosen = result.probabilities.cpu().gather(1, labels[:, None]).clamp_min(1e-30)
        loss -= float(chosen.log().sum())
        answered += torch.bincount(result.exits.cpu(), minlength=model.exits)
    count = len(data)
    return EvalResult(
        right / count, loss / count, count, tuple((answered / count).tolist()), count / max(seconds, 1e-9)
    )


@torch.no_grad()
def throughput(model: EarlyExitModel, exit: int, shape: tuple[int, ...], batch: int, device: torch.device) -> float:
    """Images a second of one exit, median of five runs after a warm-up."""
    x = torch.zeros((batch, *shape), device=device)
    times = []
    for k in range(6):
        started = time.perf_counter()
        model(x, exit=exit)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k:
            times.append(time.perf_counter() - started)
    return batch / statistics.median(times)


def select_exit(
    scores: Sequence[ExitScore],
    *,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    max_params: int | None = None,
) -> int:
    """The smallest exit (parameters, then FLOPs) that is accurate enough.

    Args:
        scores: of all exits, on held-out data.
        max_drop: accuracy may be below the best exit's (within max_params) by at most this; 0.01 if nothing is given.
        min_accuracy: least accuracy, 0..1.
        max_params: most parameters, head included.

    Raises:
        ConfigError: no exit satisfies all of them; names the closest.
    """
    if max_drop is None and min_accuracy is None:
        max_drop = 0.01
    small = [s for s in scores if max_params is None or s.parameters <= max_params]
    if not small:
        least = min(scores, key=lambda s: s.parameters)
        raise ConfigError(
            f"no exit has at most {max_params} parameters; the smallest, {least.name}, has {least.parameters}"
        )
    best = max(s.accuracy for s in small)
    floor = max(best - max_drop if max_drop is not None else 0.0, min_accuracy or 0.0)
    good = [s for s in small if s.accuracy >= floor - 1e-12]
    if not good:
        raise ConfigError(
            f"no exit reaches accuracy {floor:.4f} with max_params={max_params}; the best reaches {best:.4f}"
        )
    return min(good, key=lambda s: (s.parameters, s.flops)).exit


def exits_table(scores: Sequence[ExitScore], chosen: int) -> str:
    """The exits as text, the chosen one marked."""
    rows = [f"{'exit':<6}{'ends with':<28}{'accuracy':>9}{'parameters':>12}{'MFLOPs':>9}{'img/s':>10}"]
    for s in scores:
        mark = "  <- chosen" if s.exit == chosen else ""
        rows.append(
            f"{s.exit:<6}{s.name:<28}{s.accuracy:>9.2%}{s.parameters:>12,}{s.flops / 1e6:>9.1f}"
            f"{s.images_per_second:>10,.0f}{mark}"
        )
    return "\n".join(rows)

"""Records: what one step of the engine hands to the next; each is frozen and is also a JSON file.

profiler -> Profile -> partitioner -> Plan -> controller -> ExitScore -> exits. Bytes, seconds and samples carry no
suffix. This module imports no torch, so plans can be made, read and printed without it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nf_engine.errors import CorruptFileError


def format_bytes(count: float) -> str:
    """Bytes as text with a binary unit, three digits: 1536 -> '1.50 KiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.{2 if abs(value) < 10 else 1}f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


class Record:
    """JSON for frozen dataclasses of numbers, text, tuples and other records; strict when read back."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises CorruptFileError: no JSON, or a field is missing, unknown or of another type."""
        try:
            return cls.from_value(json.loads(text))
        except (ValueError, OverflowError, RecursionError) as error:
            raise CorruptFileError(f"not a {cls.__name__} in JSON: {error}; write it again with to_json()") from None

    @classmethod
    def from_value(cls, value: Any) -> Self:
        """The record of what JSON was parsed to. Raises ValueError: a field is missing, unknown or of another type."""
        return typing.cast(Self, _build(cls, value, cls.__name__))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises CorruptFileError: the file is missing or no such record; the message names it."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, CorruptFileError) as error:
            raise CorruptFileError(f"{path}: {error}") from None


_hints = functools.cache(typing.get_type_hints)  # it compiles the annotations anew each time


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as parsed from JSON, rebuilt as the annotated type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
        hints = _hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        if set(names) != set(value):
            raise ValueError(
                f"{where}: missing {sorted(set(names) - set(value))}, unknown {sorted(set(value) - set(names))}"
            )
        return kind(**{n: _build(hints[n], value[n], f"{where}.{n}") for n in names})
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
        return {k: _build(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(a for a in args if a is not type(None)), value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Line(Record):
    """A quantity as a straight line of the batch size: fixed + per_sample * batch.

    residual: the largest |measured - line| / measured over the points of the fit.
    """

    fixed: float
    per_sample: float
    residual: float = 0.0

    def at(self, batch: int) -> float:
        return self.fixed + self.per_sample * batch


@dataclass(frozen=True, slots=True)
class HeadSpec(Record):
    """What a head is made of: kind "linear", "deep" or "classifier" (the model's own).

    pool: cells a side of the pooled map (q); width, depth: filters of the first convolution of a deep head, and how
    many convolutions it has.
    """

    kind: str
    pool: int = 4
    width: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class HeadProfile(Record):
    """Cost of one head.

    transient: bytes of its step beyond the stage output that it reads; path: the implementation that takes the step,
    "fused" or "reference" (ops.head_path), or "autograd" for the model's own classifier.
    """

    spec: HeadSpec
    weights: int
    gradients: int
    optimizer: int
    parameters: int
    flops: int
    transient: Line
    path: str
    seconds: Line | None


@dataclass(frozen=True, slots=True)
class StageProfile(Record):
    """Cost of one stage; bytes as lines of the batch size.

    output_shape: of one sample; output: its bytes a sample.
    parameters: count; weights: bytes of parameters and buffers; gradients, optimizer: bytes of the step's.
    kept: bytes first saved for backward by this stage in a run through all stages.
    input: bytes of its input where the stage before kept it, else 0 (then kept holds it, or nobody keeps it).
    loose: bytes of its output where it does not keep it itself.
    transient: peak of forward and backward of the stage alone, above input and kept.
    forward: peak of forward in eval mode without gradients, above its input.
    flops: of one sample's forward; seconds: of forward and backward; forward_seconds: of an eval forward;
        rerun_seconds: of a forward in train mode, what running the stage again costs.
    head: the head that a unit ending here would get.
    """

    name: str
    output_shape: tuple[int, ...]
    output: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    kept: Line
    input: Line
    loose: Line
    transient: Line
    forward: Line
    flops: int
    seconds: Line | None
    forward_seconds: Line | None
    rerun_seconds: Line | None
    head: HeadProfile


@dataclass(frozen=True, slots=True)
class Profile(Record):
    """Cost of every stage of one model. device: where it was measured; "none" where no device was asked.

    loading: peak of bringing a batch of images to the device, augmented and normalised.
    input: bytes of one sample as the first stage reads it.
    image: bytes of one sample on its way to a device: the image as stored, its label and its id.
    """

    model: str
    device: str
    torch: str
    optimizer: str
    augment: str
    precision: str
    input_shape: tuple[int, ...]
    classes: int
    input: int
    batch_sizes: tuple[int, ...]
    loading: Line
    stages: tuple[StageProfile, ...]
    image: int = 0

    def table(self) -> str:
        """One row a stage: output shape, parameters, bytes a sample, largest residual, milliseconds a sample."""
        rows = [f"{'stage':<24}{'output':>14}{'params':>11}{'kept/img':>12}{'peak/img':>12}{'fit':>7}{'ms/img':>9}"]
        for s in self.stages:
            shape = "x".join(map(str, s.output_shape))
            peak = s.input.per_sample + s.kept.per_sample + s.transient.per_sample
            fit = max(line.residual for line in (s.kept, s.transient, s.forward))
            ms = f"{1000 * s.seconds.per_sample:9.3f}" if s.seconds else f"{'-':>9}"
            rows.append(
                f"{s.name:<24}{shape:>14}{s.parameters:>11,}{format_bytes(s.kept.per_sample):>12}"
                f"{format_bytes(peak):>12}{fit:>7.1%}{ms}"
            )
        return "\n".join(rows)


@dataclass(frozen=True, slots=True)
class UnitPlan(Record):
    """One unit: stages first..last (inclusive), its head and the path of the head's step (as in HeadProfile), and the
    predicted peak of its step at the block's batch. starts: stages at which its segments after the first begin; all
    segments but the last run again in backward; empty where none does."""

    first: int
    last: int
    head: HeadSpec
    path: str
    peak: int
    starts: tuple[int, ...] = ()


ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
ENGINE_SLOTS = 2  # batches as stored that wait on a device, on the way to a cache file, and on the way back
IMAGE_SLOTS = 2  # batches of images on a device, one in use while the next one arrives
WINDOW = 64 * 2**20  # bytes of a cache that are mixed with each other while it is read


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one cached sample (C, ...); "u8" holds 8 bytes a channel and one a value, up to a multiple of 16."""
    values = math.prod(shape)
    return -(-(8 * shape[0] + values) // 16) * 16 if dtype == "u8" else values * ITEM_BYTES[dtype]


def image_bytes(shape: tuple[int, ...], samples: int) -> int:
    """Bytes of uint8 images (C, H, W) on a device, with their labels and the order of an epoch, both int64."""
    return samples * (math.prod(shape) + 16)


@dataclass(frozen=True, slots=True)
class TierProbe(Record):
    """What the places of a cache were measured to do; all rates in bytes a second.

    write, read: of the disk, the latter in shuffled chunks; up, down: copies to and from the device (on the CPU there
    are none: the rate of gather); gather: of samples in RAM. fetch: seconds to bring one image to the device.
    room: bytes that "ram" and "disk" may hold; write_threads, read_threads: the fewest that reach these rates.
    """

    write: float
    read: float
    up: float
    down: float
    gather: float
    fetch: float
    room: dict[str, int]
    write_threads: int = 2
    read_threads: int = 2


@dataclass(frozen=True, slots=True)
class CachePlan(Record):
    """Where the inputs of a block wait. tier: "images" (first block), "device", "ram", "disk", "recompute" or "auto".

    dtype: as stored, "fp32", "fp16", "bf16" or "u8"; bytes: of all samples, all copies; seconds: what each tier that
    fits was predicted to cost this block, dropped: why another does not fit; reason: why this tier, in words.
    forward_batch: samples a forward pass of recomputation takes at a time, 0 where not even one fits.
    window: bytes that are mixed with each other while the cache is read, on every tier the same.
    rate, write_rate: bytes a second planned for reading and writing, 0 where nothing was measured.
    """

    tier: str
    dtype: str
    copies: int
    bytes: int
    seconds: dict[str, float]
    reason: str
    forward_batch: int = 0
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    window: int = WINDOW
    rate: float = 0.0
    write_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockPlan(Record):
    """One block: its units in order, batch size, learning rate, predicted peak bytes, and the source of its inputs."""

    units: tuple[UnitPlan, ...]
    batch: int
    lr: float
    peak: int
    seconds: float | None
    cache: CachePlan

    @property
    def first(self) -> int:
        return self.units[0].first

    @property
    def last(self) -> int:
        return self.units[-1].last

    @property
    def reads_images(self) -> bool:
        return self.cache.tier in ("images", "recompute")


@dataclass(frozen=True, slots=True)
class Bounds(Record):
    """Peak bytes of the alternatives at the plan's target batch, resident weights and optimizer state included.

    lower: the largest single stage at batch 1, below which no plan exists.
    """

    batch: int
    backpropagation: int
    checkpointed: int
    plan: int
    lower: int


@dataclass(frozen=True, slots=True)
class Plan(Record):
    """What will be trained, in which pieces, with how much memory.

    overhead: bytes resident beside every block; probe: the rates that the tiers were chosen by, where any was measured.
    resident_images: bytes of all training images where they lie on the device while a block reads them, part of the
        peaks of such blocks; 0: batches of them come from host memory.
    """

    model: str
    strategy: str
    device: str
    budget: int
    allowed: int
    overhead: int
    samples: int
    epochs: int
    stages: tuple[str, ...]
    blocks: tuple[BlockPlan, ...]
    bounds: Bounds
    host_bytes: int
    epoch_seconds: float | None
    warnings: tuple[str, ...]
    probe: TierProbe | None = None
    resident_images: int = 0
    optimizer: str = "sgd"
    precision: str = "32-true"

    @property
    def peak(self) -> int:
        return max(b.peak for b in self.blocks)

    @property
    def units(self) -> tuple[UnitPlan, ...]:
        return tuple(u for b in self.blocks for u in b.units)

    def _names(self, first: int, last: int) -> str:
        return self.stages[first] + ("" if first == last else f" .. {self.stages[last]}")

    def table(self) -> str:
        """The plan as text: one row a unit, then budget, peak and the bounds."""
        rows = [
            f"{'block':<6}{'unit':<5}{'stages':<34}{'head':<12}{'step':<10}{'batch':>6}{'lr':>8}{'peak':>12}  inputs"
        ]
        number = 0
        for k, block in enumerate(self.blocks):
            for u, unit in enumerate(block.units):
                names = self._names(unit.first, unit.last)
                head = unit.head.kind + (f" {unit.head.width}" if unit.head.width else "")
                row = f"{k if u == 0 else '':<6}{number:<5}{names:<34}{head:<12}{unit.path:<10}"
                if u == 0:
                    row += f"{block.batch:>6}{block.lr:>8.3g}{format_bytes(block.peak):>12}  {_inputs(block.cache)}"
                rows.append(row.rstrip())
                number += 1
        bounds = self.bounds
        rows.append(
            f"budget {format_bytes(self.budget)}, plan {format_bytes(self.peak)} ({self.peak / self.budget:.0%}); "
            f"{format_bytes(self.overhead)} of it beside every block; host buffers {format_bytes(self.host_bytes)}"
        )
        rows.append(
            f"at batch {bounds.batch}: backpropagation {format_bytes(bounds.backpropagation)}, "
            f"checkpointed {format_bytes(bounds.checkpointed)}, this plan {format_bytes(bounds.plan)}; "
            f"lower bound (largest stage at batch 1) {format_bytes(bounds.lower)}"
        )
        if self.epoch_seconds is not None:
            rows.append(f"an epoch of every block: {self.epoch_seconds:.3g} s of computing predicted")
        if self.resident_images:
            rows.append(f"all images lie on the device while a block reads them: {format_bytes(self.resident_images)}")
        for number, unit in enumerate(self.units):
            if not unit.starts:
                continue
            edges = (unit.first, *unit.starts)
            again = ", ".join(self._names(a, b - 1) for a, b in itertools.pairwise(edges))
            rows.append(f"note: unit {number} runs {again} again in its backward")
        rows.extend(f"note: {w}" for w in self.warnings)
        return "\n".join(rows)


def _inputs(cache: CachePlan) -> str:
    if cache.tier == "images":
        return "images"
    copies = f", {cache.copies} copies" if cache.copies > 1 else ""
    return f"{cache.tier}, {format_bytes(cache.bytes)} {cache.dtype}{copies}" if cache.bytes else cache.tier


@dataclass(frozen=True, slots=True)
class ExitScore(Record):
    """One exit: the prefix that ends with stage `stage`, and its head.

    accuracy: on held-out data, 0..1; parameters: prefix and head; flops: of one sample; images_per_second: at `batch`.
    """

    exit: int
    stage: int
    name: str
    accuracy: float
    loss: float
    parameters: int
    flops: int
    images_per_second: float
    batch: int


@dataclass(frozen=True, slots=True)
class ExitTable(Record):
    """exits.json of a run folder. chosen: number of the exit that the run chose."""

    chosen: int
    exits: tuple[ExitScore, ...]

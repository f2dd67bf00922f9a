"""TrainConfig: what a user decides, and nothing else.

One flat frozen dataclass: the same names in Python, in TOML and as flags of the command line. Every value is checked
when the object is made, so nothing behind this module checks a setting again.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nf_engine.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "partition": ("windows", "layerwise"),
    "prefer": ("speed", "accuracy"),
    "head": ("auto", "linear", "deep"),
    "optimizer": ("sgd", "adamw"),
    "cache": ("auto", "device", "ram", "disk", "recompute"),
    "cache_dtype": ("auto", "exact", "fp16", "bf16", "u8"),
    "augment": ("none", "flip", "crop-flip"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
}
COMPUTED = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: int | str, name: str) -> int:
    """Bytes from an int or from text such as "512MiB", "2GB" or "700e6"; `name` is the setting that errors speak of."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    text = "" if isinstance(value, float) else str(value)  # 0.5 would be meant as a share, and be no byte
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    try:
        if match is not None:
            return int(float(match[1]) * _SUFFIX[match[2].lower()])
    except (ValueError, KeyError, OverflowError):
        match = None
    raise ConfigError(f"{name} must be bytes such as 268435456, '256MiB' or '2GB', got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides the result of a training.

    Attributes:
        memory_budget: bytes that the tensors on the training device may use: an int, text ("512MiB", "2GB"), a float in
            (0, 1] as the share of the device's free memory, or "auto" (0.9 of it).
        memory_margin: share of the budget that the plan leaves unused.
        partition: "windows" (fewest units that fit at the target batch) or "layerwise" (one unit a stage, the paper's).
        split_points: names of modules after which to cut; empty: at every single-tensor point.
        grouping_threshold: layerwise: stages join a block while their largest batches differ by less than this share.
        max_units: windows: most units with their own local loss, before one unit a stage is tried.
        prefer: windows: "speed" takes the fewest units among plans that are predicted to be within 3 % of the fastest,
            "accuracy" the fewest units, however many stages they run twice for it.
        recompute: windows: units may run stages again in their backward, to save what these would keep.
        batch_size: samples a step in every block; "auto": windows trains at 128, or at the largest halving of it that
            fits; layerwise at the largest that fits a block, up to max_batch_size and a fiftieth of the data set.
        min_batch_size, max_batch_size: bounds of the batch sizes that a plan may choose.
        head: kind of the heads at the ends of units, "deep" or "linear"; the last unit uses the model's own classifier.
            "auto": deep for windows of three units or more, else linear.
        head_pool: heads pool to head_pool x head_pool cells before their linear layer.
        head_width: filters of a deep head's first convolution; 0: by the width rule.
        head_depth: convolutions of a deep head.
        epochs: passes over the training data, for each block.
        optimizer, lr, momentum, weight_decay: of every unit; momentum is SGD's. lr is meant at batch 128 and grows
            linearly (SGD) or with the square root (AdamW) of a block's batch.
        warmup_epochs: epochs of linear warm-up before the cosine, for each block.
        label_smoothing: of every local loss.
        cache: where a block's outputs wait for the next block: "device" (a GPU's own memory), "ram", "disk", or
            nowhere ("recompute"); "auto" measures them and takes the fastest that fits.
        cache_dtype: "fp16", "bf16", "exact" (the compute dtype), or "u8" (8 bits per sample and channel, where a
            channel has 64 values or more); "auto": bf16 if that is the compute dtype, else fp16.
        max_cache_bytes: most bytes of the caches alive at one time, RAM or disk each.
        pinned_bytes: most bytes of pinned memory that carry a cache to and from its file.
        durable_cache: sync each finished cache file; without it a power cut may cost a rebuild.
        io_timeout: seconds after which a request to the disk counts as failed.
        augment: of the training images.
        augment_copies: augmented copies in a cache; 0: two where augmentation is on, else one.
        val_fraction: share of the training data held out for the choice of the exit where no val_data is given.
        max_drop: the exit chosen is the smallest whose held-out accuracy is within max_drop of the best exit's.
        seed: of weights of heads, order and augmentation; data order and augmentation are functions of it alone.
        checkpoint_minutes: between two commits inside a block; one is always made at its end. 0: after every step.
        compile: a GPU trains through torch.compile, stage by stage; plans are measured without it, blocks are rehearsed
            with it. Refused on a CPU, where the bytes of compiled code cannot be counted.
        deterministic: a GPU computes the same bits in every run, more slowly; a CPU always does.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        precision: "32-true"; or autocast of maps and products to 16 bits: "bf16-mixed", or "16-mixed" (float16), where
            each unit has a loss scale of its own and leaves out an update whose gradients overflow. Weights, their
            updates, statistics of norms and losses are float32 in all three, and so is the trained model.
    """

    memory_budget: int | float | str = "auto"
    memory_margin: float = 0.05
    partition: str = "windows"
    split_points: tuple[str, ...] = ()
    grouping_threshold: float = 0.4
    max_units: int = 4
    prefer: str = "speed"
    recompute: bool = True
    batch_size: int | str = "auto"
    min_batch_size: int = 8
    max_batch_size: int = 1024
    head: str = "auto"
    head_pool: int = 4
    head_width: int = 0
    head_depth: int = 1
    epochs: int = 10
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    cache: str = "auto"
    cache_dtype: str = "auto"
    max_cache_bytes: int | str | None = None
    pinned_bytes: int | str = "64MiB"
    durable_cache: bool = False
    io_timeout: float = 300.0
    augment: str = "none"
    augment_copies: int = 0
    val_fraction: float = 0.05
    max_drop: float = 0.01
    seed: int = 0
    checkpoint_minutes: float = 10.0
    compile: bool = False
    deterministic: bool = False
    device: str = "auto"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("max_units", "min_batch_size", "max_batch_size", "epochs", "head_depth"):
            self._number(name, int, 1)
        for name in ("augment_copies", "head_width", "seed"):
            self._number(name, int, 0)
        for name in ("lr", "weight_decay", "warmup_epochs", "checkpoint_minutes"):
            self._number(name, float, 0)
        self._number("io_timeout", float, 1)
        for name in ("memory_margin", "momentum", "grouping_threshold", "label_smoothing", "val_fraction", "max_drop"):
            self._number(name, float, 0, 1)
        if type(self.head_pool) is not int or self.head_pool not in (1, 2, 4):
            raise ConfigError(f"head_pool must be 1, 2 or 4, got {self.head_pool!r}")
        if self.min_batch_size > self.max_batch_size:
            raise ConfigError(f"min_batch_size {self.min_batch_size} is above max_batch_size {self.max_batch_size}")
        if self.batch_size != "auto":
            self._number("batch_size", int, 1)
        if self.max_cache_bytes is not None:
            parse_bytes(self.max_cache_bytes, "max_cache_bytes")
        parse_bytes(self.pinned_bytes, "pinned_bytes")
        for name in ("recompute", "durable_cache", "compile", "deterministic"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        points = self.split_points
        if not isinstance(points, (list, tuple)) or not all(isinstance(p, str) for p in points):
            raise ConfigError(f"split_points must be a list of module names, got {self.split_points!r}")
        object.__setattr__(self, "split_points", tuple(self.split_points))
        self._check_budget()

    def _number(self, name: str, kind: type, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if isinstance(value, int) and value.bit_length() > 63:  # may be too long to print, or to be a float
            raise ConfigError(f"{name} must be below 2**63, got an integer of {value.bit_length()} bits")
        number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not number or not low <= value < high:  # false for NaN, too
            bounds = f">= {low}" if high == math.inf else f"in [{low}, {high})"
            raise ConfigError(f"{name} must be {'an integer' if kind is int else 'a number'} {bounds}, got {value!r}")

    def _check_budget(self) -> None:
        budget = self.memory_budget
        if budget == "auto":
            return
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ConfigError(
                    f"memory_budget as a share must be in (0, 1], got {budget}; for bytes give an int or text"
                )
            return
        need = parse_bytes(budget, "memory_budget")
        if need < 2**20:
            raise ConfigError(f"memory_budget must be at least 1 MiB (1048576 bytes), got {budget!r} = {need} bytes")

    @property
    def compute_dtype(self) -> str:
        """What maps are while a block trains: "fp32", "fp16" or "bf16"."""
        return COMPUTED[self.precision]

    @property
    def stored_dtype(self) -> str:
        """What caches hold: "fp32", "fp16", "bf16" or "u8"; the compute dtype is what they are read back in."""
        computed = self.compute_dtype
        return {"auto": "bf16" if computed == "bf16" else "fp16", "exact": computed}.get(
            self.cache_dtype, self.cache_dtype
        )

    def with_fields(self, values: dict[str, Any]) -> TrainConfig:
        """This configuration with some fields replaced.

        Raises:
            ConfigError: a name is unknown (the closest one is named), or a value is refused.
        """
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown setting {name!r}{hint}")
        return replace(self, **values)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads a flat TOML file of these fields.

        Raises:
            ConfigError: the file is missing, is no TOML, or holds an unknown or refused setting.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        return cls.from_toml(text, str(path))

    @classmethod
    def from_toml(cls, text: str, where: str) -> TrainConfig:
        """As load, of the text of a file. where: its path, for the error."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not valid TOML: {error}") from None
        try:
            return cls().with_fields(values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_toml(self) -> str:
        """The fields as TOML text that `load` reads back to an equal object; None is left out."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                lines.append(f"{field.name} = {_toml_value(value)}\n")
        return "".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(value)

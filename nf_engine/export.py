"""Export: writes a trained model, or one exit of it, and reads it back.

An exported folder holds config.json (what rebuilds the model: no code, no weights, the digest of the weights) and
model.safetensors with keys unit{k}.body.{stage}.* and unit{k}.head.*, the keys of the blocks in a run folder, which
`load` reads too. A .pt2 file holds one exit as a graph that runs without nf_engine.
images (N, C, H, W), as trained -> logits (N, K). What is written is read back and run before it gets its name.
Source: the layout follows safetensors, https://github.com/huggingface/safetensors; the .pt2 file is torch.export's.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from nf_engine.checkpoint import SCORES, assign, parse, state_of, to_bytes
from nf_engine.committed import read_run
from nf_engine.errors import ConfigError, CorruptFileError, ExportError, NoDeviceError, UnsupportedModelError
from nf_engine.exits import EarlyExitModel, Scaled
from nf_engine.folder_files import staging
from nf_engine.heads import Shape, build_head
from nf_engine.manifest import MANIFEST
from nf_engine.models import ModelSpec
from nf_engine.preprocess import Normalisation
from nf_engine.records import HeadSpec, Record
from nf_engine.stages import Cut, split

__all__ = ["export_pt2", "load", "save_pretrained"]

FORMAT = "nf-model/1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
JSON_LIMIT = 4 << 20  # bytes: a thousand stages take a tenth of it
SIZE_LIMIT = 1 << 20  # of images, classes and heads: a hostile file must not keep us building
DEPTH_LIMIT = 64  # of a deep head
RTOL, ATOL = 1e-4, 1e-5  # of a .pt2 file: the same operators, maybe fused another way


@dataclass(frozen=True, slots=True)
class _Exit(Record):
    first: int
    last: int
    head: HeadSpec


@dataclass(frozen=True, slots=True)
class _Facts(Record):
    """`EarlyExitModel.facts`."""

    format: str
    model: ModelSpec | None
    name: str
    input_shape: tuple[int, ...]
    input_dtype: str
    classes: int
    split_points: tuple[str, ...]
    stages: tuple[str, ...]
    normalisation: Normalisation
    exits: tuple[_Exit, ...]


Facts = TypeVar("Facts", bound=_Facts)


@dataclass(frozen=True, slots=True)
class _RunFacts(_Facts):
    """model.json of a run folder. chosen: the exit that the run chose."""

    chosen: int


@dataclass(frozen=True, slots=True)
class _ExportFacts(_Facts):
    """config.json of an exported folder. sha256: of the bytes of model.safetensors, hex."""

    sha256: str


# --- write -----------------------------------------------------------------------------------------------------------


def save_pretrained(model: EarlyExitModel, folder: str | Path, *, exit: int | None = None) -> Path:
    """Writes a model as config.json and model.safetensors, reads it back and compares the two bit for bit.

    Args:
        model: on any device, in any mode.
        folder: new or empty; it appears only when it is complete and right.
        exit: write this exit alone, its prefix and its head; None: all exits of the model.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder holds files, the exit is out of range, or the model does not say how to rebuild it.
        ExportError: what was read back does not compute what the model does.
        DiskFullError, StorageError: the files cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: expected a new or an empty folder, found one with files, or a file; name another")
    target = _on_cpu(model if exit is None else model.truncate(exit))
    facts = _checked_facts(target)
    data = to_bytes(state_of(dict(_parts(target))), {"format": FORMAT})
    config = {**facts, "sha256": hashlib.sha256(data).hexdigest()}
    with staging(folder) as parts:
        parts.write(WEIGHTS, data)
        parts.write(CONFIG, (json.dumps(config, indent=1) + "\n").encode())
        _compare(target, _read_back(parts.path, target), folder)
        parts.put(parts.path, folder)
    return folder


def export_pt2(model: EarlyExitModel, path: str | Path, *, exit: int = -1, verify: bool = True) -> Path:
    """Writes one exit as a torch.export program with a dynamic batch size, which runs without nf_engine.

    Such a file holds more than numbers: load it with torch.export.load only where it comes from a trusted source.

    Args:
        model: on any device, in any mode; the program computes what it does in eval mode.
        path: a new file, best with the suffix .pt2; it appears only when it is complete and right.
        exit: the exit that the program ends with.
        verify: read the file back and compare it with the model on batches of 1, 2 and 7 random images.

    Returns:
        The path.

    Raises:
        ConfigError: the file exists, the exit is out of range, or the model does not say what images it reads.
        ExportError: torch.export refuses the model, or the program differs from it; gives the largest difference.
        DiskFullError, StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path}: expected a new file, found one of that name; delete it or name another")
    target = _on_cpu(model.truncate(exit))
    _checked_facts(target)
    program = _exported(target, path)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with staging(path) as parts:
        part = parts.write("model.pt2", buffer.getvalue())
        if verify:
            _compare_pt2(target, part, path)
        parts.put(part, path)
    return path


def _on_cpu(model: EarlyExitModel) -> EarlyExitModel:
    """A copy to compare with: the layout of the weights in memory changes the last bits of a convolution."""
    contiguous: EarlyExitModel = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return contiguous.eval()


def _checked_facts(model: EarlyExitModel) -> dict[str, Any]:
    try:
        facts = _Facts.from_json(json.dumps(model.facts))
        _check(facts)
        if len(facts.exits) != model.exits:
            raise CorruptFileError(f"exits: expected {model.exits} as in the model, found {len(facts.exits)}")
    except (CorruptFileError, TypeError) as error:
        raise ConfigError(
            f"model.facts cannot rebuild the model: {error}; take one that train() or load() made"
        ) from None
    return model.facts


def _parts(model: EarlyExitModel) -> Iterator[tuple[str, nn.Module]]:
    for k, (body, head) in enumerate(zip(model.bodies, model.heads, strict=True)):
        yield f"unit{k}.body", body
        yield f"unit{k}.head", head


def _read_back(folder: Path, model: EarlyExitModel) -> EarlyExitModel:
    try:
        if model.facts["model"] is not None:
            return load(folder)
        facts = _read_facts(folder / CONFIG, _ExportFacts)  # a user's own class: its copy gets the weights of the file
        found = copy.deepcopy(model)
        assign(dict(_parts(found)), _exported_state(folder, facts), str(folder / WEIGHTS))
        return found
    except CorruptFileError as error:
        raise ExportError(f"{error} (read back right after writing; nothing was kept)") from error


def _images(facts: dict[str, Any], count: int) -> Tensor:
    """Random images (N, C, H, W) of the dtype that the model was trained on."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, *facts["input_shape"])
    if facts["input_dtype"] == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def _compare(model: EarlyExitModel, found: EarlyExitModel, path: Path) -> None:
    x = _images(model.facts, 8)
    for k in range(model.exits):
        expected, logits = model(x, exit=k), found(x, exit=k)
        if not torch.equal(expected, logits):
            raise ExportError(
                f"{path}: exit {k} read back differs from the model by {_difference(expected, logits)}, expected equal "
                "bits; nothing was kept; check the disk and the memory of this machine, and the model for NaN"
            )


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max()) if expected.shape == found.shape else math.inf


def _exported(model: EarlyExitModel, path: Path) -> torch.export.ExportedProgram:
    # Two images: torch.export would make a batch of one a constant.
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            return torch.export.export(model, (_images(model.facts, 2),), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever a user's forward raises under torch.export
        lines = str(error).strip().splitlines() or ["no message"]
        raise ExportError(
            f"{path}: torch.export refuses the model: {type(error).__name__}: {lines[0]}; save_pretrained still works"
        ) from error


@torch.no_grad()
def _compare_pt2(model: EarlyExitModel, part: Path, path: Path) -> None:
    try:
        program = torch.export.load(part).module()
    except Exception as error:  # whatever torch's readers raise: the file is not what was written
        raise ExportError(f"{path}: cannot be read back: {error}; nothing was kept; check the disk") from error
    for count in (1, 2, 7):
        x = _images(model.facts, count)
        expected, logits = model(x), program(x)
        if expected.shape != logits.shape or not torch.allclose(expected, logits, RTOL, ATOL):
            raise ExportError(
                f"{path}: the program differs from the model by {_difference(expected, logits)} on {count} images, "
                f"expected at most {ATOL} + {RTOL} * logit; nothing was kept; use save_pretrained, or another exit"
            )


# --- read ------------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    exit: int | Literal["best", "all"] = "best",
    map_location: str | torch.device = "cpu",
) -> EarlyExitModel:
    """Reads a trained model from an exported folder or a run folder.

    Args:
        path: a folder that save_pretrained wrote, or the folder of a finished run.
        model: of the class that was trained, needed where the files name none, since files never name code; it is
            copied and keeps its own weights.
        exit: "best": the exit that the run chose, of an exported folder all that it holds; "all": every exit; a
            number: that exit alone.
        map_location: where the model shall be, such as "cpu" or "cuda:0".

    Returns:
        The model in eval mode.

    Raises:
        ConfigError: the path is no such folder, the exit is out of range, or model is needed or of another class.
        CorruptFileError: a file fails its checks; names file, field, expected and found.
        NoDeviceError: map_location is not there.
        UnsupportedModelError: the model given cannot be cut into stages.
    """
    folder, device = Path(path), _device(map_location)
    if (folder / CONFIG).is_file():
        facts: _ExportFacts | _RunFacts = _read_facts(folder / CONFIG, _ExportFacts)
        where, chosen = folder / CONFIG, None
        state = _exported_state(folder, cast(_ExportFacts, facts))
    elif (folder / MANIFEST).is_file():
        where = folder / "model.json"
        facts, state = _run(folder, where)
        chosen = facts.chosen
    else:
        raise ConfigError(
            f"{folder}: expected {CONFIG} (exported) or {MANIFEST} (a run), found neither; name such a folder"
        )
    whole = _rebuilt(facts, model, where)
    assign(dict(_parts(whole)), state, str(folder / WEIGHTS if chosen is None else folder))
    if exit == "best" and chosen is not None:
        exit = chosen
    return (whole if isinstance(exit, str) else whole.truncate(exit)).to(device).eval()


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"map_location must be a device such as 'cpu' or 'cuda:0', got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NoDeviceError(f"map_location is {name}, torch finds {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return device


def _read_facts(path: Path, kind: type[Facts]) -> Facts:
    return _parsed_facts(_read(path, JSON_LIMIT), path, kind)


def _parsed_facts(text: bytes, path: Path, kind: type[Facts]) -> Facts:
    try:
        found = json.loads(text.decode())  # of bytes it would guess the encoding
        form = found.get("format") if isinstance(found, dict) else None
        if form != FORMAT:
            raise CorruptFileError(f"format: expected {FORMAT!r}, found {form!r}; use the version that wrote it")
        facts = kind.from_json(text.decode())
        _check(facts)
    except (ValueError, RecursionError, CorruptFileError) as error:
        raise CorruptFileError(f"{path}: {error}") from None
    return facts


def _read(path: Path, limit: int | None = None) -> bytes:
    """A regular file, or a link to one: a pipe must not keep us waiting."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CorruptFileError(f"{path}: expected a regular file, found another kind; export again")
            data = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be read: {error.strerror}; restore it, or export again") from None
    except MemoryError:
        raise CorruptFileError(f"{path}: larger than the memory; this is no file of ours") from None
    if limit is not None and len(data) > limit:
        raise CorruptFileError(f"{path}: expected at most {limit} bytes, found more; this is no file of ours")
    return data


def _check(facts: _Facts) -> None:
    """Raises CorruptFileError, the field first, where the values of the right types make no sense."""
    shape, mean, std = facts.input_shape, facts.normalisation.mean, facts.normalisation.std
    starts = [0, *(e.last + 1 for e in facts.exits)]
    in_order = all(e.first == start <= e.last for e, start in zip(facts.exits, starts, strict=False))
    chosen = facts.chosen if isinstance(facts, _RunFacts) else 0
    channels = shape[0] if shape else 0
    rules = (
        ("format", facts.format == FORMAT, FORMAT, facts.format),
        ("input_shape", len(shape) == 3 and _sizes(*shape), f"three of 1..{SIZE_LIMIT}", shape),
        ("input_dtype", facts.input_dtype in DTYPES, " or ".join(DTYPES), facts.input_dtype),
        ("classes", _sizes(facts.classes), f"1..{SIZE_LIMIT}", facts.classes),
        ("model", facts.model is None or _modest(facts.model), f"numbers up to {SIZE_LIMIT}", facts.model),
        ("normalisation.mean", len(mean) == channels and all(map(math.isfinite, mean)),
         "a finite number for each channel", mean),
        ("normalisation.std", len(std) == channels and all(0 < s < math.inf for s in std),
         "a positive number for each channel", std),
        ("exits", bool(facts.exits) and in_order and starts[-1] <= len(facts.stages),
         f"exits in order without gaps, from stage 0 on, of {len(facts.stages)} stages",
         [(e.first, e.last) for e in facts.exits]),
        ("exits.head", all(_sane(e.head) for e in facts.exits), "sizes in range", [e.head for e in facts.exits]),
        ("chosen", 0 <= chosen < len(facts.exits), f"0..{len(facts.exits) - 1}", chosen),
    )  # fmt: skip
    for field, right, expected, found in rules:
        if not right:
            raise CorruptFileError(f"{field}: expected {expected}, found {found}; restore the file, or export again")


def _sizes(*numbers: float) -> bool:
    return all(0 < n <= SIZE_LIMIT for n in numbers)


def _modest(spec: ModelSpec) -> bool:
    return _sizes(spec.classes, spec.width, spec.input_size, spec.channels)


def _sane(head: HeadSpec) -> bool:
    sizes = (head.pool, head.width, head.depth)
    return min(sizes) >= 0 and max(sizes) <= SIZE_LIMIT and head.depth <= DEPTH_LIMIT


def _rebuilt(facts: _Facts, model: nn.Module | None, where: Path) -> EarlyExitModel:
    """The model that the facts describe, its weights still to be filled in."""
    if model is None and facts.model is None:
        raise ConfigError(
            f"{where}: the trained model, {facts.name}, is a class of your own, and files never name code; pass one, "
            f"made as for training, as load(..., model={facts.name}(...))"
        )
    if model is not None:
        model = copy.deepcopy(model)
        cut = split(model, facts.input_shape, split_points=facts.split_points)
        _compare_stages(facts, cut, ConfigError, f"{where}: the model given")
        return _assembled(facts, cut, where)
    assert facts.model is not None
    try:
        with torch.device("meta"):
            model = facts.model.build()
        cut = split(model, facts.input_shape, split_points=facts.split_points)
    except (ValueError, RuntimeError, TypeError, OverflowError, UnsupportedModelError) as error:
        raise CorruptFileError(f"{where}: model: {facts.model} cannot be built: {error}; restore the file") from error
    _compare_stages(facts, cut, CorruptFileError, f"{where}: model {facts.model.name}")
    return _assembled(facts, cut, where)


def _compare_stages(facts: _Facts, cut: Cut, kind: type[Exception], what: str) -> None:
    names = tuple(s.name for s in cut.stages)
    if names != facts.stages or cut.classes != facts.classes:
        raise kind(
            f"{what}: expected stages {facts.stages} and {facts.classes} classes, found {names} and {cut.classes}; "
            "it must be made as for training"
        )


def _assembled(facts: _Facts, cut: Cut, where: Path) -> EarlyExitModel:
    bodies = [nn.Sequential(*(s.module for s in cut.stages[e.first : e.last + 1])) for e in facts.exits]
    try:
        with torch.device("meta"):  # their values come from the file
            heads = [
                build_head(
                    e.head,
                    cast(Shape, cut.stages[e.last].output_shape),
                    facts.classes,
                    smoothing=0.0,
                    seed=0,
                    classifier=cut.classifier if e.head.kind == "classifier" else None,
                )
                for e in facts.exits
            ]
    except (ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{where}: exits.head: {error}") from error
    kept = json.loads(facts.to_json())
    plain = {f.name: kept[f.name] for f in fields(_Facts)}
    return EarlyExitModel(Scaled(facts.normalisation), bodies, heads, plain).eval()


def _exported_state(folder: Path, facts: _ExportFacts) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    data = _read(path)  # once: the bytes parsed are the bytes hashed
    digest = hashlib.sha256(data).hexdigest()
    if digest != facts.sha256:
        raise CorruptFileError(f"{path}: sha256: expected {facts.sha256}, found {digest}; restore it, or export again")
    return parse(data, str(path))


def _run(folder: Path, where: Path) -> tuple[_RunFacts, dict[str, Tensor]]:
    """What a finished run says of its model, and the weights of all its blocks."""
    manifest, files = read_run(folder, ("block", "model"))
    if where.name not in files:
        raise ConfigError(
            f"{folder}: expected the folder of a finished run, found one at block {manifest.position.block + 1}; "
            "finish it by the command that began it"
        )
    facts = _parsed_facts(files.pop(where.name), where, _RunFacts)
    state: dict[str, Tensor] = {}
    for name, data in files.items():
        state |= parse(data, str(folder / name))
        state.pop(SCORES, None)
    return facts, state

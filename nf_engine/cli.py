"""Command line: arguments in, one call of the library, its result out.

stdout is the result, as tables or with --json as one object; stderr is progress and errors. Exit codes are the errors'
own (nf_engine.errors): 0 done, 2 usage or configuration, 3 budget, 65 data or model, 70 a bug of ours, 75 interrupted
and resumable, 128 + n by signal n with nothing to resume.
No module that needs torch is imported before a command runs, so help and usage errors come at once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nf_engine
from nf_engine.errors import ConfigError, NFError
from nf_engine.records import format_bytes
from nf_engine.settings import settings

if TYPE_CHECKING:
    from torch import nn

    from nf_engine.data import ImageData
    from nf_engine.engine import TrainResult
    from nf_engine.exits import EvalResult

INTERRUPTED = 75  # the same command goes on

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Trains convolutional networks inside a memory budget by local learning.",
)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of settings")]
Pairs = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="any setting; can be repeated")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
ModelName = Annotated[str | None, typer.Option("--model", help="such as vgg11, vgg16, resnet18")]
Width = Annotated[float, typer.Option(help="factor on the model's channels")]
Input = Annotated[str, typer.Option("--input", help="image shape, CxHxW")]
Classes = Annotated[int, typer.Option(min=2)]
Budget = Annotated[str | None, typer.Option(help="bytes (512MiB), share of the free memory (0.5) or auto")]
Partition = Annotated[str | None, typer.Option(help="windows or layerwise")]
Batch = Annotated[str | None, typer.Option(help="samples a step, or auto")]
Head = Annotated[str | None, typer.Option(help="auto, linear or deep")]
Cache = Annotated[str | None, typer.Option(help="auto, device, ram, disk or recompute")]
Augment = Annotated[str | None, typer.Option(help="none, flip or crop-flip")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda")]
Seed = Annotated[int | None, typer.Option()]
Epochs = Annotated[int | None, typer.Option(help="of every block")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (sys.argv's where None) and returns its exit code."""
    command = typer.main.get_command(app)
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="nf-engine")
    except SystemExit as end:  # usage errors, help, an interrupt (130), and the end of every command
        return end.code if isinstance(end.code, int) else 0
    except NFError as error:
        _complain(f"error: {error}")
        return error.exit_code
    except Exception:
        _complain(traceback.format_exc() + "error: this is a bug of nf_engine; please report it with the lines above")
        return 70
    return 0


def _complain(text: str) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # a progress bar may stand on this line
    print(text, file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        print(f"nf-engine {nf_engine.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def _needed(value: str | None, option: str) -> str:
    if value is None:
        raise ConfigError(f"{option} is missing; see nf-engine COMMAND --help")
    return value


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ConfigError(f"--input must be CxHxW such as 3x32x32, got {text!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


# --- train, plan, profile -------------------------------------------------------------------------------------------


@app.command()
def train(
    ctx: typer.Context,
    model: ModelName = None,
    width: Width = 1.0,
    data: Annotated[
        str | None, typer.Option(help="cifar10:DIR, idx:DIR, npz:FILE, folder:DIR, digits, synthetic:N")
    ] = None,
    val_data: Annotated[str | None, typer.Option(help="chooses the exit; default: a share of --data")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="new folder, or a run's to go on with; default runs/TIME-MODEL")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, must (the folder holds a run) or never")] = "auto",
    allow_inexact_resume: Annotated[
        bool, typer.Option("--allow-inexact-resume", help="go on with other versions or another device")
    ] = False,
    max_time: Annotated[float | None, typer.Option(help="seconds after which the run commits and ends")] = None,
    config: Config = None,
    pairs: Pairs = None,
    memory_budget: Budget = None,
    partition: Partition = None,
    batch_size: Batch = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="at batch 128")] = None,
    head: Head = None,
    cache: Cache = None,
    augment: Augment = None,
    max_drop: Annotated[float | None, typer.Option(help="accuracy that the chosen exit may lose")] = None,
    seed: Seed = None,
    device: Device = None,
    progress: Annotated[str, typer.Option(help="auto, lines or none")] = "auto",
    keep_cache: Annotated[bool, typer.Option(help="leave the activation caches in the run folder")] = False,
    print_config: Annotated[bool, typer.Option(help="print the settings as TOML and stop")] = False,
    as_json: Json = False,
) -> None:
    """Train a network inside a memory budget and choose the smallest exit that is accurate enough."""
    chosen = settings(config, pairs or [], ctx.params)
    if print_config:
        print(chosen.to_toml(), end="")
        return
    name, spec = _needed(model, "--model"), _needed(data, "--data")
    from nf_engine import engine
    from nf_engine.data import fit_to
    from nf_engine.sources import load_split

    training, test = map(_for_network, load_split(spec))
    assert training is not None
    held_out = load_split(val_data)[0] if val_data is not None else None
    if held_out is not None:
        held_out = fit_to(held_out, size=training.shape[-1], channels=training.shape[0])
    network = _network(name, width, training.classes, training.shape, chosen.seed)
    result = engine.train(
        network,
        training,
        held_out,
        config=chosen,
        output_dir=output_dir,
        resume=resume,
        allow_inexact_resume=allow_inexact_resume,
        max_time=max_time,
        progress=progress,
        keep_cache=keep_cache,
    )
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
    tested = _test(result, test)
    print(json.dumps(_train_json(result, tested)) if as_json else _train_text(result, tested))


def _for_network(data: ImageData | None) -> ImageData | None:
    """Small or gray images, enlarged to at least 32x32 and given three channels."""
    from nf_engine.data import fit_to

    if data is None:
        return None
    channels, height, width = data.shape
    return fit_to(data, size=max(32, height, width), channels=3 if channels == 1 else channels)


def _network(name: str, width: float, classes: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    import torch

    from nf_engine.models import build

    torch.manual_seed(seed)
    return build(name, classes=classes, width=width, input_size=shape[-1], channels=shape[0])


def _test(result: TrainResult, test: ImageData | None) -> EvalResult | None:
    """The one look at the test data, after the exit was chosen."""
    from nf_engine.exits import evaluate

    return None if test is None else evaluate(result.model, test, policy=f"fixed:{result.best_exit}")


def _train_json(result: TrainResult, tested: EvalResult | None) -> dict[str, Any]:
    return {
        "plan": dataclasses.asdict(result.plan),
        "exits": [dataclasses.asdict(e) for e in result.exits],
        "best_exit": result.best_exit,
        "memory": [dataclasses.asdict(m) for m in result.memory],
        "test_accuracy": None if tested is None else tested.accuracy,
        "timings": result.timings,
        "run_dir": str(result.run_dir),
    }


def _train_text(result: TrainResult, tested: EvalResult | None) -> str:
    budget = result.plan.budget
    rows = [result.table()]
    if result.memory:  # of the blocks that this process has trained
        rows += ["", f"{'block':<7}{'predicted':>12}{'peak':>12}{'of budget':>11}{'reserved':>12}"]
    for m in result.memory:
        reserved = format_bytes(m.reserved) if m.reserved else "-"
        rows.append(
            f"{m.block:<7}{format_bytes(m.predicted):>12}{format_bytes(m.allocated):>12}"
            f"{m.allocated / budget:>11.1%}{reserved:>12}"
        )
    rows.append(f"budget {format_bytes(budget)} ({budget} bytes)")
    if tested is not None:
        rows.append(f"test accuracy of exit {result.best_exit}: {tested.accuracy:.2%} of {tested.samples} images")
    rows += [f"run folder {result.run_dir}", f"next: nf-engine export {result.run_dir}"]
    return "\n".join(rows)


@app.command()
def plan(
    ctx: typer.Context,
    model: ModelName = None,
    width: Width = 1.0,
    image: Input = "3x32x32",
    classes: Classes = 10,
    samples: Annotated[int, typer.Option(min=1, help="images of the training data")] = 50_000,
    device_memory: Annotated[str | None, typer.Option(help="of the device planned for, such as 8GiB")] = None,
    config: Config = None,
    pairs: Pairs = None,
    memory_budget: Budget = None,
    partition: Partition = None,
    batch_size: Batch = None,
    epochs: Epochs = None,
    head: Head = None,
    cache: Cache = None,
    augment: Augment = None,
    as_json: Json = False,
) -> None:
    """Show blocks, batch sizes and peaks under a budget, without a device and without training."""
    chosen = settings(config, pairs or [], ctx.params)
    name, shape = _needed(model, "--model"), _shape(image)
    from nf_engine import engine

    network = _network(name, width, classes, shape, chosen.seed)
    made = engine.plan(network, shape, config=chosen, device_memory=device_memory, samples=samples, classes=classes)
    print(made.to_json() if as_json else made.table())


@app.command()
def profile(
    ctx: typer.Context,
    model: ModelName = None,
    width: Width = 1.0,
    image: Input = "3x32x32",
    classes: Classes = 10,
    batch_sizes: Annotated[str, typer.Option(help="three or more sizes")] = "8,32,128",
    no_time: Annotated[bool, typer.Option("--no-time", help="count bytes only, run nothing on the device")] = False,
    config: Config = None,
    pairs: Pairs = None,
    head: Head = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show bytes and seconds of each stage as a function of the batch size."""
    chosen = settings(config, pairs or [], ctx.params)
    name, shape = _needed(model, "--model"), _shape(image)
    sizes = batch_sizes.split(",")
    if not all(s.strip().isdecimal() for s in sizes):
        raise ConfigError(f"--batch-sizes must be numbers such as 8,32,128, got {batch_sizes!r}")
    from nf_engine import engine

    network = _network(name, width, classes, shape, chosen.seed)
    found = engine.profile(
        network, shape, batch_sizes=[int(s) for s in sizes], config=chosen, classes=classes, measure_time=not no_time
    )
    print(found.to_json() if as_json else found.table())


# --- export, classify, doctor ---------------------------------------------------------------------------------------


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    exit: Annotated[str, typer.Option(help="best, or its number")] = "best",
    format: Annotated[str, typer.Option(help="safetensors (a folder) or pt2 (torch.export)")] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="default RUN.model or RUN.pt2")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare the copy with the model")] = False,
    as_json: Json = False,
) -> None:
    """Write the model that ends at an exit, and compare the copy with the original."""
    if format not in ("safetensors", "pt2"):
        raise ConfigError(f"--format must be safetensors or pt2, got {format!r}")
    number = _exit_number(exit)
    from nf_engine import export as exporter
    from nf_engine.predictions import difference

    model = exporter.load(run, exit=number)
    whole = run.resolve()
    target = out or whole.with_name(whole.name + (".pt2" if format == "pt2" else ".model"))
    if format == "pt2":
        written = exporter.export_pt2(model, target, verify=not no_verify)
    else:
        written = exporter.save_pretrained(model, target)
    facts = {
        "path": str(written),
        "format": format,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(f.stat().st_size for f in (written.iterdir() if written.is_dir() else [written])),
        "max_difference": None if no_verify else difference(model, written),
    }
    print(json.dumps(facts) if as_json else _export_text(facts))


def _exit_number(text: str) -> Any:
    if text == "best":
        return text
    if not text.removeprefix("-").isdecimal():
        raise ConfigError(f"--exit must be best or a number, got {text!r}")
    return int(text)


def _export_text(facts: dict[str, Any]) -> str:
    check = (
        "not asked for"
        if facts["max_difference"] is None
        else f"logits differ by {facts['max_difference']:.2g} at most"
    )
    return f"{facts['path']}: {facts['parameters']:,} parameters, {format_bytes(facts['bytes'])}; check: {check}"


@app.command()
def classify(
    model: Annotated[Path, typer.Argument(help="exported model or run folder")],
    images: Annotated[list[Path] | None, typer.Argument(help="image files")] = None,
    data: Annotated[str | None, typer.Option(help="data as for train; its test split is classified")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first images only")] = None,
    policy: Annotated[str, typer.Option(help="best, fixed:EXIT or confidence:T")] = "best",
    as_json: Json = False,
) -> None:
    """Classify image files or a test split."""
    if bool(images) == (data is not None):
        raise ConfigError("give image files or --data, one of the two")
    from nf_engine.export import load
    from nf_engine.predictions import classify_files, classify_split

    loaded = load(model, exit="best" if policy == "best" else "all")
    policy = "fixed:-1" if policy == "best" else policy
    if images:
        found = classify_files(loaded, images[:limit], policy)
    else:
        found = classify_split(loaded, str(data), limit, policy)
    print(json.dumps(found) if as_json else _classify_text(found))


def _classify_text(found: dict[str, Any]) -> str:
    rows = []
    for p in found["predictions"]:
        label = f", label {p['label']}" if "label" in p else ""
        rows.append(
            f"{p['image']}: class {p['prediction']}{label}, probability {p['probability']:.3f}, exit {p['exit']}"
        )
    if "accuracy" in found:
        shares = ", ".join(f"{share:.1%}" for share in found["coverage"])
        rows.append(
            f"accuracy {found['accuracy']:.2%} of {found['samples']} {found['split']} images, "
            f"{found['images_per_second']:,.0f} images/s; answered at each exit: {shares}"
        )
    return "\n".join(rows)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="whose disk is measured with 64 MiB")] = Path(),
    recover: Annotated[Path | None, typer.Option(help="run folder with a damaged file: go one commit back")] = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices, kernels, extras and the speed of the disk; or mend a run folder."""
    from nf_engine import doctor as examination

    if recover is not None:
        print(examination.recover(recover))
        return
    found = examination.report(folder)
    print(json.dumps(found) if as_json else examination.text(found))

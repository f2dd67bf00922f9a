"""Engine: the stages of the job in order.

model, data -> split -> profile -> partition -> train block after block -> score the exits -> choose
Source: NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nf_engine
from nf_engine.assembly import assemble, exit_scores, model_facts
from nf_engine.checkpoint import fill, parse, state_of, to_bytes
from nf_engine.config import TrainConfig, parse_bytes
from nf_engine.controller import Controller
from nf_engine.data import ImageData
from nf_engine.device import budget_bytes, capped, deterministic, pick
from nf_engine.errors import BudgetError, ConfigError, CorruptFileError, NFError, ResumeMismatchError
from nf_engine.exits import EarlyExitModel, exits_table, select_exit
from nf_engine.given import (
    check_classes,
    check_device,
    check_made_for,
    given_plan,
    name_of,
    named_model,
    sample_shape,
    settle,
    split_data,
    uint8,
)
from nf_engine.interrupt import Interrupt, Stopped
from nf_engine.job import BlockMemory, Job, Observer, initial_parts
from nf_engine.manifest import MANIFEST, digest_of
from nf_engine.partitioner import partition
from nf_engine.planner import Planner
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import BATCHES
from nf_engine.progress import make_observer
from nf_engine.records import ExitScore, ExitTable, Plan, Profile, format_bytes
from nf_engine.recovery import asked_bytes, device_lost, is_out_of_memory
from nf_engine.resume import check_plan, check_resume, config_sha256, environment
from nf_engine.run_folder import NewFile, RunFolder, default_path
from nf_engine.stages import Cut, split
from nf_engine.unit_heads import make_head
from nf_engine.worker import Score


@dataclass(frozen=True)
class TrainResult:
    """What a training gives.

    Attributes:
        model: all exits, on the CPU, in eval mode.
        plan: what was done. exits: held-out score of each. best_exit: the one chosen.
        status: "completed"; or "interrupted", by a signal or max_time: then there are no exits, best_exit is -1, and
            the same call goes on.
        memory: predicted and measured bytes of each block that this call trained.
        history: one entry for each block and epoch. timings: seconds of plan, train, commit, score and cache_write.
        run_dir: the run folder.
    """

    model: EarlyExitModel
    plan: Plan
    exits: list[ExitScore]
    best_exit: int
    status: str
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
    resume: str = "auto",
    allow_inexact_resume: bool = False,
    max_time: float | None = None,
    progress: str = "auto",
    keep_cache: bool = False,
    **fields: Any,
) -> TrainResult:
    """Trains a CNN inside a memory budget, block after block, each unit by its own local loss.

    A run that was killed goes on where it was committed last, by the same call: its result is bit for bit that of a run
    that was not (on a GPU with deterministic=True). SIGINT, SIGTERM and SIGHUP commit and end the run; a second one
    ends the process.

    Args:
        model: any CNN that torch.fx can trace, trained in place; or a name such as "resnet18".
        train_data: (x, y) arrays or tensors, a Dataset, a DataLoader, ImageData, or text such as "cifar10:DIR".
        val_data: as train_data, the exits are scored and chosen on it; None: val_fraction of train_data is held out.
        config: a TrainConfig, or the path of its TOML file. fields: single fields of it, which win.
        plan: made earlier, or the path of its JSON file; nothing is profiled then. Of a run to go on with: None, or its
            own.
        output_dir: a new or empty folder, or that of a run to go on with; runs/<time>-<model> where None.
        resume: "auto"; "must": the folder has to hold a run; "never": it must not.
        allow_inexact_resume: go on with other versions or another device; the result differs in its last bits.
        max_time: seconds after which the run commits and ends.
        progress: "auto" (a display on a terminal, else lines), "lines" or "none".
        keep_cache: leave the activation caches on disk.

    Returns:
        TrainResult.

    Raises:
        ConfigError, DataError, UnsupportedModelError, NoDeviceError: an argument is refused, before any work.
        InfeasibleBudgetError: no plan fits the budget; names the stage, its need and the budget.
        ResumeMismatchError: the folder's run has other settings, images, network, plan or software; shows what.
        RunLockedError, PermissionRefusedError, CorruptFileError: the folder cannot be used.
        BudgetExceededError, NonFiniteError, DiskFullError, StorageError, DeviceLostError: while training.
    """
    settings = settle(config, fields)
    observer = make_observer(progress)
    data, held_out = split_data(train_data, val_data, settings)
    network = named_model(model, data.shape, data.classes, settings.seed)
    network_name = name_of(network)
    device = pick(settings.device)
    check_device(settings, device)
    started = time.perf_counter()
    cut = split(network, data.shape, split_points=settings.split_points)
    check_classes(cut, data)
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f"resume must be auto, must or never, got {resume!r}")
    train_images = Preprocess(data.normalisation, settings.augment, settings.seed, compute_dtype(settings))
    plain = Preprocess(data.normalisation, dtype=compute_dtype(settings))
    place = Path(output_dir or default_path(network_name))
    if resume == "must" and not (place / MANIFEST).is_file():
        raise ConfigError(f"resume is must, but {place} holds no run; name its folder, or resume='auto'")
    with RunFolder(place) as folder, deterministic(device, settings.deterministic):
        _log_start(folder, network_name, data, held_out)
        if folder.manifest is not None and resume == "never":
            raise ConfigError(f"resume is never, but {place} holds a run; name a new folder, or resume='auto'")
        digest = digest_of(f"{data.digest()} {held_out.digest()}".encode())
        env = environment(device, nf_engine.__version__)
        if folder.manifest is None:
            new = [NewFile("config", settings.to_toml().encode())]
            if plan is None:
                made, profiled = _planned(cut, settings, train_images, data, device, network_name, place)
                new.append(NewFile("profile", profiled.to_json().encode()))
            else:
                made = given_plan(plan, cut, settings, len(data), device)
            heads = [make_head(cut, u.head, u.last, settings) for u in made.units]
            initial = to_bytes(state_of(initial_parts(cut, heads)), {"format": "nf-initial/1"})
            new += [NewFile("plan", made.to_json().encode()), NewFile("initial", initial)]
            folder.begin(config_sha256(settings, cut), digest, env, new)
            _log_tiers(folder, made)
            observer.planned(made)
        else:
            inexact = check_resume(folder, settings, cut, digest, env, allow_inexact=allow_inexact_resume)
            made, heads = _resumed(folder, cut, settings)
            if plan is not None:
                check_plan(folder, made, given_plan(plan, cut, settings, len(data), device))
            _tell_resumed(folder, observer, made, inexact)
        job = Job(
            cut=cut,
            heads=heads,
            plan=made,
            config=settings,
            data=data,
            held_out=held_out,
            train_images=train_images,
            plain=plain,
            folder=folder,
            device=device,
            observer=observer,
            interrupt=Interrupt(max_time),
            keep_cache=keep_cache,
            history=folder.metrics(),
        )
        job.seconds["plan"] = time.perf_counter() - started
        with job.interrupt:  # until the last commit is made
            return _finish(job, network, network_name, started)


def _planned(
    cut: Cut,
    settings: TrainConfig,
    train_images: Preprocess,
    data: ImageData,
    device: torch.device,
    network_name: str,
    place: Path,
) -> tuple[Plan, Profile]:
    budget = budget_bytes(settings, device)
    planner = Planner(
        cut,
        settings,
        train_images,
        uint8(data),
        device,
        len(data),
        network_name,
        place,
        budget=budget,
        in_memory=data.in_memory,
    )
    try:
        return planner.plan(budget), planner.profile
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        asked = asked_bytes(error)
    # Here the exception is gone, and with its frames what the failed step held on to.
    wanted = "an unknown number of bytes" if asked is None else f"{asked} bytes"
    raise BudgetError(
        f"the device ran out of memory while stages were timed: asked for {wanted}, the budget is "
        f"{format_bytes(budget)} ({budget} bytes); nothing was trained: lower max_batch_size, or free the device",
        stage="profile",
        need=budget + (asked or 1),
        budget=budget,
    )


def _tell_resumed(folder: RunFolder, observer: Observer, made: Plan, inexact: Sequence[str]) -> None:
    now = folder.manifest_now
    folder.log("resumed", generation=now.generation, inexact=inexact)
    if now.done:
        observer.note(f"the run in {folder.path} is done")
        return
    observer.planned(made)
    observer.note(f"goes on in {folder.path}" + (", not bitwise: " + "; ".join(inexact) if inexact else ""))


def _finish(job: Job, network: nn.Module, network_name: str, started: float) -> TrainResult:
    """Runs a job to its end, or to where it is interrupted."""
    folder, settings = job.folder, job.config
    controller = Controller(job)
    status = "completed"
    try:
        with device_lost(), capped(job.device, job.plan.budget) as cap:
            if cap is not None:
                folder.log("cap", **cap._asdict())
                job.observer.note(
                    f"{cap.beside} bytes of the device are outside the budget: CUDA context, other programs"
                )
            controller.run()
    except Stopped as stop:
        status = "interrupted"
        position = folder.manifest_now.position
        job.observer.note(
            f"{stop}: committed at block {position.block + 1}, epoch {position.epoch}, step {position.step}; "
            f"the same command goes on in {folder.path}"
        )
    except NFError as error:
        folder.log("end", status="failed", error=str(error), exit_code=error.exit_code)
        raise
    finally:
        job.observer.close()
    made = job.plan  # batches may have shrunk
    facts = model_facts(network, network_name, job.cut, made, settings, job.data.normalisation, uint8(job.data))
    whole = assemble(job.cut, job.heads, made.units, job.data.normalisation, facts)
    exits: list[ExitScore] = []
    best = -1
    if status == "completed":
        exits, best = _exits(job, whole, facts, controller.scores)
    folder.log("end", status=status, seconds=time.perf_counter() - started, **job.seconds)
    job.observer.note(f"run folder {folder.path}")
    return TrainResult(whole, made, exits, best, status, controller.memory, job.history, job.seconds, folder.path)


def _exits(
    job: Job, whole: EarlyExitModel, facts: dict[str, Any], scores: Sequence[Score]
) -> tuple[list[ExitScore], int]:
    """Scores the exits, chooses one, and makes the last commit; of a run that is done, reads what it chose."""
    now = job.folder.manifest_now
    if now.done:
        (entry,) = now.of_role("exits")
        found = ExitTable.from_json(job.folder.read(entry).decode()).exits
        return list(found), select_exit(found, max_drop=job.config.max_drop)
    exits = exit_scores(whole, job.cut, job.plan, scores)
    best = select_exit(exits, max_drop=job.config.max_drop)
    new = [
        NewFile("exits", ExitTable(best, tuple(exits)).to_json().encode()),
        NewFile("model", (json.dumps({**facts, "chosen": best}, indent=1) + "\n").encode()),
    ]
    drop = ("initial", "train") if job.keep_cache else ("initial", "train", "cache")
    job.folder.commit(now.position, new, drop=drop, done=True)
    return exits, best


def _resumed(folder: RunFolder, cut: Cut, settings: TrainConfig) -> tuple[Plan, list[nn.Module]]:
    """The plan of a run, and its heads; the network gets the weights that the run began with."""
    now = folder.manifest_now
    (entry,) = now.of_role("plan")
    made = Plan.from_json(folder.read(entry).decode())
    heads = [make_head(cut, u.head, u.last, settings) for u in made.units]
    for entry in now.of_role("initial"):  # a run that is done has none
        state = parse(folder.read(entry), entry.name)
        try:
            fill(initial_parts(cut, heads), state, entry.name)
        except CorruptFileError as error:  # the bytes are those that were written: it is the network that differs
            raise ResumeMismatchError(
                f"{folder.path} holds a run of another network: {str(error).partition('; restore')[0]}; "
                "give the network that it began with, or name another output_dir"
            ) from None
    return made, heads


def _log_start(folder: RunFolder, network_name: str, data: ImageData, held_out: ImageData) -> None:
    for name in folder.strangers:
        folder.log("stranger", name=name)
    torch_version = str(torch.__version__)
    folder.log("start", model=network_name, samples=len(data), held_out=len(held_out), torch=torch_version)


def _log_tiers(folder: RunFolder, made: Plan) -> None:
    for number, block in enumerate(made.blocks[1:], 1):
        c = block.cache
        folder.log("tier", number=number, tier=c.tier, seconds=c.seconds, dropped=c.dropped, reason=c.reason)


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
        check_made_for(profile, settings, ("optimizer", "augment", "precision"))
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
    shape = sample_shape(sample)
    network = named_model(model, shape, classes)
    cut = split(network, shape, split_points=settings.split_points)
    identity = Normalisation((0.0,) * shape[0], (1.0,) * shape[0])
    preprocess = Preprocess(identity, settings.augment, settings.seed, compute_dtype(settings))
    return Planner(
        cut, settings, preprocess, True, device, samples, name_of(network), None, batch_sizes, together=together
    )


__all__ = ["TrainResult", "plan", "profile", "train"]

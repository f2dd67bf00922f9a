"""Resume: whether a run may go on in a folder, decided before anything is trained.

What decides the result must be what the run began with: settings, images, network. Software and hardware decide the
last bits: where they differ, the run goes on only if asked to, and is not bitwise the uninterrupted one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import fx

from nf_engine.config import TrainConfig
from nf_engine.errors import ResumeMismatchError
from nf_engine.manifest import digest_of
from nf_engine.records import Plan
from nf_engine.run_folder import RunFolder
from nf_engine.stages import Cut

__all__ = ["check_plan", "check_resume", "config_sha256", "environment"]

# Settings that change no number: they may be others when a run goes on.
NEUTRAL = ("checkpoint_minutes", "durable_cache", "io_timeout", "max_drop", "pinned_bytes")


def config_sha256(config: TrainConfig, cut: Cut) -> str:
    """Of the settings that decide the result, and of what the network computes, its weights left out."""
    settings = config.with_fields({name: getattr(TrainConfig(), name) for name in NEUTRAL}).to_toml()
    modules = [m for s in cut.stages for m in (s.module, *s.module.modules())]
    code = [m.code if isinstance(m, fx.GraphModule) else repr(m) for m in modules]
    whole = "\n".join((settings, *(s.name for s in cut.stages), *code))
    return digest_of(re.sub(r" at 0x[0-9a-f]+", "", whole).encode())


def environment(device: torch.device, version: str) -> dict[str, str]:
    """What the last bits of a result depend on. version: of nf_engine."""
    found = {"nf_engine": version, "torch": str(torch.__version__), "device": device.type}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return found | {"cuda": str(torch.version.cuda), "capability": f"{major}.{minor}"}
    return found | {"threads": str(torch.get_num_threads())}


def check_resume(
    folder: RunFolder, config: TrainConfig, cut: Cut, data_sha256: str, env: Mapping[str, str], *, allow_inexact: bool
) -> list[str]:
    """Holds a run folder against what was asked for now; returns what differs in software and hardware.

    Raises:
        ResumeMismatchError: another result was asked for; or, without allow_inexact, other software or hardware, where
            anything is left to compute.
    """
    now = folder.manifest_now
    if now.config_sha256 != config_sha256(config, cut):
        (entry,) = now.of_role("config")
        was = TrainConfig.from_toml(folder.read(entry).decode(), f"{folder.path / entry.name}")
        differences = [
            f"{f.name} was {getattr(was, f.name)!r}, is {getattr(config, f.name)!r}"
            for f in fields(TrainConfig)
            if f.name not in NEUTRAL and getattr(was, f.name) != getattr(config, f.name)
        ]
        if not differences:
            raise ResumeMismatchError(
                f"{folder.path} holds a run of another network: its modules or their settings differ; give the network "
                "that it began with, or name another output_dir"
            )
        raise ResumeMismatchError(
            f"{folder.path} holds a run with other settings: {'; '.join(differences)}; "
            f"go on with --config {folder.path / entry.name}, or name another output_dir"
        )
    if now.data_sha256 != data_sha256:
        raise ResumeMismatchError(
            f"{folder.path} holds a run on other images: sha256 {now.data_sha256[:16]}..., these have "
            f"{data_sha256[:16]}...; give the images that it began with, or name another output_dir"
        )
    differences = [
        f"{name} was {now.env.get(name, 'unknown')}, is {env.get(name, 'unknown')}"
        for name in sorted(now.env.keys() | env.keys())
        if now.env.get(name) != env.get(name)
    ]
    if differences and not allow_inexact and not now.done:
        raise ResumeMismatchError(
            f"{folder.path} was begun elsewhere: {'; '.join(differences)}; the result would differ in its last bits: "
            "go on with --allow-inexact-resume, or where it was begun"
        )
    return differences


def check_plan(folder: RunFolder, made: Plan, given: Plan) -> None:
    """Holds the plan of a run, `made`, against one that was given again.

    Raises:
        ResumeMismatchError: they are not the same.
    """
    (entry,) = folder.manifest_now.of_role("plan")
    shrunk = entry.name != "plan.json"  # batches and images on the device, where memory ran out
    if shrunk:
        given = replace(given, resident_images=made.resident_images)
    differences = [*_differences("the plan", made, given)]
    for number, (was, now) in enumerate(zip(made.blocks, given.blocks, strict=False)):
        if shrunk:
            now = replace(now, batch=was.batch, lr=was.lr)
        differences += _differences(f"block {number}", was, now)
    if differences:
        raise ResumeMismatchError(
            f"{folder.path} holds a run with another plan: {'; '.join(differences)}; leave plan out to go on with the "
            "run's own, or name another output_dir"
        )


def _differences(of: str, was: Any, now: Any) -> Iterator[str]:
    """Fields of two records that differ; of blocks, their number."""
    for field in fields(was):
        pair = getattr(was, field.name), getattr(now, field.name)
        if field.name == "blocks":
            pair = len(pair[0]), len(pair[1])
        if pair[0] != pair[1]:
            yield f"{field.name} of {of} was {pair[0]}, is {pair[1]}"

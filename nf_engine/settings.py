"""Settings: the configuration of a command, from its flags, --set, the environment and a file.

An earlier one of these wins over a later one, and any over the defaults. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nf_engine.config import TrainConfig
from nf_engine.errors import ConfigError

FIELDS = {f.name for f in dataclasses.fields(TrainConfig)}
# Variables that are read elsewhere: whole names, and starts of names.
NOT_CONFIG = {"NF_TESTING", "NF_LIBCUDA", "NF_GRAPHS", "NF_KERNELS", "NF_COMMIT"}
NOT_CONFIG_STARTS = ("NF_DATA_", "NF_FAULT", "NF_DEBUG_")
BYTES = {"memory_budget", "max_cache_bytes", "pinned_bytes"}


def settings(config: Path | None, pairs: Sequence[str], flags: dict[str, Any]) -> TrainConfig:
    """The configuration of a command: flags before --set before NF_<NAME> before the file before the defaults.

    Args:
        config: TOML file.
        pairs: NAME=VALUE texts; values are TOML, bare words are text.
        flags: parameters of the command; those that are settings and not None count.

    Raises:
        ConfigError: a name is unknown (the closest one is named) or a value is refused.
    """
    base = TrainConfig() if config is None else TrainConfig.load(config)
    chosen = {name: value for name, value in flags.items() if name in FIELDS and value is not None}
    for name in ("memory_budget", "batch_size"):  # numbers or text
        if name in chosen:
            chosen[name] = _value(name, chosen[name])
    return base.with_fields(_from_environment() | dict(map(_pair, pairs)) | chosen)


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set expects NAME=VALUE, got {text!r}")
    name = name.strip().replace("-", "_")
    return name, _value(name, value.strip())


def _value(name: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"] if len(parsed) == 1 else text
    if name in BYTES and isinstance(value, float) and not 0 < value <= 1:
        return text  # 700e6 are bytes; as a float it would be a share, and refused
    return value


def _from_environment() -> dict[str, Any]:
    found = {
        variable: text
        for variable, text in os.environ.items()
        if variable.startswith("NF_") and variable not in NOT_CONFIG and not variable.startswith(NOT_CONFIG_STARTS)
    }
    values = {_setting(variable): _value(_setting(variable), text) for variable, text in found.items()}
    try:
        TrainConfig().with_fields(values)
    except ConfigError as error:
        given = ", ".join(f"{variable}={text}" for variable, text in found.items())
        raise ConfigError(f"environment {given}: {error}") from None
    return values


def _setting(variable: str) -> str:
    return variable.removeprefix("NF_").lower()

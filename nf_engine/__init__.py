"""nf_engine: trains convolutional networks inside a memory budget by local learning.

    import nf_engine
    result = nf_engine.train("resnet18", "cifar10:DIR", memory_budget="256MiB")

The names below are loaded at their first use, so that importing the package, or asking the command line for help, does
not import torch. `nf_engine.plan` and `nf_engine.profile` are functions; the records live in `nf_engine.records`.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nf_engine import errors
    from nf_engine.config import TrainConfig
    from nf_engine.engine import TrainResult, plan, profile, train
    from nf_engine.errors import NFError
    from nf_engine.exits import EarlyExitModel, evaluate
    from nf_engine.export import load
    from nf_engine.records import Plan, Profile

    __version__: str

_HOMES = {
    "EarlyExitModel": "exits",
    "NFError": "errors",
    "Plan": "records",
    "Profile": "records",
    "TrainConfig": "config",
    "TrainResult": "engine",
    "evaluate": "exits",
    "load": "export",
    "plan": "engine",
    "profile": "engine",
    "train": "engine",
}

__all__ = [
    "EarlyExitModel",
    "NFError",
    "Plan",
    "Profile",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "errors",
    "evaluate",
    "load",
    "plan",
    "profile",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name == "errors":
        value = importlib.import_module("nf_engine.errors")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"nf_engine.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'nf_engine' has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("nf-engine")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0.1.0"

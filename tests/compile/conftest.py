"""Run alone, `pytest tests/compile`: in a run over more than this folder nothing is collected here (see harness.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def runs_alone(config: pytest.Config) -> bool:
    paths = [Path(config.invocation_params.dir, arg.split("::")[0]).resolve() for arg in config.args]
    return all(path.is_relative_to(HERE) for path in paths)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if runs_alone(config) else True


def pytest_configure(config: pytest.Config) -> None:
    if not runs_alone(config) or importlib.util.find_spec("triton") is None:
        return
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    spec = importlib.util.spec_from_file_location("harness", HERE / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module  # `from harness import ...` in the tests beside this file
    spec.loader.exec_module(module)

"""Interpreter: the kernels of nf_engine run in numpy, on any machine, and are compared with float64 PyTorch.

Run alone, `pytest tests/interp`: Triton reads TRITON_INTERPRET when it is imported, and a process in which kernels are
interpreted can launch none. In a run over more than this folder nothing is collected here.

Triton 3.6 keeps bfloat16 as 16-bit integers. Its dot multiplies those integers, and its casts cut digits off instead of
rounding them, so both are replaced below; test_interpreter.py compares them with torch's. What stays unseen here:
arithmetic done in bfloat16 (cast to float32 after a load), tf32, shared memory, races: tests/compile and a GPU do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


def runs_alone(config: pytest.Config) -> bool:
    paths = [Path(config.invocation_params.dir, arg.split("::")[0]).resolve() for arg in config.args]
    return all(path.is_relative_to(HERE) for path in paths)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if runs_alone(config) else True


def pytest_configure(config: pytest.Config) -> None:
    if not runs_alone(config) or importlib.util.find_spec("triton") is None:
        return
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET could be set; run `pytest tests/interp`")
    os.environ["TRITON_INTERPRET"] = "1"
    # Bounds of a range() are arrays of one element to the interpreter; numpy 2.4 refuses them, hence its pin.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    make_bfloat16_exact()
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN: an output left unwritten shows


def make_bfloat16_exact() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, dtype):
        if source.dtype.scalar == tl.bfloat16 and dtype.scalar == tl.float32:
            return widened(source)
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return plain_cast(self, source, dtype)
        values = np.ascontiguousarray(source.data, dtype=np.float32)
        bits = values.view(np.uint32)
        to_even = (
            bits >> 16
        ) & 1  # a tie goes to the even neighbour: add half a unit less one, and the last digit kept
        rounded = ((bits.astype(np.uint64) + 0x7FFF + to_even) >> 16).astype(np.uint16)
        return handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


@pytest.fixture(autouse=True)
def quiet_numpy() -> Iterator[None]:
    """NaN and inf are inputs of some tests: a GPU does not warn of them, numpy would."""
    with np.errstate(all="ignore"):
        yield

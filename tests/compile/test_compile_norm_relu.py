"""norm_relu's kernels, compiled for GPUs that need not be here, with the arguments of real launches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
from harness import Config, check_configs

from nf_engine.kernels import norm_relu

GOLDEN = Path(__file__).with_name("golden_norm_relu.json")
KERNELS = ("_partial_moments", "_normalise", "_partial_gradients", "_input_gradient")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
STAGES = 3  # Triton's default
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class Recorder:
    """Stands in for a kernel: keeps what it is launched with, as Triton would specialise it, and launches nothing."""

    def __init__(self, fn: Any, launches: dict[str, Config]) -> None:
        self.fn, self.launches, self.label = fn, launches, ""

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self.launch

    def launch(self, *args: Any, num_warps: int, **constants: Any) -> None:
        signature, aligned = {}, []
        plain = {name for name in self.fn.arg_names if name in (self.fn.do_not_specialize or ())}
        for name, value in zip(self.fn.arg_names, args, strict=False):
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            elif value == 1 and name not in plain:
                constants[name] = 1
                continue
            else:
                assert abs(value) < 2**31
                signature[name] = "i32"
            if name not in plain and (isinstance(value, Tensor) or value % 16 == 0):
                aligned.append(name)
        assert {*signature, *constants} == set(self.fn.arg_names)
        block = constants["BLOCK_P"]
        name = f"{self.fn.__name__[1:]} {self.label} {block}{' pool' if constants.get('POOL') else ''}"
        config = Config(name, self.fn, signature, constants, 0, num_warps, STAGES, aligned)
        assert self.launches.setdefault(name, config) == config, f"two launches are named {name}"


@pytest.fixture
def launches(monkeypatch) -> dict[str, Config]:
    """Every kernel with every tile, in bfloat16; a tile is chosen by H W and, in channels_last, by pool."""
    found: dict[str, Config] = {}
    recorders = [Recorder(getattr(norm_relu, name), found) for name in KERNELS]
    for name, recorder in zip(KERNELS, recorders, strict=True):
        monkeypatch.setattr(norm_relu, name, recorder)
    for s, label, pool in maps():
        for recorder in recorders:
            recorder.label = label
        gamma, beta, running_mean, running_var = torch.empty(4, s.shape[1], device="meta")
        y, mean, rstd = norm_relu.norm_relu_forward(
            s, gamma, beta, running_mean, running_var, momentum=0.1, eps=1e-5, pool=pool
        )
        norm_relu.norm_relu_backward_(s, y, gamma, beta, mean, rstd, pool=pool)
    return found


def maps() -> Iterator[tuple[Tensor, str, bool]]:
    for size in (4, 16):
        for label, layout in LAYOUTS.items():
            s = torch.empty(4096, 64, size, size, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
            yield from ((s, label, pool) for pool in (False, True))


def test_no_configuration_spills_or_adds_atomically(launches):
    tiles = {config.constants["BLOCK_P"] for config in launches.values()}
    assert tiles == {block for _, block in norm_relu.BLOCK_P}
    named = [(arch, name, config) for arch in (80, 90) for name, config in launches.items()]
    configs = [config._replace(name=f"{name} sm_{arch}", arch=arch) for arch, name, config in named]
    assert not (problems := check_configs(configs, GOLDEN)), "\n".join(problems)

"""The pooling, linear and cross-entropy kernels as they are launched, compiled for sm_80 and sm_90 without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
from harness import Config, check_configs

from nf_engine.kernels import linear_ce, pool, tiles

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# N, C, H = W, q: a large map and a small one, windows that overlap, global pooling.
MAPS = [(4096, 64, 32, 4), (256, 512, 4, 4), (256, 256, 14, 4), (64, 512, 7, 1)]


def pool_configs():
    for n, c, size, q in MAPS:
        for layout, order in LAYOUTS.items():
            x = torch.empty(n, c, size, size, device="meta", dtype=torch.bfloat16).to(memory_format=order)
            for backward in (False, True)[: 1 + (q > 1)]:
                for dtype in (torch.bfloat16, torch.float32)[: 1 + (size == 32)]:
                    yield pool_config(x.to(dtype), q, backward, layout)


def pool_config(x, q, backward, layout):
    tile = tiles.POOL[pool.orientation(x)][0]
    launch = pool.plan_launch(x, q, tile, backward=backward)
    pointers = launch.kernel.arg_names[:2]
    types = dict(zip(pointers, ("fp32", TYPES[x.dtype])[:: 1 if backward else -1], strict=True))
    signature = {name: f"*{types[name]}" if name in types else "i32" for name in launch.kernel.arg_names}
    values = dict(
        zip(launch.kernel.arg_names[2:], (launch.items, *x.shape[1:], *launch.windows, *x.stride()), strict=False)
    )
    ones = {name: 1 for name, value in values.items() if value == 1}
    aligned = [*pointers, *(name for name, value in values.items() if value % 16 == 0)]
    name = f"{launch.kernel.fn.__name__} {TYPES[x.dtype]} {'x'.join(map(str, x.shape))} {layout} q{q}"
    return name, launch.kernel, signature, launch.constants | ones, tile, aligned


def linear_configs():
    kernel = linear_ce._linear_cross_entropy
    pointers = kernel.arg_names[:8]
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(pointers, "*fp32") | {"labels": "*i64"}
    for classes, (tile, *_) in tiles.LINEAR.items():
        for rows in (64, 4096)[: 1 + (classes <= 32)]:
            constants = linear_ce.linear_constants(rows, classes, tile, 0.1, torch.float32)
            yield f"{kernel.fn.__name__} {rows}x{classes}", kernel, signature, constants, tile, [*pointers, "D"]


def row_configs():
    kernel = linear_ce._cross_entropy
    pointers = kernel.arg_names[:5]
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(pointers, "*fp32") | {"labels": "*i64"}
    for classes in (100, 1000):  # whole rows, one block of a row
        constants = linear_ce.row_constants(classes, tiles.ROWS[0], 0.1, torch.float32)
        yield f"{kernel.fn.__name__} {classes}", kernel, signature, constants, tiles.ROWS[0], pointers


def test_what_is_shipped_compiles_without_spills_and_fits():
    rows = [*pool_configs(), *linear_configs(), *row_configs()]
    configs = [
        Config(f"sm_{arch} {name}", kernel, signature, constants, arch, tile.num_warps, tile.num_stages, aligned)
        for name, kernel, signature, constants, tile, aligned in rows
        for arch in (80, 90)
    ]
    assert check_configs(configs, Path(__file__).with_name("golden.json")) == []

"""Tiles: how much of a tensor one program takes, for each kernel; all of it known before a launch, so that graphs hold.

The tables below are a choice by registers, shared memory and the number of programs, as compiled for sm_80 and sm_90
(tests/compile), and serve both. With NF_AUTOTUNE=1 the other rows of a table are timed too, once for each key, and the
fastest is taken: that waits for the GPU and may change the last bits of a sum, so it is off unless asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """size: of the tile, in the unit of its table; warps and pipeline stages as Triton counts them."""

    size: int
    num_warps: int
    num_stages: int


# Elements of x that a program of the pooling kernels holds at once, by orientation. Lines often cannot be read as
# vectors (a row of 14 values starts anywhere), so each element takes registers for an address of its own.
POOL = {
    "lines": (Tile(2048, 4, 1), Tile(1024, 4, 1), Tile(4096, 8, 1)),
    "channels": (Tile(4096, 4, 1), Tile(2048, 4, 1), Tile(8192, 8, 1)),
}

# Features of each row that a program of linear_cross_entropy reads at once, by classes: what leaves registers for the
# sums and keeps the stages of weights within 99 KiB of shared memory, which every GPU since sm_80 has.
LINEAR = {
    16: (Tile(128, 4, 3), Tile(256, 4, 3)),
    32: (Tile(128, 4, 3), Tile(64, 4, 3)),
    64: (Tile(64, 4, 3), Tile(32, 4, 3)),
    128: (Tile(64, 8, 3), Tile(32, 8, 3)),
    256: (Tile(32, 8, 2), Tile(16, 8, 3)),
}

# Logits that a program of cross_entropy holds at once.
ROWS = (Tile(1024, 4, 1), Tile(2048, 4, 1), Tile(2048, 8, 1))

_chosen: dict[Hashable, Tile] = {}


def run(tiles: tuple[Tile, ...], key: Hashable, launch: Callable[[Tile], object]) -> None:
    """Launches with the first tile; with NF_AUTOTUNE=1 with the fastest for this key, remembered from then on."""
    if os.environ.get("NF_AUTOTUNE") != "1":
        launch(tiles[0])
        return
    if key not in _chosen:
        _chosen[key] = min(tiles, key=lambda tile: triton.testing.do_bench(lambda: launch(tile), return_mode="median"))
    launch(_chosen[key])


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1

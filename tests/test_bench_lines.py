"""bench_lines: which units are compared, and what a row says of one."""

from __future__ import annotations

import pytest
import torch

from bench import bench_lines
from nf_engine.config import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_lines, "SIZES", (16, 64))
        return bench_lines.rows_of("vgg11", 32, 0.125, TrainConfig(device="cpu"), CPU)


def test_the_units_cover_the_network_and_its_largest_stage(rows):
    units = {r["unit"]: (r["first"], r["last"]) for r in rows}
    assert units == {"whole": (0, 7), "first half": (0, 3), "second half": (4, 7), "largest stage": (0, 0)}
    assert len(rows) == 4 * 2


def test_the_peak_lies_where_the_maps_of_a_step_have_it(rows):
    """Of the first stage, by hand: input, convolution, BatchNorm's output, ReLU in place, and pooling."""
    row = next(r for r in rows if r["unit"] == "largest stage" and r["batch"] == 64)
    image, maps = 3 * 32 * 32 * 4, 8 * 32 * 32 * 4
    assert row["peak"] >= 64 * (image + 2 * maps)
    assert row["peak"] <= 64 * (image + 5 * maps)


def test_off_is_the_error_of_the_sum(rows):
    assert all(r["off"] == r["predicted"] / r["peak"] - 1 for r in rows)
    assert all(abs(r["off"]) < 0.15 for r in rows)


def test_what_the_device_has_no_room_for_is_left_out(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_lines, "profile_unit", fail)
    monkeypatch.setattr(bench_lines, "SIZES", (16,))
    rows = bench_lines.rows_of("vgg11", 32, 0.125, TrainConfig(device="cpu"), CPU)
    assert {r["peak"] for r in rows} == {r["off"] for r in rows} == {None}

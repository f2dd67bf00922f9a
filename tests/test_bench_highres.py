"""bench_highres: the search for the largest size, its prediction against a real update, and the checks."""

from __future__ import annotations

import pytest
import torch

from bench import bench_highres
from bench.bench_highres import Setting, fake_peak, largest_size, proved
from nf_engine.compare import Arm

CPU = torch.device("cpu")


def setting(budget=64 * 2**20):
    return Setting("resnet18", 0.125, budget, CPU)


@pytest.mark.parametrize("limit", range(0, 420, 7))
def test_the_largest_size_is_found(limit):
    expected = max((s for s in range(32, 353, 32) if s <= limit), default=0)
    assert largest_size(lambda pixels: pixels <= limit, 32, 352) == expected


@pytest.mark.parametrize("kind", ["backpropagation", "checkpointed"])
def test_fake_tensors_predict_the_bytes_of_a_real_update(kind):
    peak = fake_peak(setting(), Arm(kind, 2), 96)
    real = proved(setting(), kind, 2, 96)
    assert real["peak"] == pytest.approx(peak, rel=0.01)
    assert proved(setting(int(0.95 * peak)), kind, 2, 96) is None


def test_a_size_that_does_not_prove_right_gives_way_to_the_next(monkeypatch):
    monkeypatch.setattr(bench_highres, "predicted", lambda setting, arm, batch, pixels: pixels * 1000)
    monkeypatch.setattr(
        bench_highres, "proved", lambda setting, arm, batch, pixels: {"peak": 1} if pixels <= 160 else None
    )
    made = bench_highres.run(setting(230_000), "checkpointed", 1, 32, 1024)
    assert made == {"pixels": 160, "searched": 224, "peak": 1}
    made = bench_highres.run(setting(20_000), "checkpointed", 1, 32, 1024)
    assert (made["pixels"], made["searched"]) == (0, 0)


def test_checks_compare_sizes_and_count_overruns():
    rows = [
        {"batch": b, "arm": arm, "pixels": pixels, "peak": peak, "reserved": 0}
        for b, sizes in ((1, (128, 160, 192)), (8, (0, 64, 32)))
        for arm, pixels, peak in zip((*bench_highres.PEERS, bench_highres.OURS), sizes, (90, 100, 101), strict=True)
    ]
    checks = {name: (c["value"], c["ok"]) for name, c in bench_highres.checks(rows, 100).items()}
    assert checks == {
        "pixels a side / backpropagation's, batch 1": (1.5, True),
        "pixels a side / checkpointed's, batch 1": (1.2, True),
        "pixels a side / backpropagation's, batch 8": (None, None),
        "pixels a side / checkpointed's, batch 8": (0.5, False),
        "runs over budget": (2, False),
    }


@pytest.mark.slow
def test_what_is_planned_trains_inside_its_budget():
    budget = int(0.8 * fake_peak(setting(), Arm("backpropagation", 2), 128))
    made = bench_highres.run(setting(budget), "nf_engine", 2, 32, 128)
    assert made["pixels"] in (96, 128)
    assert made["peak"] <= budget

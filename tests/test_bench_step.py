"""bench_step: what it times computes what it says."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import bench_step as bench
from nf_engine.config import TrainConfig
from nf_engine.device import placed
from nf_engine.models import build
from nf_engine.stages import split

CPU = torch.device("cpu")


def cut_of(model):
    torch.manual_seed(0)
    cut = split(build(model, width=0.125), (3, 32, 32))
    for module in (*(s.module for s in cut.stages), cut.classifier):
        placed(module, CPU).train()
    return cut


def weights(cut):
    return [t for m in (*(s.module for s in cut.stages), cut.classifier) for t in (*m.parameters(), *m.buffers())]


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
def test_the_peer_and_one_unit_take_the_same_step(model):
    config = TrainConfig(lr=0.05)
    x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,))
    cuts = [cut_of(model) for _ in range(3)]
    before = copy.deepcopy(weights(cuts[0]))
    bench.plain_step(cuts[0], (), config, x, labels)()
    bench.our_step(bench.units_of(cuts[1], model, "one unit", config, CPU), x, labels, graph=False)()
    bench.our_step(bench.units_of(cuts[2], model, "recomputed", config, CPU), x, labels, graph=False)()
    for was, a, b, c in zip(before, *map(weights, cuts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(b, c)
        assert not torch.equal(was, a)


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
def test_the_units_hold_every_stage_once(model):
    for arm, (count, starts, kind) in bench.ARMS.items():
        cut = cut_of(model)
        units = bench.units_of(cut, model, arm, TrainConfig(), CPU)
        assert [s for u in units for s in u.body] == [s.module for s in cut.stages]
        assert (len(units), units[0].body.starts) == (count, starts)
        assert [u.head.spec.kind for u in units[:-1]] == [kind] * (count - 1)


def test_checks_are_ratios_of_the_rows():
    rows = [
        {"model": "m", "step": name, "ratio": ratio, "wall_to_kernels": gap}
        for name, ratio, gap in [
            ("backpropagation", 1.0, None), ("checkpointed", 1.3, None), ("one unit", 1.02, 1.5),
            ("recomputed", 1.31, 2), ("two units", 1.04, 2), ("one unit, graph", 0.8, 1.03),
            ("two units, graph", 0.9, 1.06),
        ]
    ]  # fmt: skip
    found = {name.removeprefix("m: "): (entry["value"], entry["ok"]) for name, entry in bench.checks(rows).items()}
    assert found == {
        "one unit / backpropagation": (1.02, True),
        "two units / backpropagation": (1.04, True),
        "two units / checkpointed": (0.8, True),
        "recomputed / checkpointed": (1.0077, True),
        "step as a graph / its kernels": (1.06, False),
    }
    eager = [r | {"wall_to_kernels": None} for r in rows if "graph" not in r["step"]]
    assert bench.checks(eager)["m: step as a graph / its kernels"]["value"] is None

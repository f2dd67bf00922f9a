"""A CUDA device: the plan is made there, kept there, and gives what the CPU gives."""

from __future__ import annotations

import pytest
import torch

import nf_engine
from nf_engine.data import load_split
from nf_engine.models import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("strategy", ["windows", "layerwise"])
@pytest.mark.parametrize("cache", ["disk", "ram", "recompute"])
def test_a_run_stays_in_its_budget_and_comes_back_to_the_cpu(tmp_path, strategy, cache):
    train, test = load_split("synthetic:1200")
    network = build("vgg11", width=0.25)
    budget = 48 * 2**20
    result = nf_engine.train(
        network,
        train,
        test,
        memory_budget=budget,
        partition=strategy,
        cache=cache,
        epochs=3,
        device="cuda",
        progress="none",
        output_dir=tmp_path / "run",
    )
    for memory in result.memory:
        assert memory.allocated <= budget
        assert memory.predicted == pytest.approx(memory.allocated, rel=0.05)
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert max(e.accuracy for e in result.exits) > 0.5


def test_profiling_leaves_the_devices_random_state_alone():
    torch.cuda.manual_seed(5)
    expected = torch.cuda.get_rng_state()
    nf_engine.profile(build("vgg11", width=0.25), (3, 32, 32), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), expected)

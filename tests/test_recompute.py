"""A body that recomputes against the same stages run once: bit for bit."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nf_engine.models import build
from nf_engine.recompute import Body, is_random
from nf_engine.stages import split


class Counted(nn.Module):
    """Passes x on and counts how often."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 1


def stages_of(name):
    torch.manual_seed(0)
    return [s.module for s in split(build(name, width=0.125), (3, 32, 32)).stages]


def three_steps(body, batch=6):
    """Weights, statistics and gradients after three steps; the random state is the same at the start."""
    torch.manual_seed(1)
    for _ in range(3):
        h = body(torch.randn(batch, 3, 32, 32))
        h.backward(torch.randn_like(h))
        with torch.no_grad():
            for p in body.parameters():
                p -= 0.1 * p.grad
    return [*body.parameters(), *(p.grad for p in body.parameters()), *body.buffers()], torch.get_rng_state()


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
@pytest.mark.parametrize("starts", [(1,), (2, 3), (1, 4, 5), (1, 2, 3, 4, 5, 6, 7)], ids=str)
def test_what_runs_twice_trains_bit_for_bit_as_what_runs_once(name, starts):
    stages = stages_of(name)
    stages[2] = nn.Sequential(stages[2], nn.Dropout(0.3))
    once, twice = (Body(copy.deepcopy(stages), s).train() for s in ((), starts))
    wanted, state = three_steps(once)
    found, state_after = three_steps(twice)
    assert len(wanted) == len(found) > 60
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert torch.equal(state, state_after), "random numbers are drawn as often as if nothing ran twice"


def test_every_norm_counts_each_batch_once_whatever_its_kind():
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.InstanceNorm2d(3, track_running_stats=True),
             nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1)]  # fmt: skip
    once, twice = (Body(copy.deepcopy(norms), s).train() for s in ((), (2, 5)))
    three_steps(twice)
    three_steps(once)
    assert [int(b) for name, b in twice.named_buffers() if "num_batches" in name] == [3, 3, 0]
    for (name, a), b in zip(once.named_buffers(), twice.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("starts", "calls"), [((), [1, 1, 1, 1]), ((2,), [2, 2, 1, 1]), ((1, 3), [2, 2, 2, 1])])
def test_all_segments_but_the_last_run_again_in_backward_and_in_nothing_else(starts, calls):
    counters = [Counted() for _ in range(4)]
    # A convolution behind each, since backward runs no segment again from which nothing was saved.
    body = Body([nn.Sequential(c, nn.Conv2d(3, 3, 1)) for c in counters], starts)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        body.train()(x)
    body.eval()(x)
    assert [c.calls for c in counters] == [2] * 4
    body.train()(x).sum().backward()
    assert [c.calls - 2 for c in counters] == calls


def test_an_error_in_backward_leaves_the_statistics_alone():
    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("no more")
            return x * 1

    norm = nn.BatchNorm2d(3)
    buffers = dict(norm._buffers)
    body = Body([nn.Sequential(Fails(), norm), nn.Conv2d(3, 3, 1)], (1,)).train()
    with pytest.raises(RuntimeError, match="no more"):
        body(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(norm._buffers[name] is t for name, t in buffers.items())
    assert int(norm.num_batches_tracked) == 1


def test_random_stages_are_known():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return F.dropout(self.conv(x), 0.5, self.training)

    traced = torch.fx.symbolic_trace(Functional())
    assert is_random(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout2d()))
    assert is_random(traced)
    assert not any(is_random(stage) for stage in stages_of("vgg11"))


def test_starts_are_ascending_and_inside():
    stages = stages_of("vgg11")
    for wrong in ((0,), (2, 2), (3, 1), (len(stages),)):
        with pytest.raises(AssertionError):
            Body(stages, wrong)
    for right in itertools.combinations(range(1, 4), 2):
        assert Body(stages, right).starts == right

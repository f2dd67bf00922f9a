"""The profiler against arithmetic by hand, whole units, torch's MemTracker, and the state it must not touch."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from nf_engine import profiler
from nf_engine.config import TrainConfig
from nf_engine.device import TensorBytes
from nf_engine.errors import BudgetError
from nf_engine.models import build
from nf_engine.partitioner import Costs
from nf_engine.planner import Planner
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import fit, fit_bytes, flops_of, profile_stages, profile_unit
from nf_engine.records import Line, UnitPlan
from nf_engine.stages import split

CPU = torch.device("cpu")
PLAIN = Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3))


def profile_of(network, config=None, device=None, batch_sizes=(8, 32, 128)):
    cut = split(network, (3, 32, 32))
    settings = config or TrainConfig()
    made = profile_stages(cut, settings, PLAIN, name="m", uint8=True, device=device, batch_sizes=batch_sizes)
    return cut, settings, made


def state_hash(network):
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for tensor in (*network.parameters(), *network.buffers()):
        digest.update(tensor.detach().numpy().tobytes())
        assert tensor.grad is None
    return digest.hexdigest()


def test_one_convolution_costs_what_arithmetic_says():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    _, _, made = profile_of(network)
    stage = made.stages[0]
    image, map_ = 3 * 32 * 32 * 4, 16 * 32 * 32 * 4
    assert stage.kept.per_sample == pytest.approx(image + map_), "the image for the convolution, ReLU's output"
    # Backward: the gradient of the output and the ReLU's, the map itself being kept.
    assert stage.transient.per_sample == pytest.approx(2 * map_)
    assert stage.input.per_sample == 0
    assert stage.forward.per_sample == pytest.approx(2 * map_), "convolution and ReLU, not in place"
    assert stage.weights == stage.gradients == stage.optimizer == (3 * 16 * 9 + 16) * 4
    assert stage.output == map_
    assert stage.flops == 2 * 3 * 16 * 9 * 32 * 32
    assert stage.head.spec.kind == "classifier"
    assert stage.head.flops == 2 * 16 * 10


# Bytes a sample at batch 8, measured for VGG-16 at 32 pixels when the design was made; their sum is the 2.49 MiB that
# plain backpropagation saves.
VGG_KEPT = (536704, 655488, 327936, 327936, 164352, 131584, 164352, 82944, 66560, 82944, 25600, 17408, 21504)
VGG_INPUT = (0, 262144, 0, 131072, 0, 65536, 65536, 0, 32768, 32768, 0, 8192, 8192)


def test_vgg16_keeps_the_bytes_that_were_measured_for_it():
    _, _, made = profile_of(build("vgg16"))
    for stage, kept, entry in zip(made.stages, VGG_KEPT, VGG_INPUT, strict=True):
        # The measurement counted BatchNorm's running statistics as saved, 2 x 4 bytes a channel at batch 8.
        assert stage.kept.at(8) / 8 == pytest.approx(kept - stage.output_shape[0])
        assert stage.input.per_sample == pytest.approx(entry)
    assert sum(s.kept.at(8) for s in made.stages) / 8 / 2**20 == pytest.approx(2.49, abs=0.01)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_a_unit_is_the_sum_of_its_stages_within_five_percent(name):
    cut, config, made = profile_of(build(name, width=0.5))
    costs, last = Costs(made, False, {}), len(made.stages) - 1
    for first, end in ((0, 0), (0, last), (1, 3), (2, last)):
        unit = UnitPlan(first, end, made.stages[end].head.spec, 1, 0)
        whole = profile_unit(cut, unit, config, 128, CPU).at(128)
        assert costs.unit(first, end, 128) == pytest.approx(whole, rel=0.05)


def test_the_sum_of_a_unit_is_not_below_it_where_gradients_of_the_input_are_left_out():
    cut, config, made = profile_of(build("vgg16", width=0.5))
    last = len(made.stages) - 1
    whole = profile_unit(cut, UnitPlan(last, last, made.stages[last].head.spec, 1, 0), config, 128, CPU).at(128)
    assert whole <= Costs(made, False, {}).unit(last, last, 128) <= 1.2 * whole


def test_the_line_of_a_unit_is_never_below_it_between_its_two_sizes():
    cut, config, made = profile_of(build("vgg16", width=0.25))
    unit = UnitPlan(4, 9, made.stages[9].head.spec, 1, 0)
    line = profile_unit(cut, unit, config, 64, CPU)
    for batch in (33, 40, 50, 63):
        exact = profile_unit(cut, unit, config, batch, CPU).at(batch)
        assert exact <= line.at(batch) + 1


@pytest.mark.parametrize("device", [None, CPU], ids=str)
def test_profiling_leaves_weights_buffers_gradients_and_random_state_alone(device):
    network = build("vgg11", width=0.125).train()
    before = state_hash(network)
    profile_of(network, device=device, batch_sizes=(2, 4, 8))
    assert state_hash(network) == before
    assert network.training


@pytest.mark.parametrize("call", [1, 3, 7, 8])
def test_running_out_of_memory_half_way_changes_nothing(monkeypatch, call):
    network = build("vgg11", width=0.125)
    before = state_hash(network)
    real, calls = profiler._stage_bytes, []

    def fails(*args):
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("out of memory, in a test")
        return real(*args)

    monkeypatch.setattr(profiler, "_stage_bytes", fails)
    if call == 3:  # the third batch size of the first stage: two points make a line
        _, _, made = profile_of(network)
        assert made.stages[0].kept.per_sample > 0
    else:
        with pytest.raises(
            BudgetError, match=r"stage features\.\d ran out of memory while it was profiled at batch \d+"
        ):
            profile_of(network)
        assert len(calls) == call
    assert state_hash(network) == before


def test_the_meter_agrees_with_torchs_memory_tracker():
    from torch.distributed._tools.mem_tracker import MemTracker

    network = build("vgg11", width=0.25)

    def step(model, x):
        F.cross_entropy(model(x), torch.zeros(64, dtype=torch.int64)).backward()

    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        import copy

        ours, theirs = copy.deepcopy(network), copy.deepcopy(network)
    with fake, TensorBytes([*ours.parameters(), *ours.buffers()], fake) as counter:
        step(ours, torch.ones(64, 3, 32, 32))
    with fake:
        tracker = MemTracker()
        tracker.track_external(theirs)
        with tracker:
            step(theirs, torch.ones(64, 3, 32, 32))
    assert counter.peak == tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def test_the_meter_counts_real_tensors_once_and_forgets_freed_ones():
    with TensorBytes() as counter:
        a = torch.ones(1000)
        b = a.view(10, 100)
        assert (counter.now, counter.peak) == (4000, 4000)
        c = a + 1
        del a, c
        assert (counter.now, counter.peak) == (4000, 8000)
        del b
        assert counter.now == 0
        host = torch.frombuffer(bytearray(400), dtype=torch.float32)
        view = host.view(10, 10)
        assert counter.now == 0, "memory that no operator made"
        counter.reset()
        assert counter.peak == 0
        del view


def test_a_meter_around_fake_work_does_not_count_it():
    with TensorBytes() as counter:
        profile_of(build("vgg11", width=0.125))
    assert counter.peak < 2**20


def test_seconds_are_measured_on_a_device_only():
    network = build("vgg11", width=0.125)
    _, _, bare = profile_of(network, batch_sizes=(2, 4, 8))
    assert bare.device == "none"
    assert all(s.seconds is None and s.head.seconds is None for s in bare.stages)
    _, _, timed = profile_of(network, device=CPU, batch_sizes=(2, 4, 8))
    for stage in timed.stages:
        for line in (stage.seconds, stage.forward_seconds, stage.head.seconds):
            assert line is not None
            assert line.at(32) > 0


def test_a_fit_gives_back_a_line_and_its_residual():
    line = fit((8, 32, 128), [108, 132, 228])
    assert (line.fixed, line.per_sample, line.residual) == pytest.approx((100, 1, 0), abs=1e-9)
    bent = fit_bytes((8, 32, 128), [100, 100, 500])
    assert bent.residual > 0.05
    assert all(bent.at(b) >= v - 1e-9 for b, v in ((8, 100), (32, 100), (128, 500))), "the upper envelope"
    assert fit((4, 8), [2, 10]).at(0) >= 0
    assert fit((8, 64, 512), [1e7, 1e7, 1e7]).at(0) == pytest.approx(1e7), "gradients do not depend on the batch"
    falling = fit((8, 16, 32), [0.9, 0.5, 0.4])
    assert (falling.fixed, falling.per_sample) == pytest.approx((0, 0.0125)), "seconds on a noisy machine"
    assert fit((4,), [8]) == Line(0, 2)


def test_flops_of_a_residual_block_by_hand():
    cut = split(build("resnet18", width=0.25), (3, 32, 32))
    stage = next(s for s in cut.stages if s.name == "layer2.0")
    # 16 -> 32 channels at stride 2: a 3x3 and a 1x1 from 16, a 3x3 from 32, on 16 x 16 pixels.
    assert flops_of(stage.module, (16, 32, 32)) == 2 * 16 * 16 * (32 * 16 * 9 + 32 * 16 + 32 * 32 * 9)


@pytest.mark.parametrize("head", ["conv1x1", "conv3x3", "deep"])
def test_other_heads_are_profiled_with_their_chunks(head):
    _, _, made = profile_of(build("vgg11", width=0.25), TrainConfig(head=head))
    first = made.stages[0].head
    assert first.spec.kind == head
    assert first.flops > 0
    if head != "deep":
        assert first.chunks == (1, 2, 4, 8, 16, 32)
        peaks = [line.at(128) for line in first.transient]
        assert peaks == sorted(peaks, reverse=True), "more chunks, fewer bytes"
        assert peaks[-1] < 0.6 * peaks[0]


@pytest.mark.parametrize(("name", "strategy"), [("vgg11", "windows"), ("resnet18", "layerwise")])
def test_the_plan_fills_its_budget_and_keeps_it(name, strategy):
    network = build(name, width=0.25)
    cut = split(network, (3, 32, 32))
    config = TrainConfig(partition=strategy)
    planner = Planner(cut, config, PLAIN, True, None, 50_000, name, None)
    bound = planner.plan(1 << 40).bounds.backpropagation
    for share in (0.5, 0.7):
        plan = planner.plan(int(share * bound))
        assert plan.peak <= 0.95 * share * bound
        if strategy == "layerwise":
            assert plan.peak >= 0.85 * share * bound

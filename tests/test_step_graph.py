"""The recorded step against its eager twin: a stand-in records by remembering the call, and replays by making it."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

from nf_engine.config import TrainConfig
from nf_engine.heads import AuxiliaryHead, ModuleHead
from nf_engine.local_step import Unit, local_step, train_block
from nf_engine.records import BlockPlan, CachePlan, HeadSpec
from nf_engine.step_graph import WARM_UP, CudaRecorder, StepGraph
from nf_engine.worker import learning_rate, seed_step, train_epochs

CPU = torch.device("cpu")


class StandIn:
    """What a CUDA graph does, on the CPU: the same call on the same tensors."""

    def __init__(self, is_roomy=True, fails=None):
        self.refusal, self.is_roomy, self.fails = None, is_roomy, fails
        self.step = None
        self.records = self.replays = self.releases = 0
        self.notes = []

    def record(self, step):
        self.records += 1
        if self.fails is not None:
            self.fails()
        self.step = step

    def replay(self):
        self.replays += 1
        self.step()

    def release(self):
        self.releases += self.step is not None
        self.step = None

    def note(self, text):
        self.notes.append(text)

    def refuse(self, reason):
        self.refusal = reason
        self.notes.append(reason)


def eager():
    recorder = StandIn()
    recorder.refusal = "the twin"
    return recorder


def units_of(config, seed=0):
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
    second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    units = [
        Unit("first", [first], AuxiliaryHead(HeadSpec("deep", 4, width=16, depth=1), 8, 8, 8, 10, seed=1)),
        Unit("second", [second], ModuleHead(classifier)),
    ]
    for unit in units:
        unit.prepare(config)
        unit.body.train()
        unit.head.train()
    return units


def batches_of(count, size=8, dtype=torch.float32, seed=3):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.rand(size, 3, 8, 8, generator=draw).contiguous(memory_format=torch.channels_last)
        yield x.to(dtype), torch.randint(10, (size,), generator=draw)


def rates(count):
    return [0.1 * (k + 1) / count for k in range(count)]


def trained(config, recorder, count, dtype=torch.float32, seed=0):
    """Units, summed losses and all state after each step."""
    units = units_of(config, seed)
    losses = torch.zeros(2)
    graph = StepGraph(units, losses, recorder)
    states = []
    torch.manual_seed(11)
    for batch, rate in zip(batches_of(count, dtype=dtype), rates(count), strict=True):
        graph.set_rate(rate, 0.1)
        assert train_block(units, [batch], losses, graph) == 1
        states.append([t.detach().clone() for u in units for t in u.tensors()] + [losses.clone()])
    return units, states


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_replays_are_the_eager_steps_bit_for_bit_after_each_step(optimizer, precision):
    config = TrainConfig(optimizer=optimizer, precision=precision)
    dtype = torch.float16 if precision == "16-mixed" else torch.float32
    recorder = StandIn()
    _, recorded = trained(config, recorder, 9, dtype)
    _, twin = trained(config, eager(), 9, dtype)
    assert (recorder.records, recorder.replays) == (1, 9 - WARM_UP), "each batch is trained on once"
    for ours, theirs in zip(recorded, twin, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(recorded[-1], recorded[-2], strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_rate_as_a_tensor_gives_the_bits_of_the_same_number(optimizer):
    config = TrainConfig(optimizer=optimizer)
    units, _ = trained(config, StandIn(), 7)
    plain = units_of(config)
    torch.manual_seed(11)
    for (x, labels), rate in zip(batches_of(7), rates(7), strict=True):
        for unit in plain:
            for group in unit.optimizer.param_groups:
                share = min(1.0, group["most"] / 0.1)
                group["lr"] = torch.tensor(rate * share).item()  # rounded to float32, as the tensor holds it
            x, _ = local_step(unit, x, labels)
    for ours, theirs in zip(units, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))


class Listed:
    """Inputs of fresh tensors, as a block's are."""

    def __init__(self, count=5, size=8):
        self.count, self.size = count, size
        self.samples = count * size

    def train(self, epoch, batch, start=0):
        yield from list(batches_of(self.count, self.size, seed=epoch))[start:]


def run_epochs(config, recorder, seen=None):
    units = units_of(config)
    reports = []
    torch.manual_seed(11)
    plan = BlockPlan((), 8, 0.1, 0, None, CachePlan("images", "uint8", 1, 0, {}, ""))

    def report(epoch):
        reports.append(epoch.losses)
        if seen is not None:
            seen.append((recorder.records, recorder.replays, recorder.releases))

    train_epochs(units, Listed(), plan, config, CPU, report, recorder=recorder)
    return reports, [t.detach().clone() for u in units for t in u.tensors()]


@pytest.mark.parametrize("is_roomy", [True, False])
def test_epochs_follow_the_schedule_under_replay_and_give_memory_back_where_room_is_short(is_roomy):
    config = TrainConfig(epochs=3, warmup_epochs=1.0)
    recorder, seen = StandIn(is_roomy), []
    losses, state = run_epochs(config, recorder, seen)
    twin_losses, twin = run_epochs(config, eager())
    assert losses == twin_losses
    assert all(torch.equal(a, b) for a, b in zip(state, twin, strict=True))
    if is_roomy:
        assert seen == [(1, 2, 0), (1, 7, 0), (1, 12, 0)]
    else:
        assert seen == [(1, 2, 1), (2, 7, 2), (3, 12, 3)], "given up before each report, without a second warm-up"
    plain_losses, plain = run_epochs(config, None)
    for ours, theirs in zip(losses, plain_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(state, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_of_an_epoch_is_the_mean_over_its_own_steps():
    config = TrainConfig(epochs=2, warmup_epochs=0.0)
    units = units_of(config)
    torch.manual_seed(11)
    expected = []
    for epoch in range(2):
        sums = [0.0, 0.0]
        for k, (x, labels) in enumerate(batches_of(5, seed=epoch)):
            seed_step(CPU, config.seed, 0, epoch, k)  # the units drop out
            for u, unit in enumerate(units):
                unit.set_rate(learning_rate(5 * epoch + k, 10, 0, 0.1), 0.1)
                x, loss = local_step(unit, x, labels)
                sums[u] += loss.item()
        expected.append([v / 5 for v in sums])
    losses, _ = run_epochs(config, StandIn())
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_recorded_optimisers_read_the_rate_of_every_step():
    config = TrainConfig(epochs=2, warmup_epochs=0.4)
    found = []

    class Reads(StandIn):
        def replay(self):
            super().replay()
            found.append([rate.item() for rate in self.rates])

    recorder = Reads()
    made = StepGraph.__init__

    def noted(graph, units, losses, given):
        made(graph, units, losses, given)
        given.rates = [g["lr"] for g in units[0].optimizer.param_groups]  # of the weights, and of a wide head's layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraph, "__init__", noted)
        run_epochs(config, recorder)
    rates = [learning_rate(k, 10, 2, 0.1) for k in range(WARM_UP, 10)]
    wide = 20 / 256 / 0.1  # 16 filters on 4 x 4 cells
    assert found == [torch.tensor([rate, rate * wide]).tolist() for rate in rates]
    assert len({rate for rate, _ in found}) == len(found)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_recording_that_breaks_off_leaves_no_trace_and_is_told_once(precision):
    config = TrainConfig(precision=precision)
    dtype = torch.float16 if precision == "16-mixed" else torch.float32
    units = []

    def broken():
        """As a capture that stops in the second unit: gradients are there, a loss scale is between two calls."""
        for unit in units:
            for p in unit.parameters():
                p.grad = torch.full_like(p, 7.0)
            if unit.loss_scale is not None:
                unit.loss_scale._scaler._per_optimizer_states[id(unit.optimizer)]["stage"] = OptState.STEPPED
        try:
            raise torch.AcceleratorError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("the capture was invalidated")  # as ending such a capture does

    recorder = StandIn(fails=broken)
    units += units_of(config)
    losses, theirs = torch.zeros(2), torch.zeros(2)
    graph = StepGraph(units, losses, recorder)
    torch.manual_seed(11)
    train_block(units, batches_of(8, dtype=dtype), losses, graph)
    twin = units_of(config)
    torch.manual_seed(11)
    train_block(twin, batches_of(8, dtype=dtype), theirs, StepGraph(twin, theirs, eager()))
    assert torch.equal(losses, theirs)
    for a, b in zip(units, twin, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.tensors(), b.tensors(), strict=True))
        assert all(p.grad is None for p in a.parameters())
    assert recorder.notes == ["operation not permitted when stream is capturing"]
    assert (recorder.records, recorder.replays) == (1, 0)
    StepGraph(units_of(config), losses, recorder)
    again = units_of(config)
    train_block(again, batches_of(8, dtype=dtype), losses, StepGraph(again, losses, recorder))
    assert recorder.records == 1, "no later block tries again"


def test_adamw_is_told_that_it_is_recorded_and_no_longer_than_that():
    config = TrainConfig(optimizer="adamw")
    seen = []
    units = units_of(config)

    def look():
        seen.append([g["capturable"] for u in units for g in u.optimizer.param_groups])

    for fails in (look, lambda: (look(), 1 / 0)):
        graph = StepGraph(units, torch.zeros(2), StandIn(fails=fails))
        with contextlib.suppress(ZeroDivisionError):
            train_block(units, batches_of(WARM_UP + 1), torch.zeros(2), graph)
        assert not any(g["capturable"] for u in units for g in u.optimizer.param_groups)
    assert seen == [[True, True], [True, True]]


def test_a_batch_that_lies_where_the_recorded_one_did_is_not_copied():
    units = units_of(TrainConfig())
    losses, recorder = torch.zeros(2), StandIn()
    graph = StepGraph(units, losses, recorder)
    buffer, labels = next(iter(batches_of(1)))
    copies = []
    for k, (x, y) in enumerate(batches_of(8)):
        buffer.copy_(x)  # what a cache does: every batch is decoded into one place
        labels.copy_(y)
        with torch.profiler.profile() as seen:
            held = graph._inputs
            if not graph(buffer, labels):
                train_block(units, [(buffer, labels)], losses)
        copies.append(sum(e.count for e in seen.key_averages() if e.key == "aten::copy_"))
        assert k < WARM_UP or graph._inputs[0] is buffer
        assert held is None or held[0] is buffer
    assert copies[WARM_UP + 1 :] == [copies[0]] * 4


def test_a_batch_of_another_size_is_our_bug():
    units = units_of(TrainConfig())
    graph = StepGraph(units, torch.zeros(2), StandIn())
    train_block(units, batches_of(WARM_UP + 1), torch.zeros(2), graph)
    with pytest.raises(AssertionError):
        train_block(units, batches_of(1, size=4), torch.zeros(2), graph)


def test_graphs_can_be_switched_off(monkeypatch):
    notes = []
    assert CudaRecorder(torch.device("cuda", 0), notes.append).refusal is None
    monkeypatch.setenv("NF_GRAPHS", "off")
    assert CudaRecorder(torch.device("cuda", 0), notes.append).refusal == "NF_GRAPHS=off"
    assert notes == ["training steps are not recorded as a CUDA graph: NF_GRAPHS=off"]


def test_a_block_without_memory_for_a_recording_stays_eager_and_the_next_one_is_recorded():
    def fail():
        activations = torch.ones(1)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    held = []
    recorder = StandIn(fails=fail)
    units, losses = units_of(TrainConfig()), torch.zeros(2)
    graph = StepGraph(units, losses, recorder)
    graph.set_rate(TrainConfig().lr, 0.1)
    torch.manual_seed(5)
    train_block(units, batches_of(7), losses, graph)
    assert (recorder.records, recorder.replays, recorder.refusal) == (1, 0, None)
    assert len(recorder.notes) == 1
    assert held[0]() is None, "what the failed step holds is gone without the garbage collector"
    twin, sums = units_of(TrainConfig()), torch.zeros(2)
    torch.manual_seed(5)
    train_block(twin, batches_of(7), sums)
    assert torch.equal(losses, sums)
    recorder.fails = None
    train_block(units, batches_of(7), losses, StepGraph(units, losses, recorder))
    assert (recorder.records, recorder.replays) == (2, 4)


def test_a_recording_that_fails_keeps_nothing_alive():
    def fail():
        activations = torch.ones(1)
        held.append(weakref.ref(activations))
        raise RuntimeError("operation not permitted when stream is capturing")

    held = []
    units, losses = units_of(TrainConfig()), torch.zeros(2)
    gc.disable()
    try:
        train_block(units, batches_of(5), losses, StepGraph(units, losses, StandIn(fails=fail)))
        assert held[0]() is None
    finally:
        gc.enable()

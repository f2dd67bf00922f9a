"""Compiled stages against eager ones: the same training, each compiled once, or left alone with one note of why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import nf_engine
from nf_engine.compiler import Compiler, inductor
from nf_engine.config import TrainConfig
from nf_engine.device import placed
from nf_engine.heads import AuxiliaryHead, ModuleHead
from nf_engine.local_step import Unit, train_block
from nf_engine.models import build
from nf_engine.precision import compute_dtype
from nf_engine.records import HeadSpec
from nf_engine.stages import split
from nf_engine.step_graph import StepGraph
from nf_engine.worker import Batch, forward_block

# torch's own: the first it hides where warnings are no errors, the second comes with its default backend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

CPU = torch.device("cpu")
CLASSES, SIZE, BATCH, STEPS = 10, 32, 6, 4


@pytest.fixture(autouse=True)
def _forget_compilations():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Eager:
    """A recorder that records nothing, with the compiler that the test brings."""

    refusal, is_roomy = "the test", True

    def __init__(self, compiler=None):
        self.compiler = compiler


class Counting:
    """A backend of torch, and how many graphs it was given; from call `fails` on it fails."""

    def __init__(self, name="eager", fails=None):
        self.calls, self.name, self.fails = 0, name, fails

    def __call__(self, graph, inputs):
        self.calls += 1
        if self.fails is not None and self.calls >= self.fails:
            raise OSError("no compiler here\nand more lines")
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


class Drops(nn.Module):
    """A stage that draws random numbers."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(torch.relu(self.norm(self.conv(x))))


def units_of(config, model="resnet18", starts=(), extra=()):
    """Two units over the first five stages: residual blocks with and without a convolution in the shortcut."""
    torch.manual_seed(0)
    cut = split(build(model, width=0.125), (3, SIZE, SIZE))
    stages = [s.module for s in cut.stages[:5]]
    c, h, w = cut.stages[3].output_shape
    c_end = cut.stages[4].output_shape[0]
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_end, CLASSES))
    head = AuxiliaryHead(HeadSpec("deep", 2, width=16, depth=1), c, h, w, CLASSES, seed=1)
    units = [
        Unit("first", [stages[0], *extra, *stages[1:4]], head, starts),
        Unit("second", stages[4:], ModuleHead(classifier)),
    ]
    for unit in units:
        for module in unit.modules():
            placed(module, CPU).train()
        unit.prepare(config)
    return units


def batches_of(dtype, count=STEPS, size=BATCH):
    draw = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.rand(size, 3, SIZE, SIZE, generator=draw).contiguous(memory_format=torch.channels_last)
        yield x.to(dtype), torch.randint(CLASSES, (size,), generator=draw)


def train(units, compiler, dtype=torch.float32, count=STEPS):
    """All state after some steps, and the summed losses."""
    losses = torch.zeros(len(units))
    graph = StepGraph(units, losses, Eager(compiler))
    graph.set_rate(0.05, 0.1)
    torch.manual_seed(11)
    assert train_block(units, batches_of(dtype, count), losses, graph) == count
    return [*(t.detach() for u in units for t in u.tensors()), losses]


def counted_batches(units):
    return {int(b) for u in units for name, b in u.body.named_buffers() if "num_batches" in name}


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("starts", [(), (1, 3)], ids=["once", "twice"])
@pytest.mark.parametrize("model", ["resnet18", "vgg11"])
def test_compiled_steps_are_the_eager_steps_bit_for_bit(model, starts, precision):
    extra, backend = [Drops(8)] if model == "resnet18" else [], Counting("eager")
    plain = units_of(TrainConfig(precision=precision), model, starts, extra)
    units = units_of(TrainConfig(compile=True, precision=precision), model, starts, copy.deepcopy(extra))
    dtype = compute_dtype(TrainConfig(precision=precision))
    expected, found = train(plain, None, dtype), train(units, Compiler(pytest.fail, backend), dtype)
    assert equal(found, expected)
    assert counted_batches(units) == {STEPS}
    assert backend.calls == sum(len(u.body) for u in units), "each stage is compiled once, also where it runs twice"


def distance(found, expected):
    """The largest error of a tensor, as a share of its norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("starts", [(), (1, 3)], ids=["once", "twice"])
@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_what_is_compiled_with_its_backward_trains_alike(name, starts, precision):
    config = TrainConfig(precision=precision)
    plain, fewer, exact = (units_of(c, starts=starts) for c in (config, config, TrainConfig()))
    units = units_of(TrainConfig(compile=True, precision=precision), starts=starts)
    keys = [list(m.state_dict()) for u in plain for m in u.modules()]
    dtype, backend = compute_dtype(config), inductor if name == "inductor" else Counting(name)
    # Two steps: later on, one ReLU that rounds to its other side changes gradients by more than rounding.
    expected, found = train(plain, None, dtype, 2), train(units, Compiler(pytest.fail, backend), dtype, 2)
    if precision == "32-true":
        wanted, tolerance = expected, 1e-4
    else:
        wanted = train(exact, None, count=2)
        tolerance = 2 * distance(expected, wanted)  # as far from float32 as bfloat16 is without it
    assert distance(found, wanted) < tolerance < distance(train(fewer, None, dtype, 1), wanted)
    assert counted_batches(units) == {2}
    assert counters["stats"]["unique_graphs"] == sum(len(u.body) for u in units)
    assert [list(m.state_dict()) for u in units for m in u.modules()] == keys


def test_neither_an_eval_pass_nor_a_short_batch_nor_a_second_training_compiles_anything():
    backend = Counting()
    compiler = Compiler(pytest.fail, backend)
    config = TrainConfig(compile=True)
    units = units_of(config)
    train(units, compiler)
    stages = sum(len(u.body) for u in units)
    host = torch.arange(BATCH)
    held = [Batch(x[:n], y[:n], host[:n], host[:n]) for n in (BATCH, 2) for x, y in batches_of(torch.float32, 1)]
    written = []
    forward_block(units, iter(held), score=True, write=lambda h, _: written.append(h), device=CPU)
    assert (backend.calls, counters["stats"]["unique_graphs"]) == (stages, stages)
    again = [Unit(u.name, list(u.body), u.head) for u in units]  # as a rehearsal is followed by the training
    for unit in again:
        unit.prepare(config)
        unit.body.train()
        unit.head.train()
    train(again, compiler)
    assert (backend.calls, counters["stats"]["unique_graphs"]) == (stages, stages)
    for unit in units:
        unit.body.eval()
    for h, batch in zip(written, held, strict=True):
        with torch.no_grad():
            assert h.shape == units[1].body(units[0].body(batch.x)).shape


def test_an_eval_pass_gives_the_bits_of_a_body_that_was_never_compiled():
    units = units_of(TrainConfig(compile=True))
    train(units, Compiler(pytest.fail, Counting("aot_eager")))
    plain = [nn.Sequential(*copy.deepcopy(list(u.body))).eval() for u in units]
    ((x, _),) = batches_of(torch.float32, 1)
    host = torch.arange(BATCH)
    written = []
    batch = Batch(x, torch.zeros(BATCH, dtype=torch.int64), host, host)
    forward_block(units, iter([batch]), score=False, write=lambda h, _: written.append(h), device=CPU)
    with torch.no_grad():
        assert torch.equal(written[0], plain[1](plain[0](x)))


@pytest.mark.parametrize("fails", [1, 2, 4, 5])
@pytest.mark.parametrize("starts", [(), (2,)], ids=["once", "twice"])
def test_after_a_failure_the_rest_trains_eager_with_one_note(starts, fails):
    notes, backend = [], Counting(fails=fails)
    compiler = Compiler(notes.append, backend)
    expected = train(units_of(TrainConfig(), starts=starts), None)
    units = units_of(TrainConfig(compile=True), starts=starts)
    found = train(units, compiler)
    assert equal(found, expected), "the step in which it failed counts once, too"
    assert notes == ["no further stages are compiled: no compiler here"]
    train(units_of(TrainConfig(compile=True), starts=starts), compiler)
    assert (len(notes), backend.calls) == (1, fails), "what is not compiled yet is not tried again in this run"


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_the_forward_pass():
    def refuse(graph, inputs):
        raise OSError("no backward here")

    notes = []
    half = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=refuse)
    found = train(units_of(TrainConfig(compile=True)), Compiler(notes.append, half))
    assert equal(found, train(units_of(TrainConfig()), None))
    assert notes == ["no further stages are compiled: no backward here"]


class Waits(nn.Module):
    """A stage that asks for a value in the middle."""

    def forward(self, x):
        return x * (2.0 if x.sum().item() > -1e9 else 1.0)


def test_a_stage_that_no_graph_can_hold_stays_eager():
    notes = []
    found = train(units_of(TrainConfig(compile=True), extra=[Waits()]), Compiler(notes.append, Counting()))
    assert equal(found, train(units_of(TrainConfig(), extra=[Waits()]), None))
    assert len(notes) == 1


def test_an_error_of_the_step_itself_is_no_failure_of_the_compiler():
    def out_of_memory(*inputs):
        raise torch.OutOfMemoryError("Tried to allocate 1 GiB")

    compiler = Compiler(pytest.fail, lambda graph, inputs: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(units_of(TrainConfig(compile=True)), compiler)


def test_without_the_setting_and_without_a_recorder_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", pytest.fail)
    units = units_of(TrainConfig())
    train(units, Compiler(pytest.fail))
    units = units_of(TrainConfig(compile=True))
    train_block(units, batches_of(torch.float32), torch.zeros(2))
    assert all(u.body.run(nn.Identity(), torch.ones(1)) == 1 for u in units)


def test_a_plan_is_measured_without_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", pytest.fail)
    fields = {"samples": 600, "batch_size": 32, "memory_budget": "64MiB"}
    model = build("vgg11", width=0.125)
    plans = [nf_engine.plan(model, (3, 32, 32), compile=flag, **fields) for flag in (False, True)]
    assert [b.peak for b in plans[0].blocks] == [b.peak for b in plans[1].blocks]

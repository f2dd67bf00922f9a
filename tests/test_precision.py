"""Precision: 16-bit maps against float64 and torch's own mixed precision, loss scales, and whole runs in a budget."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import nf_engine
from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span
from nf_engine.heads import AuxiliaryHead, ModuleHead, head_bytes
from nf_engine.local_step import Unit, local_step, make_optimizer
from nf_engine.models import build
from nf_engine.peaks import profile_unit
from nf_engine.precision import autocast_like, compute_dtype, forward
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import profile_stages
from nf_engine.records import HeadSpec, UnitPlan
from nf_engine.sources import load_split
from nf_engine.stages import split

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXED = {"bf16-mixed": BF16, "16-mixed": FP16}
# Norm of the difference relative to the norm of the gradient, through three layers and their norms.
TOLERANCE = {BF16: 2e-2, FP16: 4e-3}
HEADS = {
    "linear": HeadSpec("linear", 2),
    "one cell": HeadSpec("linear", 1),
    "deep": HeadSpec("deep", 2, 16, 1),
    "classifier": None,
}


def config_of(precision, **fields):
    return TrainConfig(precision=precision, **{"lr": 0.1, "weight_decay": 0.0} | fields)


def stages_of(seed=0):
    """Smooth ones: at the kinks of ReLU and MaxPool a rounding moves a whole gradient."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.Tanh())
    return [first, nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh(), nn.AvgPool2d(2))]


def unit_of(head, config, starts=(), seed=0):
    stages = stages_of(seed)
    if HEADS[head] is None:
        made = ModuleHead(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)))
    else:
        made = AuxiliaryHead(HEADS[head], 16, 4, 4, 5, seed=2)
        generator = torch.Generator().manual_seed(2)
        nn.init.normal_(made.linear_weight, std=0.1, generator=generator)  # zero would hide the body's gradient
        for norm in made.norms:  # channels that are on, and every fourth that is off: kinks as above
            norm.bias.data = torch.where(torch.arange(len(norm.bias)) % 4 == 0, -4.0, 4.0)
    unit = Unit("u", stages, made, starts)
    unit.prepare(config)
    unit.body.train()
    unit.head.train()
    return unit


def batch_of(dtype, seed=0, count=24):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype, memory_format=torch.channels_last), torch.arange(count) % 5


def weights(unit):
    return [p.detach().clone() for p in unit.parameters()]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", MIXED)
def test_gradients_of_a_unit_are_those_of_float64_but_for_roundings(precision, head):
    unit = unit_of(head, config_of(precision))
    dtype = compute_dtype(unit_config := config_of(precision))
    twin = Unit("twin", copy.deepcopy(list(unit.body)), copy.deepcopy(unit.head))
    for module in twin.modules():
        module.to(FP64).train()
    x, y = batch_of(dtype)
    h, loss = local_step(unit, x, y)
    exact = twin.body(x.to(FP64))
    expected = F.cross_entropy(_logits(twin.head, exact), y, label_smoothing=unit_config.label_smoothing)
    expected.backward()
    assert h.dtype == dtype
    assert loss.dtype == FP32
    assert float(loss) == pytest.approx(expected.item(), rel=TOLERANCE[dtype] / 4)
    for p, q in zip(unit.parameters(), twin.parameters(), strict=True):
        found = unit.optimizer.state[p]["momentum_buffer"]  # the first gradient, unscaled
        assert p.dtype == found.dtype == FP32
        if q.ndim > 1:  # those of a bias before a norm are zero
            assert (found - q.grad).norm() <= TOLERANCE[dtype] * q.grad.norm()


def _logits(head, h):
    """Of a twin in float64, by torch's own modules where there is a choice."""
    if isinstance(head, ModuleHead):
        return head.module(h)
    for conv, norm in zip(head.convs, head.norms, strict=True):
        h = torch.relu(norm(conv(h)))
    return F.linear(F.adaptive_avg_pool2d(h, head.spec.pool).flatten(1), head.linear_weight, head.linear_bias)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_unit_in_bfloat16_is_torchs_own_mixed_precision_bit_for_bit(optimizer):
    config = config_of("bf16-mixed", optimizer=optimizer, lr=0.01)
    torch.manual_seed(0)
    plain = build("vgg11", width=0.125).train()
    cut = split(copy.deepcopy(plain), (3, 32, 32))
    unit = Unit("u", [s.module for s in cut.stages], ModuleHead(cut.classifier))
    unit.prepare(config)
    unit.body.train()
    trained = make_optimizer(plain.parameters(), config)
    for k in range(3):
        x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(k)).to(BF16)
        y = torch.arange(8) % 10
        _, loss = local_step(unit, x, y)
        with torch.autocast("cpu", BF16):
            logits = plain(x)
        expected = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
        expected.backward()
        trained.step()
        trained.zero_grad()
        assert torch.equal(loss, expected.detach())
    assert same(weights(unit), plain.parameters())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", MIXED)
def test_the_loss_falls(precision, head):
    unit = unit_of(head, config_of(precision, lr=0.2))
    x, y = batch_of(MIXED[precision])
    losses = [float(local_step(unit, x, y)[1]) for _ in range(12)]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("head", HEADS)
def test_an_overflow_leaves_out_the_update_of_its_unit_alone(head, optimizer):
    config = config_of("16-mixed", optimizer=optimizer, lr=0.01)
    unit, other, untouched = (unit_of(head, config) for _ in range(3))
    before = weights(unit)
    x, y = batch_of(FP16)
    start = float(unit.loss_scale.factor)
    unit.loss_scale.factor.fill_(2.0**120)
    _, loss = local_step(unit, x, y)
    local_step(other, x, y)
    assert same(weights(unit), before)
    assert not same(weights(other), before)
    assert float(loss) == pytest.approx(float(local_step(unit_of(head, config), x, y)[1]), rel=1e-6)
    assert float(unit.loss_scale.factor) == 2.0**119
    assert float(other.loss_scale.factor) == start
    # The next update is a first one: neither weights nor optimiser state have seen the overflow.
    unit.loss_scale.factor.fill_(start)
    local_step(unit, x, y)
    local_step(untouched, x, y)
    assert same(weights(unit), weights(untouched))
    for p, q in zip(unit.parameters(), untouched.parameters(), strict=True):
        assert all(torch.equal(unit.optimizer.state[p][k], v) for k, v in untouched.optimizer.state[q].items())


def test_the_scale_doubles_after_two_thousand_updates_and_changes_no_update():
    unit, other = (unit_of("deep", config_of("16-mixed")) for _ in range(2))
    x, y = batch_of(FP16)
    factor, updates = unit.loss_scale.tensors()
    address = factor.data_ptr()
    start = float(factor)
    updates.fill_(1998)
    local_step(unit, x, y)
    assert (float(factor), int(updates)) == (start, 1999)
    local_step(unit, x, y)
    assert (float(factor), int(updates)) == (2 * start, 0)
    assert unit.loss_scale.factor.data_ptr() == address, "a CUDA graph would not find it"
    for _ in range(2):
        local_step(other, x, y)
    assert same(weights(unit), weights(other))


def test_only_float16_has_a_loss_scale_and_it_is_part_of_the_units_state():
    for precision in ("32-true", "bf16-mixed"):
        assert unit_of("linear", config_of(precision)).loss_scale is None
    unit = unit_of("linear", config_of("16-mixed"))
    known = {id(t) for t in unit.tensors()}
    assert {id(t) for t in unit.loss_scale.tensors()} < known
    local_step(unit, *batch_of(FP16))
    assert {id(t) for t in unit.tensors()} == known, "all of it exists before the first step"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", *MIXED])
def test_a_step_reads_nothing_back_from_the_device(precision, optimizer):
    config = config_of(precision, optimizer=optimizer)
    unit = unit_of("deep", config)
    fake = FakeTensorMode()  # a value of such a tensor cannot be read
    with FakeCopyMode(fake):
        stages, head = copy.deepcopy(list(unit.body)), copy.deepcopy(unit.head)
    with fake:
        twin = Unit("twin", stages, head)
        twin.prepare(config)
        for _ in range(2):
            x = torch.empty(8, 3, 8, 8, dtype=compute_dtype(config))
            h, loss = local_step(twin, x, torch.zeros(8, dtype=torch.int64))
    assert h.dtype == compute_dtype(config)
    assert loss.dtype == FP32


@pytest.mark.parametrize("precision", MIXED)
def test_a_body_that_recomputes_computes_the_same_in_16_bits(precision):
    plain, again = (unit_of("deep", config_of(precision), starts) for starts in ((), (1,)))
    for k in range(3):
        x, y = batch_of(MIXED[precision], k)
        losses = [local_step(u, x, y)[1] for u in (plain, again)]
        assert torch.equal(*losses)
    assert same(weights(plain), weights(again))
    assert same(plain.body.buffers(), again.body.buffers())


class Widened(nn.Module):
    """What autocast does to some modules: it leaves float32."""

    def forward(self, x):
        return x.float() + 0.001


def test_a_map_keeps_its_dtype_and_float32_meets_no_autocast():
    for dtype in (BF16, FP16, FP32, FP64):
        x = torch.ones(2, 3, 4, 4, dtype=dtype)
        assert forward(nn.Identity(), x) is x
        with autocast_like(x):
            assert torch.is_autocast_enabled("cpu") == (dtype in MIXED.values())
        assert not torch.is_autocast_enabled("cpu")
    x = torch.ones(2, 3, 4, 4, dtype=BF16)
    assert forward(Widened(), x).dtype == BF16
    assert ModuleHead(Widened())(x).dtype == FP32, "logits are not rounded"


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_images_are_rounded_once_at_the_end(dtype, augment):
    norm = Normalisation((100.3, 120.4, 140.7), (50.1, 60.2, 70.3))
    images = torch.randint(0, 256, (9, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    exact = Preprocess(norm, augment, 3)(images, torch.arange(9), stream=1)
    made = copy.copy(Preprocess(norm, augment, 3, dtype))(images, torch.arange(9), stream=1)
    assert torch.equal(made, exact.to(dtype))
    assert made.is_contiguous(memory_format=torch.channels_last)


def trained(folder, precision, budget, **fields):
    data, held = load_split("synthetic:240")
    torch.manual_seed(0)
    fields = {"partition": "layerwise", "epochs": 2, "batch_size": 32, "cache": "ram", "lr": 0.02, **fields}
    return nf_engine.train(
        build("vgg11", width=0.125), data, held, precision=precision, memory_budget=budget, output_dir=folder,
        progress="none", device="cpu", **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "budget"),
    [
        ("bf16-mixed", 3_600_000),
        pytest.param("32-true", 6_200_000, marks=pytest.mark.slow),
        pytest.param("16-mixed", 3_600_000, marks=pytest.mark.slow),
    ],
)
def test_a_run_keeps_its_budget_and_its_prediction(tmp_path, precision, budget):
    result = trained(tmp_path, precision, budget)
    assert len(result.memory) >= 2, "a block reads cached inputs"
    for memory in result.memory:
        assert memory.allocated <= budget
        assert memory.allocated == pytest.approx(memory.predicted, rel=0.01)
    first, last = (line["train/loss"] for line in result.history[:2])
    assert sum(last) < sum(first)
    assert all(t.dtype == FP32 for t in result.model.state_dict().values() if t.is_floating_point())
    assert result.model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).dtype == FP32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "u8"])
def test_where_bfloat16_inputs_wait_changes_no_loss(tmp_path, dtype):
    found = [
        trained(tmp_path / tier, "bf16-mixed", 6_200_000, batch_size=64, cache=tier, cache_dtype=dtype, epochs=1)
        for tier in ("ram", "disk", "recompute")
    ]
    losses = [[line["train/loss"] for line in r.history] for r in found]
    assert losses[0] == losses[1] == losses[2]
    assert same(found[0].model.state_dict().values(), found[2].model.state_dict().values())


@pytest.mark.parametrize("precision", MIXED)
def test_one_convolution_in_16_bits_costs_what_arithmetic_says(precision):
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    made = profile_of(network, precision)
    stage = made.stages[0]
    image, map_, values = 3 * 32 * 32 * 2, 16 * 32 * 32 * 2, 3 * 16 * 9 + 16
    assert (made.input, stage.output) == (image, map_)
    assert stage.kept.per_sample == pytest.approx(image + map_), "the image for the convolution, ReLU's output"
    assert stage.kept.fixed == pytest.approx(2 * (values - 16)), "the cast weight"
    assert stage.transient.per_sample == pytest.approx(2 * map_)
    assert stage.weights == stage.gradients == stage.optimizer == 4 * values


@pytest.mark.parametrize("precision", MIXED)
def test_a_unit_in_16_bits_is_the_sum_of_its_stages_within_five_percent(precision):
    network = build("vgg11", width=0.25)
    config, made = config_of(precision), profile_of(network, precision)
    cut = split(network, (3, 32, 32))
    for first, last in ((0, 1), (1, 1), (0, len(cut.stages) - 1)):
        head, shape = made.stages[last].head, cut.stages[last].output_shape
        if head.path != "autograd":
            assert head.transient.at(64) == pytest.approx(head_bytes(head.spec, shape, 10, 64, itemsize=2), rel=0.01)
        unit = UnitPlan(first, last, head.spec, head.path, 0)
        whole = profile_unit(cut, unit, config, 64, torch.device("cpu")).at(64)
        assert Costs(made, True, {}).unit(Span(first, last), 64) == pytest.approx(whole, rel=0.05)


def profile_of(network, precision):
    config = config_of(precision)
    plain = Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3), dtype=compute_dtype(config))
    cut = split(network, (3, 32, 32))
    return profile_stages(cut, config, plain, name="m", uint8=True, device=None, batch_sizes=(8, 32, 128))

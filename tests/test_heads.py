"""Heads: the step against autograd of forward, bytes against a tracker, FLOPs against torch, widths against goldens."""

import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nf_engine.errors import ConfigError
from nf_engine.heads import (
    AuxiliaryHead,
    ModuleHead,
    adaptive_width,
    build_head,
    deep_head,
    head_bytes,
    head_flops,
    head_parameters,
)
from nf_engine.ops import IGNORE_INDEX
from nf_engine.records import HeadSpec

SPECS = [
    HeadSpec("linear", pool=2),
    HeadSpec("conv1x1", pool=2, width=5),
    HeadSpec("conv3x3", pool=4, width=5),
    HeadSpec("deep", depth=2),
]
KINDS = [spec.kind for spec in SPECS]
SHAPE, K, N = (3, 7, 6), 10, 9


@pytest.fixture(autouse=True)
def one_thread():
    """Maps this small are slower in two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(spec, *, smoothing=0.1, chunks=1, shape=SHAPE):
    """A head with a last layer that is not zero, so that gradients flow; h and labels."""
    g = torch.Generator().manual_seed(1)
    head = build_head(spec, shape, K, smoothing=smoothing, chunks=chunks, seed=3)
    with torch.no_grad():
        for p in list(head.parameters())[-2:]:
            p.copy_(torch.randn(p.shape, generator=g))
    return head, torch.randn(N, *shape, generator=g), torch.randint(K, (N,), generator=g)


def gradients(head):
    return [p.grad.clone() for p in head.parameters()]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["mean", "scaled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_a_step_equals_autograd_through_forward(spec, smoothing, scaled):
    head, h, labels = make(spec, smoothing=smoothing, chunks=4)
    labels[2] = IGNORE_INDEX
    twin, leaf = copy.deepcopy(head), h.clone().requires_grad_()
    scale = torch.tensor(0.37) if scaled else None
    loss, dh = head.step(h.requires_grad_(), labels, scale)
    assert not loss.requires_grad
    assert not dh.requires_grad
    assert h.grad is None
    assert loss.shape == ()

    total = F.cross_entropy(twin(leaf), labels, label_smoothing=smoothing, reduction="sum" if scaled else "mean")
    total = total * 0.37 if scaled else total
    total.backward()
    close([loss, dh, *gradients(head)], [total.detach(), leaf.grad, *gradients(twin)])


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_a_second_step_adds_to_the_gradients(spec):
    head, h, labels = make(spec)
    head.eval()
    head.step(h, labels)
    once = gradients(head)
    head.step(h, labels)
    close(gradients(head), [2 * g for g in once])


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_a_batch_that_is_ignored_whole_changes_nothing(spec):
    head, h, labels = make(spec)
    for scale in (None, torch.tensor(torch.inf)):
        loss, dh = head.step(h, torch.full_like(labels, IGNORE_INDEX), scale)
        for result in (loss, dh, *gradients(head)):
            assert not result.any()  # NaN counts as true


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_the_first_gradient_into_the_body_is_zero_and_the_first_loss_is_chance(spec):
    head = build_head(spec, SHAPE, K, smoothing=0.1, seed=3)
    h = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0))
    loss, dh = head.step(h, torch.arange(N))
    assert not dh.any()
    torch.testing.assert_close(loss, torch.tensor(float(K)).log())
    assert list(head.parameters())[-1].grad.any()  # but the head learns


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_weights_come_from_the_seed_and_leave_the_global_generator_alone(spec):
    state = torch.get_rng_state()
    first, same, other = (build_head(spec, SHAPE, K, smoothing=0.1, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], same[k]) for k in first)
    if spec.kind != "linear":  # it has no weights but zeros
        name = next(iter(first))
        assert not torch.equal(first[name], other[name])
        fan_in = first[name][0].numel()
        assert 0.5 < first[name].std() * (fan_in / 2) ** 0.5 < 1.5


@pytest.mark.parametrize("spec", SPECS[:3], ids=KINDS[:3])
def test_the_pool_is_clipped_to_the_map(spec):
    head, h, labels = make(spec, shape=(3, 5, 1))
    assert head.spec.pool == 1
    assert head.step(h, labels)[1].shape == h.shape
    assert sum(p.numel() for p in head.parameters()) == head_parameters(spec, (3, 5, 1), K)


@pytest.mark.parametrize("spec", SPECS[:3], ids=KINDS[:3])
def test_bfloat16_maps_meet_float32_weights(spec):
    head, h, labels = make(spec)
    twin = copy.deepcopy(head)
    loss, dh = head.step(h.bfloat16(), labels)
    exact, exact_dh = twin.step(h.bfloat16().float(), labels)
    assert dh.dtype == torch.bfloat16
    assert head(h.bfloat16()).dtype == loss.dtype == torch.float32
    assert {p.grad.dtype for p in head.parameters()} == {torch.float32}
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    error = (dh.float() - exact_dh).norm() / exact_dh.norm()
    assert error < 3e-2


def test_a_frozen_weight_gets_no_gradient():
    head, h, labels = make(SPECS[1])
    head.conv_weight.requires_grad_(False)
    head.step(h, labels)
    assert head.conv_weight.grad is None
    assert head.conv_bias.grad is not None


@pytest.mark.parametrize("size", [10, 32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_unit_over_the_whole_model_is_plain_backpropagation_bit_for_bit(smoothing, size):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, K))
    model = copy.deepcopy(nn.Sequential(body, classifier))
    x, labels = torch.randn(size, 3, 8, 8), torch.randint(K, (size,))

    head = build_head(HeadSpec("classifier"), (8, 4, 4), K, smoothing=smoothing, seed=0, classifier=classifier)
    h = body(x)
    loss, dh = head.step(h.detach(), labels)
    torch.autograd.backward(h, dh)

    expected = F.cross_entropy(model(x), labels, label_smoothing=smoothing)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    pairs = zip([*body.parameters(), *classifier.parameters()], model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_module_that_ignores_h_is_an_error():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(N, K))

        def forward(self, h):
            return self.logits

    with pytest.raises(ValueError, match="Constant do not depend on h"):
        ModuleHead(Constant()).step(torch.zeros(N, *SHAPE), torch.zeros(N, dtype=torch.int64))


def test_a_deep_head_widens_and_halves_down_to_one_pixel():
    convs = [m for m in deep_head(3, 5, 2, K, depth=5, seed=0) if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convs] == [
        (3, 16, 2),  # 5x2 -> 3x1
        (16, 32, 2),  # 2x1
        (32, 64, 2),  # 1x1
        (64, 64, 1),
        (64, 64, 1),
    ]


BAD = [
    HeadSpec("conv5x5", width=8),
    HeadSpec("conv3x3"),
    HeadSpec("linear", pool=0),
    HeadSpec("deep"),
    HeadSpec("classifier"),
]


@pytest.mark.parametrize("spec", BAD, ids=str)
def test_a_head_that_cannot_be_is_refused(spec):
    with pytest.raises(ConfigError):
        build_head(spec, SHAPE, K, smoothing=0.1, seed=0)


def test_an_auxiliary_head_is_none_of_the_others():
    with pytest.raises(ConfigError, match="use build_head"):
        AuxiliaryHead(HeadSpec("deep", depth=2), *SHAPE, K, seed=0)


def test_a_deep_head_without_depth_has_no_cost():
    with pytest.raises(ConfigError, match="depth >= 1"):
        head_flops(HeadSpec("deep"), SHAPE, K)


def test_the_cost_of_a_classifier_is_not_guessed():
    for cost in (head_flops, head_parameters):
        with pytest.raises(ValueError, match="measure its module"):
            cost(HeadSpec("classifier"), SHAPE, K)


@pytest.mark.parametrize("spec", SPECS[1:3], ids=KINDS[1:3])
def test_forward_exports_for_any_batch(spec):
    head, h, _ = make(spec)
    exported = torch.export.export(head, (h,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(h[:5]), head(h[:5]))


@pytest.mark.parametrize("shape", [SHAPE, (5, 4, 4), (3, 2, 9)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_parameters_and_flops_are_those_of_the_head(spec, shape):
    head = build_head(spec, shape, K, smoothing=0.1, seed=0)
    assert head_parameters(spec, shape, K) == sum(p.numel() for p in head.parameters())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        head(torch.zeros(1, *shape)) if spec.kind != "deep" else head.eval()(torch.zeros(1, *shape))
    assert head_flops(spec, shape, K) == counter.get_total_flops()


# --- bytes ---


class Tracker(TorchDispatchMode):
    """Peak bytes of the storages that operations make, each counted once and until it dies."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tensor.untyped_storage()._cdata)  # an input made before: not ours
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.seen.discard(key)
        self.live -= size


def tracked_bytes(spec, shape, classes, batch, chunks, dtype):
    with FakeTensorMode():
        head = build_head(spec, shape, classes, smoothing=0.1, chunks=chunks, seed=0)
        h = torch.empty(batch, *shape, dtype=dtype)
        labels, scale = torch.empty(batch, dtype=torch.int64), torch.empty(())
        with Tracker() as tracker:
            head.step(h, labels, scale)
    return tracker.peak


CASES = [
    ("linear", 4, 0, (64, 32, 32)),
    ("linear", 4, 0, (64, 30, 30)),
    ("conv1x1", 1, 64, (64, 32, 32)),
    ("conv1x1", 2, 256, (64, 32, 32)),
    ("conv3x3", 2, 64, (64, 32, 32)),
    ("conv3x3", 4, 128, (256, 8, 8)),
    ("conv3x3", 4, 96, (32, 30, 30)),
    ("deep", 4, 0, (64, 32, 32)),
    ("deep", 4, 0, (4, 64, 64)),
]


@pytest.mark.parametrize(
    ("kind", "pool", "width", "shape", "dtype"),
    [(*case, d) for case in CASES for d in (torch.float32, torch.bfloat16) if d == torch.float32 or case[0] != "deep"],
)
def test_bytes_of_a_step_are_the_tracked_ones(kind, pool, width, shape, dtype):
    spec = HeadSpec(kind, pool=pool, width=width, depth=2 if kind == "deep" else 0)
    for chunks in (1, 3, 32) if width else (1,):
        predicted = head_bytes(spec, shape, K, 512, chunks, dtype.itemsize)
        assert predicted == pytest.approx(tracked_bytes(spec, shape, K, 512, chunks, dtype), rel=0.02), chunks


def test_the_tracker_agrees_with_arithmetic_done_by_hand():
    with FakeTensorMode():
        x = torch.empty(1000)
        with Tracker() as tracker:
            y = x + 1  # 4000
            del y
            z = x * 2  # 4000
            z.add_(1)
            w = z.view(10, 100) + 1  # 8000
    assert tracker.peak == 8000
    assert tracker.live == 4 * (z.numel() + w.numel())


# --- width ---

GOLDEN = {
    "vgg16, 32 px, 10 classes": (
        "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
        32,
        10,
        [32, 32, 64, 128, 128],
    ),
    "vgg19, 64 px, 200 classes": (
        "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
        64,
        200,
        [32, 32, 32, 64, 64, 128],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_widths_of_vgg_are_the_golden_ones(name):
    layers, size, classes, golden = GOLDEN[name]
    layers = layers.split()
    fan_in, prefix, widths = 3, 0, []
    for layer, following in itertools.pairwise(layers):
        if layer == "M":
            continue
        c = int(layer)
        flops = 2 * 9 * fan_in * c * size * size
        prefix += 9 * fan_in * c + 2 * c  # convolution and BatchNorm
        size //= 2 if following == "M" else 1  # the head sits behind the pool
        widths.append(adaptive_width((c, size, size), classes, flops, prefix, kernel=1))
        fan_in = c
    assert widths == golden + [256] * (len(widths) - len(golden))


def test_a_wider_kernel_or_pool_never_gets_more_filters():
    arguments = ((128, 16, 16), 100, 2 * 9 * 128 * 128 * 16 * 16, 1_000_000)
    base = adaptive_width(*arguments, kernel=1)
    assert base > adaptive_width(*arguments, kernel=3)
    assert base > adaptive_width(*arguments, kernel=1, pool=4)
    assert adaptive_width((8, 32, 32), 10, 1, 1, kernel=3) == 32


def test_a_head_takes_half_the_flops_of_its_unit_and_a_tenth_of_the_parameters_and_no_more():
    shape, plenty = (64, 16, 16), 10**12
    flops = 2 * (64 * 64 * 16 * 16 + K * 64)  # of a 1x1 head with 64 filters
    parameters = 64 * 64 + 64 + K * 64 + K
    for spare, width in ((0, 64), (-1, 32)):
        assert adaptive_width(shape, K, 2 * flops + spare, plenty, kernel=1) == width
        assert adaptive_width(shape, K, plenty, 10 * parameters + spare, kernel=1) == width

"""Heads: the step against autograd of forward, bytes against a tracker, FLOPs against torch, widths by hand."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nf_engine.config import TrainConfig
from nf_engine.errors import ConfigError
from nf_engine.heads import (
    AuxiliaryHead,
    ModuleHead,
    adaptive_width,
    build_head,
    head_bytes,
    head_flops,
    head_parameters,
)
from nf_engine.local_step import make_optimizer
from nf_engine.ops import IGNORE_INDEX
from nf_engine.records import HeadSpec

SPECS = [
    HeadSpec("linear", pool=1),
    HeadSpec("linear", pool=2),
    HeadSpec("deep", pool=1, width=5, depth=1),
    HeadSpec("deep", pool=2, width=4, depth=2),
    HeadSpec("deep", pool=1, width=3, depth=3),
]
IDS = [f"{spec.kind} q{spec.pool}" + f" d{spec.depth}" * (spec.depth > 0) for spec in SPECS]
DEEP, DEEP_IDS = SPECS[2:], IDS[2:]
SHAPE, K, N = (3, 7, 6), 10, 9


@pytest.fixture(autouse=True)
def one_thread():
    """Maps this small are slower in two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(spec, *, smoothing=0.1, shape=SHAPE):
    """A head whose last layer and norms are as after some steps, so that gradients flow; h and labels."""
    g = torch.Generator().manual_seed(1)
    head = build_head(spec, shape, K, smoothing=smoothing, seed=3)
    with torch.no_grad():
        for p in (head.linear_weight, head.linear_bias):
            p.copy_(torch.randn(p.shape, generator=g))
        for norm in head.norms:
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                t.add_(torch.rand(t.shape, generator=g))
    return head, torch.randn(N, *shape, generator=g), torch.randint(K, (N,), generator=g)


def plain(head, shape=SHAPE):
    """The same head of torch's own modules, sharing nothing with it."""
    layers, (height, width) = [], shape[1:]
    for conv, norm in zip(head.convs, head.norms, strict=True):
        mine = nn.Conv2d(*conv.weight.shape[1::-1], 3, 1 if height == width == 1 else 2, 1, bias=False)
        mine.load_state_dict(conv.state_dict())
        layers += [mine, copy.deepcopy(norm), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    linear = nn.Linear(head.linear_weight.shape[1], K)
    linear.load_state_dict({"weight": head.linear_weight, "bias": head.linear_bias})
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(head.spec.pool), nn.Flatten(), linear)


def in_order(module):
    """Gradients of a plain head in the order of AuxiliaryHead.parameters()."""
    convs = [m.weight.grad for m in module if isinstance(m, nn.Conv2d)]
    norms = [g for m in module if isinstance(m, nn.BatchNorm2d) for g in (m.weight.grad, m.bias.grad)]
    return [module[-1].weight.grad, module[-1].bias.grad, *convs, *norms]


def gradients(head):
    return [p.grad.clone() for p in head.parameters()]


def close(found, expected, rtol=1e-4, atol=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# --- the step ---


@pytest.mark.parametrize("scaled", [False, True], ids=["mean", "scaled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_step_equals_autograd_through_forward_and_through_torchs_own_modules(spec, smoothing, scaled):
    head, h, labels = make(spec, smoothing=smoothing)
    labels[2] = IGNORE_INDEX
    twin, module = copy.deepcopy(head), plain(head)
    loss, dh = head.step(h.requires_grad_(), labels, torch.tensor(0.37) if scaled else None)
    assert not loss.requires_grad
    assert not dh.requires_grad
    assert h.grad is None
    assert loss.shape == ()

    for forward, grads_of in ((twin, gradients), (module, in_order)):
        leaf = h.detach().clone().requires_grad_()
        total = F.cross_entropy(forward(leaf), labels, label_smoothing=smoothing, reduction="sum" if scaled else "mean")
        total = total * 0.37 if scaled else total
        total.backward()
        close([loss, dh, *gradients(head)], [total.detach(), leaf.grad, *grads_of(forward)])
    for name, moved in head.named_buffers():
        assert torch.equal(moved, twin.get_buffer(name)), name
    for norm, mine in zip(head.norms, (m for m in module if isinstance(m, nn.BatchNorm2d)), strict=True):
        assert torch.equal(norm.running_mean, mine.running_mean)
        assert torch.equal(norm.running_var, mine.running_var)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_in_eval_mode_forward_uses_the_running_statistics_and_moves_nothing(spec):
    head, h, _ = make(spec)
    head.eval()
    before = copy.deepcopy(head.state_dict())
    close([head(h)], [plain(head).eval()(h)])
    close([head(h[:1])], [head(h)[:1]])  # a row depends on no other
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_second_step_adds_to_the_gradients(spec):
    head, h, labels = make(spec)
    head.step(h, labels)
    once = gradients(head)
    head.step(h, labels)
    close(gradients(head), [2 * g for g in once])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("spec", DEEP, ids=DEEP_IDS)
def test_a_layout_of_maps_or_weights_changes_no_update(spec, weights, optimizer):
    """A fused optimiser walks weight and gradient in the order of memory: their strides must be the same."""
    updated = []
    for maps in (torch.contiguous_format, torch.channels_last):
        head, h, labels = make(spec)
        head.to(memory_format=weights if maps == torch.channels_last else torch.contiguous_format)
        update = make_optimizer(head.parameters(), TrainConfig(optimizer=optimizer))
        for _ in "ab":
            head.step(h.to(memory_format=maps), labels)
        assert [p.grad.stride() for p in head.parameters()] == [p.stride() for p in head.parameters()]
        update.step()
        updated.append([p.detach().clone() for p in head.parameters()])
    close(*updated)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_batch_that_is_ignored_whole_changes_no_weight(spec):
    head, h, labels = make(spec)
    for scale in (None, torch.tensor(torch.inf)):
        loss, dh = head.step(h, torch.full_like(labels, IGNORE_INDEX), scale)
        for result in (loss, dh, *gradients(head)):
            assert not result.any()  # NaN counts as true


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_the_first_gradient_into_the_body_is_zero_and_the_first_loss_is_chance(spec):
    head = build_head(spec, SHAPE, K, smoothing=0.1, seed=3)
    h = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0))
    loss, dh = head.step(h, torch.arange(N))
    assert not dh.any()
    torch.testing.assert_close(loss, torch.tensor(float(K)).log())
    assert head.linear_bias.grad.any()  # but the head learns
    assert head.linear_weight.grad.any()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_weights_come_from_the_seed_and_leave_the_global_generator_alone(spec):
    state = torch.get_rng_state()
    first, same, other = (build_head(spec, (24, 8, 8), K, smoothing=0.1, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), same.parameters()))
    for conv, of_other in zip(first.convs, other.convs, strict=True):
        assert not torch.equal(conv.weight, of_other.weight)
        assert 0.8 < conv.weight.std() * (conv.weight[0].numel() / 2) ** 0.5 < 1.2


def test_filters_double_up_to_four_times_the_first_and_maps_halve_down_to_one_pixel():
    head = build_head(HeadSpec("deep", 1, 3, 5), (2, 5, 2), K, smoothing=0.0, seed=0)
    assert [(c.in_channels, c.out_channels, c.stride) for c in head.convs] == [
        (2, 3, (2, 2)),  # 5x2 -> 3x1
        (3, 6, (2, 2)),  # 2x1
        (6, 12, (2, 2)),  # 1x1
        (12, 12, (1, 1)),
        (12, 12, (1, 1)),
    ]


@pytest.mark.parametrize(
    ("spec", "shape", "pool"),
    [
        (HeadSpec("linear", 4), (3, 5, 1), 1),
        (HeadSpec("linear", 4), (3, 9, 3), 3),
        (HeadSpec("deep", 4, 5, 1), (3, 9, 5), 3),
        (HeadSpec("deep", 4, 5, 2), (3, 9, 5), 2),
        (HeadSpec("deep", 4, 5, 5), (3, 9, 5), 1),
    ],
    ids=str,
)
def test_the_pool_is_clipped_to_the_last_map(spec, shape, pool):
    head, h, labels = make(spec, shape=shape)
    assert head.spec.pool == pool
    assert head.step(h, labels)[1].shape == h.shape
    assert sum(p.numel() for p in head.parameters()) == head_parameters(spec, shape, K)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_bfloat16_maps_meet_float32_weights(spec):
    head, h, labels = make(spec, shape=(3, 16, 16))
    twin = copy.deepcopy(head)
    loss, dh = head.step(h.bfloat16(), labels)
    exact, exact_dh = twin.step(h.bfloat16().float(), labels)
    assert dh.dtype == torch.bfloat16
    assert head(h.bfloat16()).dtype == loss.dtype == torch.float32
    assert {p.grad.dtype for p in head.parameters()} == {torch.float32}
    torch.testing.assert_close(loss, exact, rtol=3e-2, atol=0)
    error = (dh.float() - exact_dh).norm() / exact_dh.norm()
    assert error < (0.2 if spec.depth else 3e-2)  # nine samples: a value near 0 may change its side


@pytest.mark.parametrize("spec", DEEP, ids=DEEP_IDS)
def test_a_frozen_weight_gets_no_gradient(spec):
    head, h, labels = make(spec)
    head.convs[0].weight.requires_grad_(False)
    head.norms[0].bias.requires_grad_(False)
    head.step(h, labels)
    frozen = [head.convs[0].weight, head.norms[0].bias]
    assert all((p.grad is None) == any(p is f for f in frozen) for p in head.parameters())


@pytest.mark.parametrize("spec", DEEP, ids=DEEP_IDS)
def test_a_norm_with_one_value_a_channel_is_refused_before_anything_moves(spec):
    head, h, labels = make(spec, shape=(3, 2, 2))
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="two values a channel"):
        head.step(h[:1], labels[:1])
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


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


BAD = [
    (HeadSpec("conv1x1", width=8), "linear, deep or classifier, got 'conv1x1'"),
    (HeadSpec("linear", pool=0), "pool >= 1"),
    (HeadSpec("deep", width=8), "width and depth >= 1"),
    (HeadSpec("deep", depth=2), "width and depth >= 1"),
    (HeadSpec("deep", 0, 8, 2), "pool >= 1"),
    (HeadSpec("classifier"), "pass it as classifier="),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=str)
def test_a_head_that_cannot_be_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_head(spec, SHAPE, K, smoothing=0.1, seed=0)


def test_an_auxiliary_head_is_not_the_classifier():
    with pytest.raises(ConfigError, match="use build_head"):
        AuxiliaryHead(HeadSpec("classifier"), *SHAPE, K, seed=0)


def test_the_cost_of_a_classifier_is_not_guessed():
    for cost in (head_flops, head_parameters, lambda *a: head_bytes(*a, batch=1)):
        with pytest.raises(ValueError, match="measure its module"):
            cost(HeadSpec("classifier"), SHAPE, K)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_forward_exports_for_any_batch(spec):
    head, h, _ = make(spec)
    head.eval()
    exported = torch.export.export(head, (h,), dynamic_shapes=({0: torch.export.Dim("n")},))
    for n in (1, 5, N):
        torch.testing.assert_close(exported.module()(h[:n]), head(h[:n]))


@pytest.mark.parametrize("shape", [SHAPE, (5, 4, 4), (3, 2, 9), (20, 1, 1)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_parameters_and_flops_are_those_of_the_head(spec, shape):
    head = build_head(spec, shape, K, smoothing=0.1, seed=0).eval()
    assert head_parameters(spec, shape, K) == sum(p.numel() for p in head.parameters())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        head(torch.zeros(1, *shape))
    assert head_flops(spec, shape, K) == counter.get_total_flops()


def test_parameters_and_flops_by_hand():
    spec, shape = HeadSpec("deep", 2, 16, 3), (8, 32, 32)
    assert head_parameters(spec, shape, K) == (
        9 * (8 * 16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + K * 64 * 4 + K  # convolutions, norms, linear
    )
    assert head_flops(spec, shape, K) == 2 * (
        9 * (8 * 16 * 16 * 16 + 16 * 32 * 8 * 8 + 32 * 64 * 4 * 4) + K * 64 * 4  # maps of 16, 8 and 4 pixels a side
    )


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


def tracked_bytes(spec, shape, classes, batch, dtype, layout=torch.contiguous_format, autograd=False):
    with FakeTensorMode():
        head = build_head(spec, shape, classes, smoothing=0.1, seed=0)
        h = torch.empty(batch, *shape, dtype=dtype).to(memory_format=layout)
        labels, scale = torch.empty(batch, dtype=torch.int64), torch.empty(())
        with Tracker() as tracker:
            if autograd:
                leaf = h.detach().requires_grad_()
                loss = F.cross_entropy(head(leaf), labels, label_smoothing=0.1)
                loss.backward()
            else:
                head.step(h, labels, scale)
    return tracker.peak


# (pool, width, depth), shape, classes, batch; a head of depth 0 is linear
CASES = [
    ((4, 0, 0), (64, 32, 32), K, 512),
    ((4, 0, 0), (64, 30, 30), K, 512),
    ((1, 0, 0), (64, 32, 32), K, 512),
    ((1, 0, 0), (64, 8, 8), 1000, 512),
    ((2, 0, 0), (16, 8, 8), 1000, 64),
    ((4, 0, 0), (512, 4, 4), 1000, 128),
    ((1, 64, 1), (64, 32, 32), K, 256),
    ((2, 64, 1), (64, 32, 32), K, 256),
    ((1, 32, 1), (128, 15, 15), 100, 256),
    ((1, 64, 2), (64, 32, 32), K, 512),
    ((2, 128, 2), (128, 16, 16), 100, 256),
    ((2, 16, 2), (64, 30, 30), K, 256),
    ((3, 16, 2), (64, 30, 30), K, 256),
    ((1, 64, 2), (4, 64, 64), K, 64),
    ((1, 32, 3), (64, 32, 32), K, 256),
    ((1, 128, 3), (512, 4, 4), 1000, 128),
    ((1, 64, 3), (512, 2, 2), K, 32),
    ((1, 16, 2), (16, 4, 4), 1000, 256),
]


def spec_of(pool, width, depth):
    return HeadSpec("deep" if depth else "linear", pool, width, depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "shape", "classes", "batch"), CASES, ids=str)
def test_bytes_of_a_step_are_the_tracked_ones(kind, shape, classes, batch, dtype):
    spec = spec_of(*kind)
    predicted = head_bytes(spec, shape, classes, batch, dtype.itemsize)
    assert predicted == pytest.approx(tracked_bytes(spec, shape, classes, batch, dtype), rel=0.02)
    last = tracked_bytes(spec, shape, classes, batch, dtype, layout=torch.channels_last)
    features = batch * (head_parameters(spec, shape, classes) - head_parameters(spec, shape, classes - 1))
    assert 0.98 * predicted < last < 1.02 * predicted + 4 * (head_parameters(spec, shape, classes) + features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "shape", "classes", "batch"), CASES, ids=str)
def test_a_step_takes_no_more_bytes_than_autograd(kind, shape, classes, batch, dtype):
    arguments = (spec_of(*kind), shape, classes, batch, dtype)
    head, plain = tracked_bytes(*arguments), tracked_bytes(*arguments, autograd=True)
    casts = 2 * (head_parameters(*arguments[:3]) + batch * math.prod(shape) // 32) if dtype == torch.bfloat16 else 0
    assert head <= 1.01 * plain + casts
    if kind == (1, 0, 0) and classes == K:
        assert head < plain / 100


def test_bytes_of_the_fused_path_by_hand():
    mib, n = 2**20, 1024
    x = 2 * n * 64 * 32 * 32  # 128 MiB
    tail = 4 * (n * 64 * 2 + n * K + n)  # features and their gradient, gradient of the logits, loss
    linear = 4 * K * (64 + 1)
    small = tail + linear
    assert head_bytes(HeadSpec("linear", 1), (64, 32, 32), K, n, 2, "fused") == small + 2 * n * 64
    wide = 4 * (n * 1024 * 2 + n * K + n) + 4 * K * (1024 + 1)
    assert head_bytes(HeadSpec("linear", 4), (64, 32, 32), K, n, 2, "fused") == wide + x

    # Maps of 32 filters at 16x16 (16 MiB) and 64 at 8x8 (8 MiB); the peak is dx beside the first ds, no other map lives
    spec = HeadSpec("deep", 1, 32, 2)
    weights = 9 * 64 * 32 + 9 * 32 * 64
    gradients = 4 * (weights + 2 * 32 + 2 * 64) + linear
    casts = 2 * 9 * 64 * 32 * 2  # of the first weight, and of its gradient
    assert head_bytes(spec, (64, 32, 32), K, n, 2, "fused") == x + 16 * mib + tail + gradients + casts

    # h (4, 8, 8) is small: the peak is the second convolution's backward, from ds at 2x2 to dx at 4x4 beside s and y
    spec, n = HeadSpec("deep", 1, 64, 2), 4096
    maps = 4 * n * (3 * 64 * 4 * 4 + 128 * 2 * 2)
    tail = 4 * (n * 128 * 2 + n * K + n) + 4 * K * (128 + 1)
    gradients = 4 * (9 * 64 * 128 + 2 * 128)
    assert head_bytes(spec, (4, 8, 8), K, n, 4, "fused") == maps + tail + gradients

    # a last map that is pooled to 2x2 is written, 512 filters at 4x4, and so is its gradient
    spec = HeadSpec("deep", 2, 512, 1)
    tail = 4 * (n * 2048 * 2 + n * K + n) + 4 * K * (2048 + 1)
    assert head_bytes(spec, (16, 8, 8), K, n, 4, "fused") == 3 * 4 * n * 512 * 4 * 4 + tail


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


def test_a_head_takes_an_eighth_of_the_flops_and_of_the_weights_of_the_network_and_no_more():
    shape, plenty = (64, 16, 16), 10**12
    flops = 2 * (
        9 * 64 * 64 * 8 * 8 + K * 64
    )  # of one convolution to 64 filters at half the size, and the linear layer
    parameters = 9 * 64 * 64 + 2 * 64 + K * 64 + K
    for spare, width in ((0, 64), (-1, 32)):
        assert adaptive_width(HeadSpec("deep", 1, depth=1), shape, K, 8 * flops + spare, plenty) == width
        assert adaptive_width(HeadSpec("deep", 1, depth=1), shape, K, plenty, 8 * parameters + spare) == width
    flops = 2 * (9 * 64 * 32 * 8 * 8 + 9 * 32 * 64 * 4 * 4 + K * 64)
    assert adaptive_width(HeadSpec("deep", 1, depth=2), shape, K, 8 * flops, plenty) == 32
    assert adaptive_width(HeadSpec("deep", 1, depth=2), shape, K, 8 * flops - 1, plenty) == 16


@pytest.mark.parametrize(("channels", "widths"), [(256, [1024, 512, 256, 128, 64]), (24, [96, 48, 24, 16]), (3, [16])])
def test_widths_follow_the_channels_and_grow_with_what_the_network_costs(channels, widths):
    assert adaptive_width(HeadSpec("deep", 1, depth=2), (channels, 8, 8), K, 0, 0) == widths[-1]
    for plenty in ((10**12, None), (None, 10**12)):
        found = []
        for cost in (int(1.3**k) for k in range(90)):
            flops, prefix = (cost if given is None else given for given in plenty)
            by_depth = [
                adaptive_width(HeadSpec("deep", 1, depth=d), (channels, 8, 8), K, flops, prefix) for d in (1, 2, 3)
            ]
            assert by_depth == sorted(by_depth, reverse=True)
            found.append(by_depth[1])
        assert found == sorted(found)
        assert sorted(set(found), reverse=True) == widths

"""The heads on a CUDA device: the kernels against float64 autograd, and what only a device can show of them."""

from __future__ import annotations

import copy
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
import nf_engine
from nf_engine import fused, ops
from nf_engine.config import TrainConfig
from nf_engine.heads import AuxiliaryHead, head_bytes
from nf_engine.kernels import linear_ce, norm_relu, tiles
from nf_engine.kernels.norm_relu import norm_relu_backward_, norm_relu_forward
from nf_engine.kernels.pool import pool_backward, pool_forward
from nf_engine.local_step import Unit, local_step, make_optimizer
from nf_engine.models import build
from nf_engine.ops import IGNORE_INDEX
from nf_engine.records import HeadSpec
from nf_engine.sources import load_split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32"),
]

DEVICE = "cuda"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECS = [
    HeadSpec("linear", 1),
    HeadSpec("linear", 2),
    HeadSpec("linear", 4),
    HeadSpec("deep", 4, 64, 1),
    HeadSpec("deep", 1, 32, 2),
]
REAL = [(256, (64, 32, 32), 10), (512, (256, 8, 8), 100), (64, (512, 2, 2), 10), (32, (64, 56, 56), 1000)]
SMALL, K = (24, 7, 9), 7  # off the powers of two that tiles are made of; windows overlap
N = 37
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, astuple(s))))


@pytest.fixture(autouse=True)
def exact_and_repeatable_convolutions(monkeypatch):
    """Those of cuDNN: float32 without TF32, and no algorithm that adds in a random order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def make(spec, shape=SMALL, classes=K):
    head = AuxiliaryHead(spec, *shape, classes, seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in head.parameters():  # the linear layer starts at zero: nothing would come through it
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return head.to(DEVICE)


def batch(n=N, shape=SMALL, classes=K, dtype=torch.float32, layout="nchw", seed=3):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    h = torch.randn(n, *shape, generator=generator, device=DEVICE) + 0.5
    labels = torch.randint(classes, (n,), generator=generator, device=DEVICE)
    return h.to(dtype).contiguous(memory_format=LAYOUTS[layout]), labels


def mean_of(labels, times=1.0):
    return times / (labels != IGNORE_INDEX).sum()


def moved(head):
    return {name: b for name, b in head.named_buffers() if "running" in name}


def results(head, h, labels, scale=None):
    """Loss, dh, gradients and running statistics of one step, by name."""
    loss, dh = head.step(h, labels, scale)
    return {"loss": loss, "dh": dh} | {f"d {n}": p.grad for n, p in head.named_parameters()} | moved(head)


def by_autograd(head, h, labels, scale):
    """The same by torch alone; in float64 where head and h are."""
    leaf = h.detach().clone().requires_grad_()
    loss = F.cross_entropy(head(leaf), labels, label_smoothing=0.1, reduction="sum") * scale
    loss.backward()
    found = {"loss": loss.detach(), "dh": leaf.grad}
    return found | {f"d {n}": p.grad for n, p in head.named_parameters()} | moved(head)


def arguments(head, h, labels, scale):
    """Of ops.head_step, which gives the loss of each row."""
    given = {"x": h, "params": head._params(), "labels": labels, "scale": scale, "running": head._running()}
    return given | {"pool": head.spec.pool, "smoothing": 0.1}


def distance(found, truth):
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-9))


def floor(spec, dtype):
    """Relative L2 that rounding alone may cost."""
    if spec.kind == "deep":
        return 3e-3  # a mask of the ReLU that rounding flips is worth about 1e-3, in float32 too
    return 1e-4 if dtype == torch.float32 else 1e-3


def assert_near(found, truth, own, least):
    """No further from the truth than twice torch's own step in the same dtype."""
    for name, value in found.items():
        limit = 2 * distance(own[name], truth[name]) + least
        assert distance(value, truth[name]) <= limit, f"{name}: {distance(value, truth[name]):.1e} > {limit:.1e}"


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# --- the path ---


@dtypes
def test_heads_on_a_gpu_take_the_kernels(dtype):
    assert ops.head_path(torch.device(DEVICE, 0), dtype) == ("fused", "Triton")


def test_the_environment_keeps_the_reference(monkeypatch):
    monkeypatch.setenv("NF_KERNELS", "off")
    ops.head_path.cache_clear()
    try:
        assert ops.head_path(torch.device(DEVICE, 0)) == ("reference", "NF_KERNELS=off")
    finally:
        ops.head_path.cache_clear()


# --- values ---


@layouts
@dtypes
@pytest.mark.parametrize(("n", "shape", "classes"), REAL, ids=[f"{s[0]}@{s[1]} N{n} K{k}" for n, s, k in REAL])
@specs
def test_a_step_at_real_sizes_is_as_near_to_float64_as_torchs_own(spec, n, shape, classes, dtype, layout):
    head, (h, labels) = make(spec, shape, classes), batch(n, shape, classes, dtype, layout)
    scale = mean_of(labels, 1024.0 if dtype == torch.float16 else 1.0)
    given = h.clone()
    truth = by_autograd(copy.deepcopy(head).double(), h.double(), labels, scale.double())
    own = by_autograd(copy.deepcopy(head), h, labels, scale)
    found = results(head, h, labels, scale)
    assert torch.equal(h, given), "h is only read"
    assert (found["dh"].dtype, found["dh"].shape) == (h.dtype, h.shape)
    assert_near(found, truth, own, floor(spec, dtype))


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@layouts
@dtypes
@specs
def test_rows_that_are_ignored_count_for_nothing(spec, dtype, layout, ignored):
    head, (h, labels) = make(spec), batch(dtype=dtype, layout=layout)
    labels[{"none": slice(0), "some": slice(0, None, 3), "all": slice(None)}[ignored]] = IGNORE_INDEX
    truth, own = copy.deepcopy(head).double(), copy.deepcopy(head)
    found = results(head, h, labels)  # scale is 1 / 0 where all are ignored
    if ignored == "all":
        assert not any(value.any() for name, value in found.items() if "running" not in name)  # NaN counts as true
        return
    scale = mean_of(labels)
    truth = by_autograd(truth, h.double(), labels, scale.double())
    assert_near(found, truth, by_autograd(own, h, labels, scale), 2 * floor(spec, dtype))
    if spec.kind == "linear":
        assert not found["dh"][labels == IGNORE_INDEX].any()


@pytest.mark.parametrize("classes", [7, 100, 1000])
@layouts
def test_labels_that_start_inside_a_tensor_are_read_right(layout, classes):
    """8 bytes off the 16 that a compiler may count on."""
    h, whole = batch(N + 1, classes=classes, layout=layout)
    inside, alone = whole[1:], whole[1:].clone()
    assert (inside.data_ptr() % 16, alone.data_ptr() % 16) == (8, 0)
    for spec in SPECS:
        head = make(spec, classes=classes)
        twin = copy.deepcopy(head)
        assert_same_bits(results(head, h[1:], inside), results(twin, h[1:], alone))


@pytest.mark.parametrize("classes", [7, 100, 1000])
@layouts
@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda s: f"q{s.pool}")
def test_a_wrong_label_or_a_nan_spoils_its_own_row_alone(spec, layout, classes):
    head, (h, labels) = make(spec, classes=classes), batch(classes=classes, layout=layout)
    scale = mean_of(labels)
    clean = ops.head_step(**arguments(head, h, labels, scale))
    bad = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    for row, label in ((0, classes), (5, -1), (11, 2**40), (N - 1, 1 - 2**31)):
        labels[row], bad[row] = label, True
    h[17, 3, 2, 4], bad[17] = torch.nan, True
    step = ops.head_step(**arguments(head, h, labels, scale))
    assert torch.equal(step.loss_rows.isnan(), bad)
    assert torch.equal(step.loss_rows[~bad], clean.loss_rows[~bad])
    assert step.dx[bad].isnan().all()
    assert torch.equal(step.dx[~bad], clean.dx[~bad])
    assert step.grads.bl.isnan().all()


@layouts
@pytest.mark.parametrize("spec", SPECS[3:], ids=lambda s: f"d{s.depth}")
def test_a_nan_in_one_sample_passes_through_the_norms_to_every_row(spec, layout):
    head, (h, labels) = make(spec), batch(layout=layout)
    h[17, 3, 2, 4] = torch.nan
    step = ops.head_step(**arguments(head, h, labels, mean_of(labels)))
    for value in (step.loss_rows, step.dx, *step.grads.convs, step.grads.wl, *head._running().means):
        assert value.isnan().all()


# --- the same bits ---


@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")  # said of cuBLAS, whose order is fixed here
@layouts
@dtypes
@specs
def test_a_second_run_gives_the_same_bits_and_leaves_nothing_unwritten(spec, dtype, layout):
    head, (h, labels) = make(spec, (64, 32, 32)), batch(256, (64, 32, 32), dtype=dtype, layout=layout)
    twin = copy.deepcopy(head)
    once = results(head, h, labels)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        again = results(twin, h, labels)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(again, once)


WARPS = [(SPECS[2], 10), (SPECS[1], 30), (SPECS[2], 60), (SPECS[0], 100), (SPECS[0], 256), (SPECS[0], 1000)]
WARPS += [(spec, 10) for spec in SPECS[3:]]


@layouts
@dtypes
@pytest.mark.parametrize(("spec", "classes"), WARPS, ids=lambda v: f"{v.kind}-q{v.pool}" if v in SPECS else f"K{v}")
def test_four_and_eight_warps_agree(spec, classes, dtype, layout, monkeypatch):
    """Programs have been miscompiled at eight alone."""
    h, labels = batch(96, (64, 13, 15), classes, dtype, layout)
    found = []
    for warps in (4, 8):
        for table in (tiles.POOL, tiles.LINEAR):
            for key, rows in table.items():
                monkeypatch.setitem(table, key, (rows[0]._replace(num_warps=warps),))
        monkeypatch.setattr(linear_ce, "ROWS", (tiles.ROWS[0]._replace(num_warps=warps),))
        monkeypatch.setattr(norm_relu, "WARPS", warps)
        found.append(results(make(spec, (64, 13, 15), classes), h, labels))
    for name, value in found[0].items():
        assert distance(found[1][name], value.double()) <= floor(spec, dtype), name


@layouts
@dtypes
@specs
def test_a_captured_step_replays_on_new_data_with_the_bits_of_an_eager_one(spec, dtype, layout):
    head, (h, labels) = make(spec), batch(dtype=dtype, layout=layout)
    twin, start = copy.deepcopy(head), copy.deepcopy(head.state_dict())
    new_h, new_labels = batch(dtype=dtype, layout=layout, seed=4)
    new_labels[::3] = IGNORE_INDEX
    expected = results(twin, new_h, new_labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is loaded at first use is loaded before the capture
        head.step(h, labels)
    torch.cuda.current_stream().wait_stream(side)
    head.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(head, h, labels)
    head.load_state_dict(start)
    h.copy_(new_h)
    labels.copy_(new_labels)
    graph.replay()
    assert_same_bits(found, expected)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@layouts
@specs
def test_a_compiled_step_gives_the_bits_of_an_eager_one(spec, layout):
    head, (h, labels) = make(spec), batch(layout=layout)
    start, scale = copy.deepcopy(head.state_dict()), mean_of(labels)
    torch._dynamo.reset()

    def around(x, **given):
        step = ops.head_step(x * 2, **given)
        return [step.loss_rows, step.dx * 2, *step.grads.flat()]

    found = []
    for call in (around, torch.compile(around, fullgraph=True)):
        head.load_state_dict(start)
        found.append([*call(**arguments(head, h, labels, scale)), *(b.clone() for b in moved(head).values())])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(compiled, eager)


# --- the device ---


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@layouts
@dtypes
@specs
def test_a_step_never_waits_for_the_device(spec, dtype, layout):
    head, (h, labels) = make(spec), batch(dtype=dtype, layout=layout)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, SMALL[0], 3, padding=1), torch.nn.BatchNorm2d(SMALL[0]))
    unit = Unit("unit", [body.to(DEVICE), torch.nn.ReLU()], make(spec))
    unit.optimizer = make_optimizer(unit.parameters(), TrainConfig())
    images, _ = batch(shape=(3, *SMALL[1:]), layout=layout)
    for mode in ("default", "error"):  # what is loaded at first use may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            head.step(h, labels)
            local_step(unit, images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def peak_of(call):
    """Bytes that a call takes at most beyond those there before, its results among them; and the results."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    return torch.cuda.max_memory_allocated() - before, kept


@layouts
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@specs
def test_the_peak_of_a_step_is_the_closed_form(spec, dtype, layout, monkeypatch):
    n, shape = 1024, (64, 32, 32)
    head, (h, labels) = make(spec, shape), batch(n, shape, dtype=dtype, layout=layout)
    workspaces = [0]

    def measured(convolution):
        def call(*args):
            before = torch.cuda.memory_allocated()
            peak, result = peak_of(lambda: convolution(*args))
            workspaces.append(peak - (torch.cuda.memory_allocated() - before))
            return result

        return call

    with monkeypatch.context() as patch:  # the first step: cuBLAS takes its own workspace, and keeps it
        patch.setattr(fused, "conv", measured(fused.conv))
        patch.setattr(fused, "conv_backward", measured(fused.conv_backward))
        head.step(h, labels)
    head.zero_grad(set_to_none=True)
    peak, _ = peak_of(lambda: head.step(h, labels))
    form = head_bytes(spec, shape, K, n, h.element_size(), "fused")
    rounding = 2 * 2**20  # of the allocator
    allowed = 1.05 * form + rounding + max(workspaces)
    assert peak <= allowed, f"{peak:,} bytes, closed form {form:,}, workspace of cuDNN {max(workspaces):,}"


@layouts
def test_maps_of_more_than_2_to_the_31_elements(layout):
    """Offsets that wrap around would spoil the first samples, or miss the last."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    n, c, side = 2**15 + 33, 64, 32
    x = torch.empty(n, c, side, side, device=DEVICE, dtype=torch.bfloat16, memory_format=LAYOUTS[layout])
    x.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    assert x[:-33].numel() == 2**31

    ends = [slice(0, 32), slice(-48, None)]
    pooled = pool_forward(x, 4)
    dx = pool_backward(pooled, x)
    for end in ends:
        few = pooled[end].view(-1, c, 4, 4)
        torch.testing.assert_close(few, F.adaptive_avg_pool2d(x[end].float(), 4), rtol=1e-4, atol=1e-5)
        expected = (few / 64).repeat_interleave(8, 2).repeat_interleave(8, 3)
        torch.testing.assert_close(dx[end].float(), expected, rtol=1e-2, atol=1e-6)
    del dx, pooled

    gamma, beta = torch.full((c,), 0.7, device=DEVICE), torch.full((c,), 0.2, device=DEVICE)
    running = torch.zeros(c, device=DEVICE), torch.ones(c, device=DEVICE)
    y, mean, rstd = norm_relu_forward(x, gamma, beta, *running, momentum=0.1, eps=1e-5, pool=False)
    parts = x.split(1024)
    count = x.numel() // c
    exact = sum(p.double().sum((0, 2, 3)) for p in parts) / count
    variance = sum((p.double() - exact.view(-1, 1, 1)).square().sum((0, 2, 3)) for p in parts) / count
    torch.testing.assert_close(mean, exact.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rstd, (variance + 1e-5).rsqrt().float(), rtol=1e-4, atol=0)
    wide = [v.view(-1, 1, 1) for v in (mean, rstd)]
    xhat = [(x[end].float() - wide[0]) * wide[1] for end in ends]
    z = [0.7 * part + 0.2 for part in xhat]
    for end, part in zip(ends, z, strict=True):
        torch.testing.assert_close(y[end].float(), part.relu(), rtol=1e-2, atol=1e-5)

    dy = [y[end].float() for end in ends]
    dgamma, dbeta = norm_relu_backward_(x, y, gamma, beta, mean, rstd, pool=False)
    means = [v.view(-1, 1, 1) / count for v in (dbeta, dgamma)]
    for k, end in enumerate(ends):
        ds = 0.7 * wide[1] * (dy[k] * (z[k] > 0) - means[0] - xhat[k] * means[1])
        assert distance(x[end], ds.double()) <= 1e-2


# --- a training ---


def test_a_training_ends_near_one_on_the_reference_path(tmp_path, monkeypatch):
    train, test = load_split("synthetic:1200")
    ended = {}
    for path, switch in (("fused", "on"), ("reference", "off")):
        monkeypatch.setenv("NF_KERNELS", switch)
        ops.head_path.cache_clear()
        torch.manual_seed(0)  # of the model's weights
        result = nf_engine.train(
            build("vgg11", width=0.25),
            train,
            test,
            memory_budget="512MiB",
            partition="layerwise",
            head="deep",
            batch_size=32,
            lr=0.02,
            epochs=2,
            device=DEVICE,
            progress="none",
            output_dir=tmp_path / path,
        )
        *units, last = result.plan.units
        assert {(u.head.kind, u.path) for u in units} == {("deep", path)}
        assert last.head.kind == "classifier"
        ended[path] = [loss for line in result.history if line["epoch"] == 1 for loss in line["train/loss"]]
    ops.head_path.cache_clear()
    assert ended["fused"] == pytest.approx(ended["reference"], rel=0.02)
    assert min(ended["fused"]) < 1.5  # chance is 2.3

"""The head's step without autograd, against float64 autograd of the same head written with torch's own layers."""

import pytest
import torch
import torch.nn.functional as F

from nf_engine import reference
from nf_engine.records import HeadSpec
from nf_engine.reference import IGNORE_INDEX, HeadParams

SPECS = [HeadSpec("linear"), HeadSpec("conv1x1", width=5), HeadSpec("conv3x3", width=5)]
KIND = [spec.kind for spec in SPECS]
# (H, W, q): windows that divide the map, that overlap in one or both directions, and a map of one pixel
MAPS = [(8, 8, 4), (8, 4, 2), (7, 7, 4), (7, 7, 2), (5, 3, 2), (4, 6, 4), (9, 7, 1), (1, 1, 1)]
# Norm of the difference relative to the norm of the result: where sums cancel, single values lose more. bfloat16
# carries 8 bits, and dx and the convolution's gradient a few roundings of them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
CLASSES = 7


@pytest.fixture(autouse=True)
def one_thread():
    """Maps this small are slower in two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(spec, n, c, h, w, q, dtype=torch.float64, layout=torch.contiguous_format, ignored=0):
    g = torch.Generator().manual_seed(1000 * h + 10 * w + q)
    wide = torch.promote_types(dtype, torch.float32)
    kernel, filters = reference.KERNELS[spec.kind], spec.width or c
    x = torch.randn(n, c, h, w, generator=g, dtype=torch.float64).to(dtype).to(memory_format=layout)
    wl = torch.randn(CLASSES, filters * q * q, generator=g, dtype=wide)
    bl = torch.randn(CLASSES, generator=g, dtype=wide)
    wc = torch.randn(filters, c, kernel, kernel, generator=g, dtype=wide) / c**0.5 if kernel else None
    bc = torch.randn(filters, generator=g, dtype=wide) if kernel else None
    labels = torch.randint(CLASSES, (n,), generator=g)
    labels[:ignored] = IGNORE_INDEX
    scale = torch.rand((), generator=g, dtype=wide) + 0.1  # not one: a step that forgets it must fail
    return x, HeadParams(wc, bc, wl, bl), labels, scale, HeadSpec(spec.kind, pool=q, width=spec.width)


def exact(x, params, labels, scale, q, smoothing):
    """loss_rows, dx and gradients by float64 autograd."""
    leaf, wc, bc, wl, bl = (None if t is None else t.double().clone().requires_grad_() for t in (x, *params))
    h = leaf if wc is None else F.relu(F.conv2d(leaf, wc, bc, padding=wc.shape[2] // 2))
    logits = F.linear(F.adaptive_avg_pool2d(h, q).flatten(1), wl, bl)
    rows = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    (rows.sum() * scale.double()).backward()
    return rows.detach(), leaf.grad, [None if p is None else p.grad for p in (wc, bc, wl, bl)]


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm()
    assert error <= tolerance * max(expected.double().norm().item(), 1e-3), f"error {error}, norm {expected.norm()}"


def assert_step_is_exact(step, truth, tolerance):
    rows, dx, grads = truth
    assert_near(step.loss_rows, rows, tolerance)
    assert_near(step.dx, dx, tolerance)
    for found, expected in zip(step.grads, grads, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert_near(found, expected, tolerance)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (37, 10), (5, 1000), (3, 1)])
def test_cross_entropy_rows_match_torch(n, k, smoothing):
    logits = (5 * torch.randn(n, k, generator=torch.Generator().manual_seed(k))).requires_grad_()
    labels = torch.arange(n) % k
    labels[n // 2] = IGNORE_INDEX
    loss, dlogits = reference.cross_entropy_rows(logits.detach(), labels, smoothing)

    leaf = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(leaf, labels, reduction="none", label_smoothing=smoothing)
    expected.sum().backward()
    assert loss.dtype == dlogits.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlogits, leaf.grad.float(), rtol=1e-6, atol=1e-6)


def test_huge_and_infinite_logits_give_what_torch_gives():
    logits = torch.tensor([[1e30, -1e30, 0.0], [0.0, -torch.inf, 1.0], [88.0, 89.0, 90.0]])
    labels = torch.tensor([0, 2, 1])
    loss, dlogits = reference.cross_entropy_rows(logits, labels, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.isfinite(dlogits).all()


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_a_label_out_of_range_makes_its_own_row_nan_and_no_other(wrong):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, wrong, 6, IGNORE_INDEX])
    loss, dlogits = reference.cross_entropy_rows(logits, labels, 0.1)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert dlogits.isnan().any(1).tolist() == [False, True, False, False]
    right = torch.tensor([0, 2])
    expected = F.cross_entropy(logits[right], labels[right], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss[right], expected)


@pytest.mark.parametrize(("h", "w", "q"), MAPS)
@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_the_step_matches_float64_autograd(spec, h, w, q, poisoned):
    x, params, labels, scale, spec = make(spec, 6, 3, h, w, q, ignored=1)
    for smoothing in (0.0, 0.1):
        truth = exact(x, params, labels, scale, q, smoothing)
        for chunks in (1, 2, 3, 8, 32):
            step = reference.head_step(x, params, labels, scale, spec=spec, smoothing=smoothing, chunks=chunks)
            assert_step_is_exact(step, truth, TOLERANCE[torch.float64])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("h", "w", "q"), [(12, 12, 4), (7, 7, 2), (16, 16, 1)])
@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_the_step_keeps_its_precision_dtype_and_layout(spec, h, w, q, dtype, layout, poisoned):
    x, params, labels, scale, spec = make(spec, 9, 6, h, w, q, dtype, layout)
    rounded = params if params.wc is None else params._replace(wc=params.wc.to(dtype), bc=params.bc.to(dtype))
    truth = exact(x, rounded, labels, scale, q, 0.1)
    before = x.clone()
    for chunks in (1, 4):
        step = reference.head_step(x, params, labels, scale, spec=spec, smoothing=0.1, chunks=chunks)
        assert_step_is_exact(step, truth, TOLERANCE[dtype])
        assert step.loss_rows.dtype == torch.float32
        assert {g.dtype for g in step.grads if g is not None} == {torch.float32}
        assert step.dx.dtype == dtype
        assert step.dx.stride() == x.stride()
        assert step.dx.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(x, before)


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
@pytest.mark.parametrize(("h", "q"), [(8, 4), (7, 2)])
def test_chunks_change_no_more_than_the_last_bits(spec, h, q):
    x, params, labels, scale, spec = make(spec, 40, 6, h, h, q, torch.float32, ignored=3)
    whole = reference.head_step(x, params, labels, scale, spec=spec, smoothing=0.1)
    for chunks in (2, 3, 8, 32, 100):
        parts = reference.head_step(x, params, labels, scale, spec=spec, smoothing=0.1, chunks=chunks)
        assert_step_is_exact(parts, (whole.loss_rows, whole.dx, whole.grads), 1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_ignored_rows_add_exactly_nothing(spec):
    x, params, labels, scale, spec = make(spec, 6, 3, 6, 6, 2, ignored=2)
    step = reference.head_step(x, params, labels, scale, spec=spec, smoothing=0.1)
    alone = reference.head_step(x[2:], params, labels[2:], scale, spec=spec, smoothing=0.1)
    assert not step.loss_rows[:2].any()
    assert not step.dx[:2].any()
    assert_step_is_exact(alone, (step.loss_rows[2:], step.dx[2:], step.grads), 1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_a_batch_that_is_ignored_whole_gives_zeros_although_scale_is_infinite(spec):
    x, params, labels, _, spec = make(spec, 6, 3, 6, 6, 2, torch.float32, ignored=6)
    step = reference.head_step(x, params, labels, torch.tensor(torch.inf), spec=spec, smoothing=0.1, chunks=2)
    for result in (step.loss_rows, step.dx, *(g for g in step.grads if g is not None)):
        assert not result.any()  # NaN counts as true


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_an_empty_batch_gives_empty_rows_and_zero_gradients(spec):
    x, params, labels, scale, spec = make(spec, 0, 3, 6, 6, 2, torch.float32)
    step = reference.head_step(x, params, labels, scale, spec=spec, smoothing=0.1, chunks=4)
    assert step.loss_rows.shape == (0,)
    assert step.dx.shape == x.shape
    assert not any(g.any() for g in step.grads if g is not None)
    assert reference.head_logits(x, params, spec=spec, chunks=4).shape == (0, CLASSES)


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_a_strided_or_expanded_x_is_read_rightly(spec):
    big, params, labels, scale, spec = make(spec, 8, 3, 16, 8, 2)
    for x, y in ((big[::2, :, ::2], labels[::2]), (big[:1, :, :8].expand(4, -1, -1, -1), labels[:4])):
        step = reference.head_step(x, params, y, scale, spec=spec, smoothing=0.1, chunks=2)
        assert_step_is_exact(step, exact(x, params, y, scale, 2, 0.1), 1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_the_same_inputs_give_the_same_bits(spec):
    x, params, labels, scale, spec = make(spec, 32, 8, 16, 16, 4, torch.float32)
    first, second = (reference.head_step(x, params, labels, scale, spec=spec, smoothing=0.1, chunks=4) for _ in "ab")
    for a, b in zip((*first[:2], *first.grads), (*second[:2], *second.grads), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=KIND)
def test_logits_match_float64_in_any_number_of_chunks(spec):
    x, params, *_, spec = make(spec, 6, 3, 7, 5, 2, torch.float32)
    wc, bc, wl, bl = (None if p is None else p.double() for p in params)
    h = x.double() if wc is None else F.relu(F.conv2d(x.double(), wc, bc, padding=wc.shape[2] // 2))
    expected = F.linear(F.adaptive_avg_pool2d(h, 2).flatten(1), wl, bl)
    for chunks in (1, 4, 32):
        logits = reference.head_logits(x, params, spec=spec, chunks=chunks)
        assert logits.dtype == torch.float32
        assert_near(logits, expected, 1e-6)

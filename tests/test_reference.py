"""The head's step without autograd, against float64 autograd of the same head written with torch's own layers."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nf_engine import reference
from nf_engine.reference import IGNORE_INDEX, HeadParams, Statistics

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# (H, W, q): windows that divide the map, that overlap in one or both directions, maps as large as q, and one pixel
MAPS = [(8, 8, 4), (8, 4, 2), (7, 7, 4), (7, 7, 2), (5, 3, 2), (4, 6, 4), (7, 8, 3), (6, 9, 3), (9, 7, 1), (8, 8, 1),
        (4, 4, 4), (1, 1, 1)]  # fmt: skip
# (H, W, q, d): halved evenly and unevenly, to one row and to one pixel
DEEP = [(8, 8, 1, 1), (8, 8, 2, 1), (7, 5, 2, 1), (8, 8, 2, 2), (9, 7, 1, 2), (9, 9, 2, 2), (8, 8, 1, 3), (16, 9, 2, 3),
        (2, 2, 1, 3), (5, 1, 1, 2)]  # fmt: skip
HEADS = [(8, 8, 1, 0), (8, 8, 4, 0), (7, 7, 2, 0), (8, 8, 1, 1), (9, 9, 2, 2), (12, 8, 1, 3)]
# Norm of the difference relative to the norm of the result: where sums cancel, single values lose more. The half types
# carry 8 and 11 bits; behind each norm of a deep head the map is rounded, and a value near 0 may change its side.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DEEP_TOLERANCE = TOLERANCE | {torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 1e-2}
CLASSES, CHANNELS = 7, 3


@pytest.fixture(autouse=True)
def one_thread():
    """Maps this small are slower in two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(n, h, w, q, depth, dtype=torch.float64, layout=torch.contiguous_format, ignored=0):
    """Arguments of a step by name, all random; a head of depth 0 is linear."""
    g = torch.Generator().manual_seed(1000 * h + 100 * w + 10 * q + depth)
    wide = torch.promote_types(dtype, torch.float32)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=wide)

    x = (randn(n, CHANNELS, h, w) + 0.5).to(dtype).to(memory_format=layout)
    widths = [CHANNELS, 4, 6, 5][: depth + 1]
    convs = tuple(randn(f, c, 3, 3) / (9 * c) ** 0.5 for c, f in itertools.pairwise(widths))
    gammas, betas = tuple(1 + randn(f) / 4 for f in widths[1:]), tuple(randn(f) / 4 for f in widths[1:])
    running = Statistics(tuple(randn(f) for f in widths[1:]), tuple(randn(f) ** 2 for f in widths[1:]))
    labels = torch.randint(CLASSES, (n,), generator=g)
    labels[:ignored] = IGNORE_INDEX
    return {
        "x": x,
        "params": HeadParams(convs, gammas, betas, randn(CLASSES, widths[-1] * q * q), randn(CLASSES)),
        "running": running,
        "labels": labels,
        "scale": torch.rand((), generator=g, dtype=wide) + 0.1,  # not one: a step that forgets it must fail
        "pool": q,
        "smoothing": 0.1,
    }


def step(given, **changed):
    """One step on a copy of the statistics; returns it and the statistics it moved."""
    given = {**given, **changed}
    running = copy.deepcopy(given["running"])
    with torch.no_grad():
        return reference.head_step(**(given | {"running": running})), running


def plain(given, dtype=torch.float64):
    """The same head of torch's own layers, in `dtype`, its convolutions rounded as the step rounds them."""
    params, running, (height, width) = given["params"], given["running"], given["x"].shape[2:]
    layers = []
    for weight, *norm in zip(*params[:3], *running, strict=True):
        stride = 1 if height == width == 1 else 2
        height, width = (height + 1) // 2, (width + 1) // 2
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride, 1, bias=False, dtype=dtype)
        batch_norm = nn.BatchNorm2d(weight.shape[0], dtype=dtype)
        held = (conv.weight, batch_norm.weight, batch_norm.bias, batch_norm.running_mean, batch_norm.running_var)
        with torch.no_grad():
            for mine, value in zip(held, (weight.to(given["x"].dtype), *norm), strict=True):
                mine.copy_(value)
        layers += [conv, batch_norm, nn.ReLU()]
    linear = nn.Linear(params.wl.shape[1], CLASSES, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(params.wl)
        linear.bias.copy_(params.bl)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(given["pool"]), nn.Flatten(), linear)


def in_order(module):
    """Gradients of a plain head in the order of HeadParams.flat()."""
    convs = [m.weight.grad for m in module if isinstance(m, nn.Conv2d)]
    norms = [m for m in module if isinstance(m, nn.BatchNorm2d)]
    return [
        *convs,
        *(m.weight.grad for m in norms),
        *(m.bias.grad for m in norms),
        *(p.grad for p in module[-1].parameters()),
    ]


def exact(given, **changed):
    """loss_rows, dx, gradients and moved statistics by float64 autograd."""
    given = {**given, **changed}
    module, leaf = plain(given), given["x"].detach().double().clone().requires_grad_()
    rows = F.cross_entropy(module(leaf), given["labels"], reduction="none", label_smoothing=given["smoothing"])
    (rows.sum() * given["scale"].double()).backward()
    norms = [m for m in module if isinstance(m, nn.BatchNorm2d)]
    moved = [*(m.running_mean for m in norms), *(m.running_var for m in norms)]
    return [rows.detach(), leaf.grad, *in_order(module), *moved]


def results(taken):
    """Of a step as `step` returns it, in the order of `exact`."""
    taken, running = taken
    return [taken.loss_rows, taken.dx, *taken.grads.flat(), *running.means, *running.variances]


def assert_near(found, expected, tolerance):
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error, norm = (a.double() - b.double()).norm().item(), b.double().norm().item()
        assert error <= tolerance * max(norm, 1e-3), f"result {k}: error {error}, norm {norm}"


# --- cross-entropy ---


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


# --- the step ---


@pytest.mark.parametrize(("h", "w", "q", "depth"), [*((*case, 0) for case in MAPS), *DEEP])
def test_the_step_matches_float64_autograd(h, w, q, depth, poisoned):
    given = make(6, h, w, q, depth, ignored=1)
    for smoothing in (0.0, 0.1, 1.0):
        found = results(step(given, smoothing=smoothing))
        assert_near(found, exact(given, smoothing=smoothing), TOLERANCE[torch.float64])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_the_step_keeps_its_precision_dtype_and_layout(h, w, q, depth, dtype, layout, poisoned):
    given = make(24, h, w, q, depth, dtype, LAYOUTS[layout])
    x, before = given["x"], given["x"].clone()
    taken, running = step(given)
    assert_near(results((taken, running)), exact(given), (DEEP_TOLERANCE if depth else TOLERANCE)[dtype])
    assert {t.dtype for t in (taken.loss_rows, *taken.grads.flat(), *running.means)} == {torch.float32}
    assert all(g.is_contiguous(memory_format=LAYOUTS[layout]) for g in taken.grads.convs)
    assert all(g.is_contiguous() for g in (*taken.grads.gammas, *taken.grads.betas, taken.grads.wl, taken.grads.bl))
    assert taken.dx.dtype == dtype
    assert taken.dx.stride() == ((CHANNELS, 1, 0, 0) if q == 1 and not depth else x.stride())
    assert taken.dx.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_running_statistics_move_as_those_of_batch_norm(depth, dtype):
    given = make(5, 9, 8, 1, depth, dtype)
    module = plain(given, torch.float32)
    for k in range(0, 3 * depth, 3):
        module[k].to(dtype)
    running = copy.deepcopy(given["running"])
    for _ in "ab":
        with torch.no_grad():
            module[:-2](given["x"])
            reference.head_step(**(given | {"running": running}))
    norms = [m for m in module if isinstance(m, nn.BatchNorm2d)]
    for norm, mean, variance in zip(norms, *running, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, variance)


@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_one_sample_is_enough_where_the_map_has_more_than_one_pixel(h, w, q, depth):
    given = make(1, 2 * h, 2 * w, q, depth)
    assert_near(results(step(given)), exact(given), TOLERANCE[torch.float64])


@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_ignored_rows_have_no_loss_and_no_gradient_of_their_own(h, w, q, depth):
    given = make(6, h, w, q, depth, ignored=2)
    taken, _ = step(given)
    assert not taken.loss_rows[:2].any()
    if depth:
        return assert_near(results(step(given)), exact(given), 1e-12)  # the norms see them all the same
    assert not taken.dx[:2].any()
    rest, _ = step(given, x=given["x"][2:], labels=given["labels"][2:])
    found = [rest.loss_rows, rest.dx, *rest.grads.flat()]
    return assert_near(found, [taken.loss_rows[2:], taken.dx[2:], *taken.grads.flat()], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_a_batch_that_is_ignored_whole_gives_zeros_although_scale_is_infinite(h, w, q, depth, dtype):
    given = make(6, h, w, q, depth, dtype, ignored=6)
    taken, _ = step(given, scale=torch.tensor(torch.inf))
    for result in (taken.loss_rows, taken.dx, *taken.grads.flat()):
        assert not result.any()  # NaN counts as true


@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_a_wrong_label_gives_a_nan_row_and_gradients_that_show_it(h, w, q, depth):
    given = make(4, h, w, q, depth)
    right, _ = step(given)
    wrong = torch.tensor([0, CLASSES, 1, 2])
    given["labels"] = wrong
    taken, _ = step(given)
    assert taken.loss_rows.isnan().tolist() == [False, True, False, False]
    assert taken.grads.wl.isnan().any()
    assert taken.dx[1].isnan().all()
    assert taken.dx[0].isnan().any() == bool(depth)  # a norm spreads it
    assert right.loss_rows.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_an_x_that_is_not_finite_shows_in_loss_and_gradients(h, w, q, depth, bad):
    given = make(4, h, w, q, depth, torch.float32)
    given["x"][1, 0, 2, 2] = bad
    taken, running = step(given)
    assert not taken.loss_rows[1].isfinite()
    assert not taken.dx[1].isfinite().any()
    assert not any(g.isfinite().all() for g in taken.grads.flat()[:-2])
    assert not taken.grads.wl.isfinite().all()
    if depth:
        assert not any(m.isfinite().all() for m in (*running.means, *running.variances))
    else:
        assert taken.loss_rows.isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize(("h", "w", "q"), [(8, 8, 1), (6, 6, 2), (7, 7, 2)])
def test_an_empty_batch_gives_empty_rows_and_zero_gradients(h, w, q):
    given = make(0, h, w, q, 0, torch.float32)
    taken, _ = step(given)
    assert taken.loss_rows.shape == (0,)
    assert taken.dx.shape == given["x"].shape
    assert not any(g.any() for g in taken.grads.flat())


@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_a_strided_an_expanded_and_a_transposed_x_are_read_rightly(h, w, q, depth):
    given = make(8, 2 * h, w, q, depth)
    x, labels = given["x"], given["labels"]
    views = [(x[::2, :, ::2], labels[::2]), (x[:1].expand(4, -1, -1, -1), labels[:4]), (x.transpose(2, 3), labels)]
    for view, of_view in views:
        before = view.clone()
        changed = {"x": view, "labels": of_view}
        assert_near(results(step(given, **changed)), exact(given, **changed), 1e-12)
        assert torch.equal(view, before)


@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_labels_that_begin_inside_a_tensor_are_read_rightly(h, w, q, depth):
    given = make(6, h, w, q, depth)
    longer = torch.cat([torch.tensor([CLASSES + 1]), given["labels"]])
    for a, b in zip(results(step(given, labels=longer[1:])), results(step(given)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_the_same_inputs_give_the_same_bits(h, w, q, depth):
    given = make(32, h, w, q, depth, torch.float32)
    for a, b in zip(results(step(given)), results(step(given)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("h", "w", "q", "depth"), HEADS)
def test_features_match_float64(h, w, q, depth, training):
    given = make(6, h, w, q, depth, torch.float32)
    expected = plain(given).train(training)[:-1](given["x"].double())
    params, running = given["params"], given["running"]
    features = reference.head_features(given["x"], params, running, q, training)
    assert features.dtype == torch.float32
    assert_near([features], [expected], 5e-6)

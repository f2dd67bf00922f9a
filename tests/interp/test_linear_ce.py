"""Linear + cross-entropy in the interpreter, against float64 autograd; the rows that count for nothing, and the bad."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
from nf_engine.kernels import linear_ce, tiles

IGNORED = -100
SHAPES = [(6, 128, 10), (5, 20, 7), (7, 300, 3), (1, 17, 10), (9, 33, 1), (3, 150, 100), (2, 70, 200)]  # N, D, K
ROWS = [(6, 10), (3, 1000), (5, 1), (2, 2500), (1, 257)]  # N, K
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(n, d, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator, dtype=dtype)
    weight = torch.randn(k, d, generator=generator, dtype=dtype) * d**-0.5
    return features, weight, torch.randn(k, generator=generator, dtype=dtype)


def make_labels(n, k, ignore="none", seed=0):
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    labels[slice(0, {"none": 0, "some": n, "all": n}[ignore], 2 if ignore == "some" else 1)] = IGNORED
    return labels


def assert_near(found, expected, limit=1e-6):
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= limit, f"{error:.2e}"


def exact_step(features, weight, bias, labels, scale, smoothing):
    leaf = features.double().requires_grad_()
    logits = F.linear(leaf, weight.double(), bias.double())
    logits.retain_grad()
    rows = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    (rows.sum() * scale.double()).backward()
    return rows.detach(), logits.grad, leaf.grad


@pytest.mark.parametrize("ignore", ["none", "some", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_linear_cross_entropy_matches_float64(n, d, k, smoothing, ignore):
    args = make(n, d, k)
    labels, scale = make_labels(n, k, ignore), torch.tensor([0.37])
    found = linear_ce.linear_cross_entropy(*args, labels, scale, smoothing=smoothing)
    for got, expected in zip(found, exact_step(*args, labels, scale, smoothing), strict=True):
        assert got.dtype == torch.float32
        assert_near(got, expected)
        assert (got[labels == IGNORED] == 0).all()


@pytest.mark.parametrize("ignore", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("smoothing", "dtype"), [(0.0, DTYPES[0]), (1.0, DTYPES[0]), *((0.1, d) for d in DTYPES)], ids=str
)
@pytest.mark.parametrize(("n", "k"), ROWS)
def test_cross_entropy_matches_float64(n, k, smoothing, dtype, ignore):
    logits = (3 * torch.randn(n, k, generator=torch.Generator().manual_seed(2))).to(dtype)
    labels, scale = make_labels(n, k, ignore), torch.tensor([0.37])
    found = linear_ce.cross_entropy(logits, labels, scale, smoothing=smoothing)
    exact = logits.double().requires_grad_()
    rows = F.cross_entropy(exact, labels, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(rows.sum() * scale.double(), exact)
    for got, truth in zip(found, (rows.detach(), expected), strict=True):
        assert got.dtype == torch.float32
        assert_near(got, truth)  # in every dtype: logits are read as they are, and nothing is rounded after
        assert (got[labels == IGNORED] == 0).all()


def test_many_rows_take_wider_tiles_and_several_passes(monkeypatch):
    monkeypatch.setattr(linear_ce, "MANY_ROWS", 32)
    monkeypatch.setattr(linear_ce, "LINEAR", {16: (tiles.Tile(32, 4, 1),)})
    args, labels, scale = make(37, 90, 10), make_labels(37, 10), torch.tensor([0.5])
    assert linear_ce.linear_constants(37, 10, tiles.LINEAR[16][0], 0.1, torch.float32)["BN"] == 16
    found = linear_ce.linear_cross_entropy(*args, labels, scale, smoothing=0.1)
    for got, expected in zip(found, exact_step(*args, labels, scale, 0.1), strict=True):
        assert_near(got, expected)


def test_classes_that_take_several_blocks(monkeypatch):
    monkeypatch.setattr(linear_ce, "ROWS", (tiles.Tile(32, 4, 1),))
    logits, labels = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)), make_labels(3, 100)
    logits[0, :70] = -torch.inf  # two blocks without any weight
    labels[0] = 99
    rows, dlogits = linear_ce.cross_entropy(logits, labels, torch.tensor([0.5]), smoothing=0.0)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    assert_near(rows, expected.detach())
    assert_near(dlogits, torch.autograd.grad(expected.sum() * 0.5, exact)[0])


def both(features, weight, bias, labels, scale, smoothing=0.1):
    """(loss_rows, dlogits) of the two kernels."""
    logits = F.linear(features, weight, bias)
    yield linear_ce.linear_cross_entropy(features, weight, bias, labels, scale, smoothing=smoothing)
    yield linear_ce.cross_entropy(logits, labels, scale, smoothing=smoothing)


def test_a_label_out_of_range_makes_its_row_nan_and_no_other():
    labels = torch.tensor([0, 10, 3, -1, IGNORED, 2**40, 15])
    bad = torch.tensor([False, True, False, True, False, True, True])
    for results in both(*make(7, 20, 10), labels, torch.tensor([1.0])):
        for result in results:
            assert torch.equal(result.view(7, -1).isnan().all(1), bad)
            assert result[~bad].isfinite().all()


def test_nothing_counts_and_scale_is_infinite():
    labels = torch.full((5,), IGNORED)
    for results in both(*make(5, 20, 10), labels, torch.tensor([torch.inf])):
        assert all((result == 0).all() for result in results)


def test_another_ignore_index():
    labels = torch.tensor([3, 1, 3])
    args, scale = make(3, 20, 10), torch.tensor([1.0])
    rows, dlogits, _ = linear_ce.linear_cross_entropy(*args, labels, scale, smoothing=0.1, ignore_index=3)
    assert (rows != 0).tolist() == [False, True, False]
    assert (dlogits != 0).any(1).tolist() == [False, True, False]


def test_labels_that_start_inside_a_tensor():
    whole = make_labels(8, 10)
    args, scale = make(7, 20, 10), torch.tensor([1.0])
    for shifted, plain in zip(both(*args, whole[1:], scale), both(*args, whole[1:].clone(), scale), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(shifted, plain, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_stays_in_its_row(value):
    features, weight, bias = make(5, 20, 10)
    features[2, 7] = value
    for results in both(features, weight, bias, make_labels(5, 10), torch.tensor([1.0])):
        for result in results:
            rows = result.view(5, -1).isfinite()
            assert not rows[2].any()
            assert rows[[0, 1, 3, 4]].all()


def test_gradcheck_in_float64():
    features, weight, bias = make(2, 17, 5, torch.float64)
    labels, scale = torch.tensor([4, IGNORED]), torch.ones(1, dtype=torch.float64)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features):
            rows, _, dfeatures = linear_ce.linear_cross_entropy(features, weight, bias, labels, scale, smoothing=0.1)
            ctx.save_for_backward(dfeatures)
            return rows.sum()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0] * upstream

    assert torch.autograd.gradcheck(Loss.apply, features.requires_grad_())


def test_no_rows_and_too_many_classes():
    none = torch.empty(0, dtype=torch.int64)
    shapes = [
        tuple(r.shape) for r in linear_ce.linear_cross_entropy(*make(0, 20, 10), none, torch.ones(1), smoothing=0)
    ]
    assert shapes == [(0,), (0, 10), (0, 20)]
    assert linear_ce.cross_entropy(torch.empty(0, 10), none, torch.ones(1), smoothing=0)[1].shape == (0, 10)
    with pytest.raises(ValueError, match="at most 256 classes, got 300"):
        linear_ce.linear_cross_entropy(*make(1, 20, 300), torch.zeros(1).long(), torch.ones(1), smoothing=0)

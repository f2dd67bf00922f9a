"""BatchNorm + ReLU (+ pool), the kernels against float64 autograd of torch's own, values and gradients."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
import triton.language as tl  # noqa: E402

from nf_engine.kernels import norm_relu  # noqa: E402

MOMENTUM, EPS = 0.3, 1e-5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SHAPES = [(6, 32, 8, 8), (5, 20, 5, 7), (7, 16, 4, 4), (3, 24, 1, 1), (1, 16, 3, 3)]
SOME = [(6, 32, 8, 8), (5, 20, 5, 7)]
CASES = [(shape, torch.float32) for shape in SHAPES] + [((3, 24, 1, 1), torch.float64)]
CASES += [(shape, dtype) for shape in SOME for dtype in (torch.float64, torch.float16, torch.bfloat16)]


class Result(NamedTuple):
    y: Tensor
    running_mean: Tensor
    running_var: Tensor
    ds: Tensor
    dgamma: Tensor
    dbeta: Tensor


class Problem(NamedTuple):
    s: Tensor
    grad: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor


def problem(shape, dtype=torch.float32, layout="channels_last", pool=False) -> Problem:
    n, f = shape[:2]
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(wide)

    def as_map(x):
        return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])

    grad = normal(n, f) if pool else as_map(normal(*shape))
    return Problem(as_map(normal(*shape) * 2 + 1), grad, normal(f), normal(f), normal(f), normal(f).abs())


def ours(given: Problem, pool: bool) -> Result:
    s, grad, gamma, beta, running_mean, running_var = (x.clone() for x in given)
    y, mean, rstd = norm_relu.norm_relu_forward(
        s, gamma, beta, running_mean, running_var, momentum=MOMENTUM, eps=EPS, pool=pool
    )
    assert torch.equal(s.nan_to_num(), given.s.nan_to_num()), "the forward only reads s"
    dgamma, dbeta = norm_relu.norm_relu_backward_(s, grad, gamma, beta, mean, rstd, pool=pool)
    return Result(y, running_mean, running_var, s, dgamma, dbeta)


def exact(given: Problem, pool: bool) -> Result:
    s, grad, gamma, beta, running_mean, running_var = (x.double() for x in given)
    leaves = [x.requires_grad_() for x in (s, gamma, beta)]
    y = F.batch_norm(s, running_mean, running_var, gamma, beta, training=True, momentum=MOMENTUM, eps=EPS).relu()
    y = y.mean((2, 3)) if pool else y
    return Result(y.detach(), running_mean, running_var, *torch.autograd.grad(y, leaves, grad))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_close(found: Result, expected: Result, tolerance: float, wide: float | None = None) -> None:
    """wide: of what is float32 whatever the dtype of s, the sums that are made before any rounding."""
    for name, a, b in zip(Result._fields, found, expected, strict=True):
        narrow = a.dtype in (torch.float16, torch.bfloat16)
        limit = tolerance if narrow or wide is None else wide
        assert a.shape == b.shape, name
        assert error(a, b) <= limit, f"{name}: relative error {error(a, b):.2e}, allowed {limit:.0e}"


@pytest.mark.parametrize("pool", [False, True], ids=["map", "pool"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values_and_gradients_match_float64_autograd(shape, dtype, layout, pool):
    given = problem(shape, dtype, layout, pool)
    found = ours(given, pool)
    if not pool:
        assert found.y.dtype == dtype
        assert found.y.stride() == given.s.stride()
    narrow = dtype in (torch.float16, torch.bfloat16)
    assert_close(found, exact(given, pool), TOLERANCE[dtype], TOLERANCE[torch.float32] if narrow else None)


@pytest.mark.parametrize("pool", [False, True], ids=["map", "pool"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_programs_with_many_tiles_and_many_merges(layout, pool, monkeypatch):
    monkeypatch.setattr(norm_relu, "PROGRAMS", 6)  # 3 for each of two blocks of channels
    monkeypatch.setattr(norm_relu, "MERGE_ROWS", 2)
    given = problem((25, 40, 7, 5), torch.float32, layout, pool)
    given.s[9:13] += 100  # some tiles are far from the others
    assert_close(ours(given, pool), exact(given, pool), 1e-5)


@pytest.mark.parametrize("pool", [False, True], ids=["map", "pool"])
def test_a_second_call_repeats_bit_for_bit(pool):
    given = problem((9, 20, 5, 7), torch.float32, "channels_last", pool)
    for once, again in zip(ours(given, pool), ours(given, pool), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(layout, monkeypatch):
    monkeypatch.setattr(norm_relu, "PROGRAMS", 4)
    given = problem((18, 32, 8, 8), torch.float32, layout)
    given.s.sub_(1).div_(2).add_(30)
    given.gamma[:] = 1 - 2 * (torch.arange(32) % 2)  # either half of the normalised values passes the ReLU
    given.beta[:] = 0
    assert error(ours(given, False).y, exact(given, False).y) <= 5e-6

    given.s.add_(10_000)
    arguments = given.gamma, given.beta, given.running_mean, given.running_var
    _, mean, rstd = norm_relu.norm_relu_forward(given.s, *arguments, momentum=MOMENTUM, eps=EPS, pool=True)
    s = given.s.double()
    assert error(mean, s.mean((0, 2, 3))) <= 1e-7
    # A mean of 1e4 is rounded by up to 5e-4; a difference of sums of squares would have lost the variance, 1, entirely.
    assert error(rstd, (s.var((0, 2, 3), correction=0) + EPS).rsqrt()) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_channel_becomes_its_beta(layout):
    given = problem((7, 16, 4, 4), torch.float32, layout)
    given.s[:, 3] = 30.1
    found, expected = ours(given, False), exact(given, False)
    assert_close(found, expected, 1e-5)
    assert (found.y[:, 3] == given.beta[3].relu()).all()


@pytest.mark.parametrize(
    ("value", "layout", "pool"),
    [
        (torch.nan, "channels_last", False),
        (torch.nan, "contiguous", True),
        (torch.inf, "channels_last", True),
        (torch.inf, "contiguous", False),
    ],
)
def test_a_value_that_is_not_finite_stays_in_its_channel(value, layout, pool):
    given = problem((5, 20, 5, 7), torch.float32, layout, pool)
    clean = ours(given, pool)
    given.s[1, 6, 2, 3] = value
    found, expected = ours(given, pool), exact(given, pool)
    others = torch.arange(20) != 6
    for name, a, b, c in zip(Result._fields, found, expected, clean, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name  # all of the channel but dbeta, which asks for no s
        axis = 0 if a.ndim == 1 else 1
        kept = others.nonzero().flatten()
        assert torch.equal(a.index_select(axis, kept), c.index_select(axis, kept)), name
    assert found.y[:, 6].isnan().all()
    assert found.ds[:, 6].isnan().all()


def test_a_gradient_in_another_layout_is_refused():
    given = problem((5, 20, 5, 7))
    statistics = given.gamma, given.beta, given.gamma, given.beta
    for grad in (given.grad.contiguous(), given.grad[:, :, :, :1].expand_as(given.s), given.grad[:4]):
        with pytest.raises(ValueError, match="strides"):
            norm_relu.norm_relu_backward_(given.s, grad, *statistics, pool=False)
    with pytest.raises(ValueError, match="contiguous"):
        norm_relu.norm_relu_backward_(given.s, given.s[0, :, :5, 0].t(), *statistics, pool=True)
    with pytest.raises(ValueError, match="strides"):
        norm_relu.norm_relu_forward(given.s[:, ::2], *given[2:], momentum=MOMENTUM, eps=EPS, pool=False)


@triton.jit
def _first_offset(out, tile, samples, pixels, channels, stride_n, stride_p):
    f = tl.arange(0, 32)
    start, _, _, _ = norm_relu._tile(tile, f, samples, pixels, channels, stride_n, stride_p, 1, 2, 64)
    tl.store(out, start)


def test_an_offset_passes_two_to_the_31st():
    n, f, hw = 4096, 512, 3136
    out = torch.zeros(1, dtype=torch.int64)
    tile = n // 2 * hw // 64 - 1
    _first_offset[(1,)](out, tile, n, hw, f, hw * f, f)
    assert out.item() == (n - 2) * hw * f + (hw - 64) * f > 2**31

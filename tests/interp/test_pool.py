"""The pooling kernels in the interpreter, against float64 PyTorch: values, gradients, layouts, windows that overlap."""

from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
from nf_engine.kernels import pool, tiles

# Of the largest value; sizes off the powers of two that tiles are made of.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SHAPES = [(6, 32, 8, 8), (5, 20, 5, 7), (7, 16, 4, 4), (3, 16, 1, 1), (1, 3, 9, 4), (2, 70, 6, 5), (3, 1, 4, 6)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [(shape, q, torch.float32) for shape in SHAPES for q in (1, 2, 3, 4) if q <= min(shape[2:])]
CASES += [(shape, q, dtype) for shape in SHAPES[:3] for q in (1, 4) for dtype in (torch.float16, torch.bfloat16)]


def make(shape, dtype, layout, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


def assert_near(found, expected, dtype):
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "q", "dtype"), CASES, ids=str)
def test_forward_and_backward_match_float64(shape, q, dtype, layout):
    x = make(shape, dtype, layout)
    pooled = pool.pool_forward(x, q)
    exact = x.double().requires_grad_()
    expected = F.adaptive_avg_pool2d(exact, q).flatten(1)
    assert pooled.dtype == torch.float32
    assert pooled.shape == expected.shape
    assert_near(pooled, expected.detach(), torch.float32)  # sums of what was stored, rounded nowhere

    dpooled = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    dx = pool.pool_backward(dpooled, x)
    (expected_dx,) = torch.autograd.grad(expected, exact, dpooled.double())
    assert dx.dtype == dtype
    assert_near(dx, expected_dx, dtype)
    if q > 1:
        assert dx.stride() == x.stride()
    assert not torch.isnan(dx).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_maps_are_read_in_blocks(layout, monkeypatch):
    small = (tiles.Tile(1024, 4, 1),)  # several blocks of rows and of columns
    monkeypatch.setattr(pool, "POOL", {"lines": small, "channels": small})
    x = make((1, 2, 30, 300), torch.float32, layout)
    exact = x.double().requires_grad_()
    expected = F.adaptive_avg_pool2d(exact, 4).flatten(1)
    assert_near(pool.pool_forward(x, 4), expected.detach(), torch.float32)
    dpooled = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    (expected_dx,) = torch.autograd.grad(expected, exact, dpooled.double())
    assert_near(pool.pool_backward(dpooled, x), expected_dx, torch.float32)


def test_strides_of_any_kind_are_read():
    whole = make((4, 12, 10, 14), torch.float32, "contiguous")
    for x in (whole[1::2, 2:9, 1:8, ::2], whole.transpose(2, 3), whole[:, :1, :1, :1].expand(4, 3, 5, 6)):
        assert_near(pool.pool_forward(x, 2), F.adaptive_avg_pool2d(x.double(), 2).flatten(1), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_windows(value, layout):
    x = make((2, 5, 7, 7), torch.float32, layout)
    x[1, 2, 3, 3] = value  # in the middle: in four windows of 2 x 2
    x[0, 0, 0, 6] = value
    found = pool.pool_forward(x, 2).view(2, 5, 2, 2)
    expected = torch.zeros(2, 5, 2, 2, dtype=torch.bool)
    expected[1, 2] = expected[0, 0, 0, 1] = True
    assert torch.equal(~found.isfinite(), expected)
    assert torch.equal(found.isnan(), expected & (value != value))

    dpooled = torch.ones(2, 5, 2, 2)
    dpooled[1, 2, 0, 1] = value
    dx = pool.pool_backward(dpooled.flatten(1), x)
    window = torch.zeros(2, 5, 7, 7, dtype=torch.bool)
    window[1, 2, :4, 3:] = True
    assert torch.equal(~dx.isfinite(), window)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_in_float64(layout):
    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, q):
            ctx.save_for_backward(x)
            return pool.pool_forward(x, q)

        @staticmethod
        def backward(ctx, dpooled):
            return pool.pool_backward(dpooled.contiguous(), ctx.saved_tensors[0]), None

    x = make((2, 3, 3, 5), torch.float64, layout).requires_grad_()
    for q in (2, 3):
        assert torch.autograd.gradcheck(Pool.apply, (x, q), fast_mode=True)


def test_the_gradient_of_a_global_average_is_a_view():
    x = make((3, 4, 5, 6), torch.bfloat16, "channels_last")
    assert pool.pool_backward(torch.ones(3, 4), x).stride()[2:] == (0, 0)


@pytest.mark.parametrize("strides", [(16, 4, 1), (1, 16, 4)], ids=LAYOUTS)
def test_offsets_pass_32_bits(strides, monkeypatch):
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)  # copies it all
    stride = 2**30 + 32  # the third sample starts past 2**31; what lies between is never touched, so takes no memory
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 64), flags=mmap.MAP_PRIVATE), dtype=torch.float16)
    x = memory.as_strided((3, 4, 4, 4), (stride, *strides))
    x.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))
    pooled = torch.empty(3, 16)
    pool._run(x, pooled, 2, backward=False)
    assert torch.equal(pooled, torch.tensor([1.0, 2.0, 3.0]).view(3, 1).expand(3, 16))
    pool._run(x, 8 * pooled, 2, backward=True)
    assert torch.equal(x[:, 0, 0, 0].float(), torch.tensor([2.0, 4.0, 6.0]))


def test_no_samples_and_single_samples():
    empty = torch.empty(0, 4, 6, 6)
    assert pool.pool_forward(empty, 2).shape == (0, 16)
    assert pool.pool_backward(torch.empty(0, 16), empty).shape == empty.shape
    x = make((5, 8, 6, 6), torch.float32, "channels_last")
    rows = torch.cat([pool.pool_forward(x[n : n + 1], 2) for n in range(5)])
    assert torch.equal(rows, pool.pool_forward(x, 2))


def test_autotuning_times_each_tile_once_a_key_and_keeps_the_fastest(monkeypatch):
    monkeypatch.setenv("NF_AUTOTUNE", "1")
    monkeypatch.setattr(tiles, "_chosen", {})
    table = tiles.POOL["lines"]
    launched, timed = [], []
    time_ms = {table[0]: 3.0, table[1]: 1.0, table[2]: 2.0}

    def do_bench(call, return_mode):
        call()
        timed.append(launched.pop())
        return time_ms[timed[-1]]

    monkeypatch.setattr(tiles.triton.testing, "do_bench", do_bench)
    for key in ("a", "a", "b"):
        tiles.run(table, key, launched.append)
    assert timed == [*table, *table]
    assert launched == [table[1]] * 3

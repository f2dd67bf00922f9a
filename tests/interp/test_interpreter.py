"""The interpreter's bfloat16, as conftest.py repairs it, is torch's: bit for bit in casts, and in a dot."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
import triton.language as tl  # noqa: E402


@triton.jit
def _cast(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(target + at, tl.load(source + at, mask=inside).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), out_dtype=tl.float32))


def test_casts_round_as_torch_bit_for_bit():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    wide = torch.empty(every.shape, dtype=torch.float32)
    _cast[(1,)](every, wide, len(every), BLOCK=2**16)
    assert torch.equal(wide.view(torch.int32), every.float().view(torch.int32))

    # Every bfloat16 with the tails that decide: below, at and above a tie, and nearly the next; then a random million.
    tails = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    edges = (every.view(torch.int16).int()[:, None] * 2**16 + tails).flatten().view(torch.float32)
    values = torch.cat([edges, torch.randn(10**6)])
    narrow = torch.empty(values.shape, dtype=torch.bfloat16)
    _cast[(8,)](values, narrow, len(values), BLOCK=2**18)
    expected = values.to(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(narrow.isnan(), nan)
    assert torch.equal(narrow[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_a_dot_of_bfloat16_multiplies_its_values():
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)

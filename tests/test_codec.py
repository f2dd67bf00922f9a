"""Codecs against arithmetic in float64, against the layout written out by hand, and their bytes against the meter."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_engine import codec as codec_module
from nf_engine.codec import DTYPES, make_codec
from nf_engine.device import TensorBytes

NAMES = (*DTYPES, "u8")


def stored(codec, x):
    out = torch.full((len(x), codec.sample_bytes), 0xA5, dtype=torch.uint8)  # a byte that is not written shows
    codec.encode(x, out)
    return out


def round_trip(x, dtype, channels_last=False, out_dtype=torch.float32):
    codec = make_codec(dtype, tuple(x.shape[1:]), channels_last)
    out = torch.full_like(x, float("nan"), dtype=out_dtype)
    codec.decode(stored(codec, x), out)
    return out


def tolerance(x):
    """step / 2 and two ulp of the largest magnitude that the arithmetic meets, a channel, in float64."""
    low, high = (f(x.double().numpy(), (2, 3), keepdims=True) for f in (np.min, np.max))
    largest = np.maximum(np.maximum(np.abs(low), np.abs(high)), high - low).astype(np.float32)
    return torch.from_numpy((high - low) / 255 / 2 * (1 + 2**-20) + 2 * np.spacing(largest).astype(np.float64))


def test_affine8_has_the_bytes_that_the_format_says():
    # Channel 0: 0 .. 510, step 2; 5 / 2 = 2.5 goes to the even 2, 7 / 2 to the even 4. Channel 1: constant.
    x = torch.tensor([[[[0.0, 5.0, 7.0], [510.0, 1.0, 3.0]], [[-1.5] * 3] * 2]])
    rows = struct.pack("<4f", 0, 2, -1.5, 0) + bytes([0, 2, 4, 255, 0, 2]) + bytes(6) + bytes(4)
    assert stored(make_codec("u8", (2, 2, 3)), x).numpy().tobytes() == rows
    last = struct.pack("<4f", 0, 2, -1.5, 0) + bytes([0, 0, 2, 0, 4, 0, 255, 0, 0, 0, 2, 0]) + bytes(4)
    assert stored(make_codec("u8", (2, 2, 3), channels_last=True), x).numpy().tobytes() == last


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_has_the_bytes_of_numpy(dtype, channels_last):
    x = torch.randn(5, 3, 4, 7) * 100
    expected = x.permute(0, 2, 3, 1) if channels_last else x
    if dtype == "bf16":  # numpy has none: the upper half of float32, rounded to even
        bits = expected.contiguous().numpy().view(np.uint32)
        expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    else:
        expected = expected.contiguous().numpy().astype({"fp32": "<f4", "fp16": "<f2"}[dtype])
    codec = make_codec(dtype, (3, 4, 7), channels_last)
    assert stored(codec, x).numpy().tobytes() == expected.tobytes()
    assert torch.equal(round_trip(x, dtype, channels_last), x.to(DTYPES[dtype]).float())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
def test_memory_is_shared_only_where_the_bytes_are_the_same(dtype, channels_last):
    codec = make_codec(dtype, (3, 4, 7), channels_last)
    forms = [torch.contiguous_format, torch.channels_last]
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    tensors = [torch.randn(5, 3, 4, 7).to(kind).contiguous(memory_format=form) for kind in kinds for form in forms]
    tensors.append(torch.randn(5, 3, 4, 14)[..., ::2])
    same = []
    for x in tensors:
        rows = stored(codec, x)
        if codec.is_stored(x):
            same.append(x)
            lying = bytes((ctypes.c_char * (x.numel() * x.itemsize)).from_address(x.data_ptr()))
            assert lying == rows.numpy().tobytes()
            view = codec.view(rows)
            assert torch.equal(view, x)
            view[2, 1, 3, 5] = 7.5
            codec.decode(rows, x)
            assert x[2, 1, 3, 5] == 7.5, "a view, not a copy"
    assert len(same) == (0 if dtype == "u8" else 1)
    assert (codec.view(stored(codec, tensors[0])) is None) == (dtype == "u8")


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    scale=st.integers(-100, 100),
    offset=st.sampled_from([0.0, 0.5, -0.5, 1.0, 3.0, -1000.0, 1e6]),
    channels_last=st.booleans(),
    strided=st.booleans(),
)
def test_affine8_is_within_half_a_step(seed, shape, scale, offset, channels_last, strided):
    draw = np.random.default_rng(seed)
    x = torch.from_numpy(((draw.random(shape) + offset) * 2.0**scale).astype(np.float32))
    if strided:
        x = x.contiguous(memory_format=torch.channels_last)
    back = round_trip(x, "u8", channels_last)
    assert ((back.double() - x.double()).abs() <= tolerance(x)).all()


def test_affine8_is_within_half_a_step_on_many_values():
    torch.manual_seed(0)
    x = torch.randn(64, 16, 64, 64) * torch.logspace(-20, 20, 16).view(16, 1, 1) + torch.randn(64, 16, 1, 1)
    excess = (round_trip(x, "u8").double() - x.double()).abs() / tolerance(x)
    assert excess.max() <= 1
    assert excess.max() > 0.9, "the bound is no larger than it must be"


@pytest.mark.parametrize("channels_last", [False, True])
def test_zeros_of_a_relu_constants_and_ends_come_back_exactly(channels_last):
    torch.manual_seed(0)
    x = torch.randn(8, 6, 9, 7).relu()
    x[:, 3] = 0.1
    x[0, 4] = 0.0
    x[1, 5] = -3e38
    back = round_trip(x, "u8", channels_last)
    assert (back[x == 0] == 0).all()
    assert torch.equal(back[:, 3], x[:, 3])
    assert torch.equal(back[0, 4], x[0, 4])
    assert torch.equal(back[1, 5], x[1, 5])
    least = x == x.amin((2, 3), keepdim=True)
    assert torch.equal(back[least], x[least]), "the least value is lo itself"


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_and_outputs_have_any_float_dtype(in_dtype, out_dtype):
    x = torch.randn(3, 4, 8, 8).to(in_dtype)
    for dtype in NAMES:
        exact = round_trip(x.float(), dtype)
        assert torch.equal(round_trip(x, dtype, out_dtype=out_dtype), exact.to(out_dtype)), dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", NAMES)
def test_what_is_not_finite_is_found_after_encoding(dtype, bad):
    codec = make_codec(dtype, (4, 5, 6))
    x = torch.randn(7, 4, 5, 6)
    assert codec.finite(stored(codec, x))
    for place in ((0, 0, 0, 0), (3, 2, 4, 1), (6, 3, 4, 5)):
        wrong = x.clone()
        wrong[place] = bad
        assert not codec.finite(stored(codec, wrong)), place


def test_an_overflow_is_found_after_encoding():
    x = torch.full((2, 1, 8, 8), 70_000.0)
    found = {
        dtype: bool(make_codec(dtype, (1, 8, 8)).finite(stored(make_codec(dtype, (1, 8, 8)), x))) for dtype in NAMES
    }
    assert found == {"fp32": True, "fp16": False, "bf16": True, "u8": True}
    wide = torch.tensor([[[[-3e38, 3e38]]]])
    codec = make_codec("u8", (1, 1, 2))
    assert not codec.finite(stored(codec, wide)), "a range that no float32 holds"


def test_extremes_of_float32():
    tiny = torch.tensor([[[[0.0, 1e-40, 2e-39]], [[1e-30, 2e-30, 3e-30]], [[3.0e38, 3.2e38, 3.4e38]]]])
    back = round_trip(tiny, "u8")
    assert torch.equal(back[0, 0], torch.zeros(1, 3)), "a range without a normal step is a constant"
    assert ((back.double() - tiny.double()).abs() <= tolerance(tiny))[0, 1:].all()


def test_no_samples_are_no_error():
    for dtype in NAMES:
        codec = make_codec(dtype, (2, 8, 8))
        rows = stored(codec, torch.zeros(0, 2, 8, 8))
        codec.decode(rows, torch.zeros(0, 2, 8, 8))
        assert rows.shape == (0, codec.sample_bytes)
        assert codec.finite(rows)


def test_pieces_give_what_the_whole_gives(monkeypatch):
    x = torch.randn(11, 3, 8, 8)
    whole = stored(make_codec("u8", (3, 8, 8)), x), round_trip(x, "u8", out_dtype=torch.float16)
    monkeypatch.setattr(codec_module, "PIECE", 4 * 4 * 3 * 64)  # four samples
    assert torch.equal(stored(make_codec("u8", (3, 8, 8)), x), whole[0])
    assert torch.equal(round_trip(x, "u8", out_dtype=torch.float16), whole[1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("shape", "batch"), [((64, 16, 16), 128), ((8, 9, 7), 37), ((64, 56, 56), 64)])
def test_a_call_allocates_no_more_than_it_says(shape, batch, dtype, channels_last):
    codec = make_codec(dtype, shape, channels_last)
    x, y = torch.randn(batch, *shape), torch.empty(batch, *shape, dtype=torch.float16)
    rows = stored(codec, x)
    most = 0
    for call in (lambda: codec.encode(x, rows), lambda: codec.decode(rows, y), lambda: codec.finite(rows)):
        with TensorBytes() as counter:
            call()
        most = max(most, counter.peak)
    assert most <= codec.transient_bytes(batch) <= 1.1 * most + 4096
    assert codec.transient_bytes(10**6) <= 32 * 2**20, "bounded, whatever the batch"


def test_shapes_and_dtypes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="expected dtype fp32, fp16, bf16 or u8, got 'fp8'"):
        make_codec("fp8", (1, 2, 3))
    with pytest.raises(ValueError, match=r"u8 expects a sample of shape \(C, H, W\), got \(6,\)"):
        make_codec("u8", (6,))
    with pytest.raises(ValueError, match=r"channels_last expects .* got \(2, 3\)"):
        make_codec("fp16", (2, 3), channels_last=True)
    assert make_codec("fp32", (6,)).sample_bytes == 24
    assert [make_codec("u8", shape).sample_bytes for shape in ((1, 8, 8), (3, 8, 8), (64, 16, 16))] == [80, 224, 16896]


def test_affine8_loses_what_was_measured_for_it():
    """Relative root mean square: 0.3 % of a normalised ReLU, 0.64 % of Gaussian data; 0.258 of float32's bytes."""
    torch.manual_seed(0)
    x = torch.randn(32, 64, 16, 16)
    for values, expected in ((x, 0.0064), (x.relu(), 0.0032)):
        error = (round_trip(values, "u8").double() - values.double()).square().mean().sqrt()
        assert float(error / values.double().square().mean().sqrt()) == pytest.approx(expected, rel=0.02)
    assert make_codec("u8", (64, 16, 16)).sample_bytes / (4 * 64 * 256) == pytest.approx(0.258, abs=0.001)

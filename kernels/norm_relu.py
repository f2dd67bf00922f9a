"""BatchNorm + ReLU (+ global average pool) around a convolution: forward, and a backward that overwrites the map.

s (N, F, H, W), the convolution's output, any float dtype, channels_last or contiguous; N batch, F filters, H W map.
    forward    xhat = (s - mean) * rstd,  z = gamma * xhat + beta,  y = relu(z)  or only  pooled = mean of y over H W
    backward   dz = dy where z > 0,  ds = gamma * rstd * (dz - (sum dz + xhat * sum dz xhat) / (N H W)),  into s
s is all that the backward needs: neither y nor a mask is kept, z is computed again from s by the same expression.

Two launches each. The first leaves partial sums, one row for each program; in the second every program merges the rows
of its channels in the same order, then works on its tiles. So no program waits for another, and there are no atomics:
a sum has one order, fixed by the shape and the tiles below, and repeats bit for bit.
The variance is a sum of squared distances from a mean of the same values, never a difference of large sums: within a
program from the mean of its first tile, between programs by Chan's rule.
Sources: batch normalization, https://arxiv.org/abs/1502.03167; merging variances, Chan, Golub and LeVeque, Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["norm_relu_backward_", "norm_relu_forward"]

# A tile is [BLOCK_N samples, BLOCK_P pixels, BLOCK_F channels]. Whichever axis is adjacent in memory, a warp reads full
# sectors: 32 channels of bfloat16 are 64 bytes in channels_last, and a contiguous map is read along its pixels.
BLOCK_F = 32
WARPS = 8
# BLOCK_N * BLOCK_P: 16 KiB of bfloat16 on their way for each program, in one map or in two, and registers for two
# programs on a multiprocessor.
FORWARD_ROWS, BACKWARD_ROWS = 256, 128
BLOCK_P = ((1, 1), (16, 8), (2**31, 64))  # (largest H W, block for it)
# Programs over all channels. More would hide more latency, but each reads all partial sums of its channels again.
PROGRAMS = 256
MERGE_ROWS = 64  # partial sums merged at a time


class _Layout(NamedTuple):
    """How a kernel walks a map: sizes and strides in elements."""

    samples: int
    pixels: int
    channels: int
    stride_n: int
    stride_p: int
    stride_f: int


def norm_relu_forward(
    s: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float,
    eps: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises s by its batch statistics, then ReLU, then, with pool, the mean over H W.

    Args:
        s: (N, F, H, W), float32, bfloat16 or float16, channels_last or contiguous, N * H * W > 1; only read.
        gamma, beta: (F,), float32.
        running_mean, running_var: (F,), float32; updated in place, with the unbiased variance, as torch's BatchNorm2d.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        pool: return the pooled values, and write no y.

    Returns:
        y like s, or pooled (N, F) float32; mean and rstd (F,) float32, which the backward needs. All float64, and
        accumulated so, if s is float64.

    Raises:
        ValueError: s is neither channels_last nor contiguous.
    """
    acc = torch.promote_types(s.dtype, torch.float32)
    n, f, h, w = s.shape
    flat = _layout(s, per_sample=False)
    grid, options = _launch(flat, FORWARD_ROWS, acc)
    parts = grid[1]
    moments = torch.empty(2, parts, f, dtype=acc, device=s.device)  # mean, sum of squared distances; by program
    counts = torch.empty(parts, dtype=acc, device=s.device)
    _partial_moments[grid](s, moments, counts, *flat, **options)

    mean, rstd = torch.empty(2, f, dtype=acc, device=s.device)
    y = torch.empty(n, f, dtype=acc, device=s.device) if pool else torch.empty_like(s)
    pool = pool and h * w > 1  # a map of 1x1 is its own mean
    layout = _layout(s, per_sample=pool)
    grid, options = _launch(layout, FORWARD_ROWS, acc, whole_samples=pool)
    _normalise[grid](
        s, y, moments, counts, mean, rstd, gamma, beta, running_mean, running_var, parts, *layout,
        MOMENTUM=momentum, EPS=eps, POOL=pool, MERGE_ROWS=MERGE_ROWS, **options,
    )  # fmt: skip
    return y, mean, rstd


def norm_relu_backward_(
    s: Tensor, grad: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, *, pool: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of norm_relu_forward; overwrites s with its own.

    Args:
        s: as given to the forward; holds ds afterwards.
        grad: dy, with the shape and strides of s; with pool the gradient (N, F) float32 of the pooled values.
        gamma, beta: as given to the forward.
        mean, rstd: as the forward returned them.
        pool: as in the forward.

    Returns:
        dgamma, dbeta (F,) float32; float64 if s is.

    Raises:
        ValueError: the layout of s or of grad is another.
    """
    acc, (n, f, h, w) = mean.dtype, s.shape
    fits = grad.shape == (n, f) and grad.is_contiguous() if pool else _layout(grad) == _layout(s)
    if not fits:
        raise ValueError(
            f"with pool expected grad {(n, f)}, contiguous, else in the layout of s; got {tuple(grad.shape)} with "
            f"strides {grad.stride()}, pool={pool}, s {tuple(s.shape)} with strides {s.stride()}"
        )
    pool = pool and h * w > 1
    layout = _layout(s, per_sample=pool)
    grid, options = _launch(layout, BACKWARD_ROWS, acc)
    parts = grid[1]
    sums = torch.empty(2, parts, f, dtype=acc, device=s.device)  # of dz and of dz xhat; by program
    # Memory of their own each: results of a registered operator may not share any.
    dgamma, dbeta = (torch.empty(f, dtype=acc, device=s.device) for _ in range(2))
    known = (gamma, beta, mean, rstd)
    _partial_gradients[grid](s, grad, sums, *known, *layout, POOL=pool, **options)
    _input_gradient[grid](
        s, grad, sums, dgamma, dbeta, *known, parts, *layout, POOL=pool, MERGE_ROWS=MERGE_ROWS, **options
    )
    return dgamma, dbeta


def _layout(s: Tensor, *, per_sample: bool = True) -> _Layout:
    """In channels_last pixels follow each other across samples; where none is told apart, each is its own sample."""
    n, f, h, w = s.shape
    pixels = h * w
    if s.is_contiguous(memory_format=torch.channels_last):  # and any map of 1x1
        return _Layout(n, pixels, f, pixels * f, f, 1) if per_sample else _Layout(n * pixels, 1, f, f, f, 1)
    if s.is_contiguous():
        return _Layout(n, pixels, f, f * pixels, 1, pixels)
    raise ValueError(f"expected a map channels_last or contiguous, got {tuple(s.shape)} with strides {s.stride()}")


def _launch(
    layout: _Layout, rows: int, acc: torch.dtype, *, whole_samples: bool = False
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid over blocks of channels and programs that share their tiles, and the options of a launch."""
    block_p = next(block for largest, block in BLOCK_P if layout.pixels <= largest)
    tile = {"BLOCK_N": rows // block_p, "BLOCK_P": block_p, "BLOCK_F": BLOCK_F}
    tiles = triton.cdiv(layout.samples, tile["BLOCK_N"])
    if not whole_samples:
        tiles *= triton.cdiv(layout.pixels, block_p)
    across = triton.cdiv(layout.channels, BLOCK_F)  # first in the grid: programs that start together read whole pixels
    wide = tl.float64 if acc == torch.float64 else tl.float32
    return (across, min(tiles, max(1, PROGRAMS // across))), {**tile, "ACC": wide, "num_warps": WARPS}


@triton.jit
def _channels(channels, BLOCK_F: tl.constexpr):
    """The channels of this program, and which of them exist."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    return f, f < channels


@triton.jit
def _tile(
    tile, f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Tile number `tile`: its first element's offset, the offsets from there, its mask, its samples."""
    across = tl.cdiv(pixels, BLOCK_P)
    first_n, first_p = tile // across * BLOCK_N, tile % across * BLOCK_P
    n = tl.arange(0, BLOCK_N)[:, None, None]
    p = tl.arange(0, BLOCK_P)[None, :, None]
    f = f[None, None, :]
    start = tl.cast(first_n, tl.int64) * stride_n + first_p * stride_p  # a map may pass 2**31 elements, a tile does not
    mask = (first_n + n < samples) & (first_p + p < pixels) & (f < channels)
    return start, n * stride_n + p * stride_p + f * stride_f, mask, first_n + n


@triton.jit
def _column_sums(x):
    """[BLOCK_N, BLOCK_P, BLOCK_F] -> [BLOCK_F]."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _affine(x, mean, rstd, gamma, beta):
    """xhat and z. The one expression of both directions, fma and all, or their masks would differ near 0."""
    xhat = (x - mean) * rstd
    return xhat, tl.fma(xhat, gamma, beta)


@triton.jit(do_not_specialize=["samples"])
def _partial_moments(
    s, moments, counts, samples, pixels, channels, stride_n, stride_p, stride_f,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, over tiles program, program + programs, ... of a block of channels."""
    f, exists = _channels(channels, BLOCK_F)
    program, programs = tl.program_id(1), tl.num_programs(1)
    across = tl.cdiv(pixels, BLOCK_P)

    start, offsets, mask, _ = _tile(
        program, f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N, BLOCK_P
    )
    x = tl.load(s + start + offsets, mask=mask, other=0).to(ACC)
    count = _valid(program, samples, pixels, BLOCK_N, BLOCK_P)
    # Near enough to the mean for any data: a shift that is far from the other values is far because these first ones
    # are, and then they make the variance large as well.
    shift = _column_sums(x) / tl.cast(count, ACC)
    d = tl.where(mask, x - shift[None, None, :], 0)
    sums, squares = d, d * d
    for tile in range(program + programs, tl.cdiv(samples, BLOCK_N) * across, programs):
        start, offsets, mask, _ = _tile(
            tile, f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N, BLOCK_P
        )
        x = tl.load(s + start + offsets, mask=mask, other=0).to(ACC)
        d = tl.where(mask, x - shift[None, None, :], 0)
        sums += d
        squares += d * d
        count += _valid(tile, samples, pixels, BLOCK_N, BLOCK_P)

    n = tl.cast(count, ACC)
    delta = _column_sums(sums) / n
    row = moments + program * channels + f
    tl.store(row, shift + delta, mask=exists)
    tl.store(row + programs * channels, _column_sums(squares) - n * delta * delta, mask=exists)
    tl.store(counts + program, n, mask=tl.program_id(0) == 0)


@triton.jit
def _valid(tile, samples, pixels, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Values of a channel in a tile."""
    across = tl.cdiv(pixels, BLOCK_P)
    n, p = tile // across * BLOCK_N, tile % across * BLOCK_P
    return tl.minimum(samples - n, BLOCK_N) * tl.minimum(pixels - p, BLOCK_P)


@triton.jit
def _merged_moments(
    moments, counts, f, exists, parts, channels, total,
    BLOCK_F: tl.constexpr, MERGE_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of all values, from those of each program."""
    shift = tl.load(moments + f, mask=exists, other=0)
    sums = tl.zeros([MERGE_ROWS, BLOCK_F], ACC)
    squares = tl.zeros([MERGE_ROWS, BLOCK_F], ACC)
    for first in range(0, parts, MERGE_ROWS):
        part = first + tl.arange(0, MERGE_ROWS)[:, None]
        mask = (part < parts) & exists[None, :]
        row = moments + part * channels + f[None, :]
        d = tl.where(mask, tl.load(row, mask=mask, other=0) - shift[None, :], 0)
        n = tl.load(counts + part, mask=part < parts, other=0)
        sums += n * d
        squares += tl.load(row + parts * channels, mask=mask, other=0) + n * d * d
    delta = tl.sum(sums, axis=0) / total
    var = tl.sum(squares, axis=0) / total - delta * delta
    return shift + delta, tl.where(var < 0, 0, var)  # a constant channel may round to just below 0


@triton.jit(do_not_specialize=["samples", "parts"])
def _normalise(
    s, y, moments, counts, mean_out, rstd_out, gamma, beta, running_mean, running_var, parts,
    samples, pixels, channels, stride_n, stride_p, stride_f, MOMENTUM: tl.constexpr, EPS: tl.constexpr,
    POOL: tl.constexpr, MERGE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y, or with POOL its mean over each sample's pixels."""
    f, exists = _channels(channels, BLOCK_F)
    program, programs = tl.program_id(1), tl.num_programs(1)
    across = tl.cdiv(pixels, BLOCK_P)
    total = tl.cast(samples, ACC) * pixels
    mean, var = _merged_moments(moments, counts, f, exists, parts, channels, total, BLOCK_F, MERGE_ROWS, ACC)
    rstd = 1 / tl.sqrt(var + EPS)
    if program == 0:
        tl.store(mean_out + f, mean, mask=exists)
        tl.store(rstd_out + f, rstd, mask=exists)
        old_mean = tl.load(running_mean + f, mask=exists, other=0).to(ACC)
        old_var = tl.load(running_var + f, mask=exists, other=0).to(ACC)
        unbiased = var * (total / (total - 1))
        tl.store(running_mean + f, (1 - MOMENTUM) * old_mean + MOMENTUM * mean, mask=exists)
        tl.store(running_var + f, (1 - MOMENTUM) * old_var + MOMENTUM * unbiased, mask=exists)

    scale = tl.load(gamma + f, mask=exists, other=0).to(ACC)
    offset = tl.load(beta + f, mask=exists, other=0).to(ACC)
    # Last tiles first, here and in _input_gradient: the launch before has just left them in the cache.
    if POOL:
        groups = tl.cdiv(samples, BLOCK_N)
        for group in range(program, groups, programs):
            acc = tl.zeros([BLOCK_N, BLOCK_P, BLOCK_F], ACC)
            for k in range(across):
                start, offsets, mask, _ = _tile(
                    (groups - 1 - group) * across + k,
                    f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N, BLOCK_P,
                )  # fmt: skip
                x = tl.load(s + start + offsets, mask=mask, other=0).to(ACC)
                _, z = _affine(x, mean[None, None, :], rstd[None, None, :], scale[None, None, :], offset[None, None, :])
                acc += tl.where(mask & ~(z <= 0), z, 0)  # NaN stays NaN
            pooled = tl.sum(acc, axis=1) / pixels
            n = (groups - 1 - group) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
            at = tl.cast(n, tl.int64) * channels + f[None, :]
            tl.store(y + at, pooled, mask=(n < samples) & exists[None, :])
    else:
        tiles = tl.cdiv(samples, BLOCK_N) * across
        for tile in range(program, tiles, programs):
            start, offsets, mask, _ = _tile(
                tiles - 1 - tile, f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N, BLOCK_P
            )
            x = tl.load(s + start + offsets, mask=mask, other=0).to(ACC)
            _, z = _affine(x, mean[None, None, :], rstd[None, None, :], scale[None, None, :], offset[None, None, :])
            tl.store(y + start + offsets, tl.where(z <= 0, 0, z), mask=mask)  # NaN stays NaN


@triton.jit
def _masked_gradient(
    x, grad, start, offsets, mask, n, f, pixels, channels, mean, rstd, gamma, beta, POOL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """xhat and dz of a tile; 0 outside it."""
    xhat, z = _affine(x, mean[None, None, :], rstd[None, None, :], gamma[None, None, :], beta[None, None, :])
    if POOL:
        at = tl.cast(n, tl.int64) * channels + f[None, None, :]
        dy = tl.load(grad + at, mask=mask, other=0).to(ACC) / pixels
    else:
        dy = tl.load(grad + start + offsets, mask=mask, other=0).to(ACC)
    return tl.where(mask, xhat, 0), tl.where(mask & ~(z <= 0), dy, 0)


@triton.jit(do_not_specialize=["samples"])
def _partial_gradients(
    s, grad, sums, gamma, beta, mean, rstd, samples, pixels, channels, stride_n, stride_p, stride_f,
    POOL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz xhat over tiles program, program + programs, ... of one block of channels."""
    f, exists = _channels(channels, BLOCK_F)
    program, programs = tl.program_id(1), tl.num_programs(1)
    scale = tl.load(gamma + f, mask=exists, other=0).to(ACC)
    offset = tl.load(beta + f, mask=exists, other=0).to(ACC)
    mu = tl.load(mean + f, mask=exists, other=0)
    inv = tl.load(rstd + f, mask=exists, other=0)
    dbeta = tl.zeros([BLOCK_N, BLOCK_P, BLOCK_F], ACC)
    dgamma = tl.zeros([BLOCK_N, BLOCK_P, BLOCK_F], ACC)
    for tile in range(program, tl.cdiv(samples, BLOCK_N) * tl.cdiv(pixels, BLOCK_P), programs):
        start, offsets, mask, n = _tile(
            tile, f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N, BLOCK_P
        )
        x = tl.load(s + start + offsets, mask=mask, other=0).to(ACC)
        xhat, dz = _masked_gradient(
            x, grad, start, offsets, mask, n, f, pixels, channels, mu, inv, scale, offset, POOL, ACC
        )
        dbeta += dz
        dgamma += dz * xhat
    row = sums + program * channels + f
    tl.store(row, _column_sums(dbeta), mask=exists)
    tl.store(row + programs * channels, _column_sums(dgamma), mask=exists)


@triton.jit(do_not_specialize=["samples", "parts"])
def _input_gradient(
    s, grad, sums, dgamma_out, dbeta_out, gamma, beta, mean, rstd, parts,
    samples, pixels, channels, stride_n, stride_p, stride_f, MERGE_ROWS: tl.constexpr, POOL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s becomes ds."""
    f, exists = _channels(channels, BLOCK_F)
    program, programs = tl.program_id(1), tl.num_programs(1)
    dbetas = tl.zeros([MERGE_ROWS, BLOCK_F], ACC)
    dgammas = tl.zeros([MERGE_ROWS, BLOCK_F], ACC)
    for first in range(0, parts, MERGE_ROWS):
        part = first + tl.arange(0, MERGE_ROWS)[:, None]
        mask = (part < parts) & exists[None, :]
        row = sums + part * channels + f[None, :]
        dbetas += tl.load(row, mask=mask, other=0)
        dgammas += tl.load(row + parts * channels, mask=mask, other=0)
    dbeta, dgamma = tl.sum(dbetas, axis=0), tl.sum(dgammas, axis=0)
    if program == 0:
        tl.store(dbeta_out + f, dbeta, mask=exists)
        tl.store(dgamma_out + f, dgamma, mask=exists)

    total = tl.cast(samples, ACC) * pixels
    dbeta, dgamma = dbeta / total, dgamma / total
    scale = tl.load(gamma + f, mask=exists, other=0).to(ACC)
    offset = tl.load(beta + f, mask=exists, other=0).to(ACC)
    mu = tl.load(mean + f, mask=exists, other=0)
    inv = tl.load(rstd + f, mask=exists, other=0)
    slope = scale * inv
    tiles = tl.cdiv(samples, BLOCK_N) * tl.cdiv(pixels, BLOCK_P)
    for tile in range(program, tiles, programs):
        start, offsets, mask, n = _tile(
            tiles - 1 - tile, f, samples, pixels, channels, stride_n, stride_p, stride_f, BLOCK_N, BLOCK_P
        )
        x = tl.load(s + start + offsets, mask=mask, other=0).to(ACC)
        xhat, dz = _masked_gradient(
            x, grad, start, offsets, mask, n, f, pixels, channels, mu, inv, scale, offset, POOL, ACC
        )
        ds = slope[None, None, :] * (dz - dbeta[None, None, :] - xhat * dgamma[None, None, :])
        tl.store(s + start + offsets, ds, mask=mask)

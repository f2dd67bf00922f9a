"""Pool: adaptive average pooling of a map and its gradient, one pass over the map each.

x (N, C, H, W) -> pooled (N, C q q), float32, in the order of F.adaptive_avg_pool2d(x, q).flatten(1), and back.
Cell (i, j) is the mean of rows [floor(i H / q), ceil((i + 1) H / q)) and columns likewise: where q does not divide the
size, neighbouring windows share a row or a column. Backward writes each pixel once, by the first cell that holds it.
Two orientations of a tile, so that neighbouring lanes touch neighbouring addresses:
    lines     (planes, rows, columns)   x contiguous; a program takes row i of cells of some (n, c) planes
    channels  (cells, pixels, channels) x channels_last; a program takes some channels of some cells
Sums are float32 (float64 for float64 x), in an order that follows from the shapes; no atomics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import POOL, Tile, power_of_two, run


@triton.jit
def _start(i, size, Q: tl.constexpr):
    return i * size // Q


@triton.jit
def _end(i, size, Q: tl.constexpr):
    return ((i + 1) * size + Q - 1) // Q


@triton.jit
def _forward_lines(
    x, pooled, planes, C, H, W, stride_n, stride_c, stride_h, stride_w,
    Q: tl.constexpr, QP: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) % Q  # fastest: the rows of cells of small planes share sectors
    plane = tl.program_id(0) // Q * BR + tl.arange(0, BR)
    top, bottom = _start(i, H, Q), _end(i, H, Q)
    j = tl.arange(0, QP)
    left, right = _start(j, W, Q), _end(j, W, Q)
    base = x + tl.cast(plane // C, tl.int64) * stride_n + tl.cast(plane % C, tl.int64) * stride_c
    cells = tl.zeros([BR, QP], ACC)
    for w0 in range(0, W, BW):
        w = w0 + tl.arange(0, BW)
        sums = tl.zeros([BR, BH, BW], ACC)
        for h0 in range(top, bottom, BH):
            h = h0 + tl.arange(0, BH)
            pixel = tl.cast(h, tl.int64)[:, None] * stride_h + tl.cast(w, tl.int64)[None, :] * stride_w
            inside = (h < bottom)[:, None] & (w < W)[None, :]
            mask = (plane < planes)[:, None, None] & inside[None, :, :]
            sums += tl.load(base[:, None, None] + pixel[None, :, :], mask=mask, other=0.0).to(ACC)
        member = (w[None, :] >= left[:, None]) & (w[None, :] < right[:, None])  # selected: 0 * NaN would spread
        cells += tl.sum(tl.where(member[None, :, :], tl.sum(sums, 1)[:, None, :], 0.0), 2)
    area = (bottom - top) * (right - left)
    at = tl.cast(plane, tl.int64)[:, None] * (Q * Q) + i * Q + j[None, :]
    tl.store(pooled + at, cells / area[None, :], mask=(plane < planes)[:, None] & (j < Q)[None, :])


@triton.jit
def _forward_channels(
    x, pooled, cells, C, H, W, window_h, window_w, stride_n, stride_c, stride_h, stride_w,
    Q: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n, i, j = tl.cast(cell // (Q * Q), tl.int64), cell // Q % Q, cell % Q
    top, left = _start(i, H, Q), _start(j, W, Q)
    height, width = _end(i, H, Q) - top, _end(j, W, Q) - left
    sums = tl.zeros([BR, BP, BC], ACC)
    for p0 in range(0, window_h * window_w, BP):
        h = (p0 + tl.arange(0, BP)) // window_w
        w = (p0 + tl.arange(0, BP)) % window_w
        row = tl.cast(top[:, None] + h[None, :], tl.int64) * stride_h
        pixel = n[:, None] * stride_n + row + tl.cast(left[:, None] + w[None, :], tl.int64) * stride_w
        inside = (cell < cells)[:, None] & (h[None, :] < height[:, None]) & (w[None, :] < width[:, None])
        at = pixel[:, :, None] + tl.cast(c, tl.int64)[None, None, :] * stride_c
        sums += tl.load(x + at, mask=inside[:, :, None] & (c < C)[None, None, :], other=0.0).to(ACC)
    at = (n[:, None] * C + c[None, :]) * (Q * Q) + (cell % (Q * Q))[:, None]
    mean = tl.sum(sums, 1) / (height * width)[:, None]
    tl.store(pooled + at, mean, mask=(cell < cells)[:, None] & (c < C)[None, :])


@triton.jit
def _share(dpooled, plane, i, j, H, W, mask, Q: tl.constexpr, ACC: tl.constexpr):
    """What each pixel of cell (i, j) of a plane gets from it; 0 beyond the last cell."""
    area = (_end(i, H, Q) - _start(i, H, Q)) * (_end(j, W, Q) - _start(j, W, Q))
    inside = mask & (i < Q) & (j < Q)
    return tl.load(dpooled + plane * (Q * Q) + i * Q + j, mask=inside, other=0.0).to(ACC) / area


@triton.jit
def _backward_lines(
    dpooled, dx, planes, C, H, W, stride_n, stride_c, stride_h, stride_w,
    Q: tl.constexpr, OVERLAP: tl.constexpr,
    BR: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) % Q  # fastest: the rows of cells of small planes share sectors
    plane = tl.program_id(0) // Q * BR + tl.arange(0, BR)
    top, bottom = (i * H + Q - 1) // Q, _end(i, H, Q)  # rows whose first window is i
    base = dx + tl.cast(plane // C, tl.int64) * stride_n + tl.cast(plane % C, tl.int64) * stride_c
    owner = tl.cast(plane, tl.int64)[:, None]
    for w0 in range(0, W, BW):
        w = w0 + tl.arange(0, BW)
        j = (w * Q // W)[None, :]
        mask = (plane < planes)[:, None] & (w < W)[None, :]
        here = _share(dpooled, owner, i, j, H, W, mask, Q, ACC)
        below = here
        if OVERLAP:
            second = mask & (w[None, :] >= _start(j + 1, W, Q))  # columns of the next window too
            here += _share(dpooled, owner, i, j + 1, H, W, second, Q, ACC)
            below = _share(dpooled, owner, i + 1, j, H, W, mask, Q, ACC)
            below += _share(dpooled, owner, i + 1, j + 1, H, W, second, Q, ACC)
        for h0 in range(top, bottom, BH):
            h = h0 + tl.arange(0, BH)
            value = tl.broadcast_to(here[:, None, :], [BR, BH, BW])
            if OVERLAP:
                value += tl.where((h >= _start(i + 1, H, Q))[None, :, None], below[:, None, :], 0.0)
            pixel = tl.cast(h, tl.int64)[:, None] * stride_h + tl.cast(w, tl.int64)[None, :] * stride_w
            at = base[:, None, None] + pixel[None, :, :]
            tl.store(at, value.to(dx.dtype.element_ty), mask=mask[:, None, :] & (h < bottom)[None, :, None])


@triton.jit
def _backward_channels(
    dpooled, dx, cells, C, H, W, window_h, window_w, stride_n, stride_c, stride_h, stride_w,
    Q: tl.constexpr, OVERLAP: tl.constexpr,
    BR: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n, i, j = tl.cast(cell // (Q * Q), tl.int64), (cell // Q % Q)[:, None], (cell % Q)[:, None]
    top, left = (i * H + Q - 1) // Q, (j * W + Q - 1) // Q  # pixels whose first window is (i, j)
    owner = n[:, None] * C + c[None, :]
    mask = (cell < cells)[:, None] & (c < C)[None, :]
    here = _share(dpooled, owner, i, j, H, W, mask, Q, ACC)
    if OVERLAP:
        right = _share(dpooled, owner, i, j + 1, H, W, mask, Q, ACC)
        below = _share(dpooled, owner, i + 1, j, H, W, mask, Q, ACC)
        corner = _share(dpooled, owner, i + 1, j + 1, H, W, mask, Q, ACC)
    for p0 in range(0, window_h * window_w, BP):
        h = top + ((p0 + tl.arange(0, BP)) // window_w)[None, :]
        w = left + ((p0 + tl.arange(0, BP)) % window_w)[None, :]
        value = tl.broadcast_to(here[:, None, :], [BR, BP, BC])
        if OVERLAP:
            low = (h >= _start(i + 1, H, Q))[:, :, None]  # also in the window below
            far = (w >= _start(j + 1, W, Q))[:, :, None]  # and in the one to the right
            value += tl.where(far, right[:, None, :], 0.0) + tl.where(low, below[:, None, :], 0.0)
            value += tl.where(far & low, corner[:, None, :], 0.0)
        pixel = n[:, None] * stride_n + tl.cast(h, tl.int64) * stride_h + tl.cast(w, tl.int64) * stride_w
        inside = (h < _end(i, H, Q)) & (w < _end(j, W, Q))
        at = pixel[:, :, None] + tl.cast(c, tl.int64)[None, None, :] * stride_c
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside[:, :, None] & mask[:, None, :])


def pool_forward(x: Tensor, q: int) -> Tensor:
    """Adaptive average pooling of x (N, C, H, W) to q x q cells.

    Args:
        x: float32, bfloat16, float16 or float64; any strides, fast where contiguous or channels_last.
        q: at most min(H, W).

    Returns:
        (N, C q q) float32 (float64 for float64 x), in the order of F.adaptive_avg_pool2d(x, q).flatten(1).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pooled = torch.empty(x.shape[0], x.shape[1] * q * q, dtype=wide, device=x.device)
    _run(x, pooled, q, backward=False)
    return pooled


def pool_backward(dpooled: Tensor, like_x: Tensor) -> Tensor:
    """Gradient of the pooling at x.

    Args:
        dpooled: (N, C q q), contiguous, float32 (float64 for float64 x).
        like_x: (N, C, H, W), lends its shape, dtype and layout; not read.

    Returns:
        dx like like_x, rounded once; for q = 1 a view of (N, C) values with strides of 0, as nothing need be written.
    """
    n, c, h, w = like_x.shape
    q = math.isqrt(dpooled.shape[1] // c)
    if q == 1:
        return (dpooled / (h * w)).to(like_x.dtype).view(n, c, 1, 1).expand(n, c, h, w)
    dx = torch.empty_like(like_x)
    _run(dx, dpooled, q, backward=True)
    return dx


class Launch(NamedTuple):
    """One launch: its cells or planes, the largest window (of channels only), and the constants of the kernel."""

    kernel: Any
    grid: tuple[int, int]
    items: int
    windows: tuple[int, ...]
    constants: dict[str, Any]


def plan_launch(x: Tensor, q: int, tile: Tile, *, backward: bool) -> Launch:
    """How the tile is cut for this map; `x` may be on any device, also "meta": only its shape and strides are read."""
    n, c, h, w = x.shape
    uneven = h % q > 0 or w % q > 0
    wider = uneven and not backward  # a window may hold one row and column more than a cell owns
    height, width = -(-h // q) + wider, -(-w // q) + wider
    constants = {"Q": q, "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32}
    if backward:
        constants["OVERLAP"] = uneven
    if orientation(x) == "channels":
        cells, side = n * q * q, min(4, q * q)  # cells side by side in one program: fuller lines of pooled
        channels = min(power_of_two(c), 64)
        while channels > 16 and cells // side * -(-c // channels) < 512:  # too few programs to fill a GPU
            channels //= 2  # 16 are still a whole sector of 32 bytes
        pixels = min(power_of_two(height * width), tile.size // channels // side)
        rows = min(power_of_two(cells), tile.size // channels // pixels)
        constants |= {"BR": rows, "BP": pixels, "BC": channels}
        kernel = _backward_channels if backward else _forward_channels
        return Launch(kernel, (-(-cells // rows), -(-c // channels)), cells, (height, width), constants)
    columns, side = min(power_of_two(w), 256), power_of_two(q)
    lines = min(power_of_two(height), tile.size // columns)
    # Forward spreads a line over its cells.
    rows = max(1, min(power_of_two(n * c), tile.size // columns // max(lines, side)))
    constants |= {"BR": rows, "BH": lines, "BW": columns}
    if not backward:
        constants["QP"] = side
    return Launch(_backward_lines if backward else _forward_lines, (-(-n * c // rows) * q, 1), n * c, (), constants)


def orientation(x: Tensor) -> str:
    return "channels" if x.stride(1) == 1 and x.shape[1] > 1 else "lines"


def _run(x: Tensor, pooled: Tensor, q: int, *, backward: bool) -> None:
    """x: the map, read or (backward) written; pooled: written or (backward) read."""
    if not x.numel():
        return
    first, second = (pooled, x) if backward else (x, pooled)

    def launch(tile: Tile) -> None:
        kernel, grid, items, windows, constants = plan_launch(x, q, tile, backward=backward)
        sizes = (items, *x.shape[1:], *windows, *x.stride())
        with torch.cuda.device_of(x):
            kernel[grid](first, second, *sizes, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)

    run(POOL[orientation(x)], ("pool", backward, q, x.device, x.dtype, x.shape, x.stride()), launch)

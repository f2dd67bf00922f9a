"""Linear + cross-entropy: the end of a head, from features to the gradient of the features, in one launch.

features (N, D) -> logits (N, K) = features @ weight.T + bias -> loss rows (N,), dlogits (N, K), dfeatures (N, D).
    loss = (1 - e)(lse - z_y) + e(lse - mean z)        dlogits = (softmax(z) - (1 - e) 1_y - e / K) * scale
A program takes a few rows and all classes: one pass over D makes the logits, a second one dfeatures = dlogits @ weight.
All products are IEEE float32. In the first pass D is also split inside the program, in SPLIT parts that are summed at
the end: a tile of few rows and classes has too few sums to keep its threads busy, and each would be one long chain.
For more classes than a tile holds, cross_entropy does the middle alone, over logits that the caller multiplied.
Source: gradient in the forward pass as in Liger-Kernel, https://github.com/linkedin/Liger-Kernel (loss and its order of
steps only).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LINEAR, ROWS, Tile, power_of_two, run

MAX_CLASSES = max(LINEAR)  # of linear_cross_entropy
MANY_ROWS = 2048  # from here on 16 rows a program still make 128 programs or more


@triton.jit
def _row_loss(lse, z_label, z_sum, label, K, ignore_index, E: tl.constexpr):
    loss = (1.0 - E) * (lse - z_label)
    if E > 0:  # the mean may be -inf, and 0 * inf is NaN
        loss += E * (lse - z_sum / K)
    loss = tl.where((label >= 0) & (label < K), loss, float("nan"))
    return tl.where(label == ignore_index, 0.0, loss)


@triton.jit
def _row_gradient(z, lse, k, label, scale, K, ignore_index, E: tl.constexpr):
    """Gradient at logits z (rows, classes k); lse and label (rows,)."""
    hit = k[None, :] == label[:, None]  # compared, so no label reads out of bounds
    target = tl.where(hit, 1.0 - E, 0.0) + E / K  # summed first: exactly 1, so dz is exactly 0, for one class
    dz = (tl.exp(z - lse[:, None]) - target) * scale
    dz = tl.where(((label >= 0) & (label < K))[:, None], dz, float("nan"))
    return tl.where((label == ignore_index)[:, None], 0.0, dz)  # after the product: scale is inf if all are ignored


@triton.jit
def _linear_cross_entropy(
    features, weight, bias, labels, scale, loss_rows, dlogits, dfeatures, N, D, K, ignore_index,
    E: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_row, in_k = row < N, k < K
    start = tl.cast(row, tl.int64) * D
    part = tl.arange(0, SPLIT)[:, None] * BD + tl.arange(0, BD)[None, :]
    sums = tl.zeros([SPLIT, BN, BK], ACC)
    for d0 in range(0, D, SPLIT * BD):
        d = d0 + part
        f = tl.load(
            features + start[None, :, None] + d[:, None, :], mask=in_row[None, :, None] & (d < D)[:, None, :], other=0.0
        )
        w = tl.load(
            weight + k[None, None, :] * D + d[:, :, None], mask=in_k[None, None, :] & (d < D)[:, :, None], other=0.0
        )
        sums = tl.dot(f, w, sums, input_precision="ieee", out_dtype=ACC)
    z = tl.sum(sums, 0) + tl.load(bias + k, mask=in_k, other=0.0)[None, :]

    label = tl.load(labels + row, mask=in_row, other=0)
    z_sum = tl.sum(tl.where(in_k[None, :], z, 0.0), 1)
    z_label = tl.sum(tl.where(k[None, :] == label[:, None], z, 0.0), 1)
    z = tl.where(in_k[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    lse = top + tl.log(tl.sum(tl.exp(z - top[:, None]), 1))
    tl.store(loss_rows + row, _row_loss(lse, z_label, z_sum, label, K, ignore_index, E), mask=in_row)
    dz = _row_gradient(z, lse, k, label, tl.load(scale), K, ignore_index, E)
    inside = in_row[:, None] & in_k[None, :]
    tl.store(dlogits + tl.cast(row, tl.int64)[:, None] * K + k[None, :], dz, mask=inside)

    for d0 in range(0, D, SPLIT * BD):
        d = d0 + tl.arange(0, SPLIT * BD)
        w = tl.load(weight + k[:, None] * D + d[None, :], mask=in_k[:, None] & (d < D)[None, :], other=0.0)
        df = tl.dot(dz, w, input_precision="ieee", out_dtype=ACC)
        tl.store(dfeatures + start[:, None] + d[None, :], df, mask=in_row[:, None] & (d < D)[None, :])


@triton.jit
def _cross_entropy(
    logits, labels, scale, loss_rows, dlogits, N, K, ignore_index,
    E: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    in_row = row < N
    start = tl.cast(row, tl.int64)[:, None] * K
    label = tl.load(labels + row, mask=in_row, other=0)
    top = tl.full([BN], float("-inf"), ACC)
    exp_sum, z_sum, z_label = tl.zeros([BN], ACC), tl.zeros([BN], ACC), tl.zeros([BN], ACC)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        inside = in_row[:, None] & (k < K)[None, :]
        z = tl.load(logits + start + k[None, :], mask=inside, other=float("-inf")).to(ACC)
        z_sum += tl.sum(tl.where(inside, z, 0.0), 1)
        z_label += tl.sum(tl.where(k[None, :] == label[:, None], z, 0.0), 1)
        higher = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a block of -inf only: inf - inf is NaN
        exp_sum = exp_sum * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        top = higher
    lse = top + tl.log(exp_sum)
    tl.store(loss_rows + row, _row_loss(lse, z_label, z_sum, label, K, ignore_index, E), mask=in_row)
    scaled = tl.load(scale)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        inside = in_row[:, None] & (k < K)[None, :]
        z = tl.load(logits + start + k[None, :], mask=inside, other=0.0).to(ACC)
        tl.store(dlogits + start + k[None, :], _row_gradient(z, lse, k, label, scaled, K, ignore_index, E), mask=inside)


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    smoothing: float,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row and the gradients of scale * sum(loss) at the logits and at the features.

    Args:
        features: (N, D) float32, contiguous.
        weight, bias: (K, D) and (K,) float32, contiguous; K <= MAX_CLASSES.
        labels: (N,) int64, contiguous; ignore_index gives 0 in loss and gradients, any other label outside [0, K) NaN.
        scale: one float32, on the same device; may be inf where all rows are ignored.
        smoothing: e, in [0, 1].

    Returns:
        loss_rows (N,) unscaled, dlogits (N, K), dfeatures (N, D), float32. The gradients of the weights are
        dlogits.T @ features and dlogits.sum(0). All is float64 if all that comes in is.

    Raises:
        ValueError: K > MAX_CLASSES.
    """
    (n, d), k = features.shape, len(bias)
    if k > MAX_CLASSES:
        raise ValueError(f"expected at most {MAX_CLASSES} classes, got {k}; multiply in torch and call cross_entropy")
    loss_rows, dlogits, dfeatures = features.new_empty(n), features.new_empty(n, k), torch.empty_like(features)
    if not n:
        return loss_rows, dlogits, dfeatures

    def launch(tile: Tile) -> None:
        constants = linear_constants(n, k, tile, smoothing, features.dtype)
        with torch.cuda.device_of(features):
            _linear_cross_entropy[(-(-n // constants["BN"]),)](
                features, weight, bias, labels, scale, loss_rows, dlogits, dfeatures, n, d, k, ignore_index,
                **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    run(LINEAR[max(16, power_of_two(k))], ("linear", features.device, features.dtype, n, d, k), launch)
    return loss_rows, dlogits, dfeatures


def linear_constants(n: int, k: int, tile: Tile, smoothing: float, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of _linear_cross_entropy."""
    classes = max(16, power_of_two(k))
    # Every program reads all weights, twice: more rows each read less, but make fewer programs of more registers.
    rows = 256 // classes if n >= MANY_ROWS and classes <= 32 else 4
    part = 16  # the shortest that tl.dot takes
    return {
        "E": smoothing, "BN": rows, "BK": classes, "SPLIT": tile.size // part, "BD": part,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: Tensor, *, smoothing: float, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Loss of each row and the gradient of scale * sum(loss) at the logits; two passes over them, any K.

    Args:
        logits: (N, K) float32, bfloat16 or float16, contiguous.
        labels, scale, smoothing, ignore_index: as in linear_cross_entropy.

    Returns:
        loss_rows (N,) unscaled and dlogits (N, K), both float32 (float64 for float64 logits).
    """
    n, k = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss_rows = torch.empty(n, dtype=wide, device=logits.device)
    dlogits = torch.empty(n, k, dtype=wide, device=logits.device)
    if not n:
        return loss_rows, dlogits

    def launch(tile: Tile) -> None:
        constants = row_constants(k, tile, smoothing, logits.dtype)
        with torch.cuda.device_of(logits):
            _cross_entropy[(-(-n // constants["BN"]),)](
                logits, labels, scale, loss_rows, dlogits, n, k, ignore_index,
                **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    run(ROWS, ("rows", logits.device, logits.dtype, n, k), launch)
    return loss_rows, dlogits


def row_constants(k: int, tile: Tile, smoothing: float, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of _cross_entropy."""
    classes = min(power_of_two(k), tile.size)
    return {
        "E": smoothing, "BN": min(4, tile.size // classes), "BK": classes,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip

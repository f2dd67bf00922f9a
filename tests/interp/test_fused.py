"""The whole fused step in the interpreter, through AuxiliaryHead, against float64 autograd and the reference."""

from __future__ import annotations

import copy
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'nf-engine[triton]'")
from nf_engine import fused, ops, reference
from nf_engine.config import TrainConfig
from nf_engine.heads import AuxiliaryHead
from nf_engine.local_step import Unit, local_step, make_optimizer
from nf_engine.records import HeadSpec

SPECS = [HeadSpec("linear", 1), HeadSpec("linear", 4), HeadSpec("deep", 1, 24, 2), HeadSpec("deep", 2, 20, 1)]
SHAPES = [(16, 8, 8), (12, 7, 9)]


def make(spec, shape, classes=7):
    head = AuxiliaryHead(spec, *shape, classes, seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in head.parameters():  # the linear layer starts at zero: nothing would come through it
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return head


def batch(shape, layout, dtype, n=6, classes=7):
    generator = torch.Generator().manual_seed(3)
    h = (torch.randn(n, *shape, generator=generator) + 0.5).to(dtype).to(memory_format=layout)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[2] = ops.IGNORE_INDEX
    return h, labels


def results(head, h, labels):
    """Loss, dh, gradients and running statistics of one step, by name."""
    loss, dh = head.step(h, labels)
    found = {"loss": loss, "dh": dh} | {f"d {n}": p.grad for n, p in head.named_parameters()}
    return found | {n: b for n, b in head.named_buffers() if "running" in n}


def by_autograd(head, h, labels):
    """The same in float64."""
    leaf, head = h.double().requires_grad_(), head.double()
    loss = F.cross_entropy(head(leaf), labels, label_smoothing=0.1)
    loss.backward()
    truth = {"loss": loss.detach(), "dh": leaf.grad} | {f"d {n}": p.grad for n, p in head.named_parameters()}
    return truth | {n: b for n, b in head.named_buffers() if "running" in n}


def distance(found, truth):
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-6))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, astuple(s))))
def test_a_step_equals_float64_autograd(spec, shape, dtype, layout, monkeypatch):
    head, (h, labels) = make(spec, shape), batch(shape, layout, dtype)
    given = h.clone()
    truth = by_autograd(copy.deepcopy(head), h, labels)
    plain = results(copy.deepcopy(head), h, labels)
    monkeypatch.setattr(ops, "head_path", lambda device, dtype=None: ops.HeadPath("fused", "test"))
    found = results(head, h, labels)

    assert torch.equal(h, given), "h is only read"
    assert (found["dh"].dtype, found["dh"].shape) == (h.dtype, h.shape)
    for name, value in found.items():
        # Rounded maps flip some masks of the ReLU: no more than twice what torch's own bfloat16 loses.
        limit = 2e-5 if dtype == torch.float32 else 2 * distance(plain[name], truth[name]) + 4e-3
        assert distance(value, truth[name]) <= limit, name


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, astuple(s))))
def test_a_local_step_trains_as_on_the_reference_path(spec, monkeypatch):
    results = {}
    for path in ("reference", "fused"):
        monkeypatch.setattr(ops, "head_path", lambda device, dtype=None, name=path: ops.HeadPath(name, "test"))
        torch.manual_seed(0)
        body = torch.nn.Conv2d(3, 16, 3, padding=1)
        unit = Unit("unit", [body, torch.nn.ReLU()], make(spec, (16, 8, 8)))
        unit.optimizer = make_optimizer(unit.parameters(), TrainConfig())
        images, labels = batch((3, 8, 8), torch.channels_last, torch.float32)
        losses = [local_step(unit, images, labels)[1] for _ in range(3)]
        results[path] = [*losses, *(p.detach().clone() for p in unit.parameters())]
    for found, expected in zip(results["fused"], results["reference"], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, astuple(s))))
def test_the_registered_operator_gives_the_bits_of_the_step(spec, monkeypatch):
    """It also checks that no two of its results share memory, as torch demands."""
    monkeypatch.setattr(ops, "head_path", lambda device, dtype=None: ops.HeadPath("fused", "test"))
    head = make(spec, (16, 8, 8))
    h, labels = batch((16, 8, 8), torch.channels_last, torch.float32)
    params, running, scale = head._params(), head._running(), torch.tensor(0.25)
    lists = [[*t] for t in (params.convs, params.gammas, params.betas, *running)]
    with torch.no_grad():
        rows, dx, *rest = ops._operator(h, *lists, params.wl, params.bl, labels, scale, head.spec.pool, 0.1)
        expected = fused.head_step(h, params, head._running(), labels, scale, head.spec.pool, 0.1)
    assert torch.equal(rows, expected.loss_rows)
    assert torch.equal(dx.expand_as(expected.dx), expected.dx)
    for ours, theirs in zip(rest, expected.grads.flat(), strict=False):
        assert torch.equal(ours, theirs)


def test_more_classes_than_a_tile_holds_take_the_row_kernel():
    head = make(HeadSpec("linear", 1), (16, 4, 4), classes=300)
    h, labels = batch((16, 4, 4), torch.contiguous_format, torch.float32, classes=300)
    arguments = (h, head._params(), head._running(), labels, torch.tensor(0.25), 1, 0.1)
    with torch.no_grad():
        found, expected = fused.head_step(*arguments), reference.head_step(*arguments)
    torch.testing.assert_close(found.loss_rows, expected.loss_rows)
    torch.testing.assert_close(found.dx, expected.dx)
    for one, other in zip(found.grads.flat(), expected.grads.flat(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_map_in_no_layout_of_the_kernels_is_copied():
    head = make(HeadSpec("linear", 2), (16, 4, 4))
    h, labels = batch((16, 4, 8), torch.contiguous_format, torch.float32)
    arguments = (head._params(), head._running(), labels, torch.tensor(0.2), 2, 0.1)
    with torch.no_grad():
        found = fused.head_step(h[..., ::2], *arguments)
        expected = reference.head_step(h[..., ::2].contiguous(), *arguments)
    torch.testing.assert_close(found.dx, expected.dx)

"""The edge of the heads' operations: what is refused, and that autograd and autocast stay outside."""

import pytest
import torch

from nf_engine import ops, reference
from nf_engine.ops import HeadParams
from nf_engine.records import HeadSpec

N, C, K, F = 4, 3, 7, 5
SPECS = [HeadSpec("linear", pool=2), HeadSpec("conv1x1", 2, F), HeadSpec("conv3x3", 2, F)]


def arguments(spec, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    kernel, filters = ops.KERNELS[spec.kind], spec.width or C
    conv = (torch.randn(F, C, kernel, kernel, generator=g), torch.randn(F, generator=g)) if kernel else (None, None)
    params = HeadParams(*conv, torch.randn(K, filters * 4, generator=g), torch.randn(K, generator=g))
    x = torch.randn(N, C, 6, 6, generator=g).to(dtype)
    return {"x": x, "params": params, "labels": torch.arange(N), "scale": torch.tensor(0.25), "spec": spec}


WRONG = {
    r"floating point x \(N, C, H, W\)": {"x": torch.zeros(N, C)},
    r"x \(N, C, H, W\), got torch.uint8": {"x": torch.zeros(N, C, 6, 6, dtype=torch.uint8)},
    r"int64 labels \(4,\)": {"labels": torch.zeros(3, dtype=torch.int64)},
    r"labels .* got torch.int32": {"labels": torch.zeros(N, dtype=torch.int32)},
    r"scale as one .* got torch.float32 \(2,\)": {"scale": torch.ones(2)},
    r"scale as one .* got torch.int64": {"scale": torch.tensor(1)},
    r"smoothing in \[0, 1\], got 1.5": {"smoothing": 1.5},
    r"chunks >= 1, got 0": {"chunks": 0},
    r"kind linear, .* got deep": {"spec": HeadSpec("deep", depth=2)},
    r"pool <= min\(H, W\)": {"spec": HeadSpec("linear", pool=8)},
    r"expected parameters .* got \(None": {"spec": HeadSpec("conv1x1", 2, F)},
    r"expected parameters .*\(7, 3\)": {"spec": HeadSpec("linear", pool=1)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused_with_expected_and_found(message):
    good = {**arguments(SPECS[0]), "smoothing": 0.1, "chunks": 1}
    ops.head_step(**good)
    with pytest.raises(ValueError, match=message):
        ops.head_step(**(good | WRONG[message]))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_no_result_carries_a_graph_even_where_the_inputs_ask_for_one(spec):
    given = arguments(spec)
    given["x"].requires_grad_()
    given["params"] = HeadParams(*(None if p is None else p.requires_grad_() for p in given["params"]))
    step = ops.head_step(**given, smoothing=0.1)
    results = [step.loss_rows, step.dx, *(g for g in step.grads if g is not None)]
    results.append(ops.head_logits(given["x"], given["params"], spec=spec))
    assert not any(r.requires_grad for r in results)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_autocast_around_the_step_changes_no_bit(spec):
    given = arguments(spec)
    plain = ops.head_step(**given, smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.head_step(**given, smoothing=0.1)
        logits = ops.head_logits(given["x"], given["params"], spec=spec)
    assert torch.equal(inside.loss_rows, plain.loss_rows)
    assert torch.equal(inside.dx, plain.dx)
    assert torch.equal(inside.grads.wl, plain.grads.wl)
    assert torch.equal(logits, ops.head_logits(given["x"], given["params"], spec=spec))


def test_a_device_without_its_own_kernel_takes_the_reference(monkeypatch):
    given = arguments(SPECS[1])
    expected = ops.head_step(**given, smoothing=0.1)
    monkeypatch.delitem(ops._STEPS, "cpu")
    assert torch.equal(ops.head_step(**given, smoothing=0.1).dx, expected.dx)


def test_the_result_is_that_of_the_implementation_for_the_device(monkeypatch):
    given = arguments(SPECS[0])
    marker = reference.HeadStep(torch.ones(1), torch.ones(1), given["params"])
    monkeypatch.setitem(ops._STEPS, "cpu", lambda *args, **kwargs: marker)
    assert ops.head_step(**given, smoothing=0.1) is marker

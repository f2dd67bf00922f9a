"""The edge of the heads' operation: what is refused, which path is taken, and that autograd, autocast and the compiler
change nothing."""

import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map, tree_map_only

import nf_engine
from nf_engine import ops, reference
from nf_engine.ops import HeadParams, Statistics, head_path

N, C, K, F = 4, 3, 7, 5
HEADS = {"linear, q = 1": (1, 0), "linear, q = 4": (4, 0), "deep": (2, 2)}  # pool, depth
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=HEADS)
def given(request):
    return arguments(*HEADS[request.param])


def arguments(pool, depth, dtype=torch.float32, memory_format=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    convs = tuple(torch.randn(F, F if k else C, 3, 3, generator=g) for k in range(depth))
    norms = [tuple(torch.rand(F, generator=g) for _ in convs) for _ in range(4)]
    wl = torch.randn(K, (F if depth else C) * pool**2, generator=g)
    return {
        "x": torch.randn(N, C, 8, 8, generator=g).to(dtype).to(memory_format=memory_format),
        "params": HeadParams(convs, *norms[:2], wl, torch.randn(K, generator=g)),
        "labels": torch.arange(N),
        "scale": torch.tensor(0.25),
        "running": Statistics(*norms[2:]),
        "pool": pool,
        "smoothing": 0.1,
    }


def flat(step, running):
    return [step.loss_rows, step.dx, *step.grads.flat(), *running.means, *running.variances]


def results(given, call=ops.head_step):
    """All tensors of one step on a copy of the statistics, the moved ones among them."""
    given = {**given, "running": tree_map(torch.clone, given["running"])}
    return flat(call(**given), given["running"])


def schema(given):
    """The same arguments in the order of the operator."""
    lists = [list(part) for part in (*given["params"][:3], *given["running"])]
    return (given["x"], *lists, *given["params"][3:], *(given[k] for k in ("labels", "scale", "pool", "smoothing")))


LINEAR, DEEP = arguments(4, 0), arguments(2, 2)
PARAMS = DEEP["params"]
WRONG = [
    (LINEAR, {"x": torch.zeros(N, C)}, r"floating point x \(N, C, H, W\), got torch.float32 \(4, 3\) on cpu"),
    (LINEAR, {"x": torch.zeros(N, C, 8, 8, dtype=torch.uint8)}, r"x \(N, C, H, W\), got torch.uint8"),
    (LINEAR, {"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 labels \(4,\) on cpu, got torch.int64 \(3,\)"),
    (LINEAR, {"labels": torch.zeros(N, dtype=torch.int32)}, r"labels .* got torch.int32"),
    (LINEAR, {"labels": torch.zeros(N, dtype=torch.int64, device="meta")}, r"on cpu, got .* on meta"),
    (LINEAR, {"scale": torch.ones(2)}, r"scale as one .* got torch.float32 \(2,\)"),
    (LINEAR, {"scale": torch.tensor(1)}, r"scale as one .* got torch.int64"),
    (LINEAR, {"scale": torch.ones(1, device="meta")}, r"one floating point element on cpu, got .* on meta"),
    (LINEAR, {"smoothing": 1.5}, r"smoothing in \[0, 1\], got 1.5"),
    (LINEAR, {"smoothing": -0.1}, r"smoothing in \[0, 1\], got -0.1"),
    (LINEAR, {"pool": 0}, r"1 <= pool <= 8, the side of the last map, got 0"),
    (LINEAR, {"pool": 9}, r"1 <= pool <= 8, the side of the last map, got 9; clip it"),
    (LINEAR, {"pool": 3}, r"expected parameters \[\(7, 27\), \(7,\)\] for x .* and pool 3, got \[\(7, 48\), \(7,\)\]"),
    (LINEAR, {"x": torch.zeros(N, 2, 8, 8)}, r"expected parameters \[\(7, 32\)"),
    (LINEAR, {"running": DEEP["running"]}, r"running means and variances \[\]"),
    (DEEP, {"running": None}, r"running means and variances \[\(5,\), \(5,\)\], one for each convolution"),
    (DEEP, {"running": Statistics(DEEP["running"].means)}, r"running means and variances"),
    (DEEP, {"pool": 3}, r"1 <= pool <= 2, the side of the last map, got 3"),
    (DEEP, {"params": PARAMS._replace(convs=PARAMS.convs[::-1])}, r"expected parameters \[\(5, 3, 3, 3\)"),
    (DEEP, {"params": PARAMS._replace(betas=PARAMS.betas[:1])}, r"expected parameters"),
    (DEEP, {"x": torch.zeros(1, C, 4, 3), "labels": torch.zeros(1, dtype=torch.int64), "pool": 1,
            "params": PARAMS._replace(wl=torch.zeros(K, F))}, r"two values a channel, x \(1, 3, 4, 3\) leaves it one"),
    (DEEP, {"x": torch.zeros(0, C, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, r"use a larger batch"),
    (DEEP, {"x": DEEP["x"].double()}, r"torch.float64 beside x in torch.float64; got torch.float32 \(5,\) on cpu,"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "wrong", "message"), WRONG, ids=[f"{k}: {w[2]}" for k, w in enumerate(WRONG)])
def test_what_does_not_fit_is_refused_with_expected_and_found(good, wrong, message):
    results(good)
    with pytest.raises(ValueError, match=message):
        ops.head_step(**(good | wrong))


def test_no_result_carries_a_graph_even_where_the_inputs_ask_for_one(given):
    given["x"].requires_grad_()
    for parameter in given["params"].flat():
        parameter.requires_grad_()
    assert not any(r.requires_grad for r in results(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_the_step_changes_no_bit(given, dtype):
    given["x"] = given["x"].to(dtype)
    plain = results(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(given)
    assert [r.dtype for r in inside] == [r.dtype for r in plain]
    assert all(map(torch.equal, inside, plain))


# --- the path ---


@pytest.fixture
def fresh_paths():
    head_path.cache_clear()
    yield
    head_path.cache_clear()


def install(monkeypatch, refusal):
    """A `fused` module whose steps are marked, and which refuses with this reason."""
    marker = reference.HeadStep(torch.ones(1), torch.ones(1), HeadParams((), (), (), torch.ones(1), torch.ones(1)))
    fake = types.ModuleType("nf_engine.fused")
    fake.refusal = lambda device, dtype: refusal
    fake.head_step = lambda *args: marker
    monkeypatch.setitem(sys.modules, "nf_engine.fused", fake)
    monkeypatch.setattr(nf_engine, "fused", fake, raising=False)
    return marker


def test_a_cpu_takes_the_reference(fresh_paths):
    assert head_path(torch.device("cpu")) == ("reference", "device cpu")


def test_a_gpu_takes_the_kernels_unless_they_refuse(monkeypatch, fresh_paths):
    monkeypatch.delenv("NF_KERNELS", raising=False)
    install(monkeypatch, None)
    assert {head_path(CUDA, d).name for d in (torch.float32, torch.bfloat16, torch.float16)} == {"fused"}
    assert head_path(CUDA, torch.float64) == ("reference", "no kernels for float64")
    head_path.cache_clear()
    install(monkeypatch, "no tiles for compute capability 6.1")
    assert head_path(CUDA) == ("reference", "no tiles for compute capability 6.1")


def test_the_environment_keeps_the_reference(monkeypatch, fresh_paths):
    install(monkeypatch, None)
    monkeypatch.setenv("NF_KERNELS", "off")
    assert head_path(CUDA) == ("reference", "NF_KERNELS=off")


def test_without_triton_the_reference_is_taken_and_the_log_says_so(monkeypatch, fresh_paths, caplog):
    monkeypatch.delenv("NF_KERNELS", raising=False)
    monkeypatch.delattr(nf_engine, "fused", raising=False)
    monkeypatch.delitem(sys.modules, "nf_engine.fused", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with caplog.at_level("INFO"):
        name, reason = head_path(CUDA)
        head_path(CUDA)
    assert name == "reference"
    assert "Triton cannot be imported" in reason
    assert [reason in r.getMessage() for r in caplog.records] == [True]  # once


def test_a_step_is_that_of_the_path(monkeypatch, given):
    marker = install(monkeypatch, None)
    expected = results(given)
    monkeypatch.setattr(ops, "head_path", lambda device, dtype: ops.HeadPath("fused", "a test"))
    assert ops.head_step(**given) is marker
    monkeypatch.setattr(ops, "head_path", lambda device, dtype: ops.HeadPath("reference", "a test"))
    assert all(map(torch.equal, results(given), expected))


# --- as an operator ---


def test_the_operator_is_registered_as_torch_wants_it(given):
    torch.library.opcheck(ops._operator, schema(given))


VIEWS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "strided": lambda x: x.repeat(1, 1, 2, 2)[:, :, ::2, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_fake_tensors_have_the_shapes_and_strides_of_the_results(given, view):
    given["x"] = VIEWS[view](given["x"])
    torch.library.opcheck(ops._operator, schema(given), test_utils=("test_schema", "test_faketensor"))
    real, eager = torch.ops.nf_engine.head_step(*schema(given)), results(given)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, given)
        registered, body = torch.ops.nf_engine.head_step(*schema(fakes)), results(fakes)
    assert [*map(layout, registered)] == [*map(layout, real)]
    assert [*map(layout, body)] == [*map(layout, eager)]


def layout(tensor):
    """Shape, dtype, and the strides that mean something."""
    strides = [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    return tensor.shape, tensor.dtype, strides


def test_meta_tensors_pass_through_the_operator(given):
    meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), schema(given))
    real = torch.ops.nf_engine.head_step(*schema(given))
    assert [*map(layout, torch.ops.nf_engine.head_step(*meta))] == [*map(layout, real)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("head", HEADS)
def test_a_compiled_step_equals_the_eager_one_bit_for_bit(head, memory_format):
    given = arguments(*HEADS[head], memory_format=memory_format)
    torch._dynamo.reset()

    def around(**given):
        step = ops.head_step(**(given | {"x": given["x"] * 2}))
        return step._replace(dx=step.dx + 1)

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    found, expected = results(given, compiled), results(given, around)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert [layout(a) for a in found[:2]] == [layout(b) for b in expected[:2]], "rows and dx; gradients may differ"


def test_a_compiled_step_moves_the_statistics_it_was_given():
    given = arguments(*HEADS["deep"])
    before = tree_map(torch.clone, given["running"])
    torch.compile(ops.head_step, fullgraph=True, backend="aot_eager")(**given)
    for moved, old in zip(given["running"], before, strict=True):
        assert not any(map(torch.equal, moved, old))

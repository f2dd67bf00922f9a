"""bench_heads: its cases, the check against float64 before timing, times in turn, bytes, shares, and the checks."""

import json
import math
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from bench import bench_heads as bench
from bench import head_peers as peers
from bench.head_peers import TAIL, Case, Problem

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


def tiny(kind="deep d=2", dtype=FP32, channels=8, side=6, batch=5):
    return Case(channels, side, batch, 3, dtype, kind)


# --- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "quick", "count"), [
    ("cpu", True, 2 * 2 + 3),
    ("cpu", False, 4 * 5 + 3 + 3),  # 512@2 has no pool 4
    ("cuda", True, 4 * 5 + 3 + 2 * 5 + 4),
    ("cuda", False, 2 * (2 * (4 * 5 + 3) + 2 * 5) + 2 * 4),
])  # fmt: skip
def test_every_case_is_listed_once_and_no_pool_is_clipped(device, quick, count):
    listed = peers.cases(torch.device(device), quick)

    assert len(listed) == len({tuple(c.names().values()) for c in listed}) == count
    assert all(c.spec.pool <= c.side for c in listed)
    assert {c.dtype for c in listed} == ({FP32} if device == "cpu" else {FP32, BF16})


@pytest.mark.parametrize(
    ("kind", "least"),
    [("linear q=1", 1), (TAIL, 1), ("linear q=2", 2), ("linear q=4", 2), ("deep d=2", 2)],
)
def test_the_least_bytes_are_x_read_and_dx_written_unless_it_is_a_view(kind, least):
    case = tiny(kind, BF16)
    assert case.least_bytes == least * case.x_bytes == least * 2 * 5 * 8 * 36
    assert bench.x_bytes(case.names()) == case.x_bytes


# --- results before times -------------------------------------------------------------------------------------------


def by_hand(problem):
    """The head written out in float64: kinds of one convolution or none."""
    x = problem.xs[0].detach().double().requires_grad_()
    convs, gammas, betas, wl, bl = problem.params
    weights = [p.detach().double().requires_grad_() for p in (*convs, *gammas, *betas, wl, bl)]
    y = x
    if convs:
        s = F.conv2d(x, weights[0], stride=2, padding=1)
        mean, variance = s.mean((0, 2, 3), keepdim=True), s.var((0, 2, 3), correction=0, keepdim=True)
        xhat = (s - mean) / (variance + 1e-5).sqrt()
        y = (xhat * weights[1].view(-1, 1, 1) + weights[2].view(-1, 1, 1)).clamp_min(0)
    logits = F.adaptive_avg_pool2d(y, problem.pool).flatten(1) @ weights[-2].T + weights[-1]
    target = 0.9 * F.one_hot(problem.labels, 3).double() + 0.1 / 3
    loss = -(target * logits.log_softmax(1)).sum(1).mean()
    dx, *grads = torch.autograd.grad(loss, [x, *weights])
    return loss.detach(), dx, grads


@pytest.mark.parametrize("layout", bench.LAYOUTS)
@pytest.mark.parametrize("kind", ["linear q=1", "linear q=2", "linear q=4", "deep d=1 pool 4"])
def test_the_truth_of_a_problem_is_the_head_written_out(kind, layout):
    problem = Problem(tiny(kind), CPU, bench.LAYOUTS[layout])

    assert problem.pool == (3 if kind.startswith("deep") else problem.case.spec.pool)  # the map is 3x3
    assert problem.error(by_hand(problem)) < 1e-12
    assert problem.xs[0].is_contiguous(memory_format=bench.LAYOUTS[layout])
    assert float(problem.exact[1].norm()) > 0


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", [*peers.POOLS, TAIL])
def test_candidates_agree_with_float64(kind, dtype):
    problem = Problem(tiny(kind, dtype, side=1 if kind == TAIL else 6), CPU)
    for name in ("eager", "reference"):
        done = peers.make_step(name, problem)(problem.xs[0])
        assert problem.error(done) <= problem.tolerance(), name
        assert [g.dtype for g in done[2]] == [FP32] * len(done[2])  # of float32 weights, whatever x is


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.2, math.nan])
def test_a_step_that_is_wrong_in_any_part_has_a_large_error(part, factor):
    problem = Problem(tiny(), CPU)
    done = list(peers.make_step("eager", problem)(problem.xs[0]))
    done[part] = [done[2][0], *(factor * g for g in done[2][1:])] if part == 2 else factor * done[part]

    assert not problem.error(done) <= problem.tolerance()


def measured(monkeypatch, names=("eager", "reference"), **steps):
    """Rows of a small case, some candidates replaced: steps maps their names to functions of the right result."""
    make = peers.make_step

    def made(name, problem):
        step = make("reference" if name in steps else name, problem)
        return (lambda x: steps[name](step(x))) if name in steps else step

    monkeypatch.setattr(bench, "make_step", made)
    return bench.measure(tiny("linear q=2"), CPU, "contiguous", names, 3, 1e9)


def test_a_row_holds_times_bytes_and_the_ratio_to_eager(monkeypatch):
    eager, reference = measured(monkeypatch)

    assert (eager["candidate"], reference["candidate"]) == ("eager", "reference")
    assert 0 < reference["ms_20"] <= reference["ms"] <= reference["ms_80"]
    assert eager["eager_ratio"] == 1
    assert reference["gb_per_second"] == pytest.approx(2 * 4 * 5 * 8 * 36 / (reference["ms"] * 1e6))
    assert reference["copy_share"] == pytest.approx(reference["gb_per_second"])  # copy_ made 1e9 bytes a second
    assert reference["peak_contiguous"] == reference["peak"] > 0
    assert "closed_form" in reference
    assert "closed_form" not in eager
    assert json.loads(json.dumps(reference)) == reference
    assert "linear q=2" in bench.table_line(reference)


def test_what_disagrees_with_float64_is_not_timed(monkeypatch):
    eager, wrong = measured(monkeypatch, reference=lambda done: (done[0], 1.1 * done[1], done[2]))

    assert "ms" in eager
    assert "ms" not in wrong
    assert "0.1 against float64" in wrong["note"]
    assert wrong["note"] in bench.table_line(wrong)


def test_what_fails_says_why_and_the_others_are_measured(monkeypatch):
    def fail(_):
        raise OSError("no compiler\nand more")

    rows = measured(monkeypatch, ("compile", "fused", "eager"), compile=fail)
    assert [r.get("note") for r in rows] == ["OSError: no compiler", "RuntimeError: not taken: device cpu", None]
    assert "ms" in rows[2]


# --- time and bytes -------------------------------------------------------------------------------------------------


def test_candidates_run_in_turn_and_short_ones_more_often(monkeypatch):
    ran, now = [], [0.0]

    def call(name, seconds):
        def run():
            ran.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.time, "process_time", lambda: now[0] / 2)
    times = bench.in_turn({"a": call("a", 0.0625), "b": call("b", 0.0078125)}, CPU, 3)

    assert "".join(ran) == "abab" + 3 * "abbbbbbb"  # warm, counted: seven make 50 ms
    assert times == {"a": [(0.0625, 0.03125)] * 3, "b": [(0.0078125, 0.00390625)] * 3}


def test_ratios_are_medians_over_rounds_of_cpu_time():
    times = [(4e-3, 1e-3), (2e-3, 2e-3), (3e-3, 3e-3)]
    eager = [(1e-3, 3e-3), (1e-3, 8e-3), (1e-3, 6e-3)]
    row = bench.summary_of(times, eager, 2, tiny(), 1e9, CPU)

    assert (row["ms"], row["cpu_ms"], row["eager_ratio"]) == (1.5, 1.0, 3.0)


def test_peak_bytes_are_those_alive_at_once_beyond_what_is_given():
    problem = Problem(tiny(), CPU)

    def step(x):
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 18)
        del a
        return torch.empty(1 << 19) + b.sum() + x.sum()

    # 4 MiB and 1 MiB; later 1 MiB and twice 2 MiB, with three sums of one element (a and b, then of both)
    assert bench.peak_bytes(step, problem) == pytest.approx(5 << 20, abs=64)


# --- shares ---------------------------------------------------------------------------------------------------------


def test_the_units_are_those_of_a_cut_in_four_without_the_last():
    found = [(unit.name, shape, spec.kind) for unit, shape, spec in bench.units_of("vgg16", 0.25, CPU)]

    kind = "deep"
    assert found == [("1-1", (3, 32, 32), kind), ("2-2", (16, 32, 32), kind), ("3-4", (16, 16, 16), kind)]


# --- checks ---------------------------------------------------------------------------------------------------------


def row(candidate, ms, **more):
    base = {"device": "cuda", "layout": "channels_last", "shape": "64@32", "batch": 4096, "classes": 10,
            "dtype": "bf16", "kind": "linear q=4", "candidate": candidate, "mode": "plain"}  # fmt: skip
    return base | {"ms": ms, "copy_share": 0.8, "eager_ratio": ms and 6 / ms} | more


def values(rows, device="cuda"):
    return [c["value"] for c in bench.summary(rows, torch.device(device), 60e6).values()]


def test_the_checks_take_the_worst_of_what_each_is_about():
    peaks = {"peak_contiguous": 90, "closed_form": 100}
    share = {"device": "cuda", "model": "vgg16", "unit": "1-1", "batch": 256, "share": 0.07}
    rows = [
        row("eager", 6.0),
        row("compile", 4.0),
        row("max-autotune", 3.0),
        row("fused", 1.5, **peaks),
        row("eager", 5.0, mode="graph"),
        row("fused", 2.0, mode="graph", copy_share=0.75),
        row("reference", 60.0, peak_contiguous=300, closed_form=100),
        row("fused", 50.0, batch=16, copy_share=0.1, eager_ratio=0.9),  # 2 MB: in the L2
        row("eager", 1.0, batch=16),
        row("fused", 3.0, kind="deep d=2", copy_share=0.2, eager_ratio=1.1, peak_contiguous=101, closed_form=100),
        {k: v for k, v in row("fused", 1, mode="graph", batch=256).items() if k in bench.KEY} | {"note": "failed"},
        share,
        share | {"unit": "2-2", "share": 0.12},
        share | {"unit": "3-4", "share": 0.5, "device": "cpu"},
        row("eager", 0.1, device="cpu", eager_ratio=0.1),
    ]
    assert values(rows) == [2.5, 2.0, 0.75, 0.9, 0.1, 0.12, 1]


def test_on_a_cpu_only_what_it_can_say_is_checked():
    peaks = {"peak_contiguous": 103, "closed_form": 100}
    rows = [row("eager", 6.0, device="cpu"), row("reference", 4.0, device="cpu", **peaks)]
    other = [row("fused", 9.0), row("reference", 60.0, peak_contiguous=300, closed_form=100)]  # of a GPU
    assert values([*rows, *other], "cpu") == [None, None, None, 1.5, 0.03, None, 0]
    assert values([], "cpu") == [None] * 7


# --- a whole run ----------------------------------------------------------------------------------------------------


def run_main(monkeypatch, path, *options):
    """A run that measures nothing: two kinds, eager and ours, and one share."""

    def measure(case, device, layout, names, rounds, copied):
        named = {"device": device.type, "layout": layout} | case.names()
        return [row(n, 2.0, **named, error=0.0, ms_20=1.0, ms_80=3.0, cpu_ms=2.0, gb_per_second=1.0) for n in names]

    share = {"device": "cpu", "model": "vgg16", "unit": "1-1", "batch": 64, "width": 1.0, "head": "deep", "share": 0.3}
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "cases", lambda *_: [tiny("linear q=2"), tiny("deep d=2")])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(bench, "head_shares", lambda *_: iter([share | {"head_ms": 1.0, "step_ms": 2.0}]))
    monkeypatch.setattr(bench.plots, "save", lambda *_: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # main sets it
    threads = ["--threads", str(torch.get_num_threads()), "--device", "cpu", "--candidates", "eager,reference"]
    monkeypatch.setattr("sys.argv", ["bench", *threads, "--json", str(path), *options])
    bench.main()
    return json.loads(path.read_text())


def test_a_run_ends_with_its_document_and_a_later_one_may_add_to_it(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "heads.json"
    first = run_main(monkeypatch, path, "--only", "deep")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert [(r["kind"], r["candidate"]) for r in first["rows"]] == [("deep d=2", "eager"), ("deep d=2", "reference")]

    path.write_text(json.dumps({"rows": [r | {"old": True} for r in first["rows"]]}))
    second = run_main(monkeypatch, path, "--only", "linear|share", "--add")["rows"]
    assert [(r.get("kind", "share"), "old" in r) for r in second] == [
        ("deep d=2", True), ("deep d=2", True), ("linear q=2", False), ("linear q=2", False), ("share", False)
    ]  # fmt: skip

    third = run_main(monkeypatch, path, "--add")["rows"]
    assert [bench.key_of(r) for r in third] == [bench.key_of(r) for r in second]
    assert not any("old" in r for r in third)
    assert len(run_main(monkeypatch, path, "--add", "--layout", "contiguous")["rows"]) == 9
    assert len(run_main(monkeypatch, path, "--only", "deep")["rows"]) == 2


def test_the_plot_has_a_dot_for_each_candidate_and_mode_of_each_kind():
    rows = [
        row("eager", 6.0, peak=3 << 20),
        row("fused", 1.0, peak=2 << 20),
        row("fused", 0.5, mode="graph"),
        row("eager", 9.0, kind="deep d=2", peak=5 << 20),
        row("fused", None, kind="deep d=2"),
    ]
    dots = []

    class Axes(MagicMock):
        def scatter(self, x, y, *, label, **_):
            dots.append((x, y, label))

    left, right = Axes(), Axes()
    bench.draw(rows)(left, right)

    assert dots == [
        ([6.0, 9.0], [0, 1], "eager"),
        ([1.0], [0], "fused"),
        ([0.5], [0], "fused in a graph"),
        ([3.0, 5.0], [0, 1], "eager"),
        ([2.0], [0], "fused"),
    ]
    left.set_yticks.assert_called_with(range(2), ["64@32 N4096 linear q=4", "64@32 N4096 deep d=2"])

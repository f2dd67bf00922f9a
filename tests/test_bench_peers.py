"""bench_peers: what fits, what is run or copied, and the arithmetic of its report, on rows made by hand."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from bench import bench_peers, peer_runs, plots
from bench.bench_peers import Case, Times
from bench.peer_runs import Curve, Recipe, Workload, smaller, steady
from nf_engine.compare import Arm
from nf_engine.errors import DeviceLostError, NonFiniteError
from nf_engine.exits import evaluate
from nf_engine.sources import load_split

RECIPE = Recipe("cpu", 64, 20, 2, 128, 0.1, 0.125, "32-true")
CPU = torch.device("cpu")


def row(arm, budget="0.33", **values):
    """A row of one part at a budget of 100 bytes, of 300 that backpropagation needs."""
    sizes = {"none": None, "tight": 40}
    base = Case("vgg11-32-10", budget, arm, 0)._asdict() | RECIPE.__dict__
    made = {
        "budget_bytes": sizes.get(budget, 100),
        "fits": True,
        "how": {"kind": arm, "batch": 128, "parts": 1, "share": 1.0},
        "batches": [128],
        "epoch_seconds": 1.0,
        "images_per_second": 64.0,
        "seconds": 2.0,
        "plan_seconds": 0.0,
        "curve": [[1.0, 0.5], [2.0, 0.9]],
        "accuracy": 0.9,
        "peak": 300 if budget == "none" else 40,
        "reserved": 0,
        "process": 1000,
        "exit_parameters": 10,
        "exit_images_per_second": 5.0,
        "cache_bytes": 0,
    }
    return base | made | values


def ours(arm, budget="0.33", **values):
    two = [[[0, 3, [], "linear"]], [[4, 7, [5], "classifier"]]]
    return row(
        arm, budget, **({"how": two, "batches": [64, 64], "cache_bytes": 7, "tiers": ["images", "ram"]} | values)
    )


# --- a training's clock ---------------------------------------------------------------------------------------------


def test_a_curve_leaves_out_the_seconds_of_scoring_and_keeps_the_best(monkeypatch):
    clock = iter([100.0, 103.0, 110.0, 112.0, 113.0, 120.0])
    monkeypatch.setattr(peer_runs.time, "perf_counter", lambda: next(clock))
    curve = Curve()
    curve.score(lambda: 0.4)  # 3 s of training, 7 s of scoring
    curve.score(lambda: 0.3)  # 2 more, and 1
    assert curve.points == [(3.0, 0.4), (5.0, 0.4)]
    assert curve.seconds == 12.0


def test_the_first_epoch_does_not_count_as_steady():
    assert steady([9.0, 1.0, 3.0, 2.0]) == 2.0
    assert steady([9.0]) == 9.0


# --- what fits ------------------------------------------------------------------------------------------------------


def workload(peak, reserved=0):
    work = Workload.__new__(Workload)
    work.recipe, work.device, work.used = RECIPE, CPU, lambda arm: (peak(arm), reserved)
    return work


def test_budgets_are_shares_of_backpropagation_and_the_tight_one_is_its_batch_8():
    work = workload(lambda arm: 1000 + 10 * arm.batch)
    assert work.bytes("none") is None
    assert work.bytes("tight") == 1080
    assert work.bytes("0.5") == (1000 + 1280) // 2
    assert workload(lambda arm: 1000, 3000).bytes("0.5") == 1500  # of what a GPU's allocator reserved


def test_a_peer_gets_the_largest_batch_that_fits():
    work = workload(lambda arm: 1000 + 10 * arm.batch / arm.parts)
    assert work.arm("backpropagation", None) == Arm("backpropagation", 128)
    assert work.arm("checkpointed", 1600) == Arm("checkpointed", 60)
    assert work.arm("compiled 0.3", 1600) == Arm("compiled", 60, 1, 0.3)
    assert work.arm("local", 1009) is None
    assert work.arm("accumulated", 1600) == Arm("backpropagation", 128, 4)  # 32 at a time; 64 do not fit
    assert work.arm("accumulated", 1009) is None


def test_accumulation_after_compiling_takes_the_share_that_saves_most():
    work = workload(lambda arm: {1.0: 9000, 0.5: 4000, 0.3: 3000, 0.1: 5000}[arm.share] / arm.parts)
    assert work.arm("compiled accumulated", 1500) == Arm("compiled", 128, 2, 0.3)


def test_what_runs_out_of_memory_shrinks_until_it_runs(monkeypatch):
    tried = []

    def train(arm, budget, seed):
        tried.append(arm)
        if arm.batch > 90:
            raise torch.OutOfMemoryError("no")
        return {"fits": True}

    work = workload(None)
    work._train_peer = train
    assert work.run_peer(Arm("backpropagation", 128), 1, 0) == {"fits": True}
    assert [a.batch for a in tried] == [128, 115, 103, 92, 82]
    assert work.run_peer(None, 1, 0) == {"fits": False}
    assert smaller(Arm("local", 1)) is None
    assert smaller(Arm("compiled", 16, 4, 0.5)) == Arm("compiled", 16, 8, 0.5)
    assert smaller(Arm("compiled", 16, 16, 0.5)) is None


# --- what is run, and what is copied --------------------------------------------------------------------------------


def arguments(**values):
    given = {"parts": "vgg11-32-10", "budgets": "0.6,none", "only": "", "seeds": 1, "device": "cpu", "json": None}
    return argparse.Namespace(**(given | {"data": "synthetic:100", "limit": math.inf} | values))


def test_backpropagation_without_a_budget_is_the_first_run():
    cases = bench_peers.cases(arguments())
    assert cases[0] == Case("vgg11-32-10", "none", "backpropagation", 0)
    assert not any("," in c.arm for c in cases if c.budget == "none")
    assert {c.arm for c in cases if c.budget == "0.6"} == {*bench_peers.PEERS, *bench_peers.FIELDS}
    assert [c.arm for c in bench_peers.cases(arguments(only="^0.6 (local|layerwise$)"))] == ["layerwise", "local"]


def test_an_ablation_runs_only_where_there_is_something_to_switch_off():
    whole = [[[0, 7, [], "classifier"]]]
    one = ours("windows", how=whole, batches=[128], cache_bytes=0)
    for off in ("prefer accuracy", "no recomputation", "no cache", "linear heads", "fixed heads", "one batch size"):
        assert not bench_peers.is_on(off, one), off
        assert bench_peers.same_run(Case("vgg11-32-10", "0.33", f"windows, {off}", 0), None, None, [one]) is one
    two = ours("windows", batches=[64, 128])
    for off in ("prefer accuracy", "no recomputation", "no cache", "fixed heads", "one batch size", "full batch"):
        assert bench_peers.is_on(off, two), off
        assert bench_peers.same_run(Case("vgg11-32-10", "0.33", f"windows, {off}", 0), None, None, [two]) is None
    assert not bench_peers.is_on("linear heads", two)
    assert bench_peers.same_run(Case("vgg11-32-10", "0.33", "windows", 0), None, None, [two]) is None
    none = ours("windows", fits=False)
    assert bench_peers.same_run(Case("vgg11-32-10", "0.33", "windows, no cache", 0), None, None, [none]) is none


def test_a_run_that_went_over_a_budget_is_not_copied_to_it():
    how = {"kind": "backpropagation", "batch": 8, "parts": 1, "share": 1.0}
    free = row("backpropagation", "none", how=how, peak=50, reserved=90)
    case = Case("vgg11-32-10", "tight", "backpropagation", 0)
    assert bench_peers.same_run(case, how, 90, [free]) is free
    assert bench_peers.same_run(case, how, None, [free]) is free
    assert bench_peers.same_run(case, how, 89, [free]) is None


def test_a_run_that_fails_says_why_and_a_lost_device_ends_all(monkeypatch):
    class Fails:
        device = CPU
        error = NonFiniteError("the local loss is nan\nmore")

        def bytes(self, budget):
            return 100

        def arm(self, name, budget):
            raise self.error

    case = Case("vgg11-32-10", "0.6", "backpropagation", 0)
    found = bench_peers.run_or_why(case, Fails(), [])
    assert found == {"budget_bytes": 100, "fits": False, "why": "NonFiniteError: the local loss is nan"}
    Fails.error = DeviceLostError("gone", call="torch", code=1)
    with pytest.raises(DeviceLostError):
        bench_peers.run_or_why(case, Fails(), [])


class Stub:
    """A workload whose runs are counted; the batch that fits grows with the budget."""

    recipe = RECIPE

    def __init__(self):
        self.runs = []

    def bytes(self, budget):
        return None if budget == "none" else int(100 * float(budget))

    def arm(self, name, budget):
        return Arm("backpropagation", 128 if budget is None or budget >= 90 else budget)

    def run_peer(self, arm, budget, seed):
        self.runs.append(arm)
        return {k: v for k, v in row("x").items() if k not in (*Case._fields, *RECIPE.__dict__)} | {"how": vars(arm)}

    def run_ours(self, fields, budget, seed):
        self.runs.append(fields)
        same = ("budget_bytes", *Case._fields, *RECIPE.__dict__)
        return {k: v for k, v in ours("x", batches=[30, 60]).items() if k not in same}


def test_a_run_with_the_same_batch_is_copied_and_says_so():
    work, rows = Stub(), []
    for budget in ("none", "1", "0.5"):
        case = Case("vgg11-32-10", budget, "backpropagation", 0)
        rows.append(case._asdict() | RECIPE.__dict__ | bench_peers.run(case, work, rows))
    assert [a.batch for a in work.runs] == [128, 50]
    assert rows[1]["same_as"] == "none backpropagation"
    assert (rows[1]["budget_bytes"], rows[1]["budget"]) == (100, "1")
    assert "same_as" not in rows[2]


def test_settings_of_ablations_that_depend_on_the_plan():
    work, rows = Stub(), []
    for arm in ("windows", "windows, one batch size", "windows, full batch", "windows, no cache"):
        case = Case("vgg11-32-10", "0.5", arm, 0)
        rows.append(case._asdict() | RECIPE.__dict__ | bench_peers.run(case, work, rows))
    assert work.runs == [{}, {"batch_size": 30}, {"batch_size": 128}, {"cache": "recompute"}]


def test_runs_found_in_the_file_are_skipped_and_the_limit_leaves_some_for_later(monkeypatch, tmp_path):
    work, clock = Stub(), iter(range(100))
    monkeypatch.setattr(bench_peers, "Workload", lambda *_: work)
    monkeypatch.setattr(bench_peers, "images", lambda *_: (None, None))
    monkeypatch.setattr(bench_peers.time, "monotonic", lambda: float(next(clock)))
    only = "^(none|0.6|0.5) (backpropagation|windows)$"
    args = arguments(json=tmp_path / "rows.json", only=only, limit=2.5)
    rows, missing = bench_peers.run_all(args, RECIPE)
    assert (len(rows), missing) == (2, 2)
    assert json.loads(args.json.read_text())["rows"] == json.loads(json.dumps(rows))

    args.limit = math.inf
    rows, missing = bench_peers.run_all(args, RECIPE)
    assert (len(rows), missing, len(work.runs)) == (4, 0, 4)
    other = Recipe(**(RECIPE.__dict__ | {"epochs": 3}))
    rows, missing = bench_peers.run_all(args, other)
    assert (len(rows), len(work.runs)) == (8, 8), "another recipe is another run"


# --- report ---------------------------------------------------------------------------------------------------------


def test_time_is_taken_to_backpropagations_best_minus_three_points():
    base = row("backpropagation", "none", curve=[[1.0, 0.80], [2.0, 0.93]])
    rows = [base, row("checkpointed", curve=[[4.0, 0.85], [8.0, 0.91]]), ours("windows", curve=[[3.0, 0.89]])]
    target = bench_peers.reference(rows, rows[1])
    assert target == pytest.approx(0.90)
    assert [bench_peers.seconds_to(r, target) for r in rows] == [2.0, 8.0, None]
    assert bench_peers.seconds_to(row("local", fits=False), target) is None
    assert bench_peers.reference(rows[1:], rows[1]) is None


def test_ratios_of_times_on_a_gpu():
    gpu = {"device": "cuda"}
    rows = [
        row("backpropagation", "none", curve=[[2.0, 0.9]], images_per_second=100.0, **gpu),
        ours("windows", "none", curve=[[1.0, 0.9]], images_per_second=130.0, **gpu),
        row("backpropagation", curve=[[12.0, 0.9]], reserved=90, **gpu),
        row("checkpointed", curve=[[6.0, 0.9]], reserved=90, **gpu),
        ours("windows", curve=[[5.0, 0.9]], reserved=88, seconds=10.0, plan_seconds=0.1, **gpu),
        ours("layerwise", curve=[[4.0, 0.9]], reserved=99, **gpu),
        row("backpropagation", "tight", curve=[[14.0, 0.9]], reserved=40, **gpu),
        ours("windows", "tight", curve=[[2.0, 0.9]], reserved=39, seconds=10.0, plan_seconds=0.2, **gpu),
    ]
    assert bench_peers.times(rows) == [
        Times(math.inf, 2.0, 2.0, 1.0),
        Times(100 / 300, 12.0, 6.0, 4.0),
        Times(40 / 300, 14.0, 14.0, 2.0),
    ]
    values = {
        k.removeprefix("GPU: "): c["value"] for k, c in bench_peers.checks(rows, 0).items() if k.startswith("GPU")
    }
    assert values == {
        "times faster than backpropagation, budgets up to a third": 3.0,
        "times faster than backpropagation, the tightest budget": 7.0,
        "times faster than the best peer, budgets up to a third": 1.5,
        "times faster than the best peer, any budget": 1.5,
        "times the images/s of backpropagation without a budget": 1.3,
        "least share of the budget that windows reserves": 0.88,
        "largest share of planning in a training, windows": 0.02,
    }
    off_gpu = bench_peers.checks([r | {"device": "cpu"} for r in rows], 0)
    assert {c["value"] for k, c in off_gpu.items() if k.startswith("GPU")} == {None}


def test_what_is_not_reached_in_time_counts_against_the_one_that_missed_it():
    gpu = {"device": "cuda"}
    rows = [
        row("backpropagation", "none", **gpu),
        row("backpropagation", curve=[[12.0, 0.9]], reserved=90, **gpu),
        ours("windows", curve=[[5.0, 0.2]], reserved=88, **gpu),
    ]
    name = "GPU: times faster than backpropagation, budgets up to a third"
    assert bench_peers.checks(rows, 0)[name]["value"] == 0.0


def test_times_of_an_image_at_equal_batch_and_under_equal_budgets():
    rows = [
        row("backpropagation", "none", images_per_second=500.0),
        row("checkpointed", images_per_second=300.0),
        ours("windows", images_per_second=400.0),
        ours("windows, full batch", batches=[128, 128], images_per_second=400.0),
        ours("windows, full batch", "0.6", batches=[128, 128], budget_bytes=300, images_per_second=1.0),  # it all fits
        ours("windows", "tight", batches=[8], images_per_second=1.0, peak=41),
    ]
    checks = bench_peers.checks(rows, 3)
    assert [c["value"] for c in checks.values()][:4] == [1, 3, 1.25, 0.75]
    assert [c["ok"] for c in checks.values()][:4] == [False, False, False, True]


def test_the_table_and_the_plot_show_every_arm(capsys, tmp_path):
    rows = [
        row("backpropagation", "none"),
        row("backpropagation"),
        row("local", fits=False),
        row("compiled 0.5", curve=[[7.0, 0.9]]),
        row("compiled 0.3", curve=[[5.0, 0.9]]),
        ours("windows"),
    ]
    bench_peers.print_table(rows)
    printed = capsys.readouterr().out
    assert "time to 87.00%" in printed
    assert "does not fit" in printed
    assert "64, 64 in 2 units, some stages twice" in printed

    drawn = {}

    class Axes:
        def set_title(self, text):
            drawn["title"] = text

    original = plots.times
    try:
        plots.times = lambda axes, curves, own: drawn.update(curves)
        bench_peers.draw(rows, Axes())
    finally:
        plots.times = original
    size = 100 / 2**20
    assert drawn == {
        "title": "vgg11-32-10",
        "backpropagation": [(size, 2.0)],
        "compiled, the best share": [(size, 5.0)],
        "windows": [(size, 2.0)],
    }


# --- for real -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["windows", "layerwise"])
def test_a_run_of_ours_has_a_point_on_its_curve_for_each_epoch_of_each_block(partition):
    data, test = load_split("synthetic:200")
    work = Workload("vgg11-32-10", RECIPE, data, test.subset(torch.arange(20)))
    budget = int(0.8 * work.peak(Arm("backpropagation", 128)))
    result = work.run_ours({"partition": partition, "cache": "disk"}, budget, 0)
    assert result["fits"]
    assert result["peak"] <= budget
    assert len(result["curve"]) == 2 * len(result["batches"])
    times, best = zip(*result["curve"], strict=True)
    assert list(times) == sorted(times)
    assert list(best) == sorted(best)
    assert result["plan_seconds"] < times[0] < times[-1] < result["seconds"] + 5
    if partition == "layerwise":
        assert result["cache_bytes"] > 0 or len(result["batches"]) == 1


@pytest.mark.slow
def test_the_last_point_of_a_curve_is_the_best_exits_accuracy(monkeypatch):
    seen = []
    original = peer_runs.nf_engine.train

    def train(*args, **options):
        seen.append(original(*args, **options))
        return seen[-1]

    monkeypatch.setattr(peer_runs.nf_engine, "train", train)
    data, test = load_split("synthetic:200")
    test = test.subset(torch.arange(20))
    work = Workload("vgg11-32-10", Recipe(**(RECIPE.__dict__ | {"epochs": 1})), data, test)
    result = work.run_ours({"partition": "layerwise"}, None, 0)
    accuracies = [evaluate(seen[0].model, test, policy=f"fixed:{k}").accuracy for k in range(seen[0].model.exits)]
    assert result["curve"][-1][1] == pytest.approx(max(accuracies))


@pytest.mark.slow
def test_a_peers_row_and_a_budget_that_is_too_small_for_ours():
    data, test = load_split("synthetic:200")
    work = Workload("vgg11-32-10", RECIPE, data, test)
    arm = work.arm("checkpointed", work.bytes("0.6"))
    result = work.run_peer(arm, work.bytes("0.6"), 0)
    assert result["batches"] == [arm.batch]
    assert 0.9 * work.bytes("0.6") < result["peak"] <= work.bytes("0.6")
    assert len(result["curve"]) == 2
    assert result["exit_parameters"] == sum(p.numel() for p in work.network(0).parameters())
    assert work.run_ours({}, 2**20, 0)["fits"] is False

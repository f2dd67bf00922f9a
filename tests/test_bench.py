"""The benches' reports: checks against targets, the document of the last line, summaries, and the closing table."""

import json
import platform
import subprocess

import numpy as np
import pytest
import torch

from bench import bench_accuracy, run_all, timing

# --- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "below", "equal", "above"),
    [
        ("<= 1.5", True, True, False),
        ("< 1.5", True, False, False),
        (">= 1.5", False, True, True),
        ("== 1.5", False, True, False),
    ],
)
def test_a_check_holds_a_value_against_its_target(target, below, equal, above):
    for value, ok in ((1.25, below), (1.5, equal), (1.75, above)):
        assert timing.check(value, target) == {"value": value, "target": target, "ok": ok}


def test_a_negative_or_whole_bound_is_read():
    assert timing.check(-3, "< -2")["ok"] is True
    assert timing.check(-1, "< -2")["ok"] is False
    assert timing.check(0, "== 0")["ok"] is True


def test_a_check_that_could_not_be_measured_is_neither_kept_nor_missed():
    assert timing.check(None, ">= 2") == {"value": None, "target": ">= 2", "ok": None}


def test_a_check_is_made_before_its_value_is_rounded():
    assert timing.check(1.05001, "<= 1.05") == {"value": 1.05, "target": "<= 1.05", "ok": False}


def test_a_target_with_another_sign_is_an_error():
    with pytest.raises(KeyError):
        timing.check(1.0, "~ 1")


# --- the document ---------------------------------------------------------------------------------------------------


def finished(capsys, json_file):
    args = timing.arguments("x").parse_args(["--quick", "--threads", "1", "--data", "idx:/some/place"])
    args.json = json_file
    rows = [{"arm": "a", "seconds": 1.5}]
    checks = {"time": timing.check(1.5, "<= 2"), "gpu time": timing.check(None, "< 1")}
    timing.finish(args, rows, checks)
    return capsys.readouterr().out.splitlines(), rows, checks


def test_the_last_line_is_the_whole_document(capsys):
    lines, rows, checks = finished(capsys, None)
    document = json.loads(lines[-1])

    assert set(document) == {"machine", "versions", "commit", "arguments", "rows", "checks"}
    assert (document["rows"], document["checks"]) == (rows, checks)
    assert document["arguments"] == {"quick": True, "data": "idx:DIR", "threads": 1}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    assert document["versions"].items() >= versions.items()
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["cpu"]
    assert lines[:-1] == ["check: time: 1.5 (target <= 2): True", "check: gpu time: None (target < 1): None"]


def test_the_versions_hold_those_of_a_gpu(monkeypatch):
    here = timing.versions()
    assert not {"cuda", "cudnn", "driver"} & here.keys() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = timing.versions()
    assert found.pop("driver")
    assert found.pop("cudnn")
    assert found == here | {"cuda": "13.0"}


def test_the_commit_is_the_repositorys_with_a_word_on_changes(capsys):
    document = json.loads(finished(capsys, None)[0][-1])
    head = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True).stdout.strip()

    name, _, changes = document["commit"].partition("+")
    assert head.startswith(name)
    assert bool(name) == bool(head)
    assert changes in ("", "changes")


def test_the_document_is_also_written_where_asked(capsys, tmp_path):
    lines, *_ = finished(capsys, tmp_path / "new" / "b.json")
    written, printed = json.loads((tmp_path / "new" / "b.json").read_text()), json.loads(lines[-1])
    for document in (written, printed):
        document["machine"].pop("load")  # of this very moment

    assert written == printed


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy_rows(*rows):
    return [{"arm": arm, "seed": k, "accuracy": a, "peak_share": peak} for k, (arm, a, peak) in enumerate(rows)]


def test_the_summary_of_accuracies_holds_means_against_backpropagation(capsys):
    rows = accuracy_rows(
        ("backpropagation", 0.80, 1.7),
        ("backpropagation", 0.84, 1.7),
        ("windows cached", 0.81, 0.9),
        ("windows cached", 0.80, 0.9),
        ("windows recomputed", 0.79, 1.0),
        ("layerwise cached", 0.40, 1.01),
    )
    checks = bench_accuracy.summary(rows)
    printed = capsys.readouterr().out

    assert checks == {
        "points below backpropagation, windows cached": {"value": 1.5, "target": "<= 2", "ok": True},
        "points below backpropagation, windows recomputed": {"value": 3.0, "target": "<= 2", "ok": False},
        "points below backpropagation, layerwise cached": {"value": 42.0, "target": "<= 100", "ok": True},
        "runs over budget": {"value": 1, "target": "== 0", "ok": False},  # not the peer, which has no budget
    }
    assert "mean 82.00%, sd 2.83 points, n 2" in printed
    assert "mean 40.00%, sd 0.00 points, n 1" in printed


def test_a_summary_without_backpropagation_only_counts_runs_over_budget():
    assert bench_accuracy.summary(accuracy_rows(("windows cached", 0.9, 0.5))) == {
        "runs over budget": {"value": 0, "target": "== 0", "ok": True}
    }


# --- all benches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def benches(monkeypatch):
    """Commands that were run, and the documents that they leave: one check for each bench, one case of micro."""
    commands = []
    documents = {name: {"checks": {"time": timing.check(1.5, "<= 2")}} for name in run_all.BENCHES}
    documents["micro"] = {"benchmarks": [{"name": "test_crc32c[portable]", "stats": {"median": 0.00125}}]}

    def run(command, result):
        commands.append(command)
        return documents[result.name.removesuffix(".json").removesuffix("_quick")]

    monkeypatch.setattr(run_all, "run", run)
    return commands, documents


def test_all_benches_run_in_turn_with_the_same_data(benches, tmp_path):
    commands, _ = benches
    assert run_all.main(["--quick", "--data", "synthetic:40", "--out", str(tmp_path)]) == 0

    expected = [
        [f"bench.bench_{name}", "--quick", "--json", str(tmp_path / f"{name}_quick.json"), "--data", "synthetic:40"]
        for name in (
            "startup",
            "step",
            "training",
            "memory",
            "lines",
            "peers",
            "highres",
            "cache",
            "cache_vs_recompute",
            "overlap",
            "reliability",
            "head_kinds",
            "heads",
            "accuracy",
        )
    ]
    micro = ["pytest", "bench/test_micro.py", "-q", f"--benchmark-json={tmp_path / 'micro.json'}"]
    assert commands == [*expected, micro]


def test_one_table_shows_checks_and_micro_medians(benches, tmp_path, capsys):
    benches[1]["memory"]["checks"]["gpu"] = timing.check(None, "< 1")
    assert run_all.main(["--out", str(tmp_path)]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("==")]
    assert rows == [
        ["bench", "name", "value", "target", "ok"],
        ["startup", "time", "1.5", "<=", "2", "yes"],
        ["step", "time", "1.5", "<=", "2", "yes"],
        ["training", "time", "1.5", "<=", "2", "yes"],
        ["memory", "time", "1.5", "<=", "2", "yes"],
        ["memory", "gpu", "-", "<", "1", "-"],
        ["lines", "time", "1.5", "<=", "2", "yes"],
        ["peers", "time", "1.5", "<=", "2", "yes"],
        ["highres", "time", "1.5", "<=", "2", "yes"],
        ["cache", "time", "1.5", "<=", "2", "yes"],
        ["cache_vs_recompute", "time", "1.5", "<=", "2", "yes"],
        ["overlap", "time", "1.5", "<=", "2", "yes"],
        ["reliability", "time", "1.5", "<=", "2", "yes"],
        ["head_kinds", "time", "1.5", "<=", "2", "yes"],
        ["heads", "time", "1.5", "<=", "2", "yes"],
        ["accuracy", "time", "1.5", "<=", "2", "yes"],
        ["micro", "crc32c[portable]", "1.25", "ms", "-", "-"],
    ]


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--check"], 8)])
def test_a_missed_target_ends_with_8_only_if_checks_were_asked_for(benches, tmp_path, options, code):
    benches[1]["memory"]["checks"]["time"] = timing.check(3.0, "<= 2")
    assert run_all.main([*options, "--out", str(tmp_path)]) == code


def test_a_target_that_could_not_be_measured_is_not_missed(benches, tmp_path):
    benches[1]["memory"]["checks"]["time"] = timing.check(None, "<= 2")
    assert run_all.main(["--check", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["memory", "micro"])
def test_a_bench_that_fails_ends_with_1_and_the_others_still_run(benches, tmp_path, capsys, name):
    commands, documents = benches
    documents[name] = None
    assert run_all.main(["--check", "--out", str(tmp_path)]) == 1

    assert len(commands) == len(run_all.BENCHES) + 1
    assert "did not run" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} "))


def test_a_failed_command_leaves_no_document_not_even_an_older_one(tmp_path, capfd):
    result = tmp_path / "old.json"
    result.write_text("{}")

    assert run_all.run(["bench.bench_none"], result) is None
    assert not result.exists()
    assert "bench_none" in capfd.readouterr().err


def test_a_commands_document_is_read(tmp_path):
    (tmp_path / "in.json").write_text('{"checks":{"a":1}}')
    assert run_all.run(["json.tool", str(tmp_path / "in.json"), str(tmp_path / "out.json")], tmp_path / "out.json") == {
        "checks": {"a": 1}
    }


@pytest.mark.parametrize(
    ("value", "spec"), [(None, "synthetic:2000"), ("", "synthetic:2000"), ("/d", "idx:/d"), ("idx:/d", "idx:/d")]
)
def test_the_data_of_the_environment_come_before_the_generated(monkeypatch, value, spec):
    monkeypatch.delenv("NF_DATA_FASHION", raising=False)
    if value is not None:
        monkeypatch.setenv("NF_DATA_FASHION", value)
    assert run_all.default_data() == spec

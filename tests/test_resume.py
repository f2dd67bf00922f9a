"""Whether a run may go on: what differs is refused by name, what changes no number is not; a run that is done stays."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import fields, replace

import pytest
import small_runs as runs
import torch
from torch import nn

from nf_engine import cli, engine, local_step
from nf_engine.config import TrainConfig
from nf_engine.errors import ConfigError, CorruptFileError, ResumeMismatchError
from nf_engine.manifest import Manifest
from nf_engine.resume import NEUTRAL

go, cut_after, outcome = runs.go, runs.cut_after, runs.outcome
training_images, held_out_images = runs.training_images, runs.held_out_images

# Another value of each setting than the runs here have.
OTHER = {
    "memory_budget": 1 << 25,
    "memory_margin": 0.1,
    "partition": "layerwise",
    "split_points": ("features.0", "features.2"),
    "grouping_threshold": 0.3,
    "max_units": 3,
    "prefer": "accuracy",
    "recompute": False,
    "batch_size": 16,
    "min_batch_size": 4,
    "max_batch_size": 512,
    "head": "linear",
    "head_pool": 2,
    "head_width": 8,
    "head_depth": 2,
    "epochs": 3,
    "optimizer": "adamw",
    "lr": 0.2,
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "warmup_epochs": 0.5,
    "label_smoothing": 0.2,
    "cache": "ram",
    "cache_dtype": "exact",
    "max_cache_bytes": 1 << 24,
    "pinned_bytes": "32MiB",
    "durable_cache": True,
    "compile": True,
    "io_timeout": 200.0,
    "augment": "flip",
    "augment_copies": 3,
    "val_fraction": 0.1,
    "max_drop": 0.02,
    "seed": 1,
    "checkpoint_minutes": 7.0,
    "deterministic": True,
    "device": "auto",
    "precision": "bf16-mixed",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody cut."""
    return outcome(go(tmp_path_factory.mktemp("whole") / "run"))


def position(folder):
    return tuple(runs.manifest(folder)["position"][key] for key in ("block", "epoch", "step"))


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """A run that was cut in its second block."""
    folder = tmp_path_factory.mktemp("began") / "run"
    with cut_after(11):
        assert go(folder).status == "interrupted"
    assert position(folder) == (1, 0, 3)
    return folder


@pytest.fixture
def cut(began, tmp_path):
    """A copy of it, the test's own."""
    return shutil.copytree(began, tmp_path / "run")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "run"
    return go(folder)


def state(folder):
    """What a refusal must leave as it was: all but the log and the name of the last owner."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in ("log.jsonl", "LOCK")}


def refused(folder, *words, **given):
    """The same call with something else is refused, says so, and leaves the folder as it was."""
    before = state(folder)
    with pytest.raises(ResumeMismatchError) as info:
        go(folder, **given)
    assert info.value.exit_code == 6
    missing = [word for word in words if word not in str(info.value)]
    assert not missing, f"{missing} not in: {info.value}"
    assert state(folder) == before


# ---- Settings ------------------------------------------------------------------------------------------------------


def test_every_setting_that_decides_the_result_is_refused_if_it_alone_differs(began, monkeypatch, figure):
    monkeypatch.setattr(engine, "check_device", lambda *_: None)  # which refuses compile=True on a CPU sooner
    names = [f.name for f in fields(TrainConfig)]
    assert OTHER.keys() == set(names), "a new setting needs its line here"
    was = TrainConfig.load(began / "config.toml")
    deciding = [name for name in names if name not in NEUTRAL]
    for name in deciding:
        assert OTHER[name] != getattr(was, name)
        told = f"{name} was {getattr(was, name)!r}, is {OTHER[name]!r}; go on with --config {began / 'config.toml'}"
        refused(began, told, **{name: OTHER[name]})
    figure("P15", "settings of a run, each changed alone: refused", len(deciding), len(deciding))


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_setting_that_changes_no_number_may_be_another(cut, whole, name):
    result = outcome(go(cut, **{name: OTHER[name]}))
    assert result.pop("best_exit") in range(runs.BLOCKS)  # max_drop chooses it
    assert result == {key: value for key, value in whole.items() if key != "best_exit"}


def test_all_that_differs_is_told_at_once_and_the_command_that_is_named_goes_on(cut, whole):
    refused(cut, "epochs was 2, is 3; lr was 0.1, is 0.2; go on with", epochs=3, lr=0.2, io_timeout=9.0)
    data, held = training_images(), held_out_images()
    result = engine.train(
        runs.Net(), data, held, config=cut / "config.toml", output_dir=cut, progress="none"
    )  # fmt: skip
    assert outcome(result) == whole


# ---- Images, network, plan -----------------------------------------------------------------------------------------


def changed_pixel(data):
    data[0][5, 1, 2, 3] ^= 1


def changed_label(data):
    data[1][5] = (data[1][5] + 1) % 3


def another_order(data):
    data[0][[3, 4]], data[1][[3, 4]] = data[0][[4, 3]], data[1][[4, 3]]


IMAGES = [
    (what, change) for what in ("train_data", "val_data") for change in (changed_pixel, changed_label, another_order)
]


@pytest.mark.parametrize(("what", "change"), IMAGES, ids=lambda v: getattr(v, "__name__", v))
def test_other_images_are_refused(began, what, change):
    data = training_images() if what == "train_data" else held_out_images()
    change(data)
    refused(began, "other images: sha256 " + runs.manifest(began)["data_sha256"][:16], **{what: data})


def test_fewer_images_swapped_ones_and_other_held_out_ones_are_refused(began):
    data, held = training_images(), held_out_images()
    refused(began, "other images", train_data=(data[0][:-1], data[1][:-1]))
    refused(began, "other images", train_data=held, val_data=data)
    refused(began, "other images", val_data=runs.images(runs.HELD, 3))


class Other(nn.Module):
    def __init__(self, *widths, kernel=3, activation=nn.ReLU, dropout=0.2):
        super().__init__()
        layers = []
        for before, after in zip((3, *widths), widths, strict=False):
            convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), activation(), nn.Dropout(dropout)))
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(widths[-1], runs.CLASSES)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


NETWORKS = {
    "fewer stages": lambda: Other(8, 8),
    "more stages": lambda: Other(8, 8, 8, 8),
    "wider": lambda: Other(8, 16, 8),
    "kernel": lambda: Other(8, 8, 8, kernel=5),
    "activation": lambda: Other(8, 8, 8, activation=nn.Tanh),
    "dropout": lambda: Other(8, 8, 8, dropout=0.3),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_another_network_is_refused(began, done, what):
    refused(began, "another network", network=NETWORKS[what]())
    refused(done.run_dir, "another network", network=NETWORKS[what]())


def test_the_same_network_of_another_class_goes_on(cut, whole):
    assert outcome(go(cut, network=Other(8, 8, 8))) == whole


def test_other_weights_of_the_same_network_are_those_of_the_run(cut, whole):
    other = runs.Net()
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(0.5)
    assert outcome(go(cut, network=other)) == whole


def test_a_plan_that_is_not_the_runs_is_refused_and_the_runs_own_goes_on(cut, whole):
    planned = runs.plan()
    other = replace(planned.blocks[1], batch=16)
    given = replace(planned, blocks=(planned.blocks[0], other, planned.blocks[2]))
    refused(cut, "another plan: batch of block 1 was 8, is 16; leave plan out", plan=given)
    refused(cut, "another plan: cache of block 1 was", "tier='disk'", "tier='ram'", plan=runs.plan("ram"))
    refused(cut, "another plan: blocks of the plan was 3, is 2", plan=replace(planned, blocks=planned.blocks[:2]))
    assert outcome(go(cut, plan=None)) == whole


# ---- Software and hardware -----------------------------------------------------------------------------------------


def begun_with(folder, **env):
    """As if the run had been begun by other software."""
    path = folder / "MANIFEST.json"
    manifest = Manifest.parse(path.read_bytes(), "it")
    path.write_bytes(replace(manifest, env={**manifest.env, **env}).to_bytes())


@pytest.mark.parametrize(
    ("name", "value"),
    [("torch", "2.11.0"), ("nf_engine", "0.0.9"), ("threads", "7"), ("device", "cuda"), ("capability", "9.0")],
)
def test_other_software_or_hardware_is_refused_unless_it_is_allowed(cut, whole, capsys, name, value):
    begun_with(cut, **{name: value})
    refused(cut, f"{name} was {value}, is ", "--allow-inexact-resume")
    capsys.readouterr()
    result = go(cut, allow_inexact_resume=True, progress="lines")
    assert f"not bitwise: {name} was {value}, is " in "".join(capsys.readouterr())
    assert outcome(result) == whole  # the software is the same here, whatever the manifest says


def test_other_software_reads_a_run_that_is_done(done, whole, tmp_path):
    folder = shutil.copytree(done.run_dir, tmp_path / "run")
    begun_with(folder, torch="2.11.0")
    assert outcome(go(folder)) == whole


def test_another_number_of_threads_is_refused(began):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        refused(began, f"threads was {threads}, is {threads + 1}")
    finally:
        torch.set_num_threads(threads)


# ---- Cut anywhere, must, never, auto, done -------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "at"), [(0, (0, 0, 0)), (8, (0, 2, 0)), (15, (1, 1, 3)), (24, (2, 2, 0))])
def test_a_run_that_is_asked_to_end_commits_where_it_is_and_goes_on_from_there(tmp_path, whole, steps, at):
    done = []
    with cut_after(steps):
        assert go(tmp_path / "run").status == "interrupted"
    assert position(tmp_path / "run") == at, "after a block's last step: before it is scored"
    with runs.before_steps(done.append):
        assert outcome(go(tmp_path / "run")) == whole
    assert len(done) == runs.STEPS - steps, "no step is done twice"


def test_must_needs_a_run_never_refuses_one_and_auto_takes_both(cut, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"resume is never, but .*holds a run") as info:
        go(cut, resume="never")
    assert info.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"resume is must, but .*holds no run"):
        go(tmp_path / "new", resume="must")
    with pytest.raises(ConfigError, match="auto, must or never, got 'sometimes'"):
        go(tmp_path / "new", resume="sometimes")
    assert outcome(go(cut, resume="must")) == whole
    assert outcome(go(tmp_path / "new", resume="never")) == whole


def test_a_run_that_is_done_is_read_and_not_trained_again(done, whole, monkeypatch):
    def trained(*_):
        raise AssertionError("a step of a run that is done")

    before = state(done.run_dir)
    monkeypatch.setattr(local_step, "local_step", trained)
    again = go(done.run_dir)
    assert outcome(again) == outcome(done) == whole
    assert again.exits == done.exits
    assert [e["train/loss"] for e in again.history] == [e["train/loss"] for e in done.history]
    assert (again.memory, state(done.run_dir)) == ([], before)
    refused(done.run_dir, "epochs was 2, is 3", epochs=3)


# ---- The command line ----------------------------------------------------------------------------------------------

COMMAND = [
    *("train", "--model", "vgg11", "--width", "0.125", "--data", "synthetic:120", "--epochs", "1", "--json"),
    *("--batch-size", "32", "--memory-budget", "8MiB", "--head", "linear", "--cache", "disk", "--device", "cpu"),
    *("--set", "partition=layerwise", "--set", "grouping_threshold=0", "--set", "split_points=['features.4']"),
]


def command(*arguments):
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """The plan of the command's run, so that no other has to profile, and what the run gave."""
    folder = tmp_path_factory.mktemp("commanded") / "run"
    code, out, _ = command(*COMMAND, "--output-dir", folder)
    assert code == 0
    return engine.Plan.load(folder / "plan.json"), json.loads(out)


@pytest.fixture
def planned(commanded, monkeypatch):
    plain = engine.train
    monkeypatch.setattr(engine, "train", lambda *a, **k: plain(*a, plan=commanded[0], **k))
    return commanded[1]


def test_the_command_is_stopped_by_max_time_and_goes_on_by_being_given_again(planned, tmp_path):
    folder = tmp_path / "run"
    code, out, err = command(*COMMAND, "--output-dir", folder, "--max-time", 0)
    assert (code, out) == (75, "")
    assert f"the same command goes on in {folder}" in err
    code, _, err = command(*COMMAND, "--output-dir", folder, "--resume", "never")
    assert code == 2
    assert "resume is never" in err
    code, _, err = command(*COMMAND, "--output-dir", folder, "--seed", 5)
    assert code == 6
    assert f"seed was 0, is 5; go on with --config {folder / 'config.toml'}" in err
    begun_with(folder, torch="2.11.0")
    code, _, err = command(*COMMAND, "--output-dir", folder)
    assert code == 6
    assert "torch was 2.11.0" in err
    again = [*COMMAND, "--output-dir", folder, "--resume", "must", "--allow-inexact-resume"]
    code, out, err = command(*again)
    assert code == 0
    assert "not bitwise: torch was 2.11.0" in err
    result = json.loads(out)
    assert result["test_accuracy"] == planned["test_accuracy"]
    assert [e["loss"] for e in result["exits"]] == [e["loss"] for e in planned["exits"]]


def test_resume_must_needs_a_run_on_the_command_line(planned, tmp_path):
    code, _, err = command(*COMMAND, "--output-dir", tmp_path / "none", "--resume", "must")
    assert code == 2
    assert "resume is must" in err


def test_the_command_of_a_damaged_run_says_how_to_go_one_commit_back(cut, whole):
    path = cut / "MANIFEST.json"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError) as info:
        go(cut)
    assert f"nf-engine doctor --recover {cut}" in str(info.value)
    code, out, err = command("doctor", "--recover", cut)
    assert (code, err) == (0, "")
    assert "block 2, epoch 0, step 0" in out
    assert outcome(go(cut)) == whole
    code, _, err = command("doctor", "--recover", cut.parent / "none")
    assert code == 2

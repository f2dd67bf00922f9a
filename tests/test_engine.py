"""Whole runs: a user's own network and data, the budget kept, every tier, every refusal."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import nf_engine
from nf_engine.config import TrainConfig
from nf_engine.device import TensorBytes
from nf_engine.engine import profile
from nf_engine.errors import (
    BudgetExceededError,
    ConfigError,
    DataError,
    InfeasibleBudgetError,
    NoDeviceError,
    UnsupportedModelError,
)
from nf_engine.exits import evaluate
from nf_engine.models import build
from nf_engine.records import Plan, TierProbe
from nf_engine.sources import load_split

QUIET = {"progress": "none", "device": "cpu"}


class Branch(nn.Module):
    """What a user might write: two parallel convolutions, added to the input."""

    def __init__(self, channels):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.right = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return torch.relu(x + self.left(x) + self.right(x))


class UsersNet(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.first, self.pool, self.second = Branch(16), nn.MaxPool2d(2), Branch(16)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(16, classes)

    def forward(self, x):
        x = self.second(self.pool(self.first(self.stem(x))))
        return self.fc(self.drop(x.mean((2, 3))))


class UsersData(Dataset):
    """Stripes in four directions, as float tensors: what a Dataset of a user's yields."""

    def __len__(self):
        return 400

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        label = index % 4
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        phase = [rows, columns, rows + columns, rows - columns][label]
        noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(index))
        return (torch.sin(phase + index) + 0.3 * noise)[None], label


@pytest.fixture(scope="module")
def digits():
    train, test = load_split("synthetic:600")
    return train, test


def run(digits, folder, **fields):
    torch.manual_seed(0)
    options = {"memory_budget": "16MiB", "epochs": 1, "batch_size": 32} | QUIET | fields
    return nf_engine.train(build("vgg11", width=0.125), digits[0], digits[1], output_dir=folder / "run", **options)


def test_a_plan_that_runs_stages_twice_trains_bit_for_bit_as_the_one_that_need_not(digits, tmp_path):
    free = run(digits, tmp_path / "free", memory_budget="64MiB", augment="crop-flip", batch_size=64)
    tight = {"memory_budget": int(0.97 * free.plan.bounds.backpropagation), "prefer": "accuracy"}
    runs = [free, run(digits, tmp_path / "tight", **tight, augment="crop-flip", batch_size=64)]
    assert [[len(u.starts) > 0 for u in r.plan.units] for r in runs] == [[False], [True]]
    assert runs[1].memory[0].allocated <= tight["memory_budget"] < free.memory[0].allocated
    weights = [r.model.state_dict() for r in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert runs[0].history[-1]["train/loss"] == runs[1].history[-1]["train/loss"]


@pytest.mark.parametrize("strategy", ["windows", "layerwise"])
def test_a_users_own_network_learns_from_their_dataset(tmp_path, strategy):
    torch.manual_seed(0)
    network = UsersNet()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    budget = {"windows": 5 * 2**19, "layerwise": 3 * 2**20}[strategy]
    fields = {"memory_budget": budget, "partition": strategy, "epochs": 3, "batch_size": 24, "head_pool": 2,
              "recompute": False}  # fmt: skip
    result = nf_engine.train(network, UsersData(), output_dir=tmp_path / "run", **fields, **QUIET)
    assert len(result.plan.units) > 1, "the budget is below what backpropagation needs"
    assert strategy == "layerwise" or result.plan.bounds.backpropagation > 0.95 * budget
    assert all(m.allocated <= budget for m in result.memory)
    assert set(network.state_dict()) == set(before), "state_dict keys are kept"
    assert not torch.equal(network.stem[0].weight, before["stem.0.weight"]), "trained in place"
    assert max(e.accuracy for e in result.exits) >= 0.9, "stripes are easy; chance is 0.25"
    network.eval()
    x = torch.stack([UsersData()[k][0] for k in range(8)])
    torch.testing.assert_close(result.model(x), network(x))


def test_a_dataloader_gives_what_its_dataset_gives(tmp_path):
    loader = DataLoader(UsersData(), batch_size=7, shuffle=True)
    fields = {"memory_budget": "8MiB", "epochs": 1, "batch_size": 32}
    results = []
    for k, source in enumerate((UsersData(), loader)):
        torch.manual_seed(0)
        results.append(nf_engine.train(UsersNet(), source, output_dir=tmp_path / str(k), **fields, **QUIET))
    assert results[0].history[0]["train/loss"] == results[1].history[0]["train/loss"]


@pytest.mark.parametrize(
    ("cache", "augment"),
    [("disk", "none"), ("disk", "crop-flip"), ("ram", "crop-flip"), ("recompute", "crop-flip"), ("auto", "none")],
)
def test_a_run_stays_in_its_budget_on_every_tier(tmp_path, digits, cache, augment):
    network = build("vgg11", width=0.125)
    resident = [*network.parameters(), *network.buffers()]
    budget = 5 * 2**20
    with TensorBytes(resident) as counter:
        result = nf_engine.train(
            network,
            digits[0].subset(torch.arange(200)),
            digits[1],
            memory_budget=budget,
            partition="layerwise",
            epochs=2,
            cache=cache,
            augment=augment,
            output_dir=tmp_path / "run",
            **QUIET,
        )
    assert counter.peak <= budget
    assert len(result.plan.blocks) > 1
    tiers = {b.cache.tier for b in result.plan.blocks[1:]}
    assert tiers <= {"disk", "ram", "recompute"} if cache == "auto" else tiers == {cache}
    for block, memory in zip(result.plan.blocks, result.memory, strict=True):
        assert block.peak == pytest.approx(memory.allocated, rel=0.05)
        assert block.cache.copies == (2 if block.cache.tier in ("disk", "ram") and augment != "none" else 1)
    assert not list((tmp_path / "run").glob("*.nfc")), "used caches are deleted"


TWO_BLOCKS = {
    "partition": "layerwise",
    "grouping_threshold": 0.0,
    "batch_size": 50,
    "split_points": ("features.4",),
}


def test_every_stored_dtype_trains_and_disk_ram_and_recomputation_agree(tmp_path, digits):
    train, test = digits
    losses = {}
    for dtype in ("exact", "bf16", "u8"):
        for cache in ("disk", "ram", "recompute"):
            torch.manual_seed(0)
            result = nf_engine.train(
                build("vgg11", width=0.125), train, test, memory_budget="16MiB", epochs=1, cache=cache,
                cache_dtype=dtype, **TWO_BLOCKS, output_dir=tmp_path / f"{dtype}-{cache}", **QUIET,
            )  # fmt: skip
            assert [b.cache.tier for b in result.plan.blocks] == ["images", cache]
            losses[dtype, cache] = [e.loss for e in result.exits]
        assert losses[dtype, "disk"] == losses[dtype, "ram"], "the tier changes time, never numbers"
        assert losses[dtype, "recompute"] == pytest.approx(losses[dtype, "disk"], rel=1e-2)
    # Nothing is rounded and the order is the same; the held-out batches differ, hence the last bits of their sums.
    assert losses["exact", "recompute"] == pytest.approx(losses["exact", "disk"], rel=1e-6)
    assert losses["u8", "disk"] != losses["exact", "disk"]


def test_a_disk_that_slows_down_is_given_up_once_and_the_numbers_stay(tmp_path, digits, monkeypatch):
    """The rule itself is tested with the partitioner; here it has spoken after the first epoch of block 1."""
    train, test = digits
    fast_disk = TierProbe(1e12, 1e12, 1e12, 1e12, 1e12, 1e-6, {"ram": 0, "disk": 1 << 40})
    monkeypatch.setattr("nf_engine.planner.probe_tiers", lambda *_, **__: fast_disk)
    spoken = []

    def slowed_down(watch, seconds):
        spoken.append(seconds)
        return len(spoken) == 1

    runs = {}
    for name in ("steady", "slow"):
        if name == "slow":
            monkeypatch.setattr("nf_engine.trainer._DiskWatch.slowed_down", slowed_down)
        monkeypatch.setattr("nf_engine.trainer.choose_again", lambda *_: True)
        torch.manual_seed(0)
        runs[name] = nf_engine.train(
            build("vgg11", width=0.125), train, test, memory_budget="16MiB", epochs=3, cache="auto",
            cache_dtype="exact", **TWO_BLOCKS, output_dir=tmp_path / name, **QUIET,
        )  # fmt: skip
    assert [b.cache.tier for b in runs["slow"].plan.blocks] == ["images", "disk"]
    assert runs["slow"].plan.blocks[1].cache.forward_batch > 0
    events = [json.loads(line) for line in (tmp_path / "slow" / "log.jsonl").read_text().splitlines()]
    assert [(e["number"], e["epoch"], e["recompute"]) for e in events if e["event"] == "slow_disk"] == [(1, 0, True)]
    assert len(spoken) == 3
    assert [e.loss for e in runs["slow"].exits] == [e.loss for e in runs["steady"].exits]
    assert max(m.allocated for m in runs["slow"].memory) <= runs["slow"].plan.budget


def test_the_run_folder_holds_the_plan_the_settings_and_the_blocks(tmp_path, digits):
    result = run(
        digits, tmp_path, memory_budget="4MiB", partition="layerwise", batch_size="auto", keep_cache=True, cache="disk"
    )
    folder = result.run_dir
    assert Plan.load(folder / "plan.json") == result.plan
    settings = TrainConfig.load(folder / "config.toml")
    assert settings.partition == "layerwise"
    exits = json.loads((folder / "exits.json").read_text())
    assert exits["chosen"] == result.best_exit
    assert len(exits["exits"]) == len(result.plan.units) == result.model.exits
    assert len(list(folder.glob("b*.safetensors"))) == len(result.plan.blocks)
    assert len(list(folder.glob("x*.nfc"))) == len(list(folder.glob("v*.nfc"))) == len(result.plan.blocks) - 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(e["block"], e["epoch"]) for e in lines] == [(k, 0) for k in range(len(result.plan.blocks))]
    assert not list(folder.glob("*.tmp"))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, digits):
    runs = [run(digits, tmp_path / str(k), seed=s, augment="crop-flip") for k, s in enumerate((3, 3, 4))]
    losses = [r.history[0]["train/loss"] for r in runs]
    assert losses[0] == losses[1] != losses[2]
    same = zip(runs[0].model.state_dict().values(), runs[1].model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_the_hosts_random_state_is_left_alone(tmp_path, digits):
    network = build("vgg11", width=0.125)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002  the host's own generators
    nf_engine.train(
        network, *digits, memory_budget="16MiB", epochs=1, batch_size=64, output_dir=tmp_path / "run", **QUIET
    )
    assert torch.equal(torch.rand(3), expected)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002


def test_a_given_plan_is_obeyed_without_profiling(tmp_path, digits):
    first = run(digits, tmp_path / "a", memory_budget="5MiB", batch_size="auto")
    again = nf_engine.train(
        build("vgg11", width=0.125),
        *digits,
        plan=first.run_dir / "plan.json",
        epochs=1,
        output_dir=tmp_path / "b",
        **QUIET,
    )
    assert again.plan == first.plan
    assert not (tmp_path / "b" / "profile.json").exists()
    with pytest.raises(ConfigError, match="the plan was made for stages"):
        nf_engine.train(build("resnet18", width=0.125), *digits, plan=first.plan, output_dir=tmp_path / "c", **QUIET)


@pytest.mark.parametrize(("name", "other"), [("optimizer", "adamw"), ("precision", "bf16-mixed"), ("augment", "flip")])
def test_records_made_with_other_settings_are_refused(tmp_path, digits, name, other):
    message = f"was made for {name}='{getattr(TrainConfig(), name)}', this is {name}='{other}'; make the"
    if name != "augment":  # of which the blocks' bytes, measured whole, hold the augmentation of a batch alone
        made = nf_engine.plan(build("vgg11", width=0.125), digits[0].shape, samples=570, memory_budget="64MiB")
        with pytest.raises(ConfigError, match=message):
            run(digits, tmp_path, plan=made, **{name: other})
    profile = nf_engine.profile("vgg11", (3, 32, 32), measure_time=False)
    with pytest.raises(ConfigError, match=message):
        nf_engine.plan("vgg11", (3, 32, 32), memory_budget="96MiB", profile=profile, **{name: other})


def test_a_plan_for_caches_of_another_dtype_is_refused(tmp_path, digits):
    """Its rooms were counted in that dtype: exact caches would be twice as large."""
    network = build("vgg11", width=0.125)
    given = {"memory_budget": "8MiB", "partition": "layerwise", "grouping_threshold": 0.0, "cache": "ram"}
    made = nf_engine.plan(network, digits[0].shape, samples=570, device="cpu", **given)
    assert {b.cache.dtype for b in made.blocks[1:]} == {"fp16"}
    with pytest.raises(ConfigError, match="the plan was made for caches in fp16, cache_dtype='exact' stores fp32"):
        nf_engine.train(network, *digits, plan=made, cache_dtype="exact", output_dir=tmp_path / "run", **given, **QUIET)


def test_a_plan_for_a_device_with_its_own_memory_is_refused_on_the_cpu(tmp_path, digits):
    network = build("vgg11", width=0.125)
    fields = {"memory_budget": "32MiB", "samples": 600, "batch_size": 64}
    apart = nf_engine.plan(network, (3, 32, 32), device_memory="1GiB", **fields)
    joint = nf_engine.plan(network, (3, 32, 32), device="cpu", **fields)
    assert apart.overhead == 0
    assert joint.overhead == sum(t.numel() * t.element_size() for t in network.state_dict().values())
    with pytest.raises(ConfigError, match="on the CPU all weights share the budget"):
        nf_engine.train(network, *digits, plan=apart, output_dir=tmp_path / "run", **QUIET)
    with pytest.raises(ConfigError, match="the plan has no blocks"):
        nf_engine.train(network, *digits, plan=replace(joint, blocks=()), output_dir=tmp_path / "no", **QUIET)


def test_held_out_data_is_split_off_by_class_where_none_is_given(tmp_path, digits):
    result = nf_engine.train(
        build("vgg11", width=0.125),
        digits[0],
        memory_budget="16MiB",
        val_fraction=0.2,
        epochs=1,
        batch_size=32,
        output_dir=tmp_path / "run",
        **QUIET,
    )
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert (start["samples"], start["held_out"]) == (480, 120)
    assert result.plan.samples == 480


def test_split_points_decide_the_stages(tmp_path, digits):
    result = run(digits, tmp_path, split_points=("features.7", "features.14"))
    assert len(result.plan.stages) == 3


def test_the_chosen_exit_is_evaluated_like_any_model(tmp_path, digits):
    result = run(digits, tmp_path, epochs=3, memory_budget="6MiB", partition="layerwise")
    small = result.model.truncate(result.best_exit)
    whole = evaluate(result.model, digits[1], policy=f"fixed:{result.best_exit}")
    assert (
        evaluate(small, digits[1]).accuracy == whole.accuracy == pytest.approx(result.exits[result.best_exit].accuracy)
    )
    assert sum(p.numel() for p in small.parameters()) == result.exits[result.best_exit].parameters


def test_a_plan_needs_no_device_and_no_data():
    plan = nf_engine.plan("vgg11", (3, 32, 32), memory_budget="96MiB")
    assert plan.device == "none"
    assert plan.peak <= 0.95 * 96 * 2**20
    assert plan.epoch_seconds is None
    shares = nf_engine.plan("vgg11", (3, 32, 32), memory_budget=0.5, device_memory="192MiB")
    assert shares.budget == 96 * 2**20
    made = profile("vgg11", torch.zeros(1, 3, 32, 32), batch_sizes=(4, 8, 16), measure_time=False)
    sums = nf_engine.plan("vgg11", (3, 32, 32), memory_budget="96MiB", profile=made)
    assert sums.stages == plan.stages


def test_a_peak_above_the_budget_is_an_error_not_a_silence(tmp_path, digits):
    network = build("vgg11", width=0.125)
    plan = nf_engine.plan(network, (3, 32, 32), memory_budget="32MiB", samples=600, batch_size=64, device="cpu")
    lie = replace(plan, budget=2**20)
    with pytest.raises(
        BudgetExceededError, match=r"block 0 used .* bytes\) of tensors, the budget is 1.00 MiB"
    ) as caught:
        nf_engine.train(network, *digits, plan=lie, epochs=1, batch_size=64, output_dir=tmp_path / "run", **QUIET)
    assert caught.value.need > caught.value.budget == 2**20


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"memory_budget": "1MiB"}, InfeasibleBudgetError, r"stage \S+ needs .* at batch 1 .*the budget is 1.00 MiB"),
        ({"memory_budjet": 5}, ConfigError, "did you mean memory_budget"),
        ({"device": "cpu", "compile": True}, ConfigError, "compile=True needs a CUDA device"),
        ({"device": "cuda"}, NoDeviceError, "torch finds no CUDA device"),
        ({"memory_budget": 1 << 60}, ConfigError, r"is 1152921504606846976 bytes, but cpu has \d+ bytes free"),
        ({"val_fraction": 0.0}, ConfigError, "found 0.0"),
        ({"split_points": ("features.99",)}, ConfigError, "features.99"),
        ({"progress": "loud"}, ConfigError, "loud"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_thing_and_what_to_do(tmp_path, digits, fields, error, text):
    if error is NoDeviceError and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    options = {"memory_budget": "16MiB", "epochs": 1} | QUIET | fields
    with pytest.raises(error, match=text):
        nf_engine.train(build("vgg11", width=0.125), digits[0], output_dir=tmp_path / "run", **options)


def test_models_and_data_that_do_not_fit_are_refused(tmp_path, digits):
    options = {"memory_budget": "16MiB", "epochs": 1, "output_dir": tmp_path / "run"} | QUIET
    with pytest.raises(DataError, match="the model has 4 outputs, the labels go up to 9"):
        nf_engine.train(build("vgg11", width=0.125, classes=4), digits[0], **options)
    with pytest.raises(UnsupportedModelError):
        nf_engine.train(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), digits[0], **options)
    with pytest.raises(ConfigError, match=r"model must be an nn\.Module or a name, got int"):
        nf_engine.train(3, digits[0], **options)
    with pytest.raises(DataError, match="they must be of one shape"):
        nf_engine.train("vgg11", digits[0], (np.zeros((20, 3, 16, 16), np.uint8), np.arange(20) % 10), **options)


def test_an_output_folder_in_use_is_left_alone(tmp_path, digits):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds 'mine\.txt' and no run .*name a new or empty folder"):
        run(digits, tmp_path)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]

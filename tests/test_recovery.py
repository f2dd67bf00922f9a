"""Out of memory in a training: the block starts again with a smaller batch. Steps that raise stand in for a GPU."""

from __future__ import annotations

import json
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from small_runs import cut_after
from torch import nn

import nf_engine
from nf_engine import local_step as steps
from nf_engine.checkpoint import fill, parse, state_of, to_bytes
from nf_engine.committed import read_run
from nf_engine.errors import BudgetExceededError
from nf_engine.feed import Resident
from nf_engine.models import build
from nf_engine.partitioner import scaled_lr
from nf_engine.records import Plan
from nf_engine.recovery import asked_bytes, is_out_of_memory
from nf_engine.sources import load_split
from nf_engine.storage import ActivationCache

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1.00 GiB of which ..."
FIELDS = {
    "memory_budget": "16MiB",
    "partition": "layerwise",
    "grouping_threshold": 0.0,
    "batch_size": 40,
    "split_points": ("features.4",),
    "epochs": 2,
    "cache": "ram",
    "augment": "flip",
    "augment_copies": 1,
    "progress": "none",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def digits():
    train, test = load_split("synthetic:600")
    return train.subset(torch.arange(190)), test.subset(torch.arange(90))


def train(digits, folder, plan=None, **fields):
    torch.manual_seed(0)
    network = build("vgg11", width=0.125)
    return nf_engine.train(network, *digits, plan=plan, output_dir=folder, **{**FIELDS, **fields})


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """A run that never meets an error; its plan serves all others, so that no step is called by a planner."""
    return train(digits, tmp_path_factory.mktemp("plain") / "run")


def fail_at(monkeypatch, fails):
    """Steps raise as CUDA does where fails(batch, number of this batch size's steps) says so."""
    plain, counts, held = steps.local_step, {}, []

    def step(unit, x, labels):
        assert all(ref() is None for ref in held), "the failed step's tensors are gone before another one runs"
        assert all(p.grad is None for p in unit.parameters()), "nor are its gradients"
        torch.rand(())  # as a dropout would
        count = counts[len(x), unit.name] = counts.get((len(x), unit.name), 0) + 1
        if fails(len(x), count, unit.name):
            h = unit.body(x)  # a graph that the traceback's frame holds on to
            for p in unit.parameters():
                p.grad = torch.ones_like(p)
            held.extend([weakref.ref(h), weakref.ref(x)])
            raise torch.OutOfMemoryError(MESSAGE)
        return plain(unit, x, labels)

    monkeypatch.setattr(steps, "local_step", step)
    monkeypatch.setattr("nf_engine.trainer.RECOVERING", ("cpu",))
    return counts


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_rehearsal_changes_nothing(tmp_path, digits, plain, monkeypatch):
    assert len(plain.plan.blocks) == 2
    counts = fail_at(monkeypatch, lambda *_: False)
    rehearsed = train(digits, tmp_path / "rehearsed", plain.plan)
    assert same(plain.model, rehearsed.model)
    assert rehearsed.plan == plain.plan
    losses = [[line["train/loss"] for line in r.history] for r in (plain, rehearsed)]
    assert losses[0] == losses[1]
    assert set(counts.values()) == {4 + 2 * (190 // 40)}, "four steps before the epochs, in each block"
    state = torch.get_rng_state()
    monkeypatch.setattr("nf_engine.trainer.RECOVERING", ())
    train(digits, tmp_path / "drawn", plain.plan)
    assert torch.equal(torch.get_rng_state(), state), "what the rehearsal draws does not count"


@pytest.mark.parametrize("at", [2, 4 + 3, 4 + 4 + 2])  # in the rehearsal; in the first epoch; in the second
def test_a_block_that_runs_out_of_memory_is_trained_as_if_it_had_started_smaller(
    tmp_path, digits, plain, monkeypatch, caplog, at
):
    block = plain.plan.blocks[1]
    smaller = replace(block, batch=36, lr=scaled_lr(nf_engine.TrainConfig(), 36))
    expected = train(digits, tmp_path / "twin", replace(plain.plan, blocks=(plain.plan.blocks[0], smaller)))
    name = f"{plain.plan.stages[block.first]}..{plain.plan.stages[block.last]}"
    fail_at(monkeypatch, lambda batch, count, unit: unit == name and batch == 40 and count == at)
    with caplog.at_level(logging.WARNING, "nf_engine"):
        result = train(digits, tmp_path / "run", plain.plan)
    assert same(result.model, expected.model), "the weights are those of a run that began with the smaller batch"
    assert result.plan.blocks[1] == smaller
    manifest, files = read_run(tmp_path / "run", ("plan",))
    assert [Plan.from_json(data.decode()) for data in files.values()] == [result.plan]
    assert files.keys() == {"plan-g0003.json"}, "a file of a commit is never changed in place"
    assert manifest.done
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "block 1 ran out of memory at batch 40: asked for 20971520 bytes," in record.getMessage()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    twin = [json.loads(line) for line in (tmp_path / "twin" / "metrics.jsonl").read_text().splitlines()]
    assert lines == twin, "no epoch of the failed attempt is left"
    assert [(e["block"], e["epoch"]) for e in result.history] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["event"] == "out_of_memory"]
    assert (event["number"], event["batch"], event["asked"]) == (1, 40, 20 * 2**20)
    assert event["free"] > 0


def test_three_smaller_batches_are_tried_and_then_it_is_an_error(tmp_path, digits, plain, monkeypatch):
    counts = fail_at(monkeypatch, lambda *_: True)
    told = r"block 0 ran out of memory at batch 40 and at every .* to 20;"
    with pytest.raises(BudgetExceededError, match=told) as info:
        train(digits, tmp_path / "run", plain.plan)
    assert [batch for batch, _ in counts] == [40, 36, 30, 20]
    assert info.value.need == 16 * 2**20 + 20 * 2**20 > info.value.budget
    assert info.value.exit_code == 4
    assert info.value.__context__ is None, "the torch error would keep tensors alive"


def test_images_that_leave_no_room_on_the_device_make_way_once_and_for_all(tmp_path, digits, plain, monkeypatch):
    """The batch stays, and so it does in every later start: the plan that is committed has no images there."""
    there, step, starts = weakref.WeakSet(), steps.local_step, []

    class Kept(Resident):
        def __init__(self, *given):
            super().__init__(*given)
            there.add(self)

    def crowded(unit, x, labels):
        if there:
            raise torch.OutOfMemoryError(MESSAGE)
        starts.append(len(x))
        return step(unit, x, labels)

    monkeypatch.setattr("nf_engine.chain.Resident", Kept)
    monkeypatch.setattr(steps, "local_step", crowded)
    monkeypatch.setattr("nf_engine.trainer.RECOVERING", ("cpu",))
    lie = replace(plain.plan, resident_images=1 << 40)
    with cut_after(6):
        assert train(digits, tmp_path / "run", lie).status == "interrupted"
    result = train(digits, tmp_path / "run", lie)
    assert set(starts) == {40}
    assert result.plan == replace(plain.plan, resident_images=0)
    assert same(result.model, plain.model)
    assert len(list((tmp_path / "run").glob("plan-*.json"))) == 1, "once"


def fail_to_write(monkeypatch, most):
    """Outputs of more than `most` samples at a time cannot be stored."""
    plain, sizes, held = ActivationCache.append, [], []

    def append(cache, h, *rest):
        assert all(ref() is None for ref in held), "the failed pass's maps are gone before another one runs"
        sizes.append(len(h))
        if len(h) > most:
            held.append(weakref.ref(h))
            raise torch.OutOfMemoryError(MESSAGE)
        return plain(cache, h, *rest)

    monkeypatch.setattr(ActivationCache, "append", append)
    monkeypatch.setattr("nf_engine.chain.RECOVERING", ("cpu",))
    return sizes


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_outputs_that_do_not_fit_are_written_fewer_at_a_time(tmp_path, digits, plain, monkeypatch, caplog, tier):
    first, second = plain.plan.blocks
    on_disk = replace(second, cache=replace(second.cache, tier=tier))
    sizes = fail_to_write(monkeypatch, 20)
    with caplog.at_level(logging.WARNING, "nf_engine"):
        result = train(digits, tmp_path / "run", replace(plain.plan, blocks=(first, on_disk)), cache=tier)
    assert result.status == "completed"
    assert sizes == [40, *[20] * 4, 10, 40, *[20] * 9, 10], "of the held-out images, then of the others, each once"
    for line, expected in zip(result.history, plain.history, strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
    told = ["out of memory at batch 40 while the inputs of block 1 were written"] * 2
    assert [record.getMessage() for record in caplog.records] == told
    assert {f.name for f in (tmp_path / "run").glob("*.tmp")} == set()


def test_outputs_that_never_fit_end_the_run_which_goes_on_from_the_finished_block(tmp_path, digits, plain, monkeypatch):
    sizes = fail_to_write(monkeypatch, 0)
    with pytest.raises(
        BudgetExceededError, match="block 0 is trained and saved, but ran out of memory at batch 10"
    ) as info:
        train(digits, tmp_path / "run", plain.plan)
    assert sizes == [40, 20, 10]
    assert info.value.exit_code == 4
    monkeypatch.undo()
    trained = []
    monkeypatch.setattr(steps, "local_step", lambda *a, step=steps.local_step: trained.append(1) or step(*a))
    assert same(train(digits, tmp_path / "run", plain.plan).model, plain.model)
    assert len(trained) == 2 * (190 // 40), "the second block alone"


def test_other_errors_and_other_devices_are_left_alone(tmp_path, digits, plain, monkeypatch):
    def broken(unit, x, labels):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(steps, "local_step", broken)
    monkeypatch.setattr("nf_engine.trainer.RECOVERING", ("cpu",))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(digits, tmp_path / "other", plain.plan)
    counts = fail_at(monkeypatch, lambda *_: True)
    monkeypatch.setattr("nf_engine.trainer.RECOVERING", ("cuda",))
    with pytest.raises(torch.OutOfMemoryError):
        train(digits, tmp_path / "cpu", plain.plan)
    assert list(counts.values()) == [1]


def test_weights_of_the_start_come_back_on_modules_that_trained_since():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net.register_buffer("hidden", torch.ones(2), persistent=False)
    before = [t.clone() for t in (*net.parameters(), *net.buffers())]
    state = parse(to_bytes(state_of({"stage0": net}), {}), "initial")
    net.double().float()  # as a change of device, it makes new buffers
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            t.add_(1)
    fill({"stage0": net}, state, "initial")
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *net.buffers()), strict=True))


@pytest.mark.parametrize(
    ("error", "expected", "asked"),
    [
        (torch.OutOfMemoryError(MESSAGE), True, 20 * 2**20),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes."), True, 512),
        (torch.OutOfMemoryError("Allocation failed"), True, None),
        (RuntimeError("CUDA error: out of memory\nCompile with"), True, None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, None),
        (BudgetExceededError("block 0 ran out of memory", stage="block 0", need=2, budget=1), False, None),
        (ValueError("out of memory"), False, None),
    ],
)
def test_what_counts_as_out_of_memory(error, expected, asked):
    assert is_out_of_memory(error) is expected
    assert asked_bytes(error) == asked

"""What ends a training must not reach the disk: NaN (P18), a lost device (P21); what ends a profiling, the model (P16).

Faults are patched into this process; each run goes on afterwards and ends as one that was left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil

import numpy as np
import pytest
import small_runs as runs
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nf_engine import chain, controller, local_step, planner, trainer
from nf_engine.engine import settle
from nf_engine.errors import BudgetError, DataError, DeviceLostError, NFError, NonFiniteError
from nf_engine.planner import Planner
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.stages import split
from nf_engine.storage import ActivationCache

go, outcome = runs.go, runs.outcome
BAD = (float("nan"), float("inf"), float("-inf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return outcome(go(tmp_path_factory.mktemp("whole") / "run"))


def position(folder):
    return tuple(runs.manifest(folder)["position"][key] for key in ("block", "epoch", "step"))


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


class Poison:
    """One bad number, at one step of one block, in its inputs, its maps, a gradient, or a weight before the step."""

    def __init__(self, kind, where, rng):
        self.kind, self.where, self.rng = kind, where, rng
        self.bad, self.now, self.done = rng.choice(BAD), None, False

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(runs.before_steps(self._note))
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        plain = local_step.local_step
        patch.setattr(local_step, "local_step", lambda *a: plain(*self._poisoned(*a)))
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _note(self, now):
        self.now = now

    def _one(self, tensor):
        """The tensor with one bad number."""
        tensor = tensor.detach().clone()
        tensor.view(-1)[self.rng.randrange(tensor.numel())] = self.bad
        return tensor

    def _poisoned(self, unit, x, labels):
        if self.now != self.where or self.done:
            return unit, x, labels
        self.done = True
        if self.kind == "data":
            x = self._one(x.contiguous())
        elif self.kind == "activation":
            handle = unit.body.register_forward_hook(
                lambda _, __, h: (handle.remove(), h * self._one(torch.ones(h.shape)))[1]
            )
        elif self.kind == "gradient":
            p = self.rng.choice([p for p in unit.body.parameters() if p.requires_grad])
            handle = p.register_hook(lambda g: (handle.remove(), self._one(g.contiguous()))[1])
        else:
            p = self.rng.choice(unit.parameters())
            with torch.no_grad():
                p.copy_(self._one(p.contiguous()))
        return unit, x, labels


STEPS = [(b, e, s) for b in range(runs.BLOCKS) for e in range(runs.EPOCHS) for s in range(runs.PER_EPOCH)]


def is_finite(folder):
    """Whether all tensors that the run folder holds are."""
    files = [e["name"] for e in runs.manifest(folder)["files"] if e["name"].endswith(".safetensors")]
    tensors = [t for name in files for t in load_file(folder / name).values() if t.is_floating_point()]
    assert tensors
    return all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize("minutes", [0.0, 10.0])
@pytest.mark.parametrize("kind", ["data", "activation", "gradient", "weight"])
@pytest.mark.parametrize(("cases", "line"), [  # a line for each: the long one says 400 of 400 whatever else runs
    (5, "NaN or infinity at a few places: stopped before a commit"),
    pytest.param(50, "NaN or infinity in data, map, gradient or weight: stopped before a commit",
                 marks=pytest.mark.slow),
], ids=["few", "all"])  # fmt: skip
def test_a_number_that_is_none_is_never_committed(tmp_path, whole, figure, kind, minutes, cases, line):
    rng = random.Random(f"{kind} {minutes} {cases}")
    # Always among them: the last step of a block, after which no other one looks at the weights.
    wanted = [(1, runs.EPOCHS - 1, runs.PER_EPOCH - 1), *(rng.choice(STEPS) for _ in range(cases - 1))]
    for k, where in enumerate(wanted):
        folder = tmp_path / str(k)
        with Poison(kind, where, rng) as poison, pytest.raises(NonFiniteError) as info:
            go(folder, "ram", checkpoint_minutes=minutes)
        assert poison.done
        assert _get_current_dispatch_mode_stack() == [], (
            "the error that is still held keeps no counting of tensors alive"
        )
        text = str(info.value)
        assert f"block {where[0]}" in text, (where, text)
        assert re.search(r"step \d+|unit\d+\.(body|head)\S+ holds", text), text
        said = int(re.search(r"step (\d+)", text)[1]) if f"epoch {where[1]}, step" in text else None
        if kind in ("data", "activation"):
            assert said == where[2], (where, text)
        else:  # a gradient shows by the weights; an infinite weight may end in a ReLU, and show later or at a commit
            assert said is None or said >= where[2], (where, text)
        assert info.value.exit_code == 7
        assert position(folder) <= where, "nothing after the last good step is committed"
        assert is_finite(folder)
        assert outcome(go(folder, "ram")) == whole, (where, poison.bad)
        shutil.rmtree(folder)
    figure("P18", line, cases, cases)


@pytest.mark.parametrize("bad", BAD)
def test_images_that_are_no_numbers_are_refused_before_any_work(tmp_path, bad):
    x, labels = runs.training_images()
    x = x / 255
    x[13, 1, 2, 3] = bad
    with pytest.raises(DataError, match="expected finite pixels"):
        go(tmp_path / "run", train_data=(x, labels))
    assert not (tmp_path / "run").exists()


def test_outputs_that_overflow_a_cache_are_an_error_and_the_block_before_stays(tmp_path, whole, monkeypatch):
    plain = ActivationCache.append
    monkeypatch.setattr(ActivationCache, "append", lambda cache, x, *a: plain(cache, x * 1e9, *a))
    with pytest.raises(NonFiniteError, match="an input of block 1 overflows fp16"):
        go(tmp_path / "run")
    assert position(tmp_path / "run") == (1, 0, 0)
    monkeypatch.undo()
    assert outcome(go(tmp_path / "run")) == whole


# ---- A lost device --------------------------------------------------------------------------------------------------

LOST = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


class Lost:
    """A device that is lost at the n-th call of a function; from then on each call that needs it fails, too."""

    def __init__(self, n, folder):
        self.n, self.folder, self.calls, self.manifest = n, folder, 0, b""

    def __call__(self, *_, **__):
        self.calls += 1
        if self.calls == self.n:
            self.manifest = (self.folder / "MANIFEST.json").read_bytes()
        if self.lost:
            raise torch.AcceleratorError(LOST)

    @property
    def lost(self):
        return self.calls >= self.n


def failing(patch, owner, name, lost, *, counted=True):
    plain = getattr(owner, name)

    def call(*arguments, **more):
        if counted or lost.lost:
            lost(*arguments)
        return plain(*arguments, **more)

    patch.setattr(owner, name, call)


def open_files():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


PLACES = {
    "a step": (local_step, "local_step"),
    "a held-out score": (controller.Chain, "score"),
    "an epoch's accuracy": (trainer, "forward_block"),
    "a cache's write": (ActivationCache, "append"),
    "a cache's end": (ActivationCache, "finish"),
    "a commit's look at the values": (trainer, "check_finite"),
    "a commit's copy to the host": (trainer, "to_bytes"),
    "a block's look at its values": (controller, "check_finite"),
    "a block's copy to the host": (controller, "to_bytes"),
    "the outputs of a block": (chain, "forward_block"),
}


def error_of(call):
    try:
        call()
    except NFError as error:
        return error.with_traceback(None)  # whose frames would hold the caches


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_committed_once_the_device_is_lost(tmp_path, whole, figure, place, stride):
    descriptors = open_files()
    n, cases = 1, 0
    while True:
        folder = tmp_path / str(n)
        lost = Lost(n, folder)
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, *PLACES[place], lost)
            failing(patch, nn.Module, "to", lost, counted=False)  # what a clean-up would ask of the device
            ended = error_of(lambda folder=folder: go(folder, checkpoint_minutes=0.0))
        if not lost.lost:
            assert ended is None
            break
        assert isinstance(ended, DeviceLostError)
        assert ended.exit_code == 76
        assert _get_current_dispatch_mode_stack() == []
        assert f"the device failed: {LOST.partition(chr(10))[0]}; nothing was committed after it" in str(ended)
        assert (folder / "MANIFEST.json").read_bytes() == lost.manifest, "no commit after it"
        assert not [f.name for f in folder.iterdir() if f.name.endswith(".tmp")]
        assert open_files() == descriptors, "the caches are closed"
        assert outcome(go(folder)) == whole
        shutil.rmtree(folder)
        n, cases = n + stride, cases + 1
    assert cases > 0
    figure("P21", f"device lost in {place}: exit 76, no commit after, bitwise", cases, cases)


def test_an_error_of_the_device_out_of_memory_is_no_lost_device(tmp_path, monkeypatch):
    def full(*_):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(local_step, "local_step", full)
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        go(tmp_path / "run")


# ---- Out of memory while profiling ----------------------------------------------------------------------------------


def state_of(network):
    """A hash of all that a profiling must leave alone: tensors, gradients, modes, random numbers."""
    digest = hashlib.sha256()
    for name, t in (*network.named_parameters(), *network.named_buffers()):
        digest.update(f"{name} {t.stride()} {t.dtype} {t.requires_grad} {t.grad is None} {t.data_ptr()}".encode())
        digest.update(t.detach().numpy().tobytes())
    digest.update(repr([m.training for m in network.modules()]).encode())
    digest.update(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode())
    digest.update(repr(np.random.get_state()).encode())  # noqa: NPY002
    return digest.hexdigest()


SITES = {  # what runs out of memory, and the stride of the normal run
    "forward": ([(nn.Conv2d, "forward"), (nn.BatchNorm2d, "forward"), (nn.Linear, "forward")], 67),
    "backward": ([(torch.autograd, "backward")], 13),
    "step": ([(torch.optim.SGD, "step")], 5),
}


def planned(cut, settings):
    images = Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3), "none", 0)
    made = Planner(cut, settings, images, True, torch.device("cpu"), runs.IMAGES, "net", None, (1, 2, 4))
    return made.plan(1 << 24)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_profiling_that_runs_out_of_memory_changes_nothing(monkeypatch, figure, site, every):
    settings = settle(None, {"batch_size": 4, "split_points": runs.STAGES[:-1], "partition": "layerwise"})
    network = runs.Net()
    cut = split(network, (3, runs.SIDE, runs.SIDE), split_points=settings.split_points)
    whole = planned(cut, settings)
    before = state_of(network)
    places, stride = SITES[site]
    calls, at, cases = 0, 1, 0

    def failing_at(plain):
        def call(*arguments, **more):
            nonlocal calls
            calls += 1
            if calls == at:
                torch.rand(3)  # as a dropout before it would
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return plain(*arguments, **more)

        return call

    for owner, name in places:
        monkeypatch.setattr(owner, name, failing_at(getattr(owner, name)))
    while True:
        calls = 0
        try:
            made = planned(cut, settings)
        except (torch.OutOfMemoryError, BudgetError):
            made = None
        assert state_of(network) == before, f"{site} {at}"
        if calls < at:
            break
        cases, at = cases + 1, at + (1 if every else stride)
    assert cases >= 3
    assert made is not None
    assert [b.peak for b in made.blocks] == [b.peak for b in whole.blocks], "a later profiling finds what the first did"
    figure("P16", f"out of memory at a {site} of a profiling: all as before", cases, cases)


def test_a_run_whose_profiling_ran_out_of_memory_starts_again_by_the_same_call(tmp_path, monkeypatch):
    plain, calls = planner.profile_unit, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return plain(*arguments)

    monkeypatch.setattr(planner, "profile_unit", full)
    fields = {"plan": None, "partition": "layerwise", "batch_size": 8, "epochs": 1}
    with pytest.raises((torch.OutOfMemoryError, BudgetError)):
        go(tmp_path / "run", **fields)
    assert not (tmp_path / "run" / "MANIFEST.json").exists()
    again, other = go(tmp_path / "run", **fields), go(tmp_path / "other", **fields)
    assert outcome(again) == outcome(other)

"""Inputs of blocks: the same numbers wherever they come from, and the same places for the modules that make them."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
import small_runs as runs
import torch
from torch import nn

from nf_engine import chain, job

go, cut_after, outcome, events = runs.go, runs.cut_after, runs.outcome, runs.events
IN_BLOCK_1 = 11  # steps after which a run is cut


def with_tiers(*tiers):
    plan = runs.plan("disk")
    blocks = (replace(b, cache=replace(b.cache, tier=t)) for b, t in zip(plan.blocks[1:], tiers, strict=True))
    return replace(plan, blocks=(plan.blocks[0], *blocks))


@pytest.mark.parametrize("tiers", [("recompute", "recompute"), ("recompute", "disk"), ("ram", "recompute")])
def test_where_inputs_come_from_changes_no_number(tmp_path, tiers):
    """A recomputed block, too, gets what two caches in a row would have given it: each rounds to 16 bits."""
    assert outcome(go(tmp_path / "disk")) == outcome(go(tmp_path / "run", plan=with_tiers(*tiers)))


def test_held_out_samples_are_never_cached_on_the_device(tmp_path, monkeypatch):
    """No plan counts them there."""
    made, create = {}, chain.ActivationCache.create

    def created(folder, name, *rest, tier, **more):
        made[name[:4]] = tier
        return create(folder, name, *rest, tier=tier, **more)

    monkeypatch.setattr(chain.ActivationCache, "create", created)
    assert go(tmp_path / "run", plan=with_tiers("device", "device")).status == "completed"
    assert made == {"v001": "ram", "x001": "device", "v002": "ram", "x002": "device"}


class OnDevice:
    """Which modules, and convolutions of which blocks, are on the device, as the calls that move modules have it."""

    def __init__(self, monkeypatch):
        self.network = runs.Net()
        self.modules = set()
        move, place = nn.Module.to, job.placed

        def to(module, *args, **kwargs):
            self.modules.difference_update(module.modules() if args == ("cpu",) else ())
            return move(module, *args, **kwargs)

        def placed(module, device):
            self.modules.update(m for m in module.modules() if not [*m.children()])
            return place(module, device)

        monkeypatch.setattr(nn.Module, "to", to)
        monkeypatch.setattr(job, "placed", placed)
        monkeypatch.setattr(chain, "placed", placed)

    def blocks(self):
        return {k for k in range(runs.BLOCKS) if self.network.get_submodule(f"features.{k}.0") in self.modules}


@pytest.mark.parametrize("tiers", [("recompute", "recompute"), ("recompute", "disk"), ("disk", "ram")])
def test_no_module_stays_on_the_device_once_its_block_is_done(tmp_path, monkeypatch, tiers):
    """On a GPU they would be bytes that no plan counts, and a model in two places."""
    device, starts = OnDevice(monkeypatch), []

    def note(position):
        if position[1:] == (0, 0):
            starts.append(device.blocks())

    with runs.before_steps(note):
        assert go(tmp_path / "run", network=device.network, plan=with_tiers(*tiers)).status == "completed"
    prefixed = [set(range(k)) if tier == "recompute" else set() for k, tier in enumerate(("images", *tiers))]
    assert starts == [prefix | {k} for k, prefix in enumerate(prefixed)]
    assert device.modules == set()


def test_the_next_weights_come_while_the_last_outputs_are_written(tmp_path, monkeypatch):
    """The held-out outputs first, with the block that makes them; the last training outputs beside the next block."""
    device, seen, finish = OnDevice(monkeypatch), [], chain.ActivationCache.finish

    def finished(cache):
        seen.append((cache.record.name[0], cache.record.block, device.blocks()))
        finish(cache)

    monkeypatch.setattr(chain.ActivationCache, "finish", finished)
    assert go(tmp_path / "run", network=device.network).status == "completed"
    assert seen == [(prefix, k, {k - (prefix == "v")}) for k in range(1, runs.BLOCKS) for prefix in "vx"]


def test_a_cache_that_fails_at_its_end_leaves_no_module_on_the_device(tmp_path, monkeypatch):
    device = OnDevice(monkeypatch)

    def finish(cache):
        raise OSError(errno.EIO, "as if")

    monkeypatch.setattr(chain.ActivationCache, "finish", finish)
    with pytest.raises(OSError, match="as if"):
        go(tmp_path / "run", network=device.network)
    assert device.modules == set()
    assert not list((tmp_path / "run").glob("**/*.nfc*"))


class Drawn(torch.utils.data.Dataset):
    """Images that are rolled by as many columns as chance has it, at each reading."""

    def __init__(self):
        self.images, self.labels = runs.training_images()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return torch.roll(self.images[k], int(torch.randint(0, 8, (1,))), -1), int(self.labels[k])


def test_a_cache_of_images_that_are_drawn_anew_is_not_compared(tmp_path):
    with cut_after(IN_BLOCK_1):
        assert go(tmp_path, train_data=Drawn()).status == "interrupted"
    assert go(tmp_path, train_data=Drawn()).status == "completed"
    assert events(tmp_path, "cache_refused") == []


def test_a_cache_of_zeros_is_as_good_as_another(tmp_path):
    def dead():
        network = runs.Net()
        with torch.no_grad():
            network.features[0][1].bias.fill_(-100)
        return network

    plan = runs.plan("disk")
    given = {"plan": replace(plan, blocks=tuple(replace(b, lr=1e-9) for b in plan.blocks))}
    with cut_after(IN_BLOCK_1):
        assert go(tmp_path, network=dead(), **given).status == "interrupted"
    assert go(tmp_path, network=dead(), **given).status == "completed"
    assert events(tmp_path, "cache_refused") == []


class Deep(nn.Module):
    """Stages of many convolutions, whose bfloat16 is far from float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Sequential(*(
            nn.Sequential(*(m for _ in range(12) for m in (nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8))))
            for width in (8, 8, 8)
        ))  # fmt: skip
        self.features[0][0] = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = nn.Linear(8, runs.CLASSES)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def test_a_cache_of_a_deep_network_in_16_bits_is_not_stale(tmp_path):
    plan = replace(runs.plan("disk"), precision="bf16-mixed")
    blocks = tuple(replace(b, cache=replace(b.cache, dtype="bf16")) for b in plan.blocks)
    given = {"plan": replace(plan, blocks=blocks), "precision": "bf16-mixed", "cache_dtype": "bf16"}
    with cut_after(19):
        assert go(tmp_path, network=Deep(), **given).status == "interrupted"
    assert go(tmp_path, network=Deep(), **given).status == "completed"
    assert events(tmp_path, "cache_refused") == []

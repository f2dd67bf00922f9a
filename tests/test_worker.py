"""Local steps, epochs and passes: isolation, equality with backpropagation, and tiers that change time, not numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nf_engine.config import TrainConfig
from nf_engine.errors import NonFiniteError
from nf_engine.heads import AuxiliaryHead, ModuleHead
from nf_engine.local_step import Unit, local_step, make_optimizer, train_block
from nf_engine.models import build
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.records import BlockPlan, CachePlan, HeadSpec
from nf_engine.sources import as_image_data
from nf_engine.stages import split
from nf_engine.storage import ActivationCache, CacheGeometry
from nf_engine.worker import (
    CacheInputs,
    ImageInputs,
    counter_key,
    forward_block,
    learning_rate,
    train_epochs,
)

CPU = torch.device("cpu")
PLAIN = Preprocess(Normalisation((0.0,) * 3, (255.0,) * 3))


def images(count=96, seed=0):
    draw = np.random.default_rng(seed)
    return as_image_data((draw.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count) % 10))


def unit_of(stages, head, config):
    unit = Unit("u", stages, head)
    unit.optimizer = make_optimizer(unit.parameters(), config)
    unit.body.train()
    unit.head.train()
    return unit


def units_of_vgg(config, cuts=(3,), seed=0):
    torch.manual_seed(seed)
    cut = split(build("vgg11", width=0.125), (3, 32, 32))
    units, start = [], 0
    for end in (*cuts, len(cut.stages)):
        shape = cut.stages[end - 1].output_shape
        head = (
            AuxiliaryHead(HeadSpec("linear", 2), *shape, 10, seed=1)
            if end < len(cut.stages)
            else ModuleHead(cut.classifier)
        )
        units.append(unit_of([s.module for s in cut.stages[start:end]], head, config))
        start = end
    return units


def plan_of(batch=32, lr=0.05):
    return BlockPlan((), batch, lr, 0, None, CachePlan("images", "uint8", 1, 0, {}, ""))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_unit_over_all_stages_is_plain_backpropagation_bit_for_bit(optimizer):
    config = TrainConfig(optimizer=optimizer, lr=0.01)
    (unit,) = units_of_vgg(config, cuts=())
    torch.manual_seed(0)
    plain = build("vgg11", width=0.125).train()
    trained = make_optimizer(plain.parameters(), config)
    for k in range(4):
        x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(k))
        y = torch.arange(16) % 10
        h, loss = local_step(unit, x, y)
        expected = F.cross_entropy(plain(x), y, label_smoothing=0.1)
        expected.backward()
        trained.step()
        trained.zero_grad()
        assert torch.equal(loss, expected.detach())
        assert not h.requires_grad
    ours = unit.parameters()
    assert len(ours) == len(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain.parameters(), strict=True))


def test_a_units_loss_has_no_gradient_in_other_units():
    config = TrainConfig(lr=0.1)
    units = units_of_vgg(config, cuts=(2, 5))
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    for chosen in range(3):
        before = [[p.detach().clone() for p in u.parameters()] for u in units]
        h = x
        for k, unit in enumerate(units):
            if k == chosen:
                for _ in range(2):  # the first gradient into a body is zero: its head starts at zero
                    out, _ = local_step(unit, h, y)
            else:
                with torch.no_grad():
                    out = unit.body(h)
            h = out
        for k, (unit, old) in enumerate(zip(units, before, strict=True)):
            changed = [not torch.equal(p, q) for p, q in zip(unit.parameters(), old, strict=True)]
            assert any(changed) if k == chosen else not any(changed)
            assert all(p.grad is None for p in unit.parameters()), "gradients are freed with the step"


def test_the_sum_of_losses_is_what_the_steps_gave():
    config = TrainConfig(lr=0.0)
    units = units_of_vgg(config)
    batches = [(torch.rand(8, 3, 32, 32), torch.arange(8) % 10) for _ in range(3)]
    losses = torch.zeros(2)
    assert train_block(units, iter(batches), losses) == 3
    expected = 0.0
    for x, y in batches:
        h = units[0].body(x)
        expected += F.cross_entropy(units[0].head(h), y, label_smoothing=0.1).item()
    assert float(losses[0]) == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_warms_up_then_follows_a_cosine():
    assert [learning_rate(k, 100, 10, 1.0) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, 100, 10, 1.0) == pytest.approx(1.0)
    assert learning_rate(55, 100, 10, 1.0) == pytest.approx(0.5)
    assert learning_rate(99, 100, 10, 1.0) < 0.001


def test_an_epoch_gives_each_sample_once_in_an_order_of_seed_block_and_epoch():
    data = images(96)
    marks = []

    class Mark(Preprocess):
        def __call__(self, x, ids, *, stream):
            marks.append((stream, ids.tolist()))
            return super().__call__(x, ids, stream=stream)

    mark = Mark(Normalisation((0.0,) * 3, (1.0,) * 3))
    for seed in (0, 1):
        inputs = ImageInputs(data, mark, CPU, seed)
        for epoch in (0, 1, 0):
            list(inputs.train(epoch, 32))
    orders = [[i for _, ids in marks[k : k + 3] for i in ids] for k in range(0, len(marks), 3)]
    assert all(sorted(o) == list(range(96)) for o in orders)
    assert orders[0] == orders[2], "the same epoch, the same order"
    assert orders[0] != orders[1]
    assert orders[0] != orders[3]
    assert [s for s, _ in marks[:9:3]] == [0, 1, 0], "augmentation follows the epoch"


def two_blocks(config):
    """The first two stages of a network as a finished block, and a function that makes the second block's unit."""
    torch.manual_seed(0)
    cut = split(build("vgg11", width=0.125), (3, 32, 32))
    first = unit_of(
        [s.module for s in cut.stages[:2]],
        AuxiliaryHead(HeadSpec("linear", 4), *cut.stages[1].output_shape, 10, seed=1),
        config,
    )

    def second():
        torch.manual_seed(5)
        other = split(build("vgg11", width=0.125), (3, 32, 32))
        return unit_of([s.module for s in other.stages[2:]], ModuleHead(other.classifier), config)

    return first, second, cut.stages[1].output_shape


def store(first, data, shape, folder, dtype, tier, batch=32, copies=1, preprocess=PLAIN):
    geometry = CacheGeometry(
        sample_shape=shape, dtype=dtype, samples=len(data) * copies, copies=copies, channels_last=True
    )
    key = counter_key(0, "write", "x", 1)
    source = ImageInputs(data, preprocess, CPU, 0, copies=copies)
    cache = ActivationCache.create(folder, f"{tier}.nfc", geometry, tier=tier, order_key=key)
    forward_block(
        [first],
        source.once(batch, key),
        score=False,
        write=lambda h, b: cache.append(h, b.labels, b.ids, b.copies),
        device=CPU,
    )
    cache.finish()
    order = np.tile(source.order_ids()[source.positions(key)], copies)
    return CacheInputs(cache, 0, 1, len(data), copies, order), geometry, order


def losses_of(unit, inputs, config, batch=32):
    found = []
    train_epochs([unit], inputs, plan_of(batch), config, CPU, lambda r: found.extend(r.losses), block=1)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_training_from_disk_ram_and_recomputation_is_the_same_bit_for_bit(tmp_path, dtype):
    config = TrainConfig(epochs=3, lr=0.05)
    data = images(96)
    first, second, shape = two_blocks(config)
    train_block([first], ImageInputs(data, PLAIN, CPU, 0).train(0, 32), torch.zeros(1))
    runs = {}
    for tier in ("disk", "ram"):
        inputs, geometry, order = store(first, data, shape, tmp_path, dtype, tier)
        runs[tier] = losses_of(second(), inputs, config)
        inputs.close()
    again = ImageInputs(
        data, PLAIN, CPU, 0, block=1, prefix=[first.body.eval()], forward_batch=32, order=order, geometry=geometry
    )
    runs["recompute"] = losses_of(second(), again, config)
    assert runs["disk"] == runs["ram"] == runs["recompute"]
    assert len(set(runs["disk"])) == 3
    parts = replace(again, forward_batch=7)
    assert losses_of(second(), parts, config) == pytest.approx(runs["disk"], rel=1e-4)


def test_cached_activations_are_those_of_the_frozen_block_in_eval_mode(tmp_path):
    config = TrainConfig()
    data = images(70)
    first, _, shape = two_blocks(config)
    train_block([first], ImageInputs(data, PLAIN, CPU, 0).train(0, 32), torch.zeros(1))
    before = {k: v.clone() for k, v in first.body.state_dict().items()}
    inputs, _, _ = store(first, data, shape, tmp_path, "fp32", "disk")
    first.body.eval()
    seen = set()
    with torch.no_grad():
        for batch in inputs.once(16, 3):
            raw, labels = data.batch(batch.ids)
            expected = first.body(PLAIN(raw, None, stream=0))
            torch.testing.assert_close(batch.x, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(batch.labels, labels)
            seen |= set(batch.ids.tolist())
    assert seen == set(range(70))
    assert all(torch.equal(v, before[k]) for k, v in first.body.state_dict().items()), "statistics do not drift"
    inputs.close()


def test_copies_are_augmented_apart_and_a_pass_over_them_is_as_many_epochs(tmp_path):
    config = TrainConfig(augment="crop-flip")
    data = images(64)
    first, _, shape = two_blocks(config)
    augmented = Preprocess(PLAIN._normalisation, "crop-flip", 3)
    inputs, _, _ = store(first, data, shape, tmp_path, "fp32", "ram", copies=2, preprocess=augmented)
    rows = {}
    for batch in inputs.once(16, 9):
        for x, sample, copy in zip(batch.x.clone(), batch.ids.tolist(), batch.copies.tolist(), strict=True):
            rows[sample, copy] = x
    assert set(rows) == {(s, c) for s in range(64) for c in range(2)}
    different = sum(not torch.equal(rows[s, 0], rows[s, 1]) for s in range(64))
    assert different > 60
    seen = [y.tolist() for epoch in (0, 1) for _, y in inputs.train(epoch, 16)]
    assert len(seen) == 8, "two epochs of four batches are one pass over both copies"
    counts = np.bincount(np.concatenate(seen), minlength=10)
    assert counts.tolist() == (2 * np.bincount(data.labels.numpy(), minlength=10)).tolist()
    inputs.close()


def test_a_loss_that_is_not_finite_names_block_unit_and_epoch():
    config = TrainConfig(epochs=2, lr=1e30, warmup_epochs=0)
    units = units_of_vgg(config, cuts=())
    units[0].name = "conv1..fc"
    inputs = ImageInputs(images(64), PLAIN, CPU, 0)
    with pytest.raises(
        NonFiniteError,
        match=r"block 4, unit conv1..fc, epoch \d, step \d or before: the local loss is (nan|inf); lower lr",
    ):
        train_epochs(units, inputs, plan_of(lr=1e30), config, CPU, lambda r: None, block=4)


def test_scores_count_right_answers_and_cross_entropy():
    class Fixed(nn.Module):
        def forward(self, h):
            return h.flatten(1)[:, :10] * 3

    unit = Unit("u", [nn.Identity()], Fixed())
    x = torch.rand(50, 1, 2, 5)
    labels = torch.arange(50) % 10
    batches = [(x[a:b], labels[a:b]) for a, b in ((0, 20), (20, 50))]
    from nf_engine.worker import Batch

    sums = forward_block([unit], (Batch(a, b, b, b) for a, b in batches), score=True, write=None, device=CPU)
    (score,) = sums.scores()
    logits = x.flatten(1) * 3
    assert score.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_counter_keys_differ_by_every_part():
    keys = {counter_key(s, p, b, e) for s in range(3) for p in ("order", "write") for b in range(3) for e in range(3)}
    assert len(keys) == 54
    assert all(0 <= k < 2**64 for k in keys)


@pytest.mark.parametrize(("channels", "most"), [(8, 20 / 128), (32, 20 / 512)])  # on 4 x 4 cells: features
@pytest.mark.parametrize("peak", [0.1, 0.4])
def test_the_schedule_of_the_last_layer_of_a_wide_head_is_lower(channels, most, peak):
    """By hand, in float64: zero weights give 1 / K to each class, and SGD begins with rate * (1 + 0.9) * gradient."""
    head = AuxiliaryHead(HeadSpec("linear", 4), channels, 4, 4, 10, smoothing=0.1, seed=0)
    unit = Unit("u", [nn.Identity()], head)
    unit.prepare(TrainConfig(weight_decay=0.0, momentum=0.9))
    unit.set_rate(0.05, peak)
    scale = min(1, most / peak)
    x, labels = torch.rand(6, channels, 4, 4), torch.arange(6)
    local_step(unit, x, labels)
    wrong = 0.1 - (0.9 * F.one_hot(labels, 10).double() + 0.01)  # softmax less smoothed labels
    gradient = wrong.T @ x.double().flatten(1) / 6
    assert torch.allclose(unit.head.linear_weight.double(), -0.05 * scale * 1.9 * gradient, rtol=1e-5, atol=1e-8)
    assert torch.allclose(unit.head.linear_bias.double(), -0.05 * 1.9 * wrong.mean(0), rtol=1e-5, atol=1e-8)


def test_a_pass_over_a_cache_ends_with_its_last_batch(tmp_path):
    """What waits in a pass that is over, slots on a device among it, would lie there while the block is scored."""
    geometry = CacheGeometry(sample_shape=(2, 2, 2), dtype="fp32", samples=8, copies=2)
    cache = ActivationCache.create(tmp_path, "a.nfc", geometry)
    cache.append(torch.rand(8, 2, 2, 2), torch.arange(8), torch.arange(4).repeat(2), torch.arange(8) // 4)
    cache.finish()
    inputs = CacheInputs(cache, 0, 1, 4, 2, np.arange(8))
    for epoch in range(4):
        batches = inputs.train(epoch, 2)
        next(batches)
        under_way = inputs._pass
        next(batches)
        batches.close()
        assert (inputs._pass is under_way) == (epoch % 2 == 0), "two epochs are one pass over two copies"
    inputs.close()

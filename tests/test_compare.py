"""The peers' loops against loops written out by hand: the same updates, fewer bytes where they promise it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from nf_engine import compare
from nf_engine.compare import LOCAL_FILTERS, Arm, _from_host, _local_head, _to_host, largest_batch, train_peer
from nf_engine.config import TrainConfig
from nf_engine.device import TensorBytes
from nf_engine.models import build
from nf_engine.preprocess import Preprocess
from nf_engine.sources import as_image_data
from nf_engine.stages import split
from nf_engine.worker import learning_rate, pass_key

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=0.05, seed=3)


def images():
    draw = np.random.default_rng(0)
    return as_image_data((draw.integers(0, 256, (64, 3, 32, 32), np.uint8), np.arange(64) % 10))


def fresh():
    torch.manual_seed(0)
    return build("vgg11", width=0.125)


def trained(arm, config=CONFIG, **options):
    network, data = fresh(), images()
    return network, train_peer(split(network, data.shape), data, data, config, arm, device=CPU, **options)


def by_hand(update, parameters):
    """The training of CONFIG at batch 16: `update` gets images and labels and leaves gradients."""
    data = images()
    preprocess = Preprocess(data.normalisation)
    optimizer = torch.optim.SGD(parameters, lr=1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(2):
        order = np.random.Generator(np.random.Philox(key=pass_key(3, 0, epoch))).permutation(64)
        for k in range(4):
            x, y = data.batch(torch.from_numpy(order[16 * k : 16 * k + 16]))
            optimizer.param_groups[0]["lr"] = learning_rate(4 * epoch + k, 8, 4, 0.05 * 16 / 128)
            update(preprocess(x, None, stream=0), y)
            optimizer.step()
            optimizer.zero_grad()


def loss(logits, y):
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def assert_same_weights(network, other, rtol=1e-4, atol=1e-5):
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def assert_same_state(network, other):
    for (name, ours), theirs in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_backpropagation_is_the_loop_that_a_user_would_write():
    network, result = trained(Arm("backpropagation", 16))
    plain = fresh().train()
    by_hand(lambda x, y: loss(plain(x), y).backward(), plain.parameters())
    assert_same_weights(network, plain)

    data = images()
    with torch.no_grad():
        x, y = data.batch(torch.arange(64))
        right = (plain.eval()(Preprocess(data.normalisation)(x, None, stream=0)).argmax(1) == y).float().mean().item()
    assert result.accuracy == pytest.approx(right)
    assert len(result.epoch_seconds) == 2


def test_an_update_over_parts_follows_the_mean_gradient_of_the_batch():
    network, result = trained(Arm("backpropagation", 16, 4))
    plain = fresh().train()

    def update(x, y):
        gradients = [torch.autograd.grad(loss(plain(x[k : k + 4]), y[k : k + 4]), [*plain.parameters()])
                     for k in range(0, 16, 4)]  # fmt: skip
        for p, parts in zip(plain.parameters(), zip(*gradients, strict=True), strict=True):
            p.grad = torch.stack(parts).mean(0)

    by_hand(update, plain.parameters())
    assert_same_weights(network, plain)
    assert result.peak < trained(Arm("backpropagation", 16))[1].peak


@pytest.mark.parametrize("kind", ["checkpointed", "offloaded"])
@pytest.mark.parametrize("parts", [1, 2])
def test_saving_less_for_backward_changes_bytes_and_nothing_else(kind, parts):
    plain, full = trained(Arm("backpropagation", 16, parts))
    again, less = trained(Arm(kind, 16, parts))
    assert_same_state(again, plain)  # statistics of norms, too: each batch counts once
    assert less.accuracies == full.accuracies
    assert less.peak < 0.95 * full.peak


TORCHS_OWN = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # while inductor is imported


@TORCHS_OWN
@pytest.mark.slow
def test_a_compiled_network_trains_alike_and_the_meter_counts_inside_of_it():
    plain, full = trained(Arm("backpropagation", 16))
    compiled, less = trained(Arm("compiled", 16, 1, 0.5))
    assert_same_weights(compiled, plain, rtol=1e-2, atol=2e-2)  # rounding, over eight updates from the start
    assert compiled.state_dict()["features.1.num_batches_tracked"] == 8
    assert less.peak < 0.95 * full.peak  # were the meter in its way, it would be the eager peak


@TORCHS_OWN
@pytest.mark.slow
def test_the_share_of_activations_reaches_the_partitioner():
    _, most = trained(Arm("compiled", 32, 1, 1.0), CONFIG.with_fields({"epochs": 1}))
    _, least = trained(Arm("compiled", 32, 1, 0.1), CONFIG.with_fields({"epochs": 1}))
    assert most.peak != least.peak


def test_local_units_learn_from_their_own_losses():
    network, _ = trained(Arm("local", 16))
    plain = fresh().train()
    cut = split(plain, (3, 32, 32))
    heads = [_local_head(cut, k, 3) for k in range(len(cut.stages) - 1)]

    def update(x, y):
        total = 0
        for stage, head in zip(cut.stages, [*heads, cut.classifier], strict=True):
            h = stage.module(x)
            total = total + loss(head(h), y)
            x = h.detach()
        total.backward()

    by_hand(update, [*plain.parameters(), *(p for head in heads for p in head.parameters())])
    assert_same_weights(network, plain, rtol=1e-3, atol=1e-4)
    assert all(head[0].weight.shape[::2] == (LOCAL_FILTERS, 3) for head in heads)


def test_heads_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    cut = split(fresh(), (3, 32, 32))
    torch.random.set_rng_state(before)
    first = _local_head(cut, 1, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0].weight, _local_head(cut, 1, 3)[0].weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("arm", [Arm("backpropagation", 16), Arm("checkpointed", 16, 2)], ids=["plain", "checkpointed"])
def test_sixteen_bit_maps_take_fewer_bytes(arm, precision):
    config = CONFIG.with_fields({"epochs": 1, "precision": precision})
    network, less = trained(arm, config)
    assert less.peak < 0.9 * trained(arm, CONFIG.with_fields({"epochs": 1}))[1].peak
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())


# --- recorded updates -----------------------------------------------------------------------------------------------


class StandIn:
    """A recorder that remembers the call and makes it again."""

    def __init__(self, is_roomy, fails=None):
        self.refusal, self.is_roomy, self.fails = None, is_roomy, fails
        self.step, self.records, self.replays = None, 0, 0

    def record(self, step):
        if self.fails is not None:
            self.fails()
        self.step, self.records = step, self.records + 1

    def replay(self):
        self.replays += 1
        self.step()

    def release(self):
        self.step = None

    def refuse(self, reason):
        self.refusal = reason


@pytest.mark.parametrize("arm", [Arm("backpropagation", 8), Arm("checkpointed", 8, 2), Arm("local", 8)])
@pytest.mark.parametrize("is_roomy", [True, False])
def test_a_replayed_update_is_the_eager_one(monkeypatch, arm, is_roomy):
    plain, eager = trained(arm)
    recorder = StandIn(is_roomy)
    monkeypatch.setattr(compare, "_recorder", lambda device: recorder)
    again, replayed = trained(arm)
    assert_same_weights(again, plain, rtol=1e-6, atol=1e-7)  # the learning rate is a float32 tensor
    assert replayed.accuracies == eager.accuracies
    assert recorder.replays == 16 - compare.WARM_UP
    assert recorder.records == (1 if is_roomy else 2)  # recorded again where scoring needed the room
    assert recorder.step is None


def test_an_update_that_cannot_be_recorded_stays_eager(monkeypatch):
    def breaks_off():
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        raise RuntimeError("no capture\nand more")

    plain, eager = trained(Arm("backpropagation", 8))
    recorder = StandIn(True, breaks_off)
    monkeypatch.setattr(compare, "_recorder", lambda device: recorder)
    network, data = fresh(), images()
    cut = split(network, data.shape)
    result = train_peer(cut, data, data, CONFIG, Arm("backpropagation", 8), device=CPU)
    assert recorder.refusal == "no capture"
    assert_same_weights(network, plain, rtol=1e-6, atol=1e-7)
    assert result.accuracies == eager.accuracies


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [Arm("backpropagation", 16), Arm("checkpointed", 16, 2)])
def test_a_budget_of_the_peak_is_enough_and_one_byte_less_is_not(arm):
    peak = trained(arm)[1].peak
    assert trained(arm, budget=peak)[1].peak == peak
    with pytest.raises(torch.OutOfMemoryError, match=str(peak - 1)):
        trained(arm, budget=peak - 1)


def test_the_peak_does_not_grow_with_the_epochs():
    arm = Arm("backpropagation", 16)
    assert trained(arm, CONFIG.with_fields({"epochs": 1}))[1].peak == trained(arm)[1].peak


def test_accuracies_after_each_epoch_are_off_the_training():
    once, last = trained(Arm("backpropagation", 16))
    each, all_of_them = trained(Arm("backpropagation", 16), every_epoch=True)
    assert_same_state(each, once)
    assert len(all_of_them.accuracies) == 2
    assert all_of_them.accuracies[-1:] == last.accuracies


@given(
    fixed=st.integers(0, 10**6),
    slope=st.integers(1, 10**5),
    bend=st.sampled_from([0, 3, 500]),
    most=st.integers(2, 600),
    share=st.floats(0, 1.2),
)
@example(fixed=0, slope=1, bend=500, most=41, share=0.25)
def test_the_largest_batch_fits_and_hardly_a_larger_one_does(fixed, slope, bend, most, share):
    calls = []

    def peak(batch):
        calls.append(batch)
        return fixed + max(slope * batch, (slope + bend) * batch - 40 * bend)  # convex

    budget = share * peak(most)
    fits = [b for b in range(1, most + 1) if peak(b) <= budget]
    calls.clear()
    found = largest_batch(peak, budget, most)
    if not fits:
        assert found == 0
    else:
        assert max(fits) - max(1, max(fits) // 50) < found <= max(fits)
    assert len(set(calls)) <= (8 if bend == 0 else 20)


def test_an_arm_that_cannot_be_is_refused():
    for wrong in ({"kind": "magic"}, {"parts": 3}, {"kind": "local", "parts": 2}):
        with pytest.raises(AssertionError):
            Arm(**({"kind": "backpropagation", "batch": 16} | wrong))


# --- host copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[1:, ::2],
        lambda x: x.to(torch.int64),
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
    ],
    ids=["plain", "channels_last", "slice", "int64", "broadcast"],
)
def test_a_host_copy_comes_back_with_its_layout_and_is_not_counted(make):
    tensor = make(torch.rand(3, 4, 5, 6))
    with TensorBytes([tensor]) as counter:
        before = counter.now
        host = _to_host(tensor)
        assert counter.now == before
        back = _from_host(host)
        assert counter.now > before
    assert torch.equal(back, tensor)
    assert back.data_ptr() != tensor.data_ptr()
    if tensor.is_contiguous(memory_format=torch.channels_last):
        assert back.stride() == tensor.stride()

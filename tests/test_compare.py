"""The peers' loops: what a user would write, and checkpointing that leaves BatchNorm right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nf_engine.compare import train_peer
from nf_engine.config import TrainConfig
from nf_engine.data import as_image_data
from nf_engine.models import build
from nf_engine.preprocess import Preprocess
from nf_engine.stages import split
from nf_engine.worker import learning_rate, pass_key

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=0.05, seed=3)


def images():
    draw = np.random.default_rng(0)
    return as_image_data((draw.integers(0, 256, (64, 3, 32, 32), np.uint8), np.arange(64) % 10))


def trained(checkpointed):
    torch.manual_seed(0)
    network = build("vgg11", width=0.125)
    data = images()
    return network, train_peer(
        split(network, data.shape), data, data, CONFIG, batch=16, checkpointed=checkpointed, device=CPU
    )


def test_backpropagation_is_the_loop_that_a_user_would_write():
    network, result = trained(False)
    torch.manual_seed(0)
    plain = build("vgg11", width=0.125).train()
    data = images()
    preprocess = Preprocess(data.normalisation)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(2):
        order = np.random.Generator(np.random.Philox(key=pass_key(3, 0, epoch))).permutation(64)
        for k in range(4):
            x, y = data.batch(torch.from_numpy(order[16 * k : 16 * k + 16]))
            optimizer.param_groups[0]["lr"] = learning_rate(4 * epoch + k, 8, 4, 0.05 * 16 / 128)
            F.cross_entropy(plain(preprocess(x, None, stream=0)), y, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        x, y = data.batch(torch.arange(64))
        right = (plain.eval()(preprocess(x, None, stream=0)).argmax(1) == y).float().mean().item()
    assert result.accuracy == pytest.approx(right)
    assert len(result.epoch_seconds) == 2


def test_checkpointing_gives_the_same_network_with_less_memory():
    plain, full = trained(False)
    again, less = trained(True)
    for (name, ours), theirs in zip(again.state_dict().items(), plain.state_dict().values(), strict=True):
        if "num_batches_tracked" not in name:  # recomputation counts each batch twice, its momentum is halved for it
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert less.peak < 0.95 * full.peak
    norm = next(m for m in again.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.momentum == 0.1, "put back"

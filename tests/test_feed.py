"""Feeds: whichever way images come, the batches are those gathered by hand. A late lane stands in for a device."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import nf_engine
from nf_engine.config import TrainConfig
from nf_engine.data import as_image_data, fit_to, load_split
from nf_engine.engine import Planner
from nf_engine.feed import Gathered, Prefetched, Resident, feed_to
from nf_engine.models import build
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import block_peak
from nf_engine.records import image_bytes
from nf_engine.stages import split
from nf_engine.storage import CacheGeometry
from nf_engine.worker import ImageInputs

CPU = torch.device("cpu")
GARBAGE = 77
MIB = 2**20


class LateLane:
    """A device that copies as late as it may, and loses the contents of a slot that was released."""

    def __init__(self):
        self.pairs, self.pending, self.used = [], {}, set()
        self.closed = False

    def pair(self, shape, dtype):
        self.pairs.append((torch.full(shape, GARBAGE, dtype=dtype), torch.full(shape, GARBAGE, dtype=dtype)))
        return self.pairs[-1]

    def await_sent(self, slot):
        if slot in self.pending:
            self._copy(slot)

    def send(self, slot, pairs):
        assert slot not in self.pending, "the copy before was not waited for"
        self.pending[slot] = [(host, there, host.clone()) for host, there in pairs]

    def receive(self, slot):
        self._copy(slot)
        self.used.add(slot)

    def _copy(self, slot):
        assert slot not in self.used, "copied into a slot that is being read"
        for host, there, sent in self.pending.pop(slot):
            assert torch.equal(host, sent), "pinned memory was overwritten before its copy"
            there.copy_(host)

    def release(self, slot):
        self.used.remove(slot)
        for k in (slot, slot + 2):  # images of two slots, then their tickets, in the order of `pair`
            self.lose(k)

    def lose(self, number):
        images_and_tickets = [self.pairs[0], self.pairs[2], self.pairs[1], self.pairs[3]]
        images_and_tickets[number][1].fill_(GARBAGE)

    def close(self):
        self.closed = True
        for _, there in self.pairs:
            there.fill_(GARBAGE)


def prefetched(data, lanes=None):
    lanes = [] if lanes is None else lanes

    def lane():
        lanes.append(LateLane())
        return lanes[-1]

    return Prefetched(data, lane)


FEEDS = {"prefetched": prefetched, "resident": lambda data: Resident(data, CPU)}


def arrays(count=53, dtype=np.uint8, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (count, 3, 12, 12)).astype(dtype), draw.integers(0, 10, count)


class Items:
    """A Dataset whose item `broken` cannot be read any more, once it is told so."""

    def __init__(self, x, y):
        self.x, self.y, self.broken, self.threads = x, y, None, set()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        if k == self.broken:
            raise OSError(f"item {k} is gone")
        self.threads.add(threading.current_thread().name)
        return torch.from_numpy(self.x[k]), int(self.y[k])


def sources():
    x, y = arrays()
    rows = torch.arange(52, 0, -3)
    yield "uint8", as_image_data((x, y))
    yield "float32", as_image_data(arrays(dtype=np.float32))
    yield "subset", as_image_data((x, y)).subset(rows)
    yield "dataset", as_image_data(Items(x, y))
    yield "subset of a dataset", as_image_data(Items(x, y)).subset(rows)
    yield "fitted dataset", fit_to(as_image_data(Items(x, y)), size=15, channels=3)


SOURCES = dict(sources())


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("nf-images")]


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch", [1, 5, 16, 60])
def test_pieces_are_the_rows_that_were_asked_for(feed, source, batch):
    data = SOURCES[source]
    if not data.in_memory and feed == "resident":
        pytest.skip("a Dataset is read anew in each epoch")
    everything, labels = data.batch(torch.arange(len(data)))
    ids = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
    kept = []
    for k, piece in enumerate(FEEDS[feed](data).pieces(ids.split(batch))):
        expected = ids[k * batch : (k + 1) * batch]
        assert piece.images.dtype == data.dtype == everything.dtype
        assert torch.equal(piece.images, everything[expected])
        assert torch.equal(piece.ids, expected)
        assert torch.equal(piece.host_ids, expected)
        kept.append(piece.labels)
    assert torch.equal(torch.cat(kept), labels[ids]), "labels outlast their piece"
    assert list(FEEDS[feed](data).pieces(())) == []
    assert threads() == []


def inputs_of(data, feed, prefix, forward_batch, augment):
    preprocess = Preprocess(Normalisation((120.0,) * 3, (60.0,) * 3), augment, 5)
    fields = {}
    if prefix:
        torch.manual_seed(2)
        stages = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU())]
        geometry = CacheGeometry(sample_shape=(4, *data.shape[1:]), dtype="fp16", samples=len(data), channels_last=True)
        order = np.random.default_rng(1).permutation(len(data))
        fields = {"prefix": [s.eval() for s in stages], "geometry": geometry, "order": order, "block": 1}
    return ImageInputs(data, preprocess, CPU, 7, copies=2, forward_batch=forward_batch, feed=feed, **fields)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("prefix", "forward_batch"), [(False, 0), (True, 0), (True, 7), (True, 100)])
@pytest.mark.parametrize("batch", [1, 12, 53, 60])
def test_inputs_are_the_same_whichever_way_images_come(feed, dtype, prefix, forward_batch, batch):
    data = as_image_data(arrays(dtype=dtype))
    plain = inputs_of(data, None, prefix, forward_batch, "crop-flip")
    other = inputs_of(data, FEEDS[feed](data), prefix, forward_batch, "crop-flip")
    for epoch in range(2):
        steps = 0
        for (x, y), (expected, labels) in zip(other.train(epoch, batch), plain.train(epoch, batch), strict=True):
            assert torch.equal(x, expected)
            assert x.stride() == expected.stride()
            assert torch.equal(y, labels)
            x.fill_(0)  # it is the reader's
            steps += 1
        assert steps == 53 // batch
    for key in (None, 11):
        seen = 0
        for got, expected in zip(other.once(batch, key), plain.once(batch, key), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            seen += len(got.ids)
        assert seen == 2 * 53


def test_on_the_cpu_no_thread_and_no_copy_comes_between():
    data = SOURCES["uint8"]
    assert isinstance(feed_to(CPU, data), Gathered)
    items = Items(*arrays())
    inputs = ImageInputs(as_image_data(items), Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3)), CPU, 0)
    assert len(list(inputs.train(0, 10))) == 5
    assert items.threads == {threading.current_thread().name}


def test_the_next_batch_is_gathered_while_the_last_one_is_used():
    items = Items(*arrays(count=40))
    data = as_image_data(items)
    items.threads.clear()
    read = []
    plain = data.batch

    def batch(ids, out=None):
        read.append(ids.tolist())
        return plain(ids, out)

    data.batch = batch
    parts = torch.arange(40).split(8)
    for k, _ in enumerate(prefetched(data).pieces(parts)):
        deadline = time.monotonic() + 10
        while len(read) < min(k + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(read) == min(k + 2, 5), "one batch ahead, and no more, as no slot is free"
    assert read == [p.tolist() for p in parts]
    assert all(name.startswith("nf-images") for name in items.threads)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_pass_that_is_left_early_ends_its_thread_and_its_copies(taken):
    lanes = []
    data = SOURCES["uint8"]
    source = inputs_of(data, prefetched(data, lanes), False, 0, "none").train(0, 8)
    for _ in range(taken):
        next(source)
    assert len(threads()) == (taken > 0)
    source.close()
    assert threads() == []
    assert all(lane.closed for lane in lanes)
    assert len(lanes) == (taken > 0)


def test_a_pass_that_nobody_holds_any_more_ends_as_well():
    data = SOURCES["uint8"]
    source = prefetched(data).pieces(torch.arange(53).split(8))
    next(source)
    assert threads()
    del source
    assert threads() == []


@pytest.mark.parametrize("broken", [0, 9, 52])
def test_an_error_of_the_data_reaches_the_reader_when_its_batch_is_due(broken):
    items, lanes = Items(*arrays()), []
    data = as_image_data(items)
    items.broken = broken
    seen = []
    with pytest.raises(OSError, match=f"item {broken} is gone"):
        seen.extend(piece.labels for piece in prefetched(data, lanes).pieces(torch.arange(53).split(8)))
    assert len(seen) == broken // 8
    assert threads() == []
    assert lanes[0].closed


def test_an_error_of_the_reader_ends_the_thread():
    data = SOURCES["float32"]
    feed = prefetched(data)

    def read():
        for _ in inputs_of(data, feed, False, 0, "none").once(8, None):
            raise KeyError("reader")

    with pytest.raises(KeyError, match="reader"):
        read()
    assert threads() == []

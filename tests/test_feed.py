"""Feeds: whichever way images come, the batches are those gathered by hand. A late lane stands in for a device."""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import nf_engine
from nf_engine import chain, job, local_step
from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span
from nf_engine.data import fit_to
from nf_engine.device import TensorBytes, placed
from nf_engine.engine import Planner
from nf_engine.feed import Gathered, Prefetched, Resident, feed_to
from nf_engine.local_step import Unit, train_block
from nf_engine.models import build
from nf_engine.peaks import block_peak
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.records import image_bytes
from nf_engine.sources import as_image_data, load_split
from nf_engine.stages import split
from nf_engine.storage import CacheGeometry
from nf_engine.unit_heads import make_head
from nf_engine.worker import ImageInputs

CPU = torch.device("cpu")
GARBAGE = 77
MIB = 2**20


class LateLane:
    """A device that reads pinned memory until it is waited for, and loses what is in a slot once it is released."""

    def __init__(self):
        self.pairs, self.sent, self.unread, self.used = [], {}, {}, set()
        self.closed = False

    def pair(self, shape, dtype):
        host = torch.from_numpy(torch.full(shape, GARBAGE, dtype=dtype).numpy().copy())  # no meter counts it
        self.pairs.append((host, torch.full(shape, GARBAGE, dtype=dtype)))
        return self.pairs[-1]

    def await_sent(self, slot):
        for host, value in self.sent.pop(slot, ()):
            assert torch.equal(host, value), "pinned memory was overwritten while it was read"

    def send(self, slot, pairs):
        assert slot not in self.sent, "the copy before was not waited for"
        assert slot not in self.used, "a copy into a slot that is being read"
        self.sent[slot] = [(host, host.clone()) for host, _ in pairs]
        self.unread[slot] = pairs

    def receive(self, slot):
        for host, there in self.unread.pop(slot):
            there.copy_(host)
        self.used.add(slot)

    def release(self, slot):
        self.used.remove(slot)
        for _, there in self.pairs[2 * slot : 2 * slot + 2]:  # images and tickets
            there.fill_(GARBAGE)

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


@pytest.mark.parametrize(
    ("feed", "source"),
    [(f, s) for f in FEEDS for s, data in SOURCES.items() if data.in_memory or f == "prefetched"],
)
@pytest.mark.parametrize("batch", [1, 5, 16, 60])
def test_pieces_are_the_rows_that_were_asked_for(feed, source, batch):
    data = SOURCES[source]
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
    data = as_image_data(items)
    images, plain = [], data.batch

    def batch(ids, out=None):
        found = plain(ids, out)
        images.append(weakref.ref(found[0]))
        return found

    data.batch = batch
    inputs = ImageInputs(data, Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3)), CPU, 0)
    for steps, _ in enumerate(inputs.train(0, 10), 1):
        assert len(images) == steps, "nothing is read ahead"
        assert images[-1]() is None, "images are gone while their batch is used"
    assert steps == 5
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


def planner_of(samples, in_memory=True, uint8=True, **fields):
    cut = split(build("vgg11", width=0.25), (3, 32, 32))
    config = TrainConfig(**{"batch_size": 64, "partition": "windows", **fields})
    plain = Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3), config.augment, 0, compute_dtype(config))
    return Planner(cut, config, plain, uint8, None, samples, "vgg11", None, together=False, in_memory=in_memory)


@pytest.mark.parametrize("cache", ["recompute", "disk", "device"])
def test_images_lie_on_the_device_where_all_blocks_that_read_them_have_the_room(cache):
    fields = {"cache": cache, "partition": "layerwise", "grouping_threshold": 0.0, "augment_copies": 0}
    fields = {**fields, "augment": "none"} if cache == "device" else fields
    samples = 1000
    size = samples * (3 * 32 * 32 + 8 + 8)
    assert image_bytes((3, 32, 32), samples) == size
    apart = planner_of(samples, in_memory=False, **fields).plan(100 * MIB)
    made = planner_of(samples, **fields).plan(100 * MIB)
    assert len(made.blocks) > 2
    assert (apart.resident_images, made.resident_images) == (0, size)
    for with_images, without in zip(made.blocks, apart.blocks, strict=True):
        reads = without.first == 0 or cache == "recompute"
        assert with_images == replace(without, peak=without.peak + size * reads), "nothing but the peak has changed"
    assert made.bounds.plan == made.peak <= made.allowed
    assert f"all images lie on the device while a block reads them: {size / MIB:.2f} MiB" in made.table()
    assert "all images" not in apart.table()
    reading = max(b.peak for b in apart.blocks if b.first == 0 or cache == "recompute")
    for room, expected in ((size, size), (size - 1, 0)):
        near = planner_of(samples, **fields)._with_images(replace(apart, allowed=reading + room))
        assert near.resident_images == expected


def test_float_images_datasets_and_host_memory_have_no_images_on_the_device():
    for changes in ({"uint8": False}, {"in_memory": False}):
        assert planner_of(100, **changes).plan(100 * MIB).resident_images == 0
    cut = split(build("vgg11", width=0.25), (3, 32, 32))
    plain = Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3))
    assert Planner(cut, TrainConfig(), plain, True, CPU, 100, "v", None).plan(100 * MIB).resident_images == 0


BATCH_BYTES = 64 * 4 * 3 * 32 * 32


def test_a_plan_counts_the_slots_that_images_arrive_in():
    planner = planner_of(1000)
    made = planner.plan(200 * MIB)
    (block,) = made.blocks
    peaks = [
        block_peak(
            planner.cut,
            block,
            planner.settings,
            planner.preprocess,
            uint8=uint8,
            device=CPU,
            overhead=0,
            together=together,
        )
        for together, uint8 in ((True, True), (False, True), (False, False))
    ]
    # Two slots of images, ids and labels; and a batch beside the one that a recorded step reads.
    assert peaks[1] - peaks[0] == 2 * 64 * (3 * 32 * 32 + 2 * 8) + BATCH_BYTES
    assert peaks[2] - peaks[0] == 2 * 64 * (4 * 3 * 32 * 32 + 2 * 8) + BATCH_BYTES
    assert made.peak - made.resident_images == peaks[1]
    assert made.host_bytes == 2 * 64 * (3 * 32 * 32 + 2 * 8)


@pytest.mark.parametrize("way", FEEDS)
def test_a_block_takes_the_bytes_that_were_planned_whichever_way_images_come(way):
    """The worker's loop under the meter, the twin's memory of the device counted."""
    planner = planner_of(320, augment="crop-flip", label_smoothing=0.1)
    made = planner.plan(200 * MIB)
    (block,) = made.blocks
    predicted = made.peak - (made.resident_images if way == "prefetched" else 0)
    data = load_split("synthetic:320")[0]
    modules = [s.module for s in planner.cut.stages]
    head = make_head(planner.cut, block.units[0].head, block.last, planner.settings)
    unit = Unit("u", modules, head)
    for module in unit.modules():
        placed(module, CPU).train()
    counter = TensorBytes(unit.tensors())
    with counter:
        unit.prepare(planner.settings)
        preprocess = Preprocess(data.normalisation, "crop-flip", 0)
        inputs = ImageInputs(data, preprocess, CPU, 0, feed=FEEDS[way](data))
        assert train_block([unit], inputs.train(0, 64), torch.zeros(1)) == 5
    assert 0.97 * (predicted - BATCH_BYTES) <= counter.peak <= predicted, "no step is recorded here"


FIELDS = {
    "memory_budget": "24MiB",
    "partition": "layerwise",
    "grouping_threshold": 0.0,
    "batch_size": 40,
    "split_points": ("features.4", "features.8"),
    "epochs": 2,
    "cache": "recompute",
    "progress": "none",
    "device": "cpu",
}


@pytest.mark.slow
def test_a_training_is_the_same_whichever_way_images_come(tmp_path, monkeypatch):
    train, test = load_split("synthetic:300")
    train = train.subset(torch.arange(10, 263))

    def run(name, plan=None):
        torch.manual_seed(0)
        return nf_engine.train(
            build("vgg11", width=0.125), train, test, plan=plan, output_dir=tmp_path / name, **FIELDS
        )

    def weights(result):
        return result.model.state_dict().values()

    plain = run("plain")
    assert plain.plan.resident_images == 0
    assert len(plain.plan.blocks) >= 3
    made = []

    def resident(data, device):
        made.append(Resident(data, device))
        return made[-1]

    monkeypatch.setattr("nf_engine.chain.Resident", resident)
    there = run("resident", replace(plain.plan, resident_images=image_bytes(train.shape, len(train))))
    assert len(made) == 1, "brought once, as every block reads images"
    small = run("small", replace(plain.plan, resident_images=image_bytes(train.shape, len(train)) - 1))
    assert len(made) == 1, "the plan was made for fewer"
    lanes = []
    monkeypatch.setattr("nf_engine.worker.feed_to", lambda device, data: prefetched(data, lanes))
    arriving = run("prefetched", plain.plan)
    assert len(lanes) > 2 * len(plain.plan.blocks)
    for other in (there, small, arriving):
        assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(other), strict=True))
        assert [line["val/accuracy"] for line in other.history] == [line["val/accuracy"] for line in plain.history]


def test_images_leave_the_device_with_the_last_block_that_reads_them(tmp_path, monkeypatch):
    train, test = load_split("synthetic:200")
    alive, held, jobs = [], [], []

    def resident(data, device):
        made = Resident(data, device)
        held.append(weakref.ref(made))
        return made

    def units(self, number, **kind):
        jobs.append(self)
        alive.append(sum(ref() is not None for ref in held))
        return plain_units(self, number, **kind)

    plain_units = job.Job.units
    monkeypatch.setattr(chain, "Resident", resident)
    monkeypatch.setattr(job.Job, "units", units)
    fields = {**FIELDS, "epochs": 1, "cache": "ram", "augment": "none"}
    cut = split(build("vgg11", width=0.125), train.shape, split_points=FIELDS["split_points"])
    plain = Preprocess(train.normalisation)
    config = TrainConfig(**{k: v for k, v in fields.items() if k != "progress"})
    made = Planner(cut, config, plain, True, CPU, len(train), "vgg11", None).plan(24 * MIB)
    tiers = ["images", *("recompute" if k == 2 else "ram" for k in range(1, len(made.blocks)))]
    forward = {"recompute": {"forward_batch": 16, "bytes": 0}}
    blocks = [
        replace(b, cache=replace(b.cache, tier=tier, **forward.get(tier, {})))
        for b, tier in zip(made.blocks, tiers, strict=True)
    ]
    made = replace(made, blocks=tuple(blocks), resident_images=image_bytes(train.shape, len(train)))
    nf_engine.train(build("vgg11", width=0.125), train, test, plan=made, output_dir=tmp_path / "run", **fields)
    assert alive == [int(tier in ("images", "recompute")) for tier in tiers]
    assert len(held) == 2
    assert jobs
    assert not any(ref() is not None for ref in held), "gone with the last block, not with the run"


def test_images_leave_the_device_where_its_memory_runs_out(tmp_path, monkeypatch):
    train, test = load_split("synthetic:200")
    fields = {**FIELDS, "epochs": 1, "split_points": (), "partition": "windows"}
    plain_step, feeds = local_step.local_step, []

    def step(unit, x, labels):
        if len(x) == 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return plain_step(unit, x, labels)

    def loaded(self, parts, load):
        feeds.append((len(parts[0]), type(self.feed)))
        return plain_loaded(self, parts, load)

    plain_loaded = ImageInputs._loaded
    plain = nf_engine.train(build("vgg11", width=0.125), train, test, output_dir=tmp_path / "plain", **fields)
    monkeypatch.setattr("nf_engine.local_step.local_step", step)
    monkeypatch.setattr("nf_engine.trainer.RECOVERING", ("cpu",))
    monkeypatch.setattr(ImageInputs, "_loaded", loaded)
    made = replace(plain.plan, resident_images=image_bytes(train.shape, len(train)))
    again = nf_engine.train(build("vgg11", width=0.125), train, test, plan=made, output_dir=tmp_path / "run", **fields)
    assert [b.batch for b in again.plan.blocks] == [36]
    assert feeds[0] == (40, Resident)
    assert {feed for size, feed in feeds if size != 40} == {type(None)}


def test_the_search_for_a_plan_knows_the_slots_of_images():
    profile = planner_of(1000).profile
    assert profile.image == 3 * 32 * 32 + 2 * 8
    unit = (Span(0, 2), Span(3, 3))
    for batch in (1, 64):
        with_slots, without = (Costs(replace(profile, image=i), False, {}) for i in (profile.image, 0))
        assert with_slots.block(unit, batch, 0) - without.block(unit, batch, 0) == pytest.approx(2 * batch * 3088)
        later = unit[1:]
        assert with_slots.block(later, batch, 0) == without.block(later, batch, 0)
        together = [Costs(replace(profile, image=i), True, {}).block(unit, batch, 0) for i in (profile.image, 0)]
        assert together[0] == together[1]

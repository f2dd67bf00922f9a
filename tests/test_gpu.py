"""A CUDA device: the plan is made there, kept there, and gives what the CPU gives."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nf_engine
from nf_engine.config import TrainConfig
from nf_engine.device import capped, placed, room_bytes
from nf_engine.errors import NonFiniteError
from nf_engine.feed import Gathered, Prefetched, Resident, feed_to
from nf_engine.heads import AuxiliaryHead, ModuleHead
from nf_engine.local_step import Unit, train_block
from nf_engine.models import build
from nf_engine.precision import compute_dtype
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.records import HeadSpec
from nf_engine.recovery import asked_bytes
from nf_engine.sources import as_image_data, load_split
from nf_engine.step_graph import WARM_UP, CudaRecorder, StepGraph
from nf_engine.storage import ActivationCache, CacheGeometry, EngineOptions, cuda_status, engine_report, sample_order
from nf_engine.worker import ImageInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("strategy", ["windows", "layerwise"])
@pytest.mark.parametrize("cache", ["device", "disk", "ram", "recompute"])
def test_a_run_stays_in_its_budget_and_comes_back_to_the_cpu(tmp_path, strategy, cache):
    train, test = load_split("synthetic:1200")
    network = build("vgg11", width=0.25)
    budget = 128 * 2**20  # torch's allocator takes 20 MiB at a time
    result = nf_engine.train(
        network,
        train,
        test,
        memory_budget=budget,
        partition=strategy,
        cache=cache,
        grouping_threshold=0.0,  # layerwise: every unit is a block, with a cache before it
        epochs=3,
        device="cuda",
        progress="none",
        output_dir=tmp_path / "run",
    )
    assert (len(result.plan.blocks) > 1) == (strategy == "layerwise")
    for memory in result.memory:
        assert memory.allocated <= budget
        assert memory.allocated <= 1.05 * memory.predicted
        if cache != "device":  # there a block's peak holds the cache that it leaves, also while it trains
            assert memory.predicted == pytest.approx(memory.allocated, rel=0.05)
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert max(e.accuracy for e in result.exits) > 0.5


def written(folder, geometry, x, tier, batch=60):
    cache = ActivationCache.create(folder, "a.nfc", geometry, tier=tier, device="cuda")
    for start in range(0, len(x), batch):
        ids = torch.arange(start, min(start + batch, len(x)))
        cache.append(x[start : start + batch], ids % 10, ids)
    cache.finish()
    return cache


@pytest.mark.parametrize("tier", ["disk", "ram", "device"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16", "u8"])
def test_a_cache_round_trips_on_torchs_streams_as_on_the_cpu(tmp_path, tier, dtype):
    assert cuda_status()[0]
    geometry = CacheGeometry(sample_shape=(16, 9, 8), dtype=dtype, samples=1000, chunk_bytes=1 << 17)
    x = torch.randn(1000, 16, 9, 8).relu()
    order = torch.from_numpy(sample_order(7, 1000, geometry, 1 << 19))
    with ActivationCache.create(tmp_path, "cpu.nfc", geometry, tier="ram") as host:
        host.append(x, torch.arange(1000) % 10, torch.arange(1000))
        host.finish()
        expected = torch.cat([b.x.clone() for b in host.batches(0, 70, key=7, window_bytes=1 << 19)])
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream), written(tmp_path, geometry, x.cuda(), tier) as cache:
            got, ids = [], []
            for b in cache.batches(0, 70, key=7, window_bytes=1 << 19):
                torch.cuda._sleep(200_000)  # the slot is still in use when the next batch is copied
                got.append(b.x.clone())
                ids.append(b.ids)
                assert torch.equal(b.labels.cpu(), b.ids % 10)
            assert torch.equal(torch.cat(ids), order)
            if dtype == "u8":  # the division may round differently on the device
                torch.testing.assert_close(torch.cat(got).cpu(), expected, rtol=0, atol=2e-2)
            else:
                assert torch.equal(torch.cat(got).cpu(), expected)
        (tmp_path / "a.nfc").unlink(missing_ok=True)


def test_a_replayed_graph_writes_what_it_computed(tmp_path):
    """The graph overwrites its own output at each replay: without the staging slots the copy would see a later one."""
    geometry = CacheGeometry(sample_shape=(4, 16, 16), dtype="fp16", samples=64 * 40)
    source, out = torch.zeros(64, 4, 16, 16, device="cuda"), torch.zeros(64, 4, 16, 16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(source * 2 + 1)
    with ActivationCache.create(tmp_path, "a.nfc", geometry, device="cuda") as cache:
        for k in range(40):
            source.fill_(k)
            graph.replay()
            ids = torch.arange(64 * k, 64 * (k + 1))
            cache.append(out, ids % 10, ids)
        cache.finish()
        for b in cache.batches(0, 64, key=1):
            expected = (b.ids // 64 * 2 + 1).float().cuda()
            assert torch.equal(b.x, expected[:, None, None, None].expand_as(b.x))


def test_pinned_bytes_are_what_was_configured(tmp_path):
    for size in (16 << 20, 64 << 20):
        report = engine_report(torch.device("cuda", 0), EngineOptions(pinned_bytes=size))
        assert report["pinned"] == report["memory"] == size


@pytest.mark.parametrize("value", [float("nan"), 70_000.0])
def test_a_value_that_is_not_finite_is_found_on_the_device(tmp_path, value):
    geometry = CacheGeometry(sample_shape=(4, 8, 8), dtype="fp16", samples=200)
    x = torch.zeros(200, 4, 8, 8, device="cuda")
    x[77, 1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="fp16"):
        written(tmp_path, geometry, x, "disk")
    assert not list(tmp_path.glob("*.tmp"))


def test_profiling_leaves_the_devices_random_state_alone():
    torch.cuda.manual_seed(5)
    expected = torch.cuda.get_rng_state()
    nf_engine.profile(build("vgg11", width=0.25), (3, 32, 32), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), expected)


CUDA = torch.device("cuda", 0)


def units_of(config):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1))
    second = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    units = [
        Unit("first", [first], AuxiliaryHead(HeadSpec("deep", 2, width=32, depth=1), 32, 32, 32, 10, seed=1)),
        Unit("second", [second], ModuleHead(classifier)),
    ]
    for unit in units:
        for module in unit.modules():
            placed(module, CUDA).train()
        unit.prepare(config)
    return units


def images_of(dtype=torch.float32, samples=32 * 12, resident=False):
    draw = np.random.default_rng(0)
    data = as_image_data((draw.integers(0, 256, (samples, 3, 32, 32), np.uint8), np.arange(samples) % 10))
    plain = Preprocess(Normalisation((120.0,) * 3, (60.0,) * 3), "crop-flip", 0, dtype)
    return ImageInputs(data, plain, CUDA, 0, feed=Resident(data, CUDA) if resident else None)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_replayed_step_is_the_eager_step_bit_for_bit(monkeypatch, optimizer, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = TrainConfig(optimizer=optimizer, precision=precision)
    found = {}
    for switch in ("on", "off"):
        monkeypatch.setenv("NF_GRAPHS", switch)
        notes = []
        with capped(CUDA, 2**30):
            units, losses = units_of(config), torch.zeros(2, device=CUDA)
            recorder = CudaRecorder(CUDA, notes.append)
            graph = StepGraph(units, losses, recorder)
            torch.manual_seed(1)
            for k, batch in enumerate(images_of(compute_dtype(config)).train(0, 32)):
                graph.set_rate(0.1 / (k + 1), 0.1)
                train_block(units, [batch], losses, graph)
            found[switch] = [t.detach().cpu() for u in units for t in u.tensors()] + [losses.cpu()]
            recorder.release()
        assert len(notes) == (switch == "off"), notes
    assert all(torch.equal(a, b) for a, b in zip(found["on"], found["off"], strict=True))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_compiled_steps_are_recorded_and_replayed_bit_for_bit_and_train_as_eager_ones(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found, notes = {}, []
    for switch, compiles in (("on", True), ("off", True), ("off", False)):
        monkeypatch.setenv("NF_GRAPHS", switch)
        config = TrainConfig(precision=precision, compile=compiles)
        with capped(CUDA, 2**30):
            units, losses = units_of(config), torch.zeros(2, device=CUDA)
            units[0].body[0][3].p = 0.0  # compiled code draws other numbers
            recorder = CudaRecorder(CUDA, notes.append)
            graph = StepGraph(units, losses, recorder)
            for k, batch in enumerate(images_of(compute_dtype(config)).train(0, 32)):
                graph.set_rate(0.1 / (k + 1), 0.1)
                train_block(units, [batch], losses, graph)
            found[switch, compiles] = [t.detach().cpu() for u in units for t in u.tensors()] + [losses.cpu()]
            recorder.release()
    assert len(notes) == 2, "the two of NF_GRAPHS=off, and none of a stage that was not compiled"
    assert all(torch.equal(a, b) for a, b in zip(found["on", True], found["off", True], strict=True))
    eager, compiled = (found["off", c][-1] for c in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=0)  # summed losses of twelve steps


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("resident", [True, False])
def test_no_step_waits_for_the_device(resident):
    units, losses = units_of(TrainConfig()), torch.zeros(2, device=CUDA)
    with capped(CUDA, 2**30):
        recorder = CudaRecorder(CUDA, pytest.fail)
        graph = StepGraph(units, losses, recorder)
        for replay in (graph, None):
            source = images_of(resident=resident).train(0, 32)
            train_block(units, itertools.islice(source, WARM_UP + 1), losses, replay)
            try:
                torch.cuda.set_sync_debug_mode("error")
                assert train_block(units, source, losses, replay) == 12 - WARM_UP - 1
            finally:
                torch.cuda.set_sync_debug_mode("default")
        recorder.release()


def test_the_allocator_keeps_the_cap_and_loses_it_afterwards():
    budget = 64 * 2**20
    before = torch.cuda.get_per_process_memory_fraction(CUDA)
    with capped(CUDA, budget) as cap:
        torch.cuda.reset_peak_memory_stats(CUDA)
        kept = torch.empty(budget // 2, dtype=torch.uint8, device=CUDA)
        with pytest.raises(torch.OutOfMemoryError) as error:
            torch.empty(budget, dtype=torch.uint8, device=CUDA)
        assert asked_bytes(error.value) == budget
        assert torch.cuda.max_memory_reserved(CUDA) <= cap.reserved == budget + cap.held
        assert room_bytes(CUDA) <= budget // 2
        del kept
    assert torch.cuda.get_per_process_memory_fraction(CUDA) == before
    torch.empty(2 * budget, dtype=torch.uint8, device=CUDA)


def test_a_graph_that_cannot_be_recorded_is_left_for_eager_steps():
    class Waits(nn.Module):
        def forward(self, x):
            return x * (2.0 if x.sum().item() > -1e9 else 1.0)

    units, losses, notes = units_of(TrainConfig()), torch.zeros(2, device=CUDA), []
    units[0].body.append(Waits())
    with capped(CUDA, 2**30):
        graph = StepGraph(units, losses, CudaRecorder(CUDA, notes.append))
        assert train_block(units, images_of().train(0, 32), losses, graph) == 12
        assert torch.isfinite(losses).all()
    assert len(notes) == 1
    assert "captur" in notes[0]


def test_a_block_that_does_not_fit_its_cap_is_trained_with_a_smaller_batch(tmp_path):
    train, test = load_split("synthetic:2400")
    fields = {"epochs": 1, "device": "cuda", "progress": "none", "batch_size": 512, "partition": "windows"}
    wide = nf_engine.train(
        build("vgg11", width=0.5), train, test, memory_budget="4GiB", output_dir=tmp_path / "wide", **fields
    )
    budget = int(0.75 * max(m.allocated for m in wide.memory))  # below what eager steps at this batch need
    lie = replace(wide.plan, budget=budget)
    tight = nf_engine.train(build("vgg11", width=0.5), train, test, plan=lie, output_dir=tmp_path / "tight", **fields)
    assert min(b.batch for b in tight.plan.blocks) < 512
    assert all(m.reserved <= budget for m in tight.memory)
    events = [json.loads(line)["event"] for line in (tmp_path / "tight" / "log.jsonl").read_text().splitlines()]
    assert "out_of_memory" in events


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("way", ["prefetched", "resident"])
def test_images_come_to_the_device_as_they_were_gathered(way, dtype):
    draw = np.random.default_rng(0)
    data = as_image_data((draw.integers(0, 256, (1111, 3, 64, 64)).astype(dtype), draw.integers(0, 10, 1111)))
    assert isinstance(feed_to(CUDA, data), Prefetched)
    feed = feed_to(CUDA, data) if way == "prefetched" else Resident(data, CUDA)
    order = torch.from_numpy(draw.permutation(1111))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            dirty = torch.full((1 << 24,), 7, dtype=torch.uint8, device=CUDA)
            torch.cuda._sleep(20_000_000)
            dirty.fill_(9)
            del dirty  # its memory is given to slots while the fill is still to run
            for _ in range(2):
                got = []
                for piece in feed.pieces(order.split(100)):
                    torch.cuda._sleep(200_000)  # the slot is still in use when the next batch could be copied
                    got.append(tuple(t.clone() for t in piece[:3]))
                joined = [torch.cat(parts).cpu() for parts in zip(*got, strict=True)]
                (expected,) = Gathered(data).pieces([order])
                assert all(torch.equal(a, b) for a, b in zip(joined, expected[:3], strict=True))


def test_what_a_pass_that_was_left_early_has_under_way_hits_nobody():
    data = as_image_data((np.zeros((512, 3, 128, 128), np.uint8), np.zeros(512, np.int64)))
    for _ in range(20):
        source = feed_to(CUDA, data).pieces(torch.arange(512).split(128))
        next(source)
        source.close()
        ones = torch.ones(4, 128, 3, 128, 128, dtype=torch.uint8, device=CUDA)
        assert bool(ones.all()), "a late copy would write zeros"
        del ones


def test_a_training_is_the_same_with_images_on_the_device_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    train, test = load_split("synthetic:1200")
    fields = {"epochs": 2, "device": "cuda", "progress": "none", "cache": "recompute", "partition": "layerwise"}
    fields = {**fields, "grouping_threshold": 0.0, "memory_budget": "64MiB"}

    def run(name, plan=None):
        torch.manual_seed(0)
        network = build("vgg11", width=0.25)
        return nf_engine.train(network, train, test, plan=plan, output_dir=tmp_path / name, **fields)

    there = run("there")
    assert there.plan.resident_images == 1200 * (3 * 32 * 32 + 16)
    host = run("host", replace(there.plan, resident_images=0))
    pairs = zip(there.model.state_dict().values(), host.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for a, b in zip(there.memory, host.memory, strict=True):
        assert b.allocated < a.allocated <= a.predicted * 1.02
        assert a.reserved <= 64 * 2**20


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_that_was_cut_again_and_again_ends_with_the_same_bits(tmp_path, precision):
    command = [sys.executable, str(Path(__file__).with_name("gpu_resume.py")), str(tmp_path), "cuda", precision]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["starts"] > 3
    assert found["cut"] == found["whole"]

"""A CUDA device: the plan is made there, kept there, and gives what the CPU gives."""

from __future__ import annotations

import pytest
import torch

import nf_engine
from nf_engine.data import load_split
from nf_engine.errors import NonFiniteError
from nf_engine.models import build
from nf_engine.storage import ActivationCache, CacheGeometry, EngineOptions, cuda_status, engine_report, sample_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("strategy", ["windows", "layerwise"])
@pytest.mark.parametrize("cache", ["device", "disk", "ram", "recompute"])
def test_a_run_stays_in_its_budget_and_comes_back_to_the_cpu(tmp_path, strategy, cache):
    train, test = load_split("synthetic:1200")
    network = build("vgg11", width=0.25)
    budget = 48 * 2**20
    result = nf_engine.train(
        network,
        train,
        test,
        memory_budget=budget,
        partition=strategy,
        cache=cache,
        epochs=3,
        device="cuda",
        progress="none",
        output_dir=tmp_path / "run",
    )
    for memory in result.memory:
        assert memory.allocated <= budget
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

"""The profiler against arithmetic by hand, whole units, torch's MemTracker, and the state it must not touch."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nf_engine import planner, profiler, tier_probe
from nf_engine.config import TrainConfig
from nf_engine.costs import Costs, Span
from nf_engine.device import TensorBytes, free_ram
from nf_engine.errors import BudgetError, InfeasibleBudgetError
from nf_engine.instruments import fit, fit_bytes, flops_of
from nf_engine.models import build
from nf_engine.peaks import profile_unit
from nf_engine.planner import Planner
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.profiler import profile_stages
from nf_engine.records import HeadSpec, Line, Plan, TierProbe, UnitPlan
from nf_engine.stages import split
from nf_engine.tier_probe import probe_tiers

CPU = torch.device("cpu")
PLAIN = Preprocess(Normalisation((0.0,) * 3, (1.0,) * 3))


def profile_of(network, config=None, device=None, batch_sizes=(8, 32, 128)):
    cut = split(network, (3, 32, 32))
    settings = config or TrainConfig()
    made = profile_stages(cut, settings, PLAIN, name="m", uint8=True, device=device, batch_sizes=batch_sizes)
    return cut, settings, made


def state_hash(network):
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for tensor in (*network.parameters(), *network.buffers()):
        digest.update(tensor.detach().numpy().tobytes())
        assert tensor.grad is None
    return digest.hexdigest()


def test_one_convolution_costs_what_arithmetic_says():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    _, _, made = profile_of(network)
    stage = made.stages[0]
    image, map_ = 3 * 32 * 32 * 4, 16 * 32 * 32 * 4
    assert stage.kept.per_sample == pytest.approx(image + map_), "the image for the convolution, ReLU's output"
    # Backward: the gradient of the output and the ReLU's, the map itself being kept.
    assert stage.transient.per_sample == pytest.approx(2 * map_)
    assert stage.input.per_sample == 0
    assert stage.forward.per_sample == pytest.approx(2 * map_), "convolution and ReLU, not in place"
    assert stage.weights == stage.gradients == stage.optimizer == (3 * 16 * 9 + 16) * 4
    assert stage.output == map_
    assert stage.flops == 2 * 3 * 16 * 9 * 32 * 32
    assert stage.head.spec.kind == "classifier"
    assert stage.head.flops == 2 * 16 * 10


# Bytes a sample at batch 8, measured for VGG-16 at 32 pixels when the design was made; their sum is the 2.49 MiB that
# plain backpropagation saves.
VGG_KEPT = (536704, 655488, 327936, 327936, 164352, 131584, 164352, 82944, 66560, 82944, 25600, 17408, 21504)
VGG_INPUT = (0, 262144, 0, 131072, 0, 65536, 65536, 0, 32768, 32768, 0, 8192, 8192)


def test_vgg16_keeps_the_bytes_that_were_measured_for_it():
    _, _, made = profile_of(build("vgg16"))
    for stage, kept, entry in zip(made.stages, VGG_KEPT, VGG_INPUT, strict=True):
        # The measurement counted BatchNorm's running statistics as saved, 2 x 4 bytes a channel at batch 8.
        assert stage.kept.at(8) / 8 == pytest.approx(kept - stage.output_shape[0])
        assert stage.input.per_sample == pytest.approx(entry)
    assert sum(s.kept.at(8) for s in made.stages) / 8 / 2**20 == pytest.approx(2.49, abs=0.01)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_a_unit_is_the_sum_of_its_stages_within_two_percent(name):
    cut, config, made = profile_of(build(name, width=0.5))
    costs, last = Costs(made, False, {}), len(made.stages) - 1
    for first, end in ((0, 0), (0, last), (1, 3), (2, last)):
        unit = UnitPlan(first, end, made.stages[end].head.spec, "reference", 0)
        whole = profile_unit(cut, unit, config, 128, CPU).at(128)
        assert costs.unit(Span(first, end), 128) == pytest.approx(whole, rel=0.02)


def test_the_sum_of_a_unit_is_not_below_it_where_gradients_of_the_input_are_left_out():
    cut, config, made = profile_of(build("vgg16", width=0.5))
    last = len(made.stages) - 1
    whole = profile_unit(cut, UnitPlan(last, last, made.stages[last].head.spec, "reference", 0), config, 128, CPU).at(
        128
    )
    assert whole <= Costs(made, False, {}).unit(Span(last, last), 128) <= 1.2 * whole


def test_the_line_of_a_unit_is_never_below_it_between_its_two_sizes():
    cut, config, made = profile_of(build("vgg16", width=0.25))
    unit = UnitPlan(4, 9, made.stages[9].head.spec, "reference", 0)
    line = profile_unit(cut, unit, config, 64, CPU)
    for batch in (33, 40, 50, 63):
        exact = profile_unit(cut, unit, config, batch, CPU).at(batch)
        assert exact <= line.at(batch) + 1


@pytest.mark.parametrize("device", [None, CPU], ids=str)
def test_profiling_leaves_weights_buffers_gradients_and_random_state_alone(device):
    network = build("vgg11", width=0.125).train()
    before = state_hash(network)
    profile_of(network, device=device, batch_sizes=(2, 4, 8))
    assert state_hash(network) == before
    assert network.training


@pytest.mark.parametrize(
    ("most", "measured"), [(600, [8, 64, 512]), (100, [8, 64]), (20, [8, 16]), (7, [2, 4]), (3, [1, 2]), (1, [1])]
)
def test_a_device_that_holds_few_samples_of_a_stage_is_profiled_with_fewer(monkeypatch, most, measured):
    network = build("vgg11", width=0.125)
    before, (_, _, whole) = state_hash(network), profile_of(network, batch_sizes=(8, 64, 512))
    real, sizes = profiler._stage_bytes, []

    def fails(module, x, counter):
        if len(x) > most:
            raise torch.OutOfMemoryError("out of memory, in a test")
        sizes.append(len(x))
        return real(module, x, counter)

    monkeypatch.setattr(profiler, "_stage_bytes", fails)
    _, _, made = profile_of(network, batch_sizes=(8, 64, 512))
    count = len(made.stages)
    assert sorted(sizes) == sorted(measured * count)
    for few, many in zip(made.stages, whole.stages, strict=True):
        assert few.kept.at(max(measured)) == pytest.approx(many.kept.at(max(measured)), rel=0.05)
    assert state_hash(network) == before


def test_a_device_without_room_for_one_sample_is_an_error_that_names_the_stage(monkeypatch):
    network = build("vgg11", width=0.125)
    before = state_hash(network)

    def fails(*_):
        raise torch.OutOfMemoryError("out of memory, in a test")

    monkeypatch.setattr(profiler, "_stage_bytes", fails)
    with pytest.raises(
        BudgetError, match=r"stage features\.\d ran out of memory while it was profiled with one sample"
    ):
        profile_of(network)
    assert state_hash(network) == before


def test_an_error_that_is_not_of_memory_is_passed_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("another")

    monkeypatch.setattr(profiler, "_stage_bytes", fails)
    with pytest.raises(RuntimeError, match="another"):
        profile_of(build("vgg11", width=0.125))


def test_flops_are_counted_wherever_the_weights_are():
    """3 x 3 kernels from 3 to 8 maps of 4 x 4, each multiply-add two operations; the norm counts none."""
    stage = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    assert flops_of(stage, (3, 4, 4)) == 2 * 9 * 3 * 8 * 16
    assert flops_of(stage.to("meta"), (3, 4, 4)) == 2 * 9 * 3 * 8 * 16


def test_the_meter_agrees_with_torchs_memory_tracker():
    from torch.distributed._tools.mem_tracker import MemTracker

    network = build("vgg11", width=0.25)

    def step(model, x):
        F.cross_entropy(model(x), torch.zeros(64, dtype=torch.int64)).backward()

    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        import copy

        ours, theirs = copy.deepcopy(network), copy.deepcopy(network)
    with fake, TensorBytes([*ours.parameters(), *ours.buffers()], fake) as counter:
        step(ours, torch.ones(64, 3, 32, 32))
    with fake:
        tracker = MemTracker()
        tracker.track_external(theirs)
        with tracker:
            step(theirs, torch.ones(64, 3, 32, 32))
    assert counter.peak == tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def test_the_meter_counts_real_tensors_once_and_forgets_freed_ones():
    with TensorBytes() as counter:
        a = torch.ones(1000)
        b = a.view(10, 100)
        assert (counter.now, counter.peak) == (4000, 4000)
        c = a + 1
        del a, c
        assert (counter.now, counter.peak) == (4000, 8000)
        del b
        assert counter.now == 0
        host = torch.frombuffer(bytearray(400), dtype=torch.float32)
        view = host.view(10, 10)
        assert counter.now == 0, "memory that no operator made"
        counter.reset()
        assert counter.peak == 0
        del view


def test_a_meter_around_fake_work_does_not_count_it():
    with TensorBytes() as counter:
        profile_of(build("vgg11", width=0.125))
    assert counter.peak < 2**20


def test_seconds_are_measured_on_a_device_only(monkeypatch):
    """By a clock that counts multiplications, so that a busy machine changes nothing."""

    def seconds_of(call, _):
        with FlopCounterMode(display=False) as counter:
            call()
        return 1 + counter.get_total_flops()

    monkeypatch.setattr("nf_engine.seconds.seconds_of", seconds_of)
    network = build("vgg11", width=0.125)
    _, _, bare = profile_of(network, batch_sizes=(2, 4, 8))
    assert bare.device == "none"
    assert all(s.seconds is None and s.head.seconds is None for s in bare.stages)
    _, _, timed = profile_of(network, device=CPU, batch_sizes=(2, 4, 8))
    for stage in timed.stages:
        for line in (stage.seconds, stage.forward_seconds, stage.rerun_seconds, stage.head.seconds):
            assert line is not None
            assert line.at(32) > 0
        assert stage.rerun_seconds.at(8) < stage.seconds.at(8), "without backward"
        assert stage.forward_seconds.at(8) <= stage.rerun_seconds.at(8), "and without a graph"


def test_a_fit_gives_back_a_line_and_its_residual():
    line = fit((8, 32, 128), [108, 132, 228])
    assert (line.fixed, line.per_sample, line.residual) == pytest.approx((100, 1, 0), abs=1e-9)
    bent = fit_bytes((8, 32, 128), [100, 100, 500])
    assert bent.residual > 0.05
    assert all(bent.at(b) >= v - 1e-9 for b, v in ((8, 100), (32, 100), (128, 500))), "the upper envelope"
    assert fit((4, 8), [2, 10]).at(0) >= 0
    assert fit((8, 64, 512), [1e7, 1e7, 1e7]).at(0) == pytest.approx(1e7), "gradients do not depend on the batch"
    falling = fit((8, 16, 32), [0.9, 0.5, 0.4])
    assert (falling.fixed, falling.per_sample) == pytest.approx((0, 0.0125)), "seconds on a noisy machine"
    assert fit((4,), [8]) == Line(0, 2)


def test_flops_of_a_residual_block_by_hand():
    cut = split(build("resnet18", width=0.25), (3, 32, 32))
    stage = next(s for s in cut.stages if s.name == "layer2.0")
    # 16 -> 32 channels at stride 2: a 3x3 and a 1x1 from 16, a 3x3 from 32, on 16 x 16 pixels.
    assert flops_of(stage.module, (16, 32, 32)) == 2 * 16 * 16 * (32 * 16 * 9 + 32 * 16 + 32 * 32 * 9)


def test_a_profile_measures_the_heads_that_are_asked_for():
    network = build("vgg11", width=0.25)
    kinds = {}
    for settings in (TrainConfig(), TrainConfig(head="deep", head_width=24, head_depth=3)):
        _, _, made = profile_of(network, settings)
        assert {s.head.path for s in made.stages[:-1]} == {"reference"}
        assert made.stages[-1].head.path == "autograd"
        kinds[settings.head] = [s.head.spec for s in made.stages]
    assert set(kinds["auto"][:-1]) == {HeadSpec("linear", 4), HeadSpec("linear", 2)}
    assert kinds["deep"][0] == HeadSpec("deep", 2, 24, 3), "16 pixels come down to 2"
    assert {(s.kind, s.width, s.depth) for s in kinds["deep"][:-1]} == {("deep", 24, 3)}
    assert {specs[-1].kind for specs in kinds.values()} == {"classifier"}


def test_heads_are_deep_from_three_units_on_unless_told():
    cut = split(build("vgg16", width=0.25), (3, 32, 32))
    found = set()
    for fields in ({}, {"head": "deep"}, {"head": "linear"}, {"partition": "layerwise"}):
        work = Planner(cut, TrainConfig(recompute=False, **fields), PLAIN, True, None, 5000, "m", None, together=True)
        whole = work.plan(1 << 40).bounds.backpropagation
        for share in (0.8, 0.6):
            units = work.plan(int(share * whole)).units
            found |= {(*fields.values(), len(units) > 2, unit.head.kind) for unit in units[:-1]}
    assert found == {
        *((False, "linear"), (True, "deep")),
        *(("deep", False, "deep"), ("deep", True, "deep")),
        *(("linear", False, "linear"), ("linear", True, "linear")),
        ("layerwise", True, "linear"),
    }


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_a_unit_that_recomputes_takes_what_its_sum_says(name):
    cut, config, made = profile_of(build(name, width=0.5))
    costs, last = Costs(made, False, {}), len(made.stages) - 1
    plain = costs.unit(Span(0, last), 128)
    recomputing = {costs.recomputation(0, last, 128, share * plain) for share in (0.9, 0.8, 0.7)}
    recomputing |= {Span(0, last, tuple(range(1, last + 1))), Span(1, 4, (3,))}
    for span in recomputing:
        assert span.starts
        unit = UnitPlan(span.first, span.last, made.stages[span.last].head.spec, "reference", 0, span.starts)
        whole = profile_unit(cut, unit, config, 128, CPU).at(128)
        assert costs.unit(span, 128) == pytest.approx(whole, rel=0.02), span


def test_heads_are_as_wide_as_costs_no_unit_and_no_batch():
    """Against plans made with each width alone, over budgets in which both kinds of answers occur."""
    cut = split(build("resnet18", width=0.25), (3, 32, 32))
    settings = TrainConfig(head="deep", recompute=False)
    work = Planner(cut, settings, PLAIN, True, None, 5000, "resnet18", None, together=True)
    whole = work.plan(1 << 40).bounds.backpropagation
    answers = []
    for share in (0.4, 0.55, 0.7):
        made = work.plan(int(share * whole))
        ranks = []
        for widest in (4, 2):
            work._take("deep", widest)
            try:
                ranks.append((planner._rank(work._plan(int(share * whole))), widest))
            except InfeasibleBudgetError:
                continue
        rank, widest = min(ranks, key=lambda pair: (pair[0], -pair[1]))
        assert planner._rank(made) == rank
        work._take("deep", widest)
        assert [u.head for u in made.units] == [work.profile.stages[u.last].head.spec for u in made.units]
        answers.append((len(made.units), widest))
    print(answers)
    assert {widest for _, widest in answers} == {2, 4}


def test_where_no_plan_with_deep_heads_fits_linear_ones_are_tried(monkeypatch):
    partition = planner.partition

    def only_linear(profile, *arguments, **options):
        if any(s.head.spec.kind == "deep" for s in profile.stages):
            raise InfeasibleBudgetError("too much", stage="s", need=2, budget=1)
        return partition(profile, *arguments, **options)

    monkeypatch.setattr(planner, "partition", only_linear)
    cut = split(build("vgg16", width=0.25), (3, 32, 32))
    plain = TrainConfig(recompute=False)
    for settings in (plain, plain.with_fields({"head": "deep"})):
        work = Planner(cut, settings, PLAIN, True, None, 5000, "vgg16", None, together=True)
        if settings.head == "deep":
            with pytest.raises(InfeasibleBudgetError, match="too much"):
                work.plan(1 << 40)
            continue
        made = work.plan(int(0.6 * work.plan(1 << 40).bounds.backpropagation))
        assert len(made.units) > 2
        assert {u.head.kind for u in made.units} == {"linear", "classifier"}
        assert "linear heads, as no plan with deep ones fits the budget" in made.warnings
        assert made.peak <= made.budget


@pytest.mark.parametrize(("name", "strategy"), [("vgg11", "windows"), ("resnet18", "layerwise")])
def test_the_plan_fills_its_budget_and_keeps_it(name, strategy):
    network = build(name, width=0.25)
    cut = split(network, (3, 32, 32))
    config = TrainConfig(partition=strategy)
    planner = Planner(cut, config, PLAIN, True, None, 50_000, name, None)
    bound = planner.plan(1 << 40).bounds.backpropagation
    for share in (0.5, 0.7):
        plan = planner.plan(int(share * bound))
        assert plan.peak <= 0.95 * share * bound
        if strategy == "layerwise":
            assert plan.peak >= 0.85 * share * bound


class SlowCache:
    """A cache on a disk of known speed: its clock stands still but for the bytes that it moves."""

    now = 0.0
    opened: list = []  # noqa: RUF012
    writing = {1: 50e6, 2: 96e6, 4: 100e6, 8: 99e6}  # noqa: RUF012
    reading = {1: 200e6, 2: 100e6, 4: 150e6, 8: 209e6}  # noqa: RUF012

    def __init__(self, folder, geometry, rate):
        self.folder, self.geometry, self.rate, self.moved = folder, geometry, rate, 0

    @classmethod
    def create(cls, folder, name, geometry, *, device, options):
        assert not list(folder.iterdir()), "the file before is gone"
        cls.opened.append(("write", options.write_threads, geometry.samples))
        return cls(folder, geometry, cls.writing[options.write_threads])

    @classmethod
    def open(cls, folder, record, *, device, options):
        cls.opened.append(("read", options.read_threads, record.samples))
        return cls(folder, record, cls.reading[options.read_threads])

    def move(self, samples):
        self.moved += samples * self.geometry.sample_bytes
        type(self).now += samples * self.geometry.sample_bytes / self.rate

    def append(self, x, labels, ids):
        assert len(x) == len(labels) == len(ids)
        self.move(len(x))

    def finish(self):
        (self.folder / "probe.nfc").touch()
        return self.geometry

    def batches(self, epoch, batch, *, key, window_bytes):
        for _ in range(self.geometry.samples // batch):
            self.move(batch)
            yield None

    def stats(self):
        return SimpleNamespace(bytes_written=self.moved, bytes_read=self.moved)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(("shape", "room"), [((16, 8, 8), "1GiB"), ((16, 8, 8), "2MiB"), ((64, 56, 56), "1GiB")])
def test_a_probe_takes_the_fewest_threads_within_five_percent_of_the_best(tmp_path, monkeypatch, shape, room):
    monkeypatch.setattr(tier_probe, "ActivationCache", SlowCache)
    monkeypatch.setattr(tier_probe, "time", SimpleNamespace(perf_counter=lambda: SlowCache.now))
    monkeypatch.setattr(tier_probe, "_gather_rate", lambda *_: 5e9)
    monkeypatch.setattr(SlowCache, "now", 0.0)
    monkeypatch.setattr(SlowCache, "opened", [])
    config = TrainConfig(max_cache_bytes=room)  # 1 MiB is full before the time is over
    found = probe_tiers(shape, 16, tmp_path, config, device=CPU, seconds=0.3, fetch=0.25)
    assert (found.write_threads, found.read_threads) == (2, 1)
    assert (found.write, found.read) == pytest.approx((96e6, 200e6))
    assert (found.up, found.down, found.gather, found.fetch) == (5e9, 5e9, 5e9, 0.25)
    assert [step[:2] for step in SlowCache.opened] == [
        *(("write", n) for n in (1, 2, 4, 8)),
        ("write", 2),  # the file to read
        *(("read", n) for n in (1, 2, 4, 8)),
    ]
    a_batch = 16 * 2 * shape[0] * shape[1] * shape[2] / 50e6
    assert SlowCache.now <= 9 * (0.3 + a_batch), "no measurement runs longer than asked"
    assert found.room["disk"] <= 2**30
    assert found.room["ram"] <= 2**30
    assert not list(tmp_path.iterdir())


def test_a_disk_with_no_room_for_a_probe_has_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(tier_probe, "ActivationCache", None)
    found = probe_tiers((64, 16, 16), 32, tmp_path, TrainConfig(max_cache_bytes="1MiB"), device=CPU, seconds=0.01)
    assert (found.room["disk"], found.write, found.read) == (0, 0.0, 0.0)
    assert found.gather > 0


def test_a_probe_of_the_real_disk_leaves_nothing_behind(tmp_path):
    with TensorBytes() as counter:
        found = probe_tiers((16, 16, 16), 32, tmp_path, TrainConfig(), device=CPU, seconds=0.02)
    assert min(found.write, found.read, found.gather) > 10**5, "bytes a second"
    assert {found.write_threads, found.read_threads} <= {1, 2, 4, 8}
    assert 0 < found.room["ram"] <= psutil.virtual_memory().total
    assert 0 < found.room["disk"] <= psutil.disk_usage(str(tmp_path)).total
    assert counter.peak <= 4 * 32 * 16**3 * 4, "a few batches: it may run inside a small budget"
    assert not list(tmp_path.iterdir())


def test_free_ram_is_that_of_the_tightest_control_group(tmp_path):
    def group(path, limit, used, idle):
        path.mkdir(exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 5\nfile 7\ninactive_file {idle}\nactive_file 9\n")

    own = tmp_path / "cgroup.txt"
    own.write_text("3:cpu:/other\n0::/outer/inner\n")
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    group(outer, "max", 10**6, 0)
    group(inner, 10**6, 700_000, 50_000)
    assert free_ram(own, tmp_path) == 350_000
    group(outer, 2 * 10**6, 1_900_000, 10_000)
    assert free_ram(own, tmp_path) == 110_000, "the group around it is tighter"
    group(inner, 10**6, 1_200_000, 0)
    assert free_ram(own, tmp_path) == 0
    group(inner, "max", 0, 0)
    group(outer, "max", 0, 0)
    everything = psutil.virtual_memory().available
    assert free_ram(own, tmp_path) == pytest.approx(everything, rel=0.2)
    assert free_ram(tmp_path / "gone", tmp_path) == pytest.approx(everything, rel=0.2)


def test_tiers_are_probed_once_and_the_plan_shows_it(tmp_path, monkeypatch):
    made = TierProbe(1e9, 2e9, 3e9, 3e9, 3e9, 1e-5, {"ram": 0, "disk": 10**12}, 4, 8)
    calls = []

    def probe(shape, batch, folder, config, **rest):
        calls.append((shape, batch, folder, rest["seconds"]))
        assert rest["fetch"] > 0
        return made

    monkeypatch.setattr(planner, "probe_tiers", probe)
    cut = split(build("vgg11", width=0.125), (3, 32, 32))
    config = TrainConfig(partition="layerwise", grouping_threshold=0.0, batch_size=32)
    work = Planner(cut, config, PLAIN, True, CPU, 5000, "vgg11", tmp_path)
    plan = work.plan(8 * 2**20)
    assert work.plan(8 * 2**20) == plan
    (call,) = calls
    largest = max(plan.blocks[1:], key=lambda b: work.profile.stages[b.first - 1].output)
    assert call[0] == work.profile.stages[largest.first - 1].output_shape
    assert call[1:3] == (largest.batch, tmp_path)
    assert plan.probe == made
    assert Plan.from_json(plan.to_json()) == plan
    assert {b.cache.tier for b in plan.blocks[1:]} <= {"disk", "recompute"}
    for block in plan.blocks[1:]:
        assert set(block.cache.seconds) | set(block.cache.dropped) == {"ram", "disk", "recompute"}
        assert "ram" in block.cache.dropped


# ---- A device with less than a measurement takes --------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """As if the CPU were a device of so many bytes; `fails` names what runs out of them, at which unit or block."""

    def install(room, name, fails):
        real, seen = getattr(planner, name), []

        def measure(cut, planned, *rest, **more):
            if fails(planned, *rest):
                seen.append(planned)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
            return real(cut, planned, *rest, **more)

        monkeypatch.setattr(planner, "RECOVERING", ("cpu",))
        monkeypatch.setattr(planner, "room_bytes", lambda device: room)
        monkeypatch.setattr(planner, name, measure)
        return seen

    return install


def planned(budget, **fields):
    cut = split(build("vgg11", width=0.125), (3, 32, 32))
    config = TrainConfig(**fields)
    images = Preprocess(Normalisation((0.0,) * 3, (255.0,) * 3))
    return Planner(cut, config, images, True, None, 2000, "vgg11", None, together=False).plan(budget)


def test_backpropagation_that_does_not_fit_the_device_does_not_end_the_planning(short):
    budget = 8 * 2**20
    whole = planned(budget)
    seen = short(budget, "profile_unit", lambda unit, *_: (unit.first, unit.last, unit.starts) == (0, 7, ()))
    made = planned(budget)
    assert len(seen) == 1
    assert made.blocks == whole.blocks
    assert made.bounds.backpropagation == pytest.approx(whole.bounds.backpropagation, rel=0.05), "the sum over stages"


def test_a_block_that_runs_out_of_memory_under_the_cap_is_planned_with_less(short):
    budget = 16 * 2**20
    whole = planned(budget, partition="layerwise")
    batch = whole.blocks[0].batch
    seen = short(budget, "block_peak", lambda block, *_: block.first == 0 and block.batch > 0.8 * batch)
    made = planned(budget, partition="layerwise")
    assert seen
    assert seen[0].batch == batch
    assert 0.5 * batch <= made.blocks[0].batch <= 0.8 * batch
    assert made.peak <= made.allowed


def test_a_unit_that_runs_out_of_memory_is_not_planned(short):
    budget = 16 * 2**20
    whole = planned(budget, partition="layerwise")
    most = 0.9 * whole.blocks[0].batch
    seen = short(budget, "profile_unit", lambda unit, config, batch, device: unit.first == 0 and batch > most)
    made = planned(budget, partition="layerwise")
    assert seen
    assert made.blocks[0].batch <= most

"""bench_head_kinds: the candidates, the units of each mode, the order and resumption of a long run, its summary."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import bench_head_kinds as bench
from bench.bench_head_kinds import BACKPROPAGATION, BLOCKS, LAYERWISE, TOGETHER, Case, Recipe
from bench.head_kinds import KINDS
from bench.timing import images
from nf_engine.config import TrainConfig
from nf_engine.models import build
from nf_engine.preprocess import Preprocess
from nf_engine.stages import split
from nf_engine.worker import ImageInputs

TINY = Recipe(images=96, epochs=1, batch=32, lr=0.1, test=200)


@pytest.fixture(scope="module")
def data():
    return images("synthetic:96", TINY.images, TINY.test)


# --- candidates -----------------------------------------------------------------------------------------------------

PARAMETERS = {  # for h of 24 channels, 10x10, 7 classes: convolutions (and norms), then the linear layer
    "linear q=1": 7 * 25,
    "linear q=2": 7 * (24 * 4 + 1),
    "linear q=4": 7 * (24 * 16 + 1),
    "conv1x1": 64 * (24 + 1) + 7 * (64 * 4 + 1),
    "conv3x3": 64 * (24 * 9 + 1) + 7 * (64 * 4 + 1),
    "deep d=1": 24 * (24 * 9 + 2) + 7 * 25,
    "deep d=2": 24 * (24 * 9 + 2) + 48 * (24 * 9 + 2) + 7 * 49,
    "deep d=3": 24 * (24 * 9 + 2) + 48 * (24 * 9 + 2) + 96 * (48 * 9 + 2) + 7 * 97,
    "deep d=2 no norm": 24 * (24 * 9 + 1) + 48 * (24 * 9 + 1) + 7 * 49,
    "deep d=2 width 1/2": 16 * (24 * 9 + 2) + 24 * (16 * 9 + 2) + 7 * 25,  # half of 24 is below 16
    "deep d=2 width 1/4": 16 * (24 * 9 + 2) + 16 * (16 * 9 + 2) + 7 * 17,
    "pool first": 64 * (24 * 9 + 2) + 7 * (64 * 4 + 1),
    "deep d=1 pool 4": 24 * (24 * 9 + 2) + 7 * (24 * 16 + 1),
    "deep d=1 pool 4 width 2": 48 * (24 * 9 + 2) + 7 * (48 * 16 + 1),
    "deep d=1 pool 4 no norm": 24 * (24 * 9 + 1) + 7 * (24 * 16 + 1),
    "deep d=2 pool 2": 24 * (24 * 9 + 2) + 48 * (24 * 9 + 2) + 7 * (48 * 4 + 1),
    "deep d=2 pool 4": 24 * (24 * 9 + 2) + 48 * (24 * 9 + 2) + 7 * (48 * 9 + 1),  # of 3x3 cells
    "deep d=1 pool 4 width 4": 96 * (24 * 9 + 2) + 7 * (96 * 16 + 1),
    "deep d=2 width 4": 96 * (24 * 9 + 2) + 192 * (96 * 9 + 2) + 7 * 193,
    "deep d=2 width 4 pool 2": 96 * (24 * 9 + 2) + 192 * (96 * 9 + 2) + 7 * (192 * 4 + 1),
    "deep d=2 width 2": 48 * (24 * 9 + 2) + 96 * (48 * 9 + 2) + 7 * 97,
}
FLOPS = {  # multiply-adds of the same heads: the map is 10x10, pooled to 8x8 first, or strided to 5x5, 3x3, 2x2
    "linear q=4": 7 * 24 * 16,
    "conv1x1": 64 * 24 * 100 + 7 * 256,
    "deep d=3": 9 * (24 * 24 * 25 + 24 * 48 * 9 + 48 * 96 * 4) + 7 * 96,
    "pool first": 9 * 24 * 64 * 64 + 7 * 256,
}


def head(kind, shape=(24, 10, 10), seed=3):
    return KINDS[kind](shape, 7, torch.Generator().manual_seed(seed))


def test_every_kind_has_the_parameters_of_its_description():
    assert {kind: sum(p.numel() for p in head(kind).parameters()) for kind in KINDS} == PARAMETERS


@pytest.mark.parametrize("kind", FLOPS)
def test_flops_count_two_for_each_multiply_add(kind):
    assert bench.flops_of(head(kind), (24, 10, 10)) == 2 * FLOPS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_starts_at_zero_logits_from_its_seed_alone(kind):
    torch.manual_seed(0)
    first = head(kind)
    torch.manual_seed(1)
    again = head(kind)

    assert torch.equal(first(torch.randn(2, 24, 10, 10)), torch.zeros(2, 7))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    changed = [not torch.equal(a, b) for a, b in zip(first.parameters(), head(kind, seed=4).parameters(), strict=True)]
    assert any(changed) == any(isinstance(m, nn.Conv2d) for m in first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_a_map_of_one_pixel(kind):
    assert head(kind, (24, 1, 1))(torch.randn(3, 24, 1, 1)).shape == (3, 7)


def test_the_bytes_of_a_step_are_its_maps_and_gradients():
    h, labels = torch.randn(16, 24, 10, 10), torch.zeros(16, dtype=torch.int64)
    linear, conv = (bench.ClockedHead(head(kind)) for kind in ("linear q=1", "conv3x3"))
    size, conv_map = h.nbytes, 4 * 16 * 64 * 100

    small = bench.step_bytes(linear, h, labels)
    assert size + 4 * PARAMETERS["linear q=1"] <= small <= 1.2 * size  # dh, and features and logits of 16 samples
    # The map, kept for the ReLU and the pooling; in backward two gradients of it.
    assert 2 * conv_map <= bench.step_bytes(conv, h, labels) <= 3.5 * conv_map


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "mode", "units", "kind", "names"),
    [
        ("vgg16", TOGETHER, 1, BACKPROPAGATION, "1-13"),
        ("vgg16", TOGETHER, 4, "conv1x1", "1-1 2-2 3-4 5-13"),
        ("vgg16", BLOCKS, 2, "conv1x1", "1-4 5-13"),
        ("resnet18", TOGETHER, 4, "conv1x1", "1-1 2-3 4-5 6-9"),
        ("resnet18", LAYERWISE, 0, "conv1x1", "1-1 2-2 3-3 4-4 5-5 6-6 7-7 8-8 9-9"),
    ],
)
def test_units_end_where_the_bench_says(model, mode, units, kind, names):
    network = build(model, width=0.25)
    cut = split(network, (3, 32, 32))
    made = bench.make_units(cut, Case("data", model, mode, units, kind, 0), TrainConfig())

    assert " ".join(u.name for u in made) == names
    trained = [p for u in made for p in u.body.parameters()] + list(made[-1].head.parameters())
    assert {id(p) for p in trained} == {id(p) for p in network.parameters()}


def weights(unit):
    return [v for m in unit.modules() for v in m.state_dict().values()]


def test_a_block_alone_learns_what_it_learns_beside_others(data):
    """The first unit sees the same batches whatever follows it; the second sees those of a finished prefix."""
    together, blocks, other = (
        bench.train(Case("data", "vgg16", mode, 2, kind, 1), TINY, data[0])
        for mode, kind in ((TOGETHER, "deep d=1"), (BLOCKS, "deep d=1"), (BLOCKS, "linear q=1"))
    )

    assert all(map(torch.equal, weights(together[0]), weights(blocks[0])))
    assert not all(map(torch.equal, weights(together[1]), weights(blocks[1])))
    assert not torch.equal(weights(together[0])[0], weights(other[0])[0])
    assert not any(m.training for m in blocks[0].body.modules())  # its norms keep the statistics that it ended with
    assert int(blocks[0].body.state_dict()["0.features.1.num_batches_tracked"]) == 3


def test_backpropagation_is_plain_sgd_over_the_whole_network(data):
    train, _ = data
    recipe = replace(TINY, epochs=2)
    (unit,) = bench.train(Case("data", "vgg16", TOGETHER, 1, BACKPROPAGATION, 1), recipe, train)

    torch.manual_seed(1)
    network = build("vgg16", width=0.25).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    inputs = ImageInputs(train, Preprocess(train.normalisation, "crop-flip", 1), torch.device("cpu"), 1)
    steps = len(train) // 32
    for step, (x, labels) in enumerate(batch for epoch in range(2) for batch in inputs.train(epoch, 32)):
        warm, cosine = (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * (step - steps) / steps)
        optimizer.param_groups[0]["lr"] = 0.1 * 32 / 128 * (warm if step < steps else cosine)
        F.cross_entropy(network(x), labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = unit.body.state_dict() | unit.head.module.state_dict()
    for name, value in network.state_dict().items():
        match = next(v for k, v in found.items() if k.endswith(name))
        torch.testing.assert_close(match, value, rtol=1e-4, atol=1e-5)


def test_a_row_holds_each_exit_and_the_costs_of_each_auxiliary_head(data):
    base, local = (
        bench.run(Case("data", "vgg16", TOGETHER, units, kind, 0), TINY, *data)
        for units, kind in ((1, BACKPROPAGATION), (4, "linear q=2"))
    )

    assert len(base["exits"]) == 1
    assert (base["head_flops"], base["head_parameters"], base["head_bytes"], base["head_share"]) == ([], [], [], 0)
    assert len(local["exits"]) == 4
    assert local["head_parameters"] == [10 * (4 * c + 1) for c in (16, 16, 32)]
    assert local["head_flops"] == [2 * 10 * 4 * c for c in (16, 16, 32)]
    assert local["head_bytes"][0] > 4 * 32 * 16 * 32 * 32
    assert 0 < local["head_share"] < 1


def test_exits_are_scored_with_running_statistics_on_all_images(data):
    scored = data[0]
    torch.manual_seed(0)
    units = bench.make_units(
        split(build("vgg16", width=0.25), (3, 32, 32)),
        Case("data", "vgg16", TOGETHER, 2, "linear q=2", 0),
        TrainConfig(),
    )
    nn.init.normal_(units[0].head.module[-1].weight)
    for unit in units:
        for norm in (m for m in unit.body.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean)
    found = bench.exit_accuracies(units, scored)

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (scored.normalisation.mean, scored.normalisation.std))
    first, second = (u.body.eval() for u in units)
    with torch.no_grad():
        h = first((scored.images - mean) / std)
        logits = [units[0].head(h), units[1].head(second(h))]
    assert found == pytest.approx([float((e.argmax(1) == scored.labels).float().mean()) for e in logits], abs=0.5 / 96)


# --- a long run -----------------------------------------------------------------------------------------------------


def test_the_first_seed_of_everything_in_a_part_comes_first_and_nothing_runs_twice():
    listed = bench.cases(["finalists-cifar", "screen-cifar", "few"])

    finalists = 3 * (1 + len(bench.FINALISTS))
    rest = len(KINDS) - len(bench.FINALISTS)  # of the screen: the finalists and backpropagation have run
    few = 3 * (3 * len(bench.FEW) + 1 + len(bench.FEW))  # vgg16 itself has run with every seed
    assert len(listed) == len(set(listed)) == finalists + rest + few
    seeds = [c.seed for c in listed]
    assert seeds[:finalists] == sorted(seeds[:finalists])
    assert set(seeds[finalists:]) == {0, 1, 2}
    assert {c.seed for c in bench.cases(["screen-fashion"])} == {0}


def fake_row(last, **more):
    return {"exits": [0.3, last], "cpu_seconds": 1.0, "head_flops": [8], "head_parameters": [4], "head_bytes": [2],
            "head_share": 0.25} | more  # fmt: skip


def arguments(path, parts="quick"):
    parser = bench.arguments("x")
    parser.add_argument("--parts")
    return parser.parse_args(["--parts", parts, "--json", str(path)])


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, ran = tmp_path / "new" / "h.json", []
    monkeypatch.setattr(bench, "images", lambda *_: (None, None))

    def run(case, *_):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(case)
        return fake_row(0.5)

    monkeypatch.setattr(bench, "run", run)
    specs = {"data": "synthetic:9"}
    with pytest.raises(KeyboardInterrupt):
        bench.run_all(arguments(path), TINY, specs)
    assert [r["kind"] for r in json.loads(path.read_text())["rows"]] == [c.kind for c in ran]

    monkeypatch.setattr(bench, "run", lambda case, *_: ran.append(case) or fake_row(0.5))
    rows = bench.run_all(arguments(path), TINY, specs)
    assert ran == bench.cases(["quick"])
    assert json.loads(path.read_text())["rows"] == rows
    assert [p.name for p in path.parent.iterdir()] == ["h.json"]

    bench.run_all(arguments(path), replace(TINY, lr=0.05), specs)  # another recipe: other runs, the old ones stay
    assert ran == 2 * bench.cases(["quick"])
    assert json.loads(path.read_text())["rows"][: len(rows)] == rows


def test_a_part_without_its_data_set_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--fashion"):
        bench.run_all(arguments(tmp_path / "h.json", "few-fashion"), TINY, {"fashion": ""})


def test_folders_do_not_enter_the_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "images", lambda *_: (None, None))
    monkeypatch.setattr(bench, "run", lambda *_: fake_row(0.5))
    path, place = tmp_path / "h.json", "/some/place"
    options = ["--cifar10", f"cifar10:{place}", "--fashion", f"idx:{place}", "--data", f"idx:{place}"]
    threads = ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["bench", *options, *threads, "--parts", "few-fashion", "--json", str(path)])
    bench.main()

    assert place not in path.read_text()
    assert place not in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == len(bench.cases(["few-fashion"]))


@pytest.mark.parametrize(("value", "spec"), [(None, ""), ("", ""), ("/d", "cifar10:/d"), ("cifar10:/d", "cifar10:/d")])
def test_an_environment_variable_may_hold_a_folder_or_a_spec(monkeypatch, value, spec):
    monkeypatch.delenv("NF_DATA_CIFAR10", raising=False)
    if value is not None:
        monkeypatch.setenv("NF_DATA_CIFAR10", value)
    assert bench.spec_of("cifar10", "NF_DATA_CIFAR10") == spec


# --- summary --------------------------------------------------------------------------------------------------------


def test_the_summary_compares_means_over_the_seeds(capsys):
    def row(data, units, kind, seed, last, **more):
        return Case(data, "vgg16", TOGETHER, units, kind, seed)._asdict() | fake_row(
            last, images=8000, epochs=4, **more
        )

    rows = [
        row("cifar10", 1, BACKPROPAGATION, 0, 0.64),
        row("cifar10", 1, BACKPROPAGATION, 1, 0.66),
        row("cifar10", 4, bench.DEFAULT, 0, 0.60, head_flops=[1_000_000, 500_000], head_bytes=[2**20, 3 * 2**20]),
        row("cifar10", 4, bench.DEFAULT, 1, 0.64),
        row("cifar10", 4, "linear q=1", 0, 0.625),
        row("fashion", 1, BACKPROPAGATION, 0, 0.9),
        row("fashion", 4, "linear q=1", 0, 0.8),
    ]
    checks = bench.summary(rows)
    lines = capsys.readouterr().out.splitlines()

    assert checks == {
        f"points below backpropagation, {bench.DEFAULT}, cifar10, 8,000 x 4": {
            "value": 3.0,
            "target": "<= 2",
            "ok": False,
        },
        f"points below backpropagation, {bench.DEFAULT}, fashion, 8,000 x 4": {
            "value": None,
            "target": "<= 2",
            "ok": None,
        },
    }
    assert "best head by the whole network's accuracy: linear q=1, 62.50%" in lines
    deep = next(line for line in lines if line.startswith(bench.DEFAULT)).split()
    assert deep[len(bench.DEFAULT.split()) :] == ["2.8", "2", "1.50", "4", "3.0", "0.25", "1.0", "30.0", "62.0"]

"""P15: a cache is reused if it is the one that this run would write, wherever the folder lies, and else made again."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_runs as runs
import torch

from nf_engine import engine
from nf_engine.errors import CacheCorruptError
from nf_engine.manifest import FORMAT, FileEntry, Manifest, Position
from nf_engine.run_caches import RunCaches

go, cut_after, outcome, events = runs.go, runs.cut_after, runs.outcome, runs.events
IN_BLOCK_1, IN_BLOCK_2 = 11, 19  # steps after which a run is cut
PAGE = 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return outcome(go(tmp_path_factory.mktemp("whole") / "run"))


def cut_run(folder, steps, **given):
    with cut_after(steps):
        assert go(folder, **given).status == "interrupted"
    return folder


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """Runs that were cut in a block whose inputs are a cache on the disk, by the number of steps."""
    folder = tmp_path_factory.mktemp("began")
    return {steps: cut_run(folder / str(steps), steps) for steps in (IN_BLOCK_1, IN_BLOCK_2)}


def caches(folder):
    """Entries of the caches before the block in training: of training (x) and held-out (v) activations."""
    found = {e["name"][0]: e for e in runs.manifest(folder)["files"] if e["role"] == "cache"}
    assert found.keys() == {"x", "v"}
    return found


# ---- What a cache is ---------------------------------------------------------------------------------------------

DIGESTS = [c * 64 for c in "abcdef"]
ENV = {"nf_engine": "0.1.0", "torch": "2.13.0", "device": "cuda", "cuda": "13.0", "capability": "9.0"}


def block(number, digest, generation=7):
    return FileEntry(f"b00{number}-g{generation:04d}.safetensors", "block", number, 100, digest)


MANIFEST = Manifest(
    FORMAT, 7, DIGESTS[0], "0" * 32, False, Position(2), DIGESTS[1], DIGESTS[2], ENV,
    (block(0, DIGESTS[3]), block(1, DIGESTS[4])),
)  # fmt: skip
PLAN = runs.plan()
TRAIN = FileEntry("c0000007.safetensors", "train", 2, 9, DIGESTS[5])


def fingerprint(manifest=MANIFEST, plan=PLAN, number=2, **beside):
    job = SimpleNamespace(folder=SimpleNamespace(manifest_now=manifest), plan=plan, **beside)
    return RunCaches(job).fingerprint(number)


def with_block(number, **changes):
    blocks = list(PLAN.blocks)
    blocks[number] = replace(blocks[number], **changes)
    return replace(PLAN, blocks=tuple(blocks))


def with_unit(number, **changes):
    return with_block(number, units=(replace(PLAN.blocks[number].units[0], **changes),))


HEAD = PLAN.blocks[0].units[0].head
INPUTS = {
    "settings": {"manifest": replace(MANIFEST, config_sha256=DIGESTS[5])},
    "images": {"manifest": replace(MANIFEST, data_sha256=DIGESTS[5])},
    **{name: {"manifest": replace(MANIFEST, env={**ENV, name: "x"})} for name in ENV},
    "one more fact of the software": {"manifest": replace(MANIFEST, env={**ENV, "threads": "1"})},
    "weights of block 0": {"manifest": replace(MANIFEST, files=(block(0, DIGESTS[5]), block(1, DIGESTS[4])))},
    "weights of block 1": {"manifest": replace(MANIFEST, files=(block(0, DIGESTS[3]), block(1, DIGESTS[5])))},
    "weights swapped": {"manifest": replace(MANIFEST, files=(block(0, DIGESTS[4]), block(1, DIGESTS[3])))},
    "a block missing": {"manifest": replace(MANIFEST, files=(block(0, DIGESTS[3]),))},
    "batch of block 0": {"plan": with_block(0, batch=7)},
    "batch of block 1": {"plan": with_block(1, batch=7)},
    "learning rate": {"plan": with_block(1, lr=0.3)},
    "first stage": {"plan": with_unit(1, first=0)},
    "last stage": {"plan": with_unit(1, last=2)},
    "path of the head": {"plan": with_unit(1, path="autograd")},
    "kind of the head": {"plan": with_unit(0, head=replace(HEAD, kind="deep"))},
    "pool of the head": {"plan": with_unit(0, head=replace(HEAD, pool=4))},
    "stages that run twice": {"plan": with_unit(1, starts=(1,))},
    "the block": {"number": 1},
}
BESIDE = {
    "generation": {"manifest": replace(MANIFEST, generation=8, prev_sha256=DIGESTS[5])},
    "run_id": {"manifest": replace(MANIFEST, run_id="1" * 32)},
    "position": {"manifest": replace(MANIFEST, position=Position(2, 1, 3))},
    "other files": {
        "manifest": replace(MANIFEST, files=(*MANIFEST.files, TRAIN))
    },
    "the block after": {"manifest": replace(MANIFEST, files=(*MANIFEST.files, block(2, DIGESTS[5])))},
    "generation of a block's file": {"manifest": replace(MANIFEST, files=(block(0, DIGESTS[3], 9), MANIFEST.files[1]))},
    "order of the facts": {"manifest": replace(MANIFEST, env=dict(reversed(ENV.items())))},
    "plan of the block after": {"plan": with_block(2, batch=7)},
    "budget": {"plan": replace(PLAN, budget=1, allowed=1)},
    "predicted peak": {"plan": with_block(0, peak=1)},
    "where the cache is": {"plan": with_block(1, cache=replace(PLAN.blocks[1].cache, tier="ram"))},
}  # fmt: skip


def test_each_input_alone_makes_it_another_cache(figure):
    different = [what for what, change in INPUTS.items() if fingerprint(**change) != fingerprint()]
    assert different == list(INPUTS)
    assert len({fingerprint(**change) for change in INPUTS.values()}) == len(INPUTS)
    figure("P15", "inputs of a cache, each changed alone: another fingerprint", len(different), len(INPUTS))


def test_nothing_else_makes_it_another_cache(figure):
    same = [what for what, change in BESIDE.items() if fingerprint(**change) == fingerprint()]
    assert same == list(BESIDE)
    figure(
        "P15", "facts beside the inputs of a cache, each changed alone: the same fingerprint", len(same), len(BESIDE)
    )


# ---- A cache of another run --------------------------------------------------------------------------------------


def one_pixel():
    data = runs.training_images()
    data[0][5, 1, 2, 3] ^= 1
    return data


def other_weights():
    network = runs.Net()
    with torch.no_grad():
        network.features[0][0].weight[0, 0, 0, 0] += 0.125
    return network


def other_batch():
    return with_block(0, lr=0.3)


OTHERS = {
    "settings": lambda: {"lr": 0.2},  # of heads and units: what a plan overrides counts as well
    "images": lambda: {"train_data": one_pixel()},
    "weights": lambda: {"network": other_weights()},
    "plan": lambda: {"plan": other_batch()},
    "software": dict,
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_cache_of_another_run_is_refused_and_made_again(tmp_path, began, whole, monkeypatch, figure, what):
    """It is sound, of the right size, order and generation, and the manifest lists it with its own digest."""
    with monkeypatch.context() as patch:
        if what == "software":
            plain = engine.environment
            patch.setattr(engine, "environment", lambda *a: {**plain(*a), "torch": "2.11.0"})
        other = cut_run(tmp_path / "other", IN_BLOCK_2, **OTHERS[what]())
    mine = shutil.copytree(began[IN_BLOCK_2], tmp_path / "mine")
    theirs = caches(other)
    for kind, entry in caches(mine).items():
        assert (entry["name"], entry["bytes"]) == (theirs[kind]["name"], theirs[kind]["bytes"])
        shutil.copyfile(other / entry["name"], mine / entry["name"])
    path = mine / "MANIFEST.json"
    manifest = Manifest.parse(path.read_bytes(), "it")
    files = tuple(replace(e, sha256=theirs[e.name[0]]["sha256"]) if e.role == "cache" else e for e in manifest.files)
    path.write_bytes(replace(manifest, files=files).to_bytes())
    assert outcome(go(mine)) == whole
    (told,) = events(mine, "cache_refused")
    assert told["number"] == 2
    assert "fingerprint" in told["reason"]
    assert caches_written(mine, 2) == 4, "by the first call, and again"
    figure("P15", "whole runs with the cache of a run of other inputs: refused, made again, bitwise", 1, 1)


def caches_written(folder, number):
    return sum(e["name"][1:4] == f"{number:03d}" for e in events(folder, "cache_written"))


@pytest.mark.parametrize(("steps", "number"), [(IN_BLOCK_1, 1), (IN_BLOCK_2, 2)])
def test_a_cache_that_other_code_has_made_is_made_again(tmp_path, began, monkeypatch, figure, steps, number):
    """The modules and their settings read the same; only what they compute is another thing."""
    folder = shutil.copytree(began[steps], tmp_path / "run")
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda _, x: torch.nn.functional.leaky_relu(x, 0.3))
    assert go(folder).status == "completed"
    (told,) = events(folder, "cache_refused")
    assert told["number"] == number
    assert "their code has changed" in told["reason"]
    assert caches_written(folder, number) == 4, "by the first call, and again"
    figure("P15", "whole runs with caches of other code: refused, made again", 1, 1)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("stored", ["fp16", "bf16", "u8"])
def test_no_rounding_makes_a_cache_stale(tmp_path, precision, stored, augment):
    plan = replace(PLAN, precision=precision)
    blocks = tuple(replace(b, cache=replace(b.cache, dtype=stored)) for b in plan.blocks)
    given = {"plan": replace(plan, blocks=blocks), "precision": precision, "cache_dtype": stored, "augment": augment}
    folder = cut_run(tmp_path / "run", IN_BLOCK_2, **given)
    assert go(folder, **given).status == "completed"
    assert events(folder, "cache_refused") == []


# ---- The same cache elsewhere ------------------------------------------------------------------------------------


def moved(folder, target, _):
    return folder.rename(target)


def copied(folder, target, _):
    return shutil.copytree(folder, target, copy_function=shutil.copyfile)


def touched(folder, _, __):
    for k, file in enumerate(sorted(folder.iterdir())):
        os.utime(file, (1e9 + k, 2e9 - k))
    return folder


def on_another_host(folder, _, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    return folder


def by_a_relative_path(folder, _, monkeypatch):
    monkeypatch.chdir(folder.parent)
    return Path(folder.name)


@pytest.mark.parametrize("change", [moved, copied, touched, on_another_host, by_a_relative_path])
@pytest.mark.parametrize(("steps", "number"), [(IN_BLOCK_1, 1), (IN_BLOCK_2, 2)])
def test_the_same_cache_is_reused_wherever_it_is(tmp_path, began, whole, monkeypatch, figure, steps, number, change):
    folder = change(shutil.copytree(began[steps], tmp_path / "run"), tmp_path / "elsewhere", monkeypatch)
    assert outcome(go(folder)) == whole
    assert events(folder, "cache_refused") == []
    assert caches_written(folder, number) == 2, "by the first call alone"
    figure("P15", "other path, copy, mtime, host: reused", 1, 1)


# ---- Damage ------------------------------------------------------------------------------------------------------


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("kind", ["x", "v"])
@pytest.mark.parametrize(
    ("steps", "number", "stride"),
    [
        pytest.param(IN_BLOCK_1, 1, 4 * PAGE),
        pytest.param(IN_BLOCK_2, 2, 4 * PAGE),
        pytest.param(IN_BLOCK_1, 1, 1021, marks=pytest.mark.slow),
        pytest.param(IN_BLOCK_2, 2, 1021, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_cache_is_made_again_once_and_the_end_is_the_same(
    tmp_path, began, whole, figure, kind, steps, number, stride
):
    entry = caches(began[steps])[kind]
    places = range(stride // 2, entry["bytes"], stride)
    for at in places:
        folder = shutil.copytree(began[steps], tmp_path / str(at))
        flip(folder / entry["name"], at)
        assert outcome(go(folder)) == whole, at
        (told,) = events(folder, "cache_refused")
        assert told["number"] == number
        assert caches_written(folder, number) == 4
        shutil.rmtree(folder)
    figure("P15", "whole runs with a damaged byte in a cache: made again once, bitwise", len(places), len(places))


@pytest.mark.parametrize("kind", ["x", "v"])
@pytest.mark.parametrize("harm", ["gone", "short", "long", "swapped", "link", "another digest"])
def test_a_cache_that_is_no_cache_any_more_is_made_again(tmp_path, began, whole, kind, harm):
    folder = shutil.copytree(began[IN_BLOCK_2], tmp_path / "run")
    names = {k: folder / e["name"] for k, e in caches(folder).items()}
    path = names[kind]
    data = path.read_bytes()
    if harm == "short":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "long":
        path.write_bytes(data + bytes(PAGE))
    elif harm == "another digest":  # a sound file, but not the one that was committed
        manifest = Manifest.parse((folder / "MANIFEST.json").read_bytes(), "it")
        files = tuple(replace(e, sha256="0" * 64) if e.name == path.name else e for e in manifest.files)
        (folder / "MANIFEST.json").write_bytes(replace(manifest, files=files).to_bytes())
    elif harm == "swapped":
        path.write_bytes(names["v" if kind == "x" else "x"].read_bytes())
    else:
        path.unlink()
    if harm == "link":
        (tmp_path / "victim").write_bytes(data)
        path.symlink_to(tmp_path / "victim")
    assert outcome(go(folder)) == whole
    assert len(events(folder, "cache_refused")) == 1
    assert harm != "link" or (tmp_path / "victim").read_bytes() == data


def test_an_epoch_before_one_that_a_reader_corrupts_counts_once(tmp_path, whole):
    """The block goes on from its last commit: what it has trained since is trained again."""
    hit = []

    def corrupt(position):
        if position == (2, 1, 1) and not hit:
            hit.append(position)
            raise CacheCorruptError("x002: a chunk is damaged")

    with runs.before_steps(corrupt):
        result = go(tmp_path / "run")
    assert hit
    assert outcome(result) == whole
    epochs = [(line["block"], line["epoch"]) for line in result.history]
    assert epochs == [(block, epoch) for block in range(runs.BLOCKS) for epoch in range(runs.EPOCHS)]


# ---- A disk that always corrupts ---------------------------------------------------------------------------------

SCRIPT = """
import importlib.util, json, pathlib, sys
spec = importlib.util.spec_from_file_location("small_runs", sys.argv[1])
runs = sys.modules["small_runs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
import torch
torch.set_num_threads(int(sys.argv[3]))
from nf_engine.errors import NFError
try:
    runs.go(pathlib.Path(sys.argv[2]))
    print(json.dumps({"result": "done"}))
except NFError as error:
    print(json.dumps({"result": type(error).__name__, "exit_code": error.exit_code, "text": str(error)}))
"""


@pytest.mark.parametrize("n", [1, 5, pytest.param(3, marks=pytest.mark.slow)])
def test_a_reader_that_always_corrupts_is_an_error_after_one_rebuild(tmp_path, began, whole, n):
    """n: the first read of the cache that comes back with a flipped bit, of header, table or chunk; all after it do."""
    folder = shutil.copytree(began[IN_BLOCK_2], tmp_path / "run")
    before = runs.manifest(folder)["position"]
    script = [
        sys.executable,
        "-c",
        SCRIPT,
        Path(__file__).with_name("small_runs.py"),
        folder,
        str(torch.get_num_threads()),
    ]
    env = {**os.environ, "NF_TESTING": "1", "NF_FAULT": f"op=pread; path=x002*; n={n}; sticky=1; mode=flip:12345"}
    ended = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["result"], told["exit_code"]) == ("CacheCorruptError", 74), told
    assert "x002" in told["text"]
    assert len(events(folder, "cache_refused")) in (1, 2), "one rebuild, begun by the opening or by the training"
    assert runs.manifest(folder)["position"] == before
    assert outcome(go(folder)) == whole, "a disk that reads right again is enough"

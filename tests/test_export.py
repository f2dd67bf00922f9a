"""Exported models: what is read back against what was written, and every way in which a file can be wrong."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import nn

from nf_engine import export
from nf_engine.checkpoint import state_of, to_bytes
from nf_engine.errors import ConfigError, CorruptFileError, ExportError, NoDeviceError
from nf_engine.exits import EarlyExitModel, Scaled
from nf_engine.export import export_pt2, load, save_pretrained
from nf_engine.folder_files import Staging
from nf_engine.heads import build_head
from nf_engine.manifest import Position
from nf_engine.models import build
from nf_engine.preprocess import Normalisation
from nf_engine.records import HeadSpec
from nf_engine.run_folder import NewFile, RunFolder
from nf_engine.stages import split

K = 7
LINEAR, SMALL, DEEP = HeadSpec("linear", pool=2), HeadSpec("deep", 2, 12, 1), HeadSpec("deep", 1, 16, 2)
CLASSIFIER = HeadSpec("classifier")
HEADS = (LINEAR, SMALL, DEEP, CLASSIFIER)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Branched(nn.Module):
    """A user's own network: a residual block whose branch has another width, tied convolutions, a functional head."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.wide = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.back = nn.Conv2d(2 * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.tied = self.again = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 9, 3, stride=2, padding=1)
        self.out = nn.Linear(9, K)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.norm(self.back(self.wide(x).relu()))).relu()
        x = x + self.again(self.tied(x).relu())
        x = self.last(x).relu()
        return self.out(x.mean((2, 3)))


def _network(name):
    torch.manual_seed(1)
    return Branched() if name == "own" else build(name, classes=K, width=1 / 8, input_size=16)


def _model(network, *, heads=HEADS, dtype="uint8", size=16):
    """As training assembles it, with random weights and statistics: one exit for each head, the last at the end."""
    shape = (next(network.parameters()).shape[1], size, size)
    cut = split(network, shape)
    lasts = [*range(len(heads) - 1), len(cut.stages) - 1]
    exits = [(k and lasts[k - 1] + 1, last, spec) for k, (last, spec) in enumerate(zip(lasts, heads, strict=True))]
    modules = [
        build_head(
            spec,
            cut.stages[last].output_shape,
            K,
            smoothing=0.1,
            seed=last,
            classifier=cut.classifier if spec.kind == "classifier" else None,
        )
        for _, last, spec in exits
    ]
    uint8 = dtype == "uint8"
    scale = Normalisation((0.1 if not uint8 else 120.7,) * shape[0], (1 / 3 if not uint8 else 61.3,) * shape[0])
    spec = getattr(network, "nf_spec", None)
    facts = {
        "format": "nf-model/1",
        "model": None if spec is None else asdict(spec),
        "name": type(network).__name__,
        "input_shape": list(shape),
        "input_dtype": dtype,
        "classes": K,
        "split_points": [],
        "stages": [s.name for s in cut.stages],
        "normalisation": {"mean": list(scale.mean), "std": list(scale.std)},
        "exits": [{"first": first, "last": last, "head": asdict(head)} for first, last, head in exits],
    }
    bodies = [nn.Sequential(*(s.module for s in cut.stages[first : last + 1])) for first, last, _ in exits]
    model = EarlyExitModel(Scaled(scale), bodies, modules, facts)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # heads start at zero: nothing could be told apart
            if tensor.is_floating_point() and tensor.ndim != 4:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    model.scaled = Scaled(scale)
    return model.eval()


@pytest.fixture(name="small")
def fixture_small():
    """A model of one linear and one deep exit, quick to write."""
    return _model(_network("vgg11"), heads=(LINEAR, SMALL))


def _images(model, n=5):
    generator = torch.Generator().manual_seed(5)
    shape = (n, *model.facts["input_shape"])
    if model.facts["input_dtype"] == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def _same(found, expected, exits):
    """Bit for bit: exit k of what was found is exit exits[k] of what was expected."""
    x = _images(expected)
    assert found.exits == len(exits)
    for k, exit in enumerate(exits):
        logits = expected(x, exit=exit)
        assert logits.std() > 1e-3
        assert torch.equal(found(x, exit=k), logits)
        assert exit == 0 or not torch.equal(found(x, exit=k), expected(x, exit=0))


def _run_folder(path, model, *, chosen):
    """What a finished run leaves: two blocks, the last exit in a file of its own."""
    parts = list(zip(model.bodies, model.heads, strict=True))
    with RunFolder(path) as folder:
        folder.begin("0" * 64, "1" * 64, {}, [])
        for block, units in enumerate((range(len(parts) - 1), (len(parts) - 1,))):
            modules = {f"unit{k}.{name}": m for k in units for name, m in zip(("body", "head"), parts[k], strict=True)}
            state = state_of(modules) | {"scores": torch.zeros(len(units), 2, dtype=torch.float64)}
            folder.commit(Position(block + 1), [NewFile("block", to_bytes(state, {"format": "nf-block/1"}), block)])
        facts = json.dumps({**model.facts, "chosen": chosen})
        folder.commit(Position(2), [NewFile("model", facts.encode())], done=True)
    return path


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "own"])
def test_a_model_comes_back_bit_for_bit_with_all_exits_or_one(tmp_path, name, dtype):
    model = _model(_network(name), dtype=dtype)
    given = {"model": Branched()} if name == "own" else {}
    random = torch.get_rng_state()
    folder = save_pretrained(model.train(), tmp_path / "m")
    assert model.training, "the model is left in its mode"
    model.eval()
    whole = load(folder, **given)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m.training for m in whole.modules())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    _same(whole, model, range(4))
    assert whole.facts == model.facts
    _same(load(folder, exit="all", **given), model, range(4))
    _same(load(folder, exit=2, **given), model, [2])
    assert all(p.requires_grad and p.device.type == "cpu" for p in whole.parameters())


@pytest.mark.parametrize("exit", [0, 1, 2, 3])
def test_one_exit_is_written_without_the_rest_of_the_network(tmp_path, exit):
    model = _model(_network("resnet18"))
    folder = save_pretrained(model, tmp_path / "one", exit=exit)
    found = load(folder)
    _same(found, model, [exit])
    short = [*list(model.bodies)[: exit + 1], model.heads[exit]]
    needed = sum(t.nbytes for part in short for t in part.state_dict().values())
    header = (folder / "model.safetensors").stat().st_size - needed
    assert 0 < header < 150 * sum(len(part.state_dict()) for part in short)
    again = save_pretrained(found, tmp_path / "again")
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_run_folder_gives_the_chosen_exit_or_any(tmp_path):
    model = _model(_network("vgg11"))
    folder = _run_folder(tmp_path / "run", model, chosen=1)
    _same(load(folder), model, [1])
    _same(load(folder, exit=-1), model, [3])
    whole = load(str(folder), exit="all")
    _same(whole, model, range(4))
    assert whole.facts == model.facts


def test_an_empty_folder_is_filled_and_one_with_files_refused(tmp_path, small):
    (tmp_path / "empty").mkdir()
    save_pretrained(small, tmp_path / "empty")
    _same(load(tmp_path / "empty"), small, [0, 1])
    before = {p.name: p.read_bytes() for p in (tmp_path / "empty").iterdir()}
    for taken in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(ConfigError, match="expected a new or an empty folder"):
            save_pretrained(small, taken)
    assert {p.name: p.read_bytes() for p in (tmp_path / "empty").iterdir()} == before


def test_a_layout_of_weights_that_is_not_contiguous_is_written_as_contiguous(tmp_path, small):
    small.to(memory_format=torch.channels_last)
    found = load(save_pretrained(small, tmp_path / "m"))
    assert all(t.is_contiguous() for t in found.state_dict().values())
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[key])


# --- a user's own class ----------------------------------------------------------------------------------------------


def test_a_users_own_class_has_to_be_given_and_keeps_its_own_weights(tmp_path):
    model = _model(_network("own"))
    folder = save_pretrained(model, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"a class of your own.*model=Branched"):
        load(folder)
    given = Branched()
    before = {key: t.clone() for key, t in given.state_dict().items()}
    _same(load(folder, model=given), model, range(4))
    assert all(torch.equal(t, before[key]) for key, t in given.state_dict().items())


def test_a_model_of_another_class_or_width_is_an_error(tmp_path):
    folder = save_pretrained(_model(_network("own")), tmp_path / "m")
    with pytest.raises(ConfigError, match=r"expected stages .*'stem'.*found .*'conv1'"):
        load(folder, model=build("resnet18", classes=K, width=1 / 8, input_size=16, channels=2))
    with pytest.raises(CorruptFileError, match=r"unit0\.body.*expected \(6, 2, 3, 3\)|expected \(5, 2, 3, 3\)"):
        load(folder, model=Branched(width=5))


@pytest.mark.parametrize("exit", [4, -5])
def test_an_exit_that_is_not_there_is_an_error(tmp_path, exit):
    model = _model(_network("vgg11"))
    folder = save_pretrained(model, tmp_path / "m")
    for call in (
        lambda: load(folder, exit=exit),
        lambda: save_pretrained(model, tmp_path / "n", exit=exit),
        lambda: export_pt2(model, tmp_path / "n.pt2", exit=exit),
    ):
        with pytest.raises(ConfigError, match=r"exit must be in 0\.\.3"):
            call()


@pytest.mark.parametrize(
    "change", [lambda f: {}, lambda f: {**f, "exits": f["exits"][:1]}, lambda f: {**f, "classes": "7"}]
)
def test_a_model_without_facts_that_fit_is_not_written(tmp_path, small, change):
    small.facts = change(small.facts)
    with pytest.raises(ConfigError, match=r"model\.facts cannot rebuild"):
        save_pretrained(small, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"model\.facts cannot rebuild"):
        export_pt2(EarlyExitModel(small.scaled, small.bodies, small.heads, {}), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11", "own"])
def test_a_weight_that_changes_between_memory_and_disk_is_found(tmp_path, monkeypatch, name):
    model = _model(_network(name), heads=(LINEAR, SMALL))

    def flipped(state, facts):
        state = {key: value.clone() for key, value in state.items()}
        state["unit0.head.linear_weight"][0, 0] += 1e-3
        return to_safetensors(state, facts)

    monkeypatch.setattr(export, "to_bytes", flipped)
    with pytest.raises(ExportError, match=r"exit 0 read back differs from the model by \d"):
        save_pretrained(model, tmp_path / "m")
    assert not list(tmp_path.iterdir()), "nothing is left of it"


@pytest.mark.parametrize("name", ["vgg11", "own"])
def test_a_file_that_changes_on_the_disk_before_it_is_read_back_is_found(tmp_path, monkeypatch, name):
    model = _model(_network(name), heads=(LINEAR, SMALL))
    write = Staging.write

    def worn(self, name, data):
        return write(self, name, data[:-5] + b"\xff" + data[-4:] if name == "model.safetensors" else data)

    monkeypatch.setattr(Staging, "write", worn)
    with pytest.raises(ExportError, match="sha256"):
        save_pretrained(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_facts_that_rebuild_another_network_are_found(tmp_path, small):
    small.facts["model"]["width"] = 0.25
    with pytest.raises(ExportError, match="expected"):
        save_pretrained(small, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- torch.export ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "exit", "dtype"), [("vgg11", 1, "uint8"), ("resnet18", 2, "float32"), ("own", 3, "uint8")]
)
def test_a_pt2_program_computes_what_the_exit_does_at_any_batch_size(tmp_path, name, exit, dtype):
    model = _model(_network(name), dtype=dtype)
    path = export_pt2(model, tmp_path / "m.pt2", exit=exit)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    program = torch.export.load(path)
    for n in (1, 2, 19):
        x = _images(model, n)
        torch.testing.assert_close(program.module()(x), model(x, exit=exit), rtol=1e-4, atol=1e-5)
    short = model.truncate(exit).state_dict()
    assert sum(t.nbytes for t in program.state_dict.values()) == sum(t.nbytes for t in short.values())


def test_a_pt2_program_that_differs_is_not_kept(tmp_path, monkeypatch, small):
    exported = export._exported

    def changed(model, path):
        with torch.no_grad():
            program = exported(model, path)
            program.state_dict["heads.0.linear_bias"].add_(0.25)
        return program

    # The program shares its weights with the model that it is compared with: give it a model of its own.
    monkeypatch.setattr(export, "_exported", lambda model, path: changed(export._on_cpu(model), path))
    with pytest.raises(ExportError, match=r"differs from the model by 0\.2[45]\d* on 1 images"):
        export_pt2(small, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
    assert export_pt2(small, tmp_path / "m.pt2", verify=False).is_file()


def test_a_pt2_file_that_cannot_be_read_back_is_not_kept(tmp_path, monkeypatch, small):
    write = Staging.write
    monkeypatch.setattr(Staging, "write", lambda self, name, data: write(self, name, data[: len(data) // 2]))
    with pytest.raises(ExportError, match="cannot be read back"):
        export_pt2(small, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_pt2_file_does_not_overwrite_another(tmp_path, small):
    (tmp_path / "m.pt2").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new file"):
        export_pt2(small, tmp_path / "m.pt2")
    assert (tmp_path / "m.pt2").read_text() == "mine"


# --- files that are wrong --------------------------------------------------------------------------------------------


@pytest.fixture(name="written", scope="module")
def fixture_written(tmp_path_factory):
    model = _model(_network("vgg11"), heads=(LINEAR, SMALL))
    return save_pretrained(model, tmp_path_factory.mktemp("export") / "m")


@pytest.fixture(name="folder")
def fixture_folder(tmp_path, written):
    """A folder of its own for each test, to spoil."""
    return Path(shutil.copytree(written, tmp_path / "m"))


def _rewrite(folder, change):
    """Other weights under a digest that fits them: only the checks of keys, shapes and dtypes are left."""
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    state = from_safetensors(path.read_bytes())
    change(state)
    data = to_safetensors(state)
    path.write_bytes(data)
    (folder / "config.json").write_text(json.dumps({**config, "sha256": hashlib.sha256(data).hexdigest()}))


BIAS = "unit1.head.linear_bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(BIAS), rf"1 missing \['{BIAS}'\]"),
        (lambda state: state.update(extra=torch.zeros(3)), r"1 unknown \['extra'\]"),
        (lambda state: state.update({BIAS: torch.zeros(K, 1)}), rf"{BIAS}: expected \({K},\).*found \({K}, 1\)"),
        (lambda state: state.update({BIAS: state[BIAS].half()}), rf"{BIAS}: expected .*float32, found .*float16"),
    ],
)
def test_weights_of_other_keys_shapes_or_dtypes_are_refused(folder, change, message):
    _rewrite(folder, change)
    with pytest.raises(CorruptFileError, match=rf"model\.safetensors: .*{message}"):
        load(folder)


def test_any_changed_byte_of_the_weights_is_found(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for position in (0, 9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CorruptFileError, match=r"model\.safetensors: sha256: expected [0-9a-f]{64}, found"):
            load(folder)
    path.write_bytes(data)
    load(folder)


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", None])
def test_a_weights_file_that_is_no_safetensors_is_refused_by_name(folder, data):
    path = folder / "model.safetensors"
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(CorruptFileError, match=r"model\.safetensors: (expected safetensors|cannot be read)"):
        load(folder)


def _deep(depth):
    return '{"format":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b'"nf-model/1"', b"{", b"\xff\xfe\x00", b'{"format": "nf-model/1"}', b"9" * 5000],
    ids=str,
)
def test_a_config_that_is_no_config_is_refused_by_name(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CorruptFileError, match=r"config\.json: "):
        load(folder)


def test_a_config_too_deep_or_too_large_is_refused(folder):
    (folder / "config.json").write_text(_deep(200_000))
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        load(folder)
    (folder / "config.json").write_text(" " * (5 << 20))
    with pytest.raises(CorruptFileError, match="at most 4194304 bytes"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("format",), "nf-model/2", "format: expected 'nf-model/1', found 'nf-model/2'"),
        (("sha256",), None, "sha256: expected str"),
        (("unknown",), 1, "unknown"),
        (("classes",), "7", "classes: expected int"),
        (("classes",), True, "classes: expected int"),
        (("classes",), K + 1, "and 8 classes, found .* and 7;"),
        (("classes",), 1 << 60, "classes: expected 1.."),
        (("input_dtype",), "float64", "input_dtype: expected uint8 or float32"),
        (("input_shape",), [], "input_shape: expected three"),
        (("input_shape",), [3, 1 << 60, 16], "input_shape: expected three"),
        (("input_shape",), [4, 16, 16], "normalisation.mean|cannot be built"),
        (("stages",), ["a", "b"], "expected"),
        (("stages", 0), "features.1", "stages"),
        (("model", "name"), "vgg12", "model must be one of"),
        (("model", "width"), 1e308, "model: expected"),
        (("model", "input_size"), 1 << 40, "model: expected"),
        (("model",), None, None),
        (("normalisation", "std", 0), 0.0, "normalisation.std"),
        (("normalisation", "mean", 1), float("nan"), "normalisation.mean"),
        (("normalisation", "mean"), [1.0], "normalisation.mean"),
        (("exits",), [], "exits: expected"),
        (("exits", 0, "first"), 1, "exits: expected"),
        (("exits", 1, "last"), 99, "exits: expected"),
        (("exits", 1, "last"), -1, "exits: expected"),
        (("exits", 0, "head", "kind"), "pickle", "head kind must be"),
        (("exits", 1, "head", "width"), 0, "exits.head"),
        (("exits", 1, "head", "width"), 1 << 50, "exits.head"),
        (("exits", 1, "head"), asdict(replace(DEEP, depth=1 << 40)), "exits.head"),
        (("exits", 1, "head", "width"), 13, r"unit1.head.linear_weight: expected \(7, 13\)"),
    ],
    ids=str,
)
def test_a_config_with_one_wrong_field_is_refused_and_the_field_named(folder, field, value, message):
    config = json.loads((folder / "config.json").read_text())
    *path, last = field
    owner = config
    for key in path:
        owner = owner[key]
    owner[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError if message is None else CorruptFileError, match=message):
        load(folder)


def test_a_run_folder_is_checked_as_well(tmp_path, small):
    with pytest.raises(CorruptFileError, match=r"model\.json: chosen: expected 0\.\.1, found 2"):
        load(_run_folder(tmp_path / "chosen", small, chosen=2))
    folder = _run_folder(tmp_path / "run", small, chosen=1)
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace('"chosen": 1', '"chosen": 0'))
    with pytest.raises(CorruptFileError, match=r"model\.json: expected .* sha256 .*--recover"):
        load(folder)
    (folder / "model.json").write_text(text)
    second = next(folder.glob("b001*"))
    second.write_bytes(next(folder.glob("b000*")).read_bytes())
    with pytest.raises(CorruptFileError, match=r"b001-g0003\.safetensors: expected"):
        load(folder)
    second.unlink()
    with pytest.raises(CorruptFileError, match=r"b001-g0003\.safetensors is missing"):
        load(folder)


def test_a_run_that_is_not_finished_has_no_model(tmp_path, small):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin("0" * 64, "1" * 64, {}, [])
    with pytest.raises(ConfigError, match="expected the folder of a finished run, found one at block 1"):
        load(tmp_path / "run")


def test_a_path_that_holds_no_model_is_an_error(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "plan.json"):
        with pytest.raises(ConfigError, match="found neither"):
            load(path)


def test_a_device_that_is_not_there_is_an_error(folder):
    with pytest.raises(ConfigError, match="map_location must be a device"):
        load(folder, map_location="gpu")
    with pytest.raises(NoDeviceError, match="map_location is cuda:77"):
        load(folder, map_location="cuda:77")

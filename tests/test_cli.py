"""The command line from arguments to exit codes; results against the library and each other."""

import contextlib
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nf_engine
from nf_engine import cli, engine, errors, predictions
from nf_engine.records import Plan, Profile
from nf_engine.sources import load_split

ROOT = Path(__file__).parents[1]
EXIT_CODES = {  # the one table of exit codes
    2: {"ConfigError"},
    3: {"BudgetError", "InfeasibleBudgetError"},
    4: {"BudgetExceededError"},
    6: {"ResumeMismatchError"},
    7: {"NonFiniteError"},
    8: {"CheckFailedError", "ExportError"},
    65: {"UnsupportedModelError", "DataError", "CorruptFileError"},
    69: {"MissingExtraError", "NoDeviceError"},
    70: {"NFError"},
    74: {"StorageError", "CacheError"},  # and the kinds of CacheError
    75: {"DiskFullError"},
    76: {"DeviceLostError", "PeerLostError"},
    77: {"RunLockedError", "PermissionRefusedError"},
}
SMALL = ["--model", "vgg11", "--width", "0.125"]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in nf_engine.TrainConfig.__dataclass_fields__:
        monkeypatch.delenv(f"NF_{name.upper()}", raising=False)


def run(*arguments):
    """Exit code, stdout and stderr of one command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def config_of(*arguments):
    code, out, err = run("train", *arguments, "--print-config")
    assert (code, err) == (0, "")
    return tomllib.loads(out)


def family(kind):
    return {kind}.union(*(family(k) for k in kind.__subclasses__()))


# --- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(family(errors.NFError), key=lambda k: k.__name__), ids=lambda k: k.__name__)
def test_every_error_ends_with_its_code_of_the_table(monkeypatch, kind):
    name = "CacheError" if issubclass(kind, errors.CacheError) else kind.__name__
    (expected,) = [code for code, names in EXIT_CODES.items() if name in names]

    def fail(*_):
        raise error

    error = kind.__new__(kind)
    error.args = ("the message",)
    monkeypatch.setattr(cli, "settings", fail)
    code, out, err = run("plan", *SMALL)

    assert code == kind.exit_code == expected
    assert (out, err.startswith("error: ")) == ("", True)
    assert "Traceback" not in err


def test_an_error_of_ours_shows_its_traceback_and_ends_with_70(monkeypatch):
    monkeypatch.setattr(cli, "settings", lambda *_: 1 // 0)
    code, out, err = run("plan", *SMALL)

    assert (code, out) == (70, "")
    assert "ZeroDivisionError" in err
    assert "report it" in err


def test_an_interrupt_ends_with_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "settings", interrupt)
    assert run("plan", *SMALL)[0] == 130


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["fly"], "fly"),
        ([], "Usage"),
        (["train", "--wings", "2"], "--wings"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--data", "digits"], "--model is missing"),
        (["train", *SMALL], "--data is missing"),
        (["train", *SMALL, "--data", "digitz"], "digits"),
        (["train", *SMALL, "--data", "synthetic:40", "--progress", "loud"], "loud"),
        (["plan", "--model", "vgg12"], "vgg11"),
        (["plan", *SMALL, "--input", "32x32"], "32x32"),
        (["plan", *SMALL, "--set", "epochs"], "NAME=VALUE"),
        (["plan", *SMALL, "--memory-budget", "-3"], "-3"),
        (["profile", *SMALL, "--batch-sizes", "8,16"], "three"),
        (["profile", *SMALL, "--batch-sizes", "8,a,16"], "8,a,16"),
        (["export", "nowhere", "--format", "onnx"], "onnx"),
        (["export", "nowhere", "--exit", "last"], "last"),
        (["export", "nowhere"], "nowhere"),
        (["classify", "nowhere"], "--data"),
        (["classify", "nowhere", "image.png", "--data", "digits"], "--data"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_what_is_wrong(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    assert word in err
    assert list(tmp_path.iterdir()) == []


def test_missing_data_ends_with_65_and_a_missing_device_with_69(tmp_path):
    assert run("train", *SMALL, "--data", f"npz:{tmp_path / 'none.npz'}")[0] == 65
    if not torch.cuda.is_available():
        code, _, err = run("train", *SMALL, "--data", "synthetic:400", "--device", "cuda")
        assert code == 69
        assert "cuda" in err


def test_a_budget_that_nothing_fits_ends_with_3_and_suggests_a_larger_one():
    code, out, err = run("plan", *SMALL, "--memory-budget", "1MiB")

    assert (code, out) == (3, "")
    assert int(err.split("memory_budget=")[1].split()[0]) > 1 << 20


def test_help_usage_errors_and_settings_need_no_torch():
    code = (
        "import sys; from nf_engine.cli import main\n"
        "lines = '--help', 'train --help', 'train --wings', 'train --print-config', 'plan --set epoch=1', '--version'\n"
        "codes = [main(line.split()) for line in lines]\n"
        "print('codes', codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "codes [0, 0, 2, 0, 2, 0] False"


def test_python_m_nf_engine_is_the_command():
    done = subprocess.run([sys.executable, "-m", "nf_engine", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"nf-engine {nf_engine.__version__}")

    done = subprocess.run([sys.executable, "-m", "nf_engine", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2


def test_every_public_name_is_there_and_plan_and_profile_are_functions():
    for name in nf_engine.__all__:
        assert getattr(nf_engine, name) is not None
    assert callable(nf_engine.plan)
    assert callable(nf_engine.profile)
    with pytest.raises(AttributeError, match="flight"):
        nf_engine.flight  # noqa: B018


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_flag_beats_set_beats_the_environment_beats_the_file_beats_the_default(tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text("epochs = 3\nlr = 0.3\nseed = 3\nmomentum = 0.3\n")
    monkeypatch.setenv("NF_EPOCHS", "4")
    monkeypatch.setenv("NF_LR", "0.4")
    monkeypatch.setenv("NF_SEED", "4")
    found = config_of("-c", file, "--set", "lr=0.5", "--set", "epochs=5", "--epochs", "6")

    default = nf_engine.TrainConfig()
    assert (found["epochs"], found["lr"], found["seed"], found["momentum"]) == (6, 0.5, 4, 0.3)
    assert found["weight_decay"] == default.weight_decay


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("memory_budget=64MiB", "64MiB"),
        ("memory_budget=0.5", 0.5),
        ("memory_budget=67108864", 67108864),
        ("memory_budget=1.0", 1.0),
        ("memory_budget=700e6", "700e6"),
        ("max_cache_bytes=3e9", "3e9"),
        ('memory_budget="64MiB"', "64MiB"),
        ("memory-budget=64MiB", "64MiB"),
        ('split_points=["a", "b"]', ["a", "b"]),
    ],
)
def test_a_set_value_is_toml_and_a_bare_word_is_text(text, value):
    assert config_of("--set", text)[text.partition("=")[0].replace("-", "_")] == value


def test_flags_that_are_numbers_or_text_keep_their_kind():
    found = config_of("--memory-budget", "0.25", "--batch-size", "32")
    assert (found["memory_budget"], found["batch_size"]) == (0.25, 32)
    found = config_of("--memory-budget", "1GiB", "--batch-size", "auto")
    assert (found["memory_budget"], found["batch_size"]) == ("1GiB", "auto")


@pytest.mark.parametrize("source", ["flag", "set", "environment"])
def test_a_budget_with_an_exponent_means_bytes(monkeypatch, source):
    arguments = {"flag": ["--memory-budget", "16e6"], "set": ["--set", "memory_budget=16e6"], "environment": []}
    if source == "environment":
        monkeypatch.setenv("NF_MEMORY_BUDGET", "16e6")
    code, out, err = run("plan", *SMALL, *arguments[source], "--json")

    assert (code, err) == (0, "")
    assert json.loads(out)["budget"] == 16_000_000


def test_a_budget_just_above_a_whole_share_is_refused_as_bytes():
    code, _, err = run("plan", *SMALL, "--memory-budget", "1.5")

    assert code == 2
    assert "at least 1 MiB" in err


@pytest.mark.parametrize("source", ["set", "environment", "file"])
def test_an_unknown_setting_is_refused_with_the_closest_name(tmp_path, monkeypatch, source):
    arguments = []
    if source == "set":
        arguments = ["--set", "epoch=3"]
    elif source == "environment":
        monkeypatch.setenv("NF_EPOCH", "3")
    else:
        (tmp_path / "c.toml").write_text("epoch = 3\n")
        arguments = ["-c", tmp_path / "c.toml"]
    code, out, err = run("train", *arguments, "--print-config")

    assert (code, out) == (2, "")
    assert "did you mean epochs" in err
    if source == "environment":
        assert "NF_EPOCH=3" in err


def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path):
    (tmp_path / "c.toml").write_text("epochs = = 3\n")
    code, _, err = run("train", "-c", tmp_path / "c.toml", "--print-config")

    assert code == 2
    assert "c.toml is not valid TOML" in err


def test_variables_that_others_read_are_no_settings(monkeypatch):
    """All that the package and its C++ ask the environment for, and one with a suffix of the user's."""
    root = Path(cli.__file__).parents[1]
    asked = r'(?:environ\.get|getenv)\(\s*"(NF_[A-Z_]+)"'
    files = [*root.glob("nf_engine/*.py"), *root.glob("csrc/[!t]*/*.cpp")]
    found = {name for file in files for name in re.findall(asked, file.read_text())}
    assert {"NF_GRAPHS", "NF_KERNELS", "NF_TESTING", "NF_LIBCUDA", "NF_DEBUG_POISON"} <= found
    for name in (*found, "NF_FAULT_COUNT", "NF_DATA_CIFAR10"):
        monkeypatch.setenv(name, "anything")
    config_of()


def test_variables_are_checked_together(monkeypatch):
    monkeypatch.setenv("NF_MIN_BATCH_SIZE", "2000")
    monkeypatch.setenv("NF_MAX_BATCH_SIZE", "4000")
    found = config_of()
    assert (found["min_batch_size"], found["max_batch_size"]) == (2000, 4000)
    monkeypatch.setenv("NF_MAX_BATCH_SIZE", "1000")
    code, _, err = run("train", "--print-config")
    assert code == 2
    assert "min_batch_size 2000 is above max_batch_size 1000" in err
    monkeypatch.setenv("NF_GRAPHSX", "off")
    assert "NF_GRAPHSX=off" in run("train", "--print-config")[2]


# --- results --------------------------------------------------------------------------------------------------------


def test_plan_prints_the_plan_of_the_library(monkeypatch):
    arguments = [*SMALL, "--classes", 7, "--samples", 900, "--device-memory", "64MiB", "--set", "memory_budget=0.5"]
    code, out, _ = run("plan", *arguments, "--json")
    assert code == 0
    made = Plan.from_json(out)
    model = cli._network("vgg11", 0.125, 7, (3, 32, 32), 0)
    assert made == nf_engine.plan(model, (3, 32, 32), samples=900, memory_budget=32 << 20, device_memory="64MiB")
    monkeypatch.setattr(engine, "plan", lambda *_, **__: made)
    assert run("plan", *arguments)[1] == made.table() + "\n"


def test_profile_prints_every_stage_for_the_sizes_asked_for():
    code, out, _ = run("profile", *SMALL, "--input", "1x16x16", "--batch-sizes", "2,4,8", "--no-time", "--json")
    assert code == 0
    found = Profile.from_json(out)
    assert (found.input_shape, found.batch_sizes, found.device) == ((1, 16, 16), (2, 4, 8), "none")
    assert found.stages[-1].output_shape[0] == 64  # an eighth of 512


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny training through the command line: its JSON, and what stood on stderr."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = [*SMALL, "--data", "synthetic:400", "--output-dir", folder, "--memory-budget", "4MiB"]
    arguments += ["--batch-size", "16", "--epochs", "2", "--cache", "ram", "--progress", "lines", "--json"]
    code, out, err = run("train", *arguments, "--set", "warmup_epochs=0", "--set", "val_fraction=0.2")
    assert code == 0, err
    return json.loads(out), err


def images_of(spec):
    test = load_split(spec)[1]
    return test.batch(torch.arange(len(test)))


def test_train_stays_in_the_budget_and_tests_the_exit_that_it_chose(trained):
    result, err = trained
    images, labels = images_of("synthetic:400")
    with torch.no_grad():
        logits = nf_engine.load(result["run_dir"], exit=result["best_exit"])(images)

    assert result["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-6)
    assert len(result["exits"]) == sum(len(b["units"]) for b in result["plan"]["blocks"]) >= 2
    assert all(m["allocated"] <= result["plan"]["budget"] == 4 << 20 for m in result["memory"])
    assert json.loads((Path(result["run_dir"]) / "exits.json").read_text())["chosen"] == result["best_exit"]
    assert err.count("epoch 1/2") == len(result["plan"]["blocks"])


def test_train_as_text_ends_with_the_next_command_to_type(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 2)  # gray, without a test split
    arguments = [*SMALL, "--data", f"npz:{tmp_path / 'd.npz'}", "--output-dir", tmp_path / "run", "--epochs", "1"]
    code, out, err = run("train", *arguments, "--progress", "none", "--set", "val_fraction=0.2", "--batch-size", "8")
    assert (code, err) == (0, "")
    rows = out.splitlines()

    assert "<- chosen" in out
    assert "test accuracy" not in out
    assert any(row.startswith("budget ") for row in rows)
    assert rows[-1] == f"next: nf-engine export {tmp_path / 'run'}"
    code, out, _ = run(*rows[-1].split()[2:3], rows[-1].split()[-1])
    assert code == 0
    assert nf_engine.load(tmp_path / "run.model").facts["input_shape"] == [3, 32, 32]


@pytest.mark.parametrize("kind", ["safetensors", "pt2"])
def test_export_writes_a_copy_that_computes_the_same(trained, tmp_path, kind):
    result = trained[0]
    target = tmp_path / "copy.pt2"
    code, out, err = run("export", result["run_dir"], "--exit", 0, "--format", kind, "--out", target, "--json")
    assert code == 0, err
    facts = json.loads(out)
    images, _ = images_of("synthetic:400")
    copy = nf_engine.load(target) if kind == "safetensors" else torch.export.load(target).module()
    with torch.no_grad():
        expected = nf_engine.load(result["run_dir"], exit=0)(images)
        torch.testing.assert_close(copy(images), expected, rtol=1e-4, atol=1e-5)

    files = list(target.iterdir()) if target.is_dir() else [target]
    assert facts["bytes"] == sum(len(f.read_bytes()) for f in files)
    assert facts["parameters"] == result["exits"][0]["parameters"]
    assert 0 <= facts["max_difference"] < 1e-4
    assert run("export", result["run_dir"], "--format", kind, "--out", target)[0] == 2  # never over an older one


def test_a_damaged_export_is_refused_with_65(trained, tmp_path):
    run("export", trained[0]["run_dir"], "--out", tmp_path / "model", "--no-verify")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")

    assert run("classify", tmp_path / "model", "--data", "synthetic:400")[0] == 65


def test_classify_gives_the_accuracy_that_train_gave(trained):
    result = trained[0]
    code, out, _ = run("classify", result["run_dir"], "--data", "synthetic:400", "--json")
    found = json.loads(out)

    assert code == 0
    assert found["accuracy"] == result["test_accuracy"]
    assert (found["samples"], found["split"], len(found["predictions"])) == (80, "test", 10)
    code, out, _ = run("classify", result["run_dir"], "--data", "synthetic:400", "--limit", 3)
    assert (code, len(out.splitlines())) == (0, 4)
    assert "of 3 test images" in out


def test_images_are_brought_to_squares_alone():
    model = SimpleNamespace(facts={"input_shape": (3, 64, 32)})
    with pytest.raises(errors.DataError, match=r"has images \(3, 32, 32\), the model takes \(3, 64, 32\); resize them"):
        predictions.classify_split(model, "synthetic:400", None, "fixed:0")


def test_a_policy_counts_the_exits_of_the_run(trained):
    result = trained[0]
    arguments = ["classify", result["run_dir"], "--data", "synthetic:400", "--json", "--policy"]
    last = len(result["exits"]) - 1
    for policy, shares in ((f"fixed:{last}", [0.0] * last + [1.0]), ("confidence:0.000001", [1.0] + [0.0] * last)):
        code, out, _ = run(*arguments, policy)
        assert (code, json.loads(out)["coverage"]) == (0, shares)
    assert run(*arguments, "fixed:99")[0] == 2


def test_image_files_are_classified_as_the_arrays_that_they_hold(trained, tmp_path):
    image = pytest.importorskip("PIL.Image")
    images, _ = images_of("synthetic:400")
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for file, pixels in zip(files, images, strict=False):
        image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    code, out, _ = run("classify", trained[0]["run_dir"], *files, "--json")
    rows = json.loads(out)["predictions"]
    expected = nf_engine.load(trained[0]["run_dir"]).predict(images[:3])

    assert code == 0
    assert [row["image"] for row in rows] == [str(f) for f in files]
    assert [row["prediction"] for row in rows] == expected.labels.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(expected.probabilities.amax(1).tolist(), abs=1e-5)
    (tmp_path / "text.png").write_text("no image")
    assert run("classify", trained[0]["run_dir"], tmp_path / "text.png")[0] == 65


def test_doctor_reports_this_machine_and_measures_its_disk(tmp_path):
    code, out, err = run("doctor", "--folder", tmp_path, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)

    assert found["versions"]["torch"] == torch.__version__
    assert found["disk"]["write"] > 0
    assert found["disk"]["read"] > 0
    assert bool(found["cuda"]["devices"]) == torch.cuda.is_available()
    assert found["kernels"].startswith("reference path") or torch.cuda.is_available()
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_is_wrong_with_a_folder_and_goes_on(tmp_path):
    code, out, _ = run("doctor", "--folder", tmp_path / "none")
    assert code == 0
    assert "No such file" in out
    assert "python" in out

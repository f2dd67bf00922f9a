"""README: its quick start runs, its file tree, exit codes and commands are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer

import nf_engine
from nf_engine import cli, errors

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def tree() -> list[str]:
    """Paths of the files that the README lists: folders end with a slash, files stand below, two spaces in."""
    (block,) = [b for b in fenced("text") if b.startswith("nf_engine/\n")]
    found, folder = [], ""
    for line in block.splitlines():
        if line.startswith("  "):
            found += [folder + name for name in re.split(r" {2,}", line.strip())[0].split()]
        else:
            folder = line
    return found


def test_the_file_tree_is_the_one_on_disk():
    paths = [path for top in ("nf_engine", "kernels") for path in (ROOT / top).rglob("*.py*")]
    files = [path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts]
    files += [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".txt")]
    assert sorted(tree()) == sorted(files)


def test_the_exit_codes_are_those_of_the_errors():
    rows = re.findall(r"^\| (\d+) \|[^|]*\| ([^|]*)\|$", TEXT, re.MULTILINE)
    listed = {name.strip(): int(code) for code, names in rows for name in names.split(",") if name.strip()}
    assert listed.pop("anything else") == 70
    assert listed == {name: getattr(errors, name).exit_code for name in errors.__all__}


def test_the_commands_exist():
    verbs = set(re.findall(r"^nf-engine ([a-z]+)", "".join(fenced("sh")), re.MULTILINE))
    known = typer.main.get_command(cli.app).commands
    assert {"plan", "train", "export", "classify", "doctor"} <= verbs <= set(known)
    benches = re.findall(r"python -m bench\.(\w+)", TEXT)
    assert benches
    for name in benches:
        assert (ROOT / "bench" / f"{name}.py").is_file()


def test_the_options_of_the_commands_exist():
    known = typer.main.get_command(cli.app).commands
    for verb, rest in re.findall(r"^nf-engine ([a-z]+)(.*)$", "".join(fenced("sh")), re.MULTILINE):
        options = {name for parameter in known[verb].params for name in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options


@pytest.mark.timeout(300)
def test_the_quick_start_runs_and_stays_inside_its_budget(tmp_path, monkeypatch, capsys):
    (code,) = fenced("python")
    assert len([line for line in code.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    blocks = re.findall(r"^block (\d): predicted (\d+), measured (\d+), budget (\d+) bytes$", printed, re.MULTILINE)
    assert len(blocks) >= 2
    for _, predicted, measured, budget in (map(int, b) for b in blocks):
        assert 0.9 * measured <= predicted <= budget
        assert 0 < measured <= budget
    assert "<- chosen" in printed
    model = nf_engine.load("model")
    assert model.exits == 1
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_the_tables_are_those_of_the_result_files():
    from bench.tables import filled

    assert filled(TEXT) == TEXT, "run `python -m bench.tables`"

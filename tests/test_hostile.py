"""Hostile files: the corpus of hostile.py through every door, in a process that may not run what it reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "corpus"
    subprocess.run([sys.executable, ROOT / "tests" / "hostile.py", path], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="module")
def reports(corpus) -> list[dict[str, Any]]:
    """What comes of each case at each door, and first of the sound twins."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "hostile_reader.py", corpus]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def hostile(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [report for report in reports if not report["case"].startswith("sound-")]


def test_the_sound_twins_are_read(reports):
    """Else a refusal would say nothing. This run holds no model, hence none is loaded from it."""
    sound = {r["door"]: r["error"] for r in reports if r["case"].startswith("sound-")}
    assert {door for door, error in sound.items() if error} == {"Manifest.parse", "nf_engine.load"}
    assert len(sound) == 8


def test_every_hostile_file_is_refused_by_name_at_once_and_nothing_is_written(reports, corpus, figure):
    cases = hostile(reports)
    assert len({case["case"] for case in cases}) == len(list(corpus.iterdir())) - 5 >= 200
    bad = []
    for case in cases:
        good = case["family"] and case["named"] and case["printable"] and case["length"] < 2000
        good = good and case["seconds"] < 1 and case["memory"] < 64 * MIB
        if not (good and case["unchanged"] and case["untouched"] and case["children"] == 0):
            bad.append(case)
    figure(
        "P10",
        "hostile files x doors: refused by name, < 1 s, < 64 MiB, nothing written",
        len(cases) - len(bad),
        len(cases),
    )
    assert bad == []


def test_reading_hostile_files_runs_no_code(reports, corpus, figure):
    cases = hostile(reports)
    quiet = [case for case in cases if case["events"] == []]
    figure("P12", "hostile files x doors: no exec, compile, import, unpickling, process", len(quiet), len(cases))
    assert [case["events"] for case in cases if case["events"]] == []
    assert not list(corpus.rglob("*pwned*"))
    assert not (ROOT / "pwned").exists()


def test_the_hook_sees_what_a_pickle_would_do(corpus, tmp_path):
    """The same hook, with a reader that loads the pickles of the corpus."""
    code = (
        "import pickle, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import hostile_reader as h\n"
        "sys.addaudithook(h.guard)\n"
        "for p in sorted(Path(sys.argv[1]).glob('state-* as pickle *')):\n"
        "    r = h.attempt(p, lambda p: pickle.loads((p / 'state.safetensors').read_bytes()))\n"
        "    print(r['error'], len(r['events']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, corpus]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == ["RuntimeError 1"] * 6, done.stderr
    assert not (tmp_path / "pwned").exists()

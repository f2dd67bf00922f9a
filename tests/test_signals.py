"""Whole runs against SIGINT, SIGTERM and SIGHUP: the first commits and ends a run, the second ends the process.

Afterwards the same call ends bit for bit as a run that was not disturbed. The runs: run_scenes.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import run_scenes as scenes

from nf_engine.interrupt import SIGNALS, Interrupt, Stopped

Scene = scenes.Scene
Figure = Callable[[str, str, int, int], None]
SCENES = (
    Scene(fields={"checkpoint_minutes": 10.0, "augment": "crop-flip", "augment_copies": 2}),
    Scene("ram", fields={"checkpoint_minutes": 10.0}),
    Scene("recompute", units=2, fields={"checkpoint_minutes": 10.0, "optimizer": "adamw"}),
)
MOST = 10.0  # seconds from a signal to the end


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """The handlers that a program starts with; a test run in the background has them ignored."""
    before = {number: signal.signal(number, handler) for number, handler in scenes.DEFAULTS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    yield from scenes.programs()


@pytest.fixture(scope="module")
def undisturbed(program: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], float]]:
    """What each scene ends as, and its seconds."""
    whole = {}
    for scene in SCENES:
        folder = tmp_path_factory.mktemp("whole") / "run"
        ended = program(folder, scene)
        whole[repr(scene)] = scenes.result_of(folder, ended), ended.facts["took"]
    return whole


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_signal_commits_and_ends_a_run_that_the_same_call_goes_on_with(
    program: Any, undisturbed: Any, tmp_path: Path, figure: Figure, number: signal.Signals, times: int
) -> None:
    draw, stopped = random.Random(number), 0
    for k in range(times):
        scene = SCENES[k % len(SCENES)]
        expected, seconds = undisturbed[repr(scene)]
        folder = tmp_path / f"run{k}"
        ended = program(folder, scene, begin="handlers", signals=[(draw.uniform(0, seconds), int(number))])
        assert ended.seconds < MOST
        scenes.contents(folder)
        if ended.result == number.name:  # it came when the run was done and its handlers were those from before
            assert scenes.manifest_of(folder)["done"]
        else:
            assert ended.result in ("interrupted", "completed"), ended
            assert ended.facts["left"] == {}
        stopped += ended.result == "interrupted"
        if ended.result != "completed":
            ended = program(folder, scene)
        assert scenes.result_of(folder, ended) == expected
        shutil.rmtree(folder)
    assert stopped >= times // 4, "the rest came too late"
    figure("P19", "SIGINT, SIGTERM, SIGHUP at any time: committed within 10 s and resumed, or done", times, times)


# A commit that takes two seconds in the operating system: the second signal comes while it lasts.
SLOW_COMMIT = "op=fsync; path=c0*; n=1; mode=delay:2000"


@pytest.mark.parametrize("second", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("first", SIGNALS, ids=lambda n: n.name)
def test_a_second_signal_ends_the_process_by_itself_and_the_last_commit_stands(
    program: Any, undisturbed: Any, tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    scene, folder = SCENES[0], tmp_path / "run"
    second_signal = {"begin": "stop", "signals": [(0.3, int(second))]}
    ended = program(folder, scene, stop=(1, 2, int(first)), fault=SLOW_COMMIT, **second_signal)
    assert ended.result == second.name  # a shell says 128 + its number
    assert ended.seconds < (MOST if second == signal.SIGINT else 1.5)  # Python's handler waits for the call
    assert scenes.position(folder) == (1, 0, 0), "the commit under way did not come to its end"
    scenes.contents(folder)
    assert scenes.result_of(folder, program(folder, scene)) == undisturbed[repr(scene)][0]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_handlers_are_put_back_after_the_end_an_error_and_a_signal() -> None:
    before = handlers()
    with Interrupt() as interrupt:
        assert all(a != b for a, b in zip(handlers(), before, strict=True))
        interrupt.check()
    assert handlers() == before
    with pytest.raises(ValueError, match="of the training"), Interrupt():
        raise ValueError("of the training")
    assert handlers() == before
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
        assert handlers() == before, "the next signal does what it would do without us"
        assert interrupt.reason == "SIGHUP"
        with pytest.raises(Stopped, match="SIGHUP"):
            interrupt.check()
    assert handlers() == before


def test_a_second_signal_of_another_kind_goes_to_its_own_handler() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert (interrupt.reason, got) == ("SIGINT", [signal.SIGTERM])
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_signals_before_the_interpreter_looks_count_as_two() -> None:
    got: list[int] = []
    before = [signal.signal(number, lambda number, _: got.append(number)) for number in SIGNALS]
    try:
        with Interrupt() as interrupt:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for number in (signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            assert interrupt.reason in ("SIGTERM", "SIGHUP")
            assert sorted([signal.Signals[interrupt.reason], *got]) == [signal.SIGHUP, signal.SIGTERM]
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.reason is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_not_touched_outside_the_main_thread() -> None:
    before, found = handlers(), []

    def enter() -> None:
        with Interrupt(max_time=0.0) as interrupt:
            found.extend([*handlers(), interrupt.reason])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [*before, "max_time"]


# ---- The command line --------------------------------------------------------------------------------------------

COMMAND = [
    *(sys.executable, "-m", "nf_engine", "train", "--model", "vgg11", "--width", "0.125", "--data", "synthetic:400"),
    *("--memory-budget", "8MiB", "--partition", "layerwise", "--batch-size", "16", "--epochs", "3", "--cache", "disk"),
    *("--set", "checkpoint_minutes=0", "--set", "val_fraction=0.2", "--device", "cpu", "--progress", "none", "--json"),
]


def start(folder: Path, before: list[str] | None = None) -> subprocess.Popen[str]:
    """The command; before: what it is run by."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*(before or []), *COMMAND, "--output-dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def await_step(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until it has committed inside a block."""
    end = time.monotonic() + 120
    while not (folder / "MANIFEST.json").exists() or scenes.position(folder) <= (0, 0, 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no commit came"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_signal_and_after_a_kill(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    expected = json.loads(whole.communicate(timeout=300)[0])
    assert whole.returncode == 0
    weights = {k: v for k, v in scenes.contents(tmp_path / "whole").items() if k.startswith(("block", "metrics"))}
    for number, code in ((signal.SIGINT, 75), (signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGKILL, -9)):
        folder = tmp_path / number.name
        process = start(folder)
        await_step(folder, process)
        sent = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, ""), err
        assert time.monotonic() - sent < MOST
        assert scenes.position(folder)[0] < 3
        process = start(folder)
        found = json.loads(process.communicate(timeout=300)[0])
        assert process.returncode == 0
        assert found["test_accuracy"] == expected["test_accuracy"]
        assert [(e["accuracy"], e["loss"]) for e in found["exits"]] == [
            (e["accuracy"], e["loss"]) for e in expected["exits"]
        ]
        assert {k: scenes.contents(folder)[k] for k in weights} == weights
        assert scenes.names_in(folder) <= scenes.listed(folder)


@pytest.mark.slow
def test_a_second_signal_ends_the_command_with_128_and_its_number(tmp_path: Path) -> None:
    """As a shell says it: through one, with a commit that hangs."""
    for number in SIGNALS:
        folder = tmp_path / number.name
        process = start(folder, ["env", "NF_TESTING=1", f"NF_FAULT={SLOW_COMMIT}".replace("n=1", "n=4")])
        await_step(folder, process)
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (-number, 128 + number)
        scenes.contents(folder)

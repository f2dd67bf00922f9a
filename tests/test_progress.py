"""Progress against lines written out by hand: fake events in, text out."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nf_engine import progress
from nf_engine.errors import ConfigError
from nf_engine.job import BlockMemory
from nf_engine.records import BlockPlan, Bounds, CachePlan, HeadSpec, Plan, UnitPlan
from nf_engine.worker import EpochReport, Score

MIB = 1 << 20


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_plan(seconds=(1.0, 3.0), epochs=2):
    def block(first, last, tier, predicted):
        units = tuple(UnitPlan(k, k, HeadSpec("linear"), "reference", MIB) for k in range(first, last + 1))
        return BlockPlan(units, 32, 0.1, 3 * MIB, predicted, CachePlan(tier, "fp16", 1, 0, {}, "for the test"))

    blocks = (block(0, 1, "images", seconds[0]), block(2, 2, "ram", seconds[1]))
    bounds = Bounds(32, 8 * MIB, 6 * MIB, 3 * MIB, MIB)
    stages = ("one", "two", "three")
    return Plan(
        "toy",
        "windows",
        "cpu",
        4 * MIB,
        4 * MIB,
        0,
        640,
        epochs,
        stages,
        blocks,
        bounds,
        0,
        None,
        ("a note of the plan",),
    )


def play(observer, plan):
    """A whole training of two blocks with two epochs each; the first block has two units."""
    observer.planned(plan)
    for number, block in enumerate(plan.blocks):
        observer.block_started(number, block)
        losses = (1.5, 0.25) if number == 0 else (0.125,)
        for epoch in range(plan.epochs):
            for step in range(20):
                observer.step(epoch * 20 + step, 40)
            observer.epoch_ended(EpochReport(number, epoch, losses, 640, 2.0), 0.5, MIB, 2 * MIB)
        scores = [Score(0.75 + k / 10, 0.5) for k in range(len(losses))]
        observer.block_ended(number, scores, BlockMemory(number, 3 * MIB, 2 * MIB, 0, 0))


def test_lines_state_the_plan_the_epochs_and_the_blocks(capsys):
    play(progress.make_observer("lines"), a_plan())

    out, err = capsys.readouterr()
    assert out == ""  # stdout belongs to the result
    lines = err.splitlines()
    assert lines[0].split() == ["block", "unit", "stages", "head", "step", "batch", "lr", "peak", "inputs"]
    assert "note: a note of the plan" in lines
    assert lines[lines.index("note: a note of the plan") + 1 :] == [
        "block 1/2: 2 units, batch 32, inputs from images",
        # 2 s where 1 was predicted: one more such epoch, and two of 3 s predicted, all doubled
        "block 1/2, epoch 1/2: loss 0.250 (1.500, 0.250), accuracy about 50.0%, 320 images/s, "
        "memory 1.00 MiB, peak 2.00 MiB, budget 4.00 MiB, ETA 0:14",
        "block 1/2, epoch 2/2: loss 0.250 (1.500, 0.250), accuracy about 50.0%, 320 images/s, "
        "memory 1.00 MiB, peak 2.00 MiB, budget 4.00 MiB, ETA 0:12",
        "block 1/2 done: accuracy at exit 0: 75.00%, 1: 85.00%; peak 2.00 MiB, predicted 3.00 MiB, budget 4.00 MiB",
        "block 2/2: 1 unit, batch 32, inputs from ram",
        # 6 s so far where 1 + 1 + 3 were predicted
        "block 2/2, epoch 1/2: loss 0.125, accuracy about 50.0%, 320 images/s, "
        "memory 1.00 MiB, peak 2.00 MiB, budget 4.00 MiB, ETA 0:04",
        "block 2/2, epoch 2/2: loss 0.125, accuracy about 50.0%, 320 images/s, "
        "memory 1.00 MiB, peak 2.00 MiB, budget 4.00 MiB, ETA 0:00",
        "block 2/2 done: accuracy at exit 2: 75.00%; peak 2.00 MiB, predicted 3.00 MiB, budget 4.00 MiB",
    ]


def test_without_predicted_seconds_all_epochs_count_the_same(capsys):
    play(progress.make_observer("lines"), a_plan(seconds=(None, None), epochs=2))

    ends = [line.rpartition("ETA ")[2] for line in capsys.readouterr().err.splitlines() if "ETA" in line]
    assert ends == ["0:06", "0:04", "0:02", "0:00"]


def test_a_long_time_left_has_hours(capsys):
    observer = progress.make_observer("lines")
    observer.planned(a_plan(seconds=(1.0, 1.0), epochs=2))
    observer.epoch_ended(EpochReport(0, 0, (1.0,), 640, 1241.0), 0.5, 0, 0)

    assert capsys.readouterr().err.splitlines()[-1].endswith("ETA 1:02:03")


def test_none_says_nothing(capsys):
    play(progress.make_observer("none"), a_plan())

    assert capsys.readouterr() == ("", "")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="auto, lines, none, got 'bars'"):
        progress.make_observer("bars")


@pytest.mark.parametrize(
    ("terminal", "variables", "kind"),
    [
        (True, {"TERM": "xterm"}, progress.Bar),
        (False, {"TERM": "xterm"}, progress.Lines),
        (True, {"TERM": "dumb"}, progress.Lines),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, progress.Lines),
    ],
)
def test_auto_draws_a_bar_on_a_terminal_only(monkeypatch, terminal, variables, kind):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())

    assert type(progress.make_observer("auto")) is kind


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_the_bar_keeps_the_same_lines_above_it(screen):
    plain = io.StringIO()
    play(progress.Lines(plain), a_plan())
    play(progress.Bar(screen), a_plan())

    shown = screen.getvalue()
    for line in plain.getvalue().splitlines():
        assert line in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0  # the cursor was hidden, and is visible at the end


def test_an_exception_in_the_middle_of_a_block_leaves_the_cursor_visible(screen):
    observer = progress.Bar(screen)
    observer.planned(a_plan())
    observer.block_started(0, a_plan().blocks[0])
    observer.step(1, 40)

    shown = screen.getvalue()
    assert "block 1/2" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_the_bar_is_drawn_four_times_a_second_at_most_and_shows_the_share_done(screen, monkeypatch):
    observer = progress.Bar(screen)
    observer.planned(a_plan())
    observer.block_started(0, a_plan().blocks[0])
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    before = len(screen.getvalue())
    for step in range(10_001):
        observer.step(step, 20_000)
        now[0] += 0.001

    drawn = screen.getvalue()[before:]
    assert 35 <= drawn.count("block 1/2") <= 41  # in ten seconds
    assert " 49%" in drawn
    assert " 51%" not in drawn


@pytest.mark.parametrize("kind", [progress.Lines, progress.Bar])
def test_a_step_costs_less_than_five_microseconds(screen, kind):
    observer = kind(screen)
    observer.planned(a_plan())
    observer.block_started(0, a_plan().blocks[0])
    costs = []
    for _ in range(5):
        started = time.process_time()
        for step in range(20_000):
            observer.step(step, 20_000)
        costs.append((time.process_time() - started) / 20_000)

    assert min(costs) < 5e-6


def test_importing_progress_imports_neither_rich_nor_torch():
    code = "import sys, nf_engine.progress; print(sorted({'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

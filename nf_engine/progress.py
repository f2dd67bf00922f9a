"""Progress: what a training is doing, on stderr, as plain lines or as a bar on a terminal.

Both say the same: the plan; for each epoch the block, the local losses, the accuracy of the block's last exit on a
sample of held-out data, images/s, bytes now and at most against the budget, and the time left; for each block the exits
and the predicted against the measured peak. `step` is called in every training step and does next to nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from nf_engine.errors import ConfigError
from nf_engine.records import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from nf_engine.job import BlockMemory, Observer
    from nf_engine.records import BlockPlan, Plan
    from nf_engine.worker import EpochReport, Score

REFRESH = 0.25  # seconds between two drawings of the bar

__all__ = ["Bar", "Lines", "Silent", "make_observer"]


def make_observer(mode: str) -> Observer:
    """The observer of a training.

    Args:
        mode: "lines"; "none"; "auto": a bar where stderr is a terminal (and neither NO_COLOR is set nor TERM is dumb),
            else lines.

    Raises:
        ConfigError: the mode is unknown.
    """
    if mode == "none":
        return Silent()
    if mode == "lines":
        return Lines(sys.stderr)
    if mode == "auto":
        return Bar(sys.stderr) if _is_display(sys.stderr) else Lines(sys.stderr)
    raise ConfigError(f"progress must be one of auto, lines, none, got {mode!r}")


def _is_display(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Silent:
    """Says nothing."""

    def planned(self, plan: Plan) -> None:
        pass

    def block_started(self, number: int, block: BlockPlan) -> None:
        pass

    def step(self, done: int, total: int) -> None:
        pass

    def epoch_ended(self, report: EpochReport, accuracy: float, now: int, peak: int) -> None:
        pass

    def block_ended(self, number: int, scores: Sequence[Score], memory: BlockMemory) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines(Silent):
    """One line for each event, of plain text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._plan: Plan | None = None
        self._clock = _Clock([], 1)
        self._units = 0

    def planned(self, plan: Plan) -> None:
        self._plan = plan
        self._clock = _Clock([b.seconds for b in plan.blocks], plan.epochs)
        self.note(plan.table())

    def block_started(self, number: int, block: BlockPlan) -> None:
        count = f"{len(block.units)} unit" + ("s" if len(block.units) > 1 else "")
        self.note(f"{self._block(number)}: {count}, batch {block.batch}, inputs from {block.cache.tier}")

    def epoch_ended(self, report: EpochReport, accuracy: float, now: int, peak: int) -> None:
        self.note(self._epoch(report, accuracy, now, peak))

    def block_ended(self, number: int, scores: Sequence[Score], memory: BlockMemory) -> None:
        exits = ", ".join(f"{self._units + k}: {s.accuracy:.2%}" for k, s in enumerate(scores))
        self._units += len(scores)
        self.note(
            f"{self._block(number)} done: accuracy at exit {exits}; peak {format_bytes(memory.allocated)}, "
            f"predicted {format_bytes(memory.predicted)}{self._of_budget()}"
        )

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _block(self, number: int) -> str:
        return f"block {number + 1}/{len(self._plan.blocks)}" if self._plan else f"block {number + 1}"

    def _of_budget(self) -> str:
        return f", budget {format_bytes(self._plan.budget)}" if self._plan else ""

    def _epoch(self, report: EpochReport, accuracy: float, now: int, peak: int) -> str:
        """The facts of one epoch; the accuracy is an estimate, from 512 samples at most."""
        left = self._clock.left(report.block, report.epoch, report.seconds)
        every = f" ({', '.join(f'{v:.3f}' for v in report.losses)})" if len(report.losses) > 1 else ""
        epochs = f"/{self._plan.epochs}" if self._plan else ""
        return (
            f"{self._block(report.block)}, epoch {report.epoch + 1}{epochs}: loss {report.losses[-1]:.3f}{every}, "
            f"accuracy about {accuracy:.1%}, {report.samples / max(report.seconds, 1e-9):,.0f} images/s, "
            f"memory {format_bytes(now)}, peak {format_bytes(peak)}{self._of_budget()}, ETA {_duration(left)}"
        )


class Bar(Lines):
    """A bar for the block in training, drawn at most four times a second; whatever stays is a line above it.

    No thread draws and the cursor stays visible, so an exception leaves the terminal as it should be.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(stream)
        self._task: TaskID | None = None
        self._drawn = 0.0
        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            console=Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def block_started(self, number: int, block: BlockPlan) -> None:
        self.close()  # of a block that starts again
        super().block_started(number, block)
        self._task = self._bar.add_task(self._block(number))
        self._bar.start()
        self._bar.console.show_cursor(True)

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._drawn < REFRESH or self._task is None:
            return
        self._drawn = now
        self._bar.update(self._task, completed=done, total=total, refresh=True)

    def block_ended(self, number: int, scores: Sequence[Score], memory: BlockMemory) -> None:
        self.close()
        super().block_ended(number, scores, memory)

    def note(self, text: str) -> None:
        self._bar.console.print(text)

    def close(self) -> None:
        """Removes the bar; what was printed stays."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._task = None


class _Clock:
    """Seconds left: the epochs to come, each as the plan measured it, corrected by how long the ones so far took."""

    def __init__(self, predicted: Sequence[float | None], epochs: int) -> None:
        self._predicted = [p or 1.0 for p in predicted]  # a plan has seconds for all blocks or for none
        self._epochs = epochs
        self._spent = 0.0
        self._expected = 0.0

    def left(self, block: int, epoch: int, seconds: float) -> float:
        """Seconds after this epoch, which took `seconds`."""
        if block >= len(self._predicted):
            return 0.0
        self._spent += seconds
        self._expected += self._predicted[block]
        here = self._predicted[block] * (self._epochs - 1 - epoch)
        later = sum(self._predicted[block + 1 :]) * self._epochs
        return (here + later) * self._spent / self._expected


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"

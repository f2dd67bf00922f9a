"""Interrupt: what asks a training to end early, at a step of its own choice.

SIGINT, SIGTERM and SIGHUP set a flag that the training reads at each step, commits, and ends; a second one does what it
would have done without us. A limit on time works like a signal.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Interrupt", "Stopped"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised in a training that was asked to end, for its own callers: the state is committed where it can be."""


class Interrupt:
    """As a context manager: listens to signals, where it is entered in the main thread; puts their handlers back."""

    def __init__(self, max_time: float | None = None) -> None:
        """max_time: seconds from now, None without limit."""
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # nohup's wish; one that Python could not put back
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self._restore()  # so that the next one needs no interpreter, which may be waiting for the disk
        if self._signal is None:
            self._signal = number
        else:
            signal.raise_signal(number)

    @property
    def reason(self) -> str | None:
        """Why the training should end; None: it should not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "max_time"
        return None

    def check(self) -> None:
        """Raises Stopped where the training should end."""
        if self.reason is not None:
            raise Stopped(self.reason)

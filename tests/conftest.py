"""The closing table: figures that tests of reliability reach, printed once at the end of a run.

A test says figure("P9", "changed bytes of a manifest refused", 65536, 65536); lines of the same name add up. With
--figures FILE they are written as JSON, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FIGURES = pytest.StashKey[dict[tuple[str, str], list[int]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", metavar="FILE", help="write the figures of the closing table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Callable[[str, str, int, int], None]:
    """figure(promise, what, reached, of): a line of the closing table."""
    lines = request.config.stash[FIGURES]

    def add(promise: str, what: str, reached: int, of: int) -> None:
        line = lines.setdefault((promise, what), [0, 0])
        line[0] += reached
        line[1] += of

    return add


def _order(key: tuple[str, str]) -> tuple[int, str]:
    return int(key[0].lstrip("P") or 0), key[1]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[FIGURES]
    if not lines:
        return
    terminalreporter.section("figures")
    for promise, what in sorted(lines, key=_order):
        reached, of = lines[promise, what]
        terminalreporter.write_line(f"{promise:<5}{what:<75}{f'{reached:,}/{of:,}':>24}")
    path = config.getoption("--figures")
    if path:
        rows = [
            {"promise": p, "what": w, "reached": lines[p, w][0], "of": lines[p, w][1]}
            for p, w in sorted(lines, key=_order)
        ]
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

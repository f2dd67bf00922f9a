"""The closing table: figures that tests of reliability reach, printed once at the end of a run.

A test says figure("P9", "changed bytes of a manifest refused", 65536, 65536); lines of the same name add up. With
--figures FILE they are kept in that file as JSON, too, with commit and date.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its figures to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = [[*key, *line] for key, line in session.config.stash[FIGURES].items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    lines = node.config.stash[FIGURES]
    for promise, what, reached, of in getattr(node, "workeroutput", {}).get("figures", ()):
        line = lines.setdefault((promise, what), [0, 0])
        line[0] += reached
        line[1] += of


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
        _keep(
            Path(path),
            {f"{p} {w}": {"promise": p, "what": w, "reached": n[0], "of": n[1]} for (p, w), n in lines.items()},
        )


def _keep(path: Path, rows: dict[str, dict[str, object]]) -> None:
    """Puts the rows beside those of other runs in the file; the newest of a name stays."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    when = {"commit": commit, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept |= {name: row | when for name, row in rows.items()}
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")

"""Paths: names that would leave the folder, and what other users put in the way of a run.

Each is played by folder_scenes.py, as root against another user and the reverse where the tests run as root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCENES = Path(__file__).with_name("folder_scenes.py")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user reaches; a path of pytest's is its owner's alone."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def play(scene: str, place: Path, *before: str) -> list[dict[str, Any]]:
    command = [*before, sys.executable, SCENES, scene, place]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)  # nothing waits
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_hostile_name_is_refused_by_every_door(place, figure):
    cases = play("names", place)
    refused = [case for case in cases if case["error"]]
    figure("P13", "hostile names x doors refused", len(refused), len(cases))
    assert len({case["name"] for case in cases}) >= 120
    assert len(refused) == len(cases)
    assert list(place.iterdir()) == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not there: 0 of 1 logs of system calls read")
def test_no_hostile_name_reaches_the_kernel(place, figure):
    """What the process asked of the file system once it had the folder open."""
    log = place.parent / f"{place.name}.strace"
    try:
        cases = play("names", place, "strace", "-f", "-qq", "-e", "trace=%file", "-o", str(log))
        calls = log.read_text(errors="replace").splitlines()
    finally:
        log.unlink(missing_ok=True)
    opened = max(i for i, call in enumerate(calls) if f'"{place}"' in call and "O_DIRECTORY" in call)
    after = [call for call in calls[opened + 1 :] if re.match(r"\d+ +\w+\(", call)]
    figure("P13", "hostile names x doors without a call of the file system", len(cases) - len(after), len(cases))
    assert after == []


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: 0 of 2 users against each other, the user alone is tested")
def test_nothing_that_another_user_puts_in_the_way_is_followed(place, figure):
    check(place, 400, "cases of folders and files of others, links, fifos, devices refused or replaced", figure)


def test_nothing_in_the_way_is_followed_by_a_user_without_rights(place, figure):
    """The part that needs no other user: as root it is a child of user nobody."""
    if os.geteuid() == 0:
        place.chmod(0o777)
        drop = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        if shutil.which("setpriv") is None or subprocess.run([*drop, sys.executable, "-c", ""]).returncode:
            pytest.skip("the interpreter cannot be run by another user: 0 of 1 users tested")
        check(place, 140, "cases of links, fifos, sockets in the way of one user refused or replaced", figure, *drop)
    else:
        check(place, 140, "cases of links, fifos, sockets in the way of one user refused or replaced", figure)


def check(place: Path, least: int, what: str, figure: Any, *before: str) -> None:
    """Refused where it must be, by the right error that names the file; the victim as it was; no waiting."""
    cases = play("users", place, *before)
    assert len(cases) >= least
    for case in cases:
        assert case["safe"], case
        assert case["family"], case
        assert case["seconds"] < 1, case  # of the processor
        assert not case["error"] or "/run" in case["message"], case
        assert not case["must"] or case["error"] == "PermissionRefusedError", case
    figure("P14", what, len(cases), len(cases))

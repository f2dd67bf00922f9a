"""A program that forks one child a case, and the tests' end of it: what commit_scenes.py and run_scenes.py share.

nf_engine._cache reads its faults from the environment when it is loaded, so each case is a process of its own; all else
is loaded before the fork, which takes a millisecond. A line of JSON goes in for each case, and one comes out:
case: env, for the child; log, a file for NF_FAULT_LOG or ""; and what the program itself wants to know.
answer: the facts of the child, or the signal or the exit code that ended it as their "result"; said, the lines that it
reported before; told, its standard error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = 9  # descriptor of NF_FAULT_LOG in the child
LIMIT = 60  # seconds of a child
Facts = dict[str, Any]  # of a case, and of what came of it
Run = Callable[[Facts, int], Facts]
Watch = Callable[[Facts, int, int], Facts]


# ---- The program -------------------------------------------------------------------------------------------------


def serve(run: Run, watch: Watch = lambda *_: {}) -> None:
    """Answers each line of standard input.

    Args:
        run: a case in the child, and a descriptor for lines that are kept even if the child is killed; its facts.
        watch: the case, the child's id and the end of a pipe that the child writes to (case["ready"]), in the program
            while the child runs; facts of its own.
    """
    for text in sys.stdin:
        print(json.dumps(_answer(json.loads(text), run, watch)), flush=True)


def _answer(case: Facts, run: Run, watch: Watch) -> Facts:
    out, err = os.memfd_create("out"), os.memfd_create("err")
    ready, case["ready"] = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _child(case, out, err, run)
        finally:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(1)
    os.close(case["ready"])  # so that the end of the child is the end of the pipe, too
    seen = watch(case, pid, ready)
    status = os.waitpid(pid, 0)[1]
    said, told = (os.pread(fd, 1 << 24, 0).decode() for fd in (out, err))
    for fd in (out, err, ready):
        os.close(fd)
    lines = said.splitlines()
    facts = json.loads(lines.pop()) if lines and lines[-1].startswith("{") else {}
    if os.WIFSIGNALED(status):
        facts = {"result": signal.Signals(os.WTERMSIG(status)).name}
    elif status or not facts:
        facts = {"result": f"exit {status}"}
    return {**facts, **seen, "said": lines, "told": told}


def _child(case: Facts, out: int, err: int, run: Run) -> None:
    os.dup2(err, 2)
    if case["log"]:
        os.dup2(os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), LOG)
    os.environ.update(case["env"])
    signal.alarm(LIMIT)
    os.write(out, json.dumps(run(case, out)).encode() + b"\n")
    ctypes.CDLL(None)._exit(0)


# ---- The tests' side ---------------------------------------------------------------------------------------------


class ForkServer:
    """A file that calls `serve`, as a program, asked one case after the other."""

    def __init__(self, file: str, **env: str) -> None:
        spec = importlib.util.find_spec("nf_engine")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        self.path = str(Path(spec.submodule_search_locations[0]).parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NF_") and name != "RANK"}
        self.process = subprocess.Popen(
            [sys.executable, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**kept, "PYTHONPATH": self.path, **env},
        )  # fmt: skip

    def ask(self, fault: str, log: str, **case: Any) -> Facts:
        """The answer to a case; fault: NF_FAULT of the child, or ""."""
        env = {"NF_TESTING": "1", "NF_FAULT": fault} if fault else {}
        env |= {"NF_TESTING": "1", "NF_FAULT_LOG": str(LOG)} if log else {}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"env": env, "log": log, **case}) + "\n")
        self.process.stdin.flush()
        answer: Facts = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)
        self.process.stdout.close()

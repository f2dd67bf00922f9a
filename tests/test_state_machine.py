"""A run folder under any sequence of what may happen to it, held against a model: the state of its last commit.

Rules: start, train, commit, finish a block, crash at any operation, a full disk, a changed byte, a second process,
another configuration, one commit back. No torch trains here: a state is a few hundred bytes that its position decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import commit_scenes as scenes
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nf_engine import _cache
from nf_engine.committed import go_back
from nf_engine.config import TrainConfig
from nf_engine.errors import CorruptFileError, DiskFullError, NFError, ResumeMismatchError, RunLockedError
from nf_engine.manifest import FileEntry, Position, digest_of
from nf_engine.resume import check_resume, config_sha256
from nf_engine.run_folder import NewFile, RunFolder

CONFIG, CUT, DATA, ENV = TrainConfig(), SimpleNamespace(stages=()), "d" * 64, {"torch": "none"}
RAM = "/dev/shm" if Path("/dev/shm").is_dir() else None
BALLAST = 5000
OPERATIONS = {
    "File": ("reserve", "truncate", "write", "fsync", "close"),
    "Folder": ("create", "append", "rename", "unlink", "fsync"),
}


class Crash(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


class World:
    """What lies between the run folder and the disk, for all machines that a test plays."""

    def __init__(self):
        self.heal()

    def heal(self):
        self.crash_in, self.torn, self.dead, self.full = 0, False, False, ""

    @contextlib.contextmanager
    def another_process(self):
        """Which no fault concerns."""
        kept = self.crash_in, self.torn, self.full
        self.heal()
        yield
        self.crash_in, self.torn, self.full = kept

    def wrapped(self, name, plain):
        def call(this, *arguments, **more):
            if self.dead:
                raise Crash
            if self.crash_in:
                self.crash_in -= 1
                if self.crash_in == 0:
                    self.dead = True
                    if self.torn and name == "write":
                        plain(this, arguments[0], arguments[1][: len(arguments[1]) // 2])
                    raise Crash
            if name in ("write", "reserve") and self.is_full(this.path):
                raise DiskFullError(f"{this.path}: no room", path=this.path, needed=1, free=0)
            return plain(this, *arguments, **more)

        return call

    def is_full(self, path):
        """Full for good, or until the ballast is dropped; a log line is no matter."""
        there = self.full == "ballast" and Path(path).with_name("ballast.tmp").exists()
        return (self.full == "all" or there) and not path.endswith(("LOCK", "ballast.tmp"))


WORLD = World()


@pytest.fixture(autouse=True)
def wrapped_files(monkeypatch):
    for owner, names in OPERATIONS.items():
        for name in names:
            kind = getattr(_cache.io, owner)
            monkeypatch.setattr(kind, name, WORLD.wrapped(name, getattr(kind, name)))


class Model:
    """A commit: how far, the bytes of every file by role and block, and the bytes of metrics.jsonl that count."""

    def __init__(self, position, files, metrics):
        self.position, self.files, self.metrics = position, files, metrics

    def after(self, position, new, gone, metrics):
        kept = {key: data for key, data in self.files.items() if key[0] not in gone}
        return Model(position, {**kept, **new}, metrics)

    def contents(self):
        return {**self.files, ("metrics", 0): self.metrics}


def is_durable(key):
    return key[0] not in ("x", "v")


def without_caches(contents):
    return {key: data for key, data in contents.items() if is_durable(key)}


class Machine(RuleBasedStateMachine):
    """The model is `last`, the commit before `prev`; what a commit that crashed would have been is `maybe`."""

    def __init__(self):
        super().__init__()
        WORLD.heal()
        self.root = Path(tempfile.mkdtemp(dir=RAM))
        self.path = self.root / "run"
        self.folder = self.last = self.prev = self.maybe = None
        self.now, self.lines = (0, 0, 0), b""
        self.clean = True  # no crash since the last start: the listing is exact

    def teardown(self):
        WORLD.heal()
        if self.folder is not None:
            self.folder.close()
        shutil.rmtree(self.root)

    # ---- Processes

    @precondition(lambda self: self.folder is None)
    @rule()
    def start(self):
        WORLD.full = ""
        try:
            self.folder = RunFolder(self.path)
        except Crash:
            WORLD.heal()
            self.clean = False
            return
        self.clean = True
        assert self.folder.strangers == []
        if self.folder.manifest is None:
            assert self.last is None
            self.begin()
            return
        self.settle()
        if self.do(self.read_committed):
            self.resume()

    def read_committed(self):
        check_resume(self.folder, CONFIG, CUT, DATA, ENV, allow_inexact=False)
        for entry in self.folder.manifest.files:
            if entry.role not in ("cache", "metrics"):
                assert self.folder.read(entry) == self.last.files[entry.role, entry.block]

    def begin(self):
        initial = {("config", 0): CONFIG.to_toml().encode(), ("initial", 0): scenes.content("initial", 0, 0)}
        new = [NewFile(role, data, block) for (role, block), data in initial.items()]
        made = Model((0, 0, 0), initial, b"")
        self.commit_as(made, lambda: self.folder.begin(config_sha256(CONFIG, CUT), DATA, ENV, new))

    def settle(self):
        """After a crash: the folder holds the last commit, or the one that was being made."""
        manifest, contents = scenes.found(self.path)
        position = tuple(manifest["position"][key] for key in ("block", "epoch", "step"))
        known = [
            m for m in (self.last, self.maybe) if m is not None and (m.position, m.contents()) == (position, contents)
        ]
        assert known, f"neither the old commit nor the new one: {position} {sorted(contents)}"
        if known[0] is not self.last:
            self.prev, self.last = self.last, known[0]
        self.maybe = None

    def resume(self):
        self.now, self.lines = self.last.position, self.last.metrics
        lines = b"".join(json.dumps(line).encode() + b"\n" for line in self.folder.metrics())
        assert lines == self.lines, "the tail that no commit counts is cut off"

    @precondition(lambda self: self.folder is not None)
    @rule()
    def stop(self):
        if self.do(self.folder.drop_ballast):
            self.end()

    def end(self):
        WORLD.heal()
        self.folder.close()
        self.folder = None

    def die(self):
        """The kernel lets go of the lock; what Python would clean up does not happen."""
        WORLD.heal()
        self.folder.close()
        self.folder, self.clean = None, False

    @precondition(lambda self: self.folder is not None)
    @rule()
    def second_process(self):
        with WORLD.another_process(), pytest.raises(RunLockedError):
            RunFolder(self.path)

    # ---- Training

    def do(self, work):
        """Whether it was done; as in a program, an error ends the process, and a crash does at once."""
        try:
            work()
        except Crash:
            self.die()
            return False
        except DiskFullError:
            assert WORLD.full
            WORLD.heal()
            self.folder.drop_ballast()
            self.end()
            return False
        return True

    def commit_as(self, made, work):
        self.maybe = made
        if self.do(work):
            self.prev, self.last, self.maybe = self.last, made, None
        elif self.clean:
            self.maybe = None  # an error that was told leaves the old commit

    @precondition(lambda self: self.folder is not None and self.now[1] < 2)
    @rule(steps=st.integers(1, 3))
    def train_step(self, steps):
        block, epoch, step = self.now
        if step + steps < 4:
            self.now = (block, epoch, step + steps)
            return
        line = scenes.line(block, epoch)
        if self.do(lambda: self.folder.add_metrics(line)):
            self.now = (block, epoch + 1, 0)
            self.lines += json.dumps(line).encode() + b"\n"

    @precondition(lambda self: self.folder is not None)
    @rule()
    def reserve(self):
        self.do(lambda: self.folder.reserve(BALLAST))

    @precondition(lambda self: self.folder is not None and self.now > self.last.position)
    @rule()
    def commit(self):
        block = self.now[0]
        data = scenes.content("train", block, self.now[1] * 10 + self.now[2])
        made = self.last.after(self.now, {("train", block): data}, ("train",), self.lines)
        self.commit_as(made, lambda: self.folder.commit(Position(*self.now), [NewFile("train", data, block)]))

    @precondition(lambda self: self.folder is not None and self.now[1] == 2)
    @rule(cached=st.booleans())
    def finish_block(self, cached):
        block, data = self.now[0], scenes.content("block", self.now[0], 0)
        made = self.last.after((block + 1, 0, 0), {("block", block): data}, ("train",), self.lines)
        position = Position(block + 1)
        self.commit_as(made, lambda: self.folder.commit(position, [NewFile("block", data, block)], drop=("train",)))
        if self.last is not made:
            return
        self.now = made.position
        if cached:
            self.write_caches(block + 1, position)

    def write_caches(self, block, position):
        contents = {(kind, block): scenes.content(kind, block, 0) for kind in "xv"}
        entries = []

        def write():
            for (kind, _), data in contents.items():
                name = f"{kind}{block:03d}-g{self.folder.next_generation:04d}.nfc"
                file = self.folder.files.create(f"{name}.tmp", direct=False)
                try:
                    file.write(0, data)
                except NFError:
                    self.folder.remove(f"{name}.tmp")
                    for entry in entries:
                        self.folder.remove(entry.name)
                    raise
                finally:
                    file.close()
                self.folder.files.rename(f"{name}.tmp", name)
                entries.append(FileEntry(name, "cache", block, len(data), digest_of(data)))

        if not self.do(write):
            return
        made = self.last.after(self.last.position, contents, ("x", "v"), self.lines)

        def commit():
            try:
                self.folder.commit(position, there=entries, drop=("cache",))
            except NFError:
                for entry in entries:
                    self.folder.remove(entry.name)
                raise

        self.commit_as(made, commit)

    # ---- Faults

    @rule(operations=st.integers(1, 40), torn=st.booleans())
    def crash_soon(self, operations, torn):
        WORLD.crash_in, WORLD.torn = operations, torn

    @precondition(lambda self: self.folder is not None)
    @rule()
    def crash(self):
        self.die()

    @precondition(lambda self: self.folder is not None)
    @rule(how=st.sampled_from(["all", "ballast"]))
    def enospc_on(self, how):
        WORLD.full = how

    @rule()
    def enospc_off(self):
        WORLD.full = ""

    @precondition(lambda self: self.folder is None and self.last is not None)
    @rule(data=st.data())
    def corrupt(self, data):
        """A changed byte is refused by name; put right again, or gone back from, the run goes on."""
        manifest, _ = scenes.found(self.path)
        names = [e["name"] for e in manifest["files"] if e["role"] != "cache" and e["bytes"]] + ["MANIFEST.json"]
        name = data.draw(st.sampled_from(names))
        path = self.path / name
        sound = path.read_bytes()
        counted = {e["name"]: e["bytes"] for e in manifest["files"]}.get(name, len(sound))
        at = data.draw(st.integers(0, counted - 1))
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << data.draw(st.integers(0, 7))]) + sound[at + 1 :])
        with WORLD.another_process(), pytest.raises(CorruptFileError, match=f"(?s){name}.*nf-engine doctor --recover"):
            self.read_all()
        if self.maybe is None and self.prev is not None and name == "MANIFEST.json" and data.draw(st.booleans()):
            with WORLD.another_process():
                go_back(self.path)
            # A crash right after the present manifest was copied makes it the one that is gone back to.
            if scenes.found(self.path)[1] != self.last.contents():
                self.last = self.prev
            self.prev, self.clean = None, False
        else:
            path.write_bytes(sound)

    def read_all(self):
        with RunFolder(self.path) as folder:
            for entry in folder.manifest.files:
                if entry.role not in ("cache", "metrics"):
                    folder.read(entry)

    @precondition(lambda self: self.folder is None and self.last is not None)
    @rule(changes=st.sampled_from([{"epochs": 3}, {"seed": 1}, {"lr": 0.2}]), allow=st.booleans())
    def change_config(self, changes, allow):
        with WORLD.another_process(), RunFolder(self.path) as folder:
            self.settle()
            self.clean = True
            with pytest.raises(ResumeMismatchError, match=next(iter(changes))):
                check_resume(folder, CONFIG.with_fields(changes), CUT, DATA, ENV, allow_inexact=allow)
            with pytest.raises(ResumeMismatchError, match="images"):
                check_resume(folder, CONFIG, CUT, "e" * 64, ENV, allow_inexact=allow)

    # ---- What always holds

    @invariant()
    def the_lock_is_free_if_and_only_if_no_process_runs(self):
        path = self.path / "LOCK"
        if not path.exists():
            assert self.folder is None
            return
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert self.folder is not None
            else:
                assert self.folder is None

    @invariant()
    def the_old_commit_loads_or_the_new_one(self):
        if self.last is None:
            return
        _, contents = scenes.found(self.path)
        known = [m.contents() for m in (self.last, self.maybe) if m is not None]
        assert contents in known

    @invariant()
    def the_commit_before_can_be_gone_back_to(self):
        if self.prev is None or self.maybe is not None or not (self.path / "MANIFEST.prev.json").exists():
            return
        manifest = json.loads((self.path / "MANIFEST.prev.json").read_bytes())
        if manifest["generation"] + 1 != json.loads((self.path / "MANIFEST.json").read_bytes())["generation"]:
            return  # a crash left a younger copy: of the present one
        _, contents = scenes.found(self.path, "MANIFEST.prev.json")
        assert contents == without_caches(self.prev.contents())

    @invariant()
    def there_is_no_stray_file(self):
        if self.clean and self.path.exists():
            names = {f.name for f in self.path.iterdir()}
            assert names <= scenes.listed(self.path) | ({"ballast.tmp"} if self.folder is not None else set())


@pytest.mark.parametrize(
    ("examples", "steps"), [(200, 30), pytest.param(2000, 50, marks=pytest.mark.slow)], ids=["200x30", "2000x50"]
)
def test_any_sequence_of_events_leaves_the_old_commit_or_the_new_one(figure, examples, steps):
    played = 0

    class Counted(Machine):
        def __init__(self):
            nonlocal played
            played += 1
            super().__init__()

    random.seed(0)
    run_state_machine_as_test(
        Counted,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    figure(
        "P3", f"random sequences of {steps} events on a run folder: old or new commit", played, max(played, examples)
    )

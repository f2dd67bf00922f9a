"""Scenes of tests of the run folder that need processes or users of their own: a program without torch or threads.

python folder_scenes.py races FOLDER COUNT    processes that start in one folder at the same time
python folder_scenes.py users FOLDER          what other users put in the way; needs root for all of it
python folder_scenes.py names FOLDER          hostile names at every door that takes one
Each prints a line of JSON for each case.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nf_engine import _cache
from nf_engine.committed import go_back, read_run
from nf_engine.errors import CorruptFileError, NFError, RunLockedError
from nf_engine.manifest import FileEntry, Manifest, Position
from nf_engine.run_folder import NewFile, RunFolder

NOBODY = 65534
Report = dict[str, Any]


def begin(path: Path) -> Report:
    """A run of two commits."""
    with RunFolder(path) as run:
        run.begin("a" * 64, "b" * 64, {}, [NewFile("config", b"lr = 0.1\n"), NewFile("plan", b"{}\n")])
        run.add_metrics({"epoch": 0})
        run.commit(Position(0, 1, 0), [NewFile("train", b"weights")])
    return {}


def forked(work: Callable[[], Report]) -> Callable[[], Report]:
    """Starts the work in a child; what is returned waits for its report."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            try:
                json.dump(work(), out)
            except BaseException as error:
                json.dump({"error": type(error).__name__, "message": str(error)}, out)
        os._exit(0)
    os.close(writing)

    def wait() -> Report:
        with os.fdopen(reading) as file:
            text = file.read()
        os.waitpid(child, 0)
        found: Report = json.loads(text)
        return found

    return wait


# --- races ---


def race(path: Path, runners: int) -> Report:
    """All start at once; the winner holds on until every other has its answer."""
    go, gun = os.pipe()
    end, whistle = os.pipe()
    done, answered = os.pipe()

    def run() -> Report:
        os.close(gun)
        os.close(whistle)
        os.read(go, 1)
        begun = time.monotonic()
        try:
            with RunFolder(path):
                os.write(answered, b".")
                os.read(end, 1)
                return {"won": os.getpid()}
        except RunLockedError as error:
            seconds = time.monotonic() - begun
            os.write(answered, b".")
            return {"pid": error.pid, "host": error.host, "since": error.since, "seconds": seconds}
        except BaseException:
            os.write(answered, b".")
            raise

    waits = [forked(run) for _ in range(runners)]
    os.close(gun)
    for _ in range(runners):
        os.read(done, 1)
    os.close(whistle)
    reports = [wait() for wait in waits]
    for descriptor in (go, end, done, answered):
        os.close(descriptor)
    return {"reports": reports}


def killed_holder(path: Path) -> None:
    """A process that has the lock is killed."""
    held, has = os.pipe()
    child = os.fork()
    if child == 0:
        run = RunFolder(path)
        os.write(has, b".")
        time.sleep(60)
        run.close()
    os.read(held, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(held)
    os.close(has)


def races(folder: Path, count: int) -> Iterator[Report]:
    """In a folder that is not there, in a run, and in one whose last process was killed."""
    for i in range(count):
        path = folder / f"{i}"
        if i % 3 == 1:
            forked(lambda path=path: begin(path))()  # type: ignore[misc]
        if i % 3 == 2:
            killed_holder(path)
        yield {"kind": ("new", "run", "killed")[i % 3], "host": platform.node(), **race(path, 4)}
        RunFolder(path).close()


# --- other users ---


def plant(kind: str, path: Path, victim: Path, stranger: int) -> None:
    """Something that is no file of the run's user, under the name of one."""
    if kind in ("link", "dangling link"):
        path.symlink_to(victim if kind == "link" else victim / "nothing")
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero: never at its end
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"another's")
        path.chmod(0o666)
        os.chown(path, stranger, stranger)


def at_folder(kind: str, place: Path, victim: Path, user: int, stranger: int) -> Callable[[], object]:
    """What stands where the run folder should be."""
    path = place / "run"
    if kind.startswith(("folder of another", "own folder")):
        path.mkdir()
        path.chmod(int(kind[-4:], 8))
        owner = user if kind.startswith("own") else stranger
        os.chown(path, owner, owner)
    elif kind == "link to an own folder":
        path.symlink_to(victim.parent)
    else:
        plant(kind, path, victim, stranger)
    return lambda: RunFolder(path).close()


def in_folder(kind: str, name: str, door: str, place: Path, victim: Path, stranger: int) -> Callable[[], object]:
    """What stands in a run folder for one of its files."""
    path = place / "run"
    with contextlib.suppress(FileNotFoundError):
        (path / name).unlink()
    plant(kind, path / name, victim, stranger)

    def open_and_read() -> None:
        with RunFolder(path) as run:
            assert run.manifest is not None
            for entry in run.manifest.files:
                run.read(entry)

    def commit() -> None:
        with RunFolder(path) as run:
            run.log("event")
            run.commit(Position(0, 2, 0), [NewFile("train", b"more")])

    def read() -> None:
        read_run(path, ["config", "plan", "train", "metrics"])

    return {"open": open_and_read, "commit": commit, "read_run": read, "go_back": lambda: go_back(path)}[door]


KINDS = ["link", "dangling link", "hard link", "fifo", "socket", "folder"]
ROOTS = ["device", "file of another"]
FOLDERS = ["link to an own folder", "link", "dangling link", "hard link", "fifo", "socket"]
FOLDERS += [f"own folder {mode}" for mode in ("0777", "0770", "0707", "0702", "0720", "1777")]
OF_ANOTHER = ["device", "file of another", *(f"folder of another {mode}" for mode in ("0700", "0755", "0777"))]
READ = {  # name -> doors that read it; each must refuse
    "LOCK": ["open", "commit", "go_back"],
    "MANIFEST.json": ["open", "commit", "read_run"],
    "MANIFEST.prev.json": ["open", "go_back"],
    "metrics.jsonl": ["open", "commit", "read_run"],
    "c0000002.safetensors": ["open", "read_run"],
    "plan.json": ["open", "read_run", "go_back"],
}
WRITTEN = {  # name -> doors that write it; they refuse, or put a new file in the place of what stands there
    "MANIFEST.json.tmp": ["commit", "go_back"],
    "c0000003.safetensors.tmp": ["commit"],
    "c0000003.safetensors": ["open", "commit"],
    "log.jsonl": ["commit"],
    "x001-g0002.nfc": ["open", "commit"],
}


def seen(victim: Path) -> list[Any]:
    status = victim.stat()
    folder = sorted((p.name, p.lstat().st_mtime_ns) for p in victim.parent.iterdir())
    return [victim.read_text(), status.st_mtime_ns, status.st_mode, status.st_uid, folder]


def attempt(call: Callable[[], object], user: int) -> Report:
    """What comes of a call of this user."""

    def work() -> Report:
        if os.geteuid() != user:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        signal.alarm(10)
        begun = time.process_time()
        try:
            call()
            error, message, family = "", "", True
        except Exception as caught:
            error, message, family = type(caught).__name__, str(caught), isinstance(caught, NFError)
        return {"error": error, "message": message, "family": family, "seconds": time.process_time() - begun}

    return forked(work)()


def cases(root: bool) -> Iterator[tuple[str, Callable[[Path, Path, int, int], Callable[[], object]], bool]]:
    """Name, what it sets up, whether it must be refused."""
    for kind in FOLDERS + (OF_ANOTHER if root else []):
        yield f"run folder: {kind}", lambda *where, kind=kind: at_folder(kind, *where), True
    for table, must in ((READ, True), (WRITTEN, False)):
        for name, doors in table.items():
            for door in doors:
                for kind in KINDS + (ROOTS if root else []):

                    def put(place, victim, user, stranger, kind=kind, name=name, door=door):  # type: ignore[no-untyped-def]
                        copy(place.parent / "sound", place / "run", user)
                        return in_folder(kind, name, door, place, victim, stranger)

                    yield f"{name} is a {kind}, {door}", put, must


def copy(run: Path, path: Path, user: int) -> None:
    """A run of another user's own."""
    shutil.copytree(run, path)
    for part in (path, *path.iterdir()):
        os.chown(part, user, user)


def users(folder: Path) -> Iterator[Report]:
    """Each case for root against another user, and the reverse; else for the user alone."""
    root = os.geteuid() == 0
    pairs = [(0, NOBODY), (NOBODY, 0)] if root else [(os.geteuid(), os.geteuid())]
    number = 0
    begin(folder / "sound")
    for user, stranger in pairs:
        for name, put, must in cases(root):
            number += 1
            place, own = folder / f"{number}", folder / f"{number}" / "own"
            place.mkdir()
            place.chmod(0o1777)
            own.mkdir()
            victim = own / "victim"
            victim.write_text("precious")
            os.chown(own, user, user)
            os.chown(victim, user, user)
            call = put(place, victim, user, stranger)
            before = seen(victim)
            report = attempt(call, user)
            safe = seen(victim) == before
            yield {"case": name, "user": user, "must": must, "safe": safe, **report}


# --- names ---

DOTS = [
    "\u2024\u2024",
    "\uff0e\uff0e",
    "\u2025",
    "\u2026",
    "\u00b7",
    "\u3002\u3002",
    "%2e%2e",
    "..%2f",
    "\u2215",
    "\uff0f",
]
HOSTILE = [
    *(
        "",
        ".",
        "..",
        "...",
        "./a",
        "../a",
        "a/..",
        "a/../b",
        "a/./b",
        "/",
        "//",
        "///",
        "/a",
        "//a",
        "a/",
        "a//",
        "a/b",
    ),
    *("../../etc/passwd", "/etc/passwd", "/etc/shadow", "/tmp/a", "/dev/null", "/dev/zero", "/dev/stdin", "/dev/tty"),
    *("/proc/self/root/etc/passwd", "/proc/self/cwd/a", "/proc/self/fd/0", "/proc/self/exe", "/proc/1/root", "/sys"),
    *("~", "~root", "~/a", "$HOME", "${HOME}/a", "`id`", "$(id)", "a;b", "a|b", "a&b", "a>b", "a<b", "*", "?", "a*"),
    *("[a]", "{a,b}", "!a", "#a", "a'b", 'a"b', "a\\b", "..\\a", "C:\\a", "C:/a", "\\\\host\\a", "a:b", "file:///a"),
    *(
        "http://a/b",
        "a b",
        " a",
        "a ",
        "a\t",
        "a\n",
        "\na",
        "a\r",
        "a\r\nb",
        "\x1b[2Ja",
        "a\x7f",
        "a\x01",
        "\x00",
        "a\x00",
    ),
    *("a\x00b", "\x00a", "plan.json\x00.txt", "a\x00/../b", "A", "Plan.json", "PLAN.JSON", "aB", "-a", "-rf", "--help"),
    *(
        ".a",
        ".tmp",
        ".ssh",
        ".git",
        "_a",
        "é",
        "ä.json",
        "\u0430.json",
        "\u202ea",
        "a\u200b",
        "\ufeffa",
        "a\u0301",
        "a\u2028",
    ),
    *DOTS,
    *(f"{dots}/a" for dots in DOTS[:4]),
    *("\ud800", "a\udcff", "a" * 65, "a" * 255, "a" * 256, "a" * 4096, "a/" * 2048, "../" * 1365, "a" * 100_000),
    *(
        "MANIFEST/a",
        "MANIFEST/../a",
        "MANIFEST\x00",
        "MANIFESTé",
        "LOCK/../../a",
        "LOCK A",
        "MANIFEST" + "a" * 64,
        "lock/",
    ),
]


def names(folder: Path) -> Iterator[Report]:
    """Each name at each door; before that, one that is good, which shows that the doors are open."""
    files = _cache.io.Folder(str(folder))
    doors: dict[str, Callable[[str], object]] = {
        "create": files.create,
        "create, buffered": lambda name: files.create(name, direct=False),
        "open": files.open,
        "append": files.append,
        "lock": files.lock,
        "rename from": lambda name: files.rename(name, "there"),
        "rename to": lambda name: files.rename("here", name),
        "unlink": files.unlink,
        "manifest": in_manifest,
    }
    for name in HOSTILE:
        for door, call in doors.items():
            try:
                call(name)
                error = ""
            except (ValueError, TypeError, CorruptFileError) as caught:
                error = type(caught).__name__
            yield {"name": ascii(name)[:60], "door": door, "error": error}
    files.close()


def in_manifest(name: str) -> None:
    """Read from a manifest that lists it, under each role."""
    for role in ("config", "block", "train", "cache", "metrics", "model"):
        files = (FileEntry(name, role, 0, 1, "a" * 64),)
        head = ("nf-manifest/1", 1, "", "b" * 32, False, Position(), "c" * 64, "d" * 64, {})
        try:
            Manifest.parse(Manifest(*head, files).to_bytes(), "m")
        except CorruptFileError:
            continue
        return
    raise CorruptFileError("refused in each role")


if __name__ == "__main__":
    scene, where, *rest = sys.argv[1:]
    place = Path(where)
    scenes = {"races": lambda: races(place, int(rest[0])), "users": lambda: users(place), "names": lambda: names(place)}
    for line in scenes[scene]():
        print(json.dumps(line), flush=True)

"""Folder files: single files of a folder that may lie beside somebody else's, and the lock of the folder.

A folder is this user's, and its owner alone may write it; a file in it is a regular one with one name. Nothing is
opened through a link, nothing waits for a pipe, and a new file is never one that was there. Every operation goes
through nf_engine._cache.io, where faults can be injected.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nf_engine import _cache
from nf_engine.errors import CorruptFileError, NFError, PermissionRefusedError, RunLockedError, StorageError

__all__ = ["Staging", "appending", "check_owner", "lock_folder", "make_folder", "read_file", "staging", "write_file"]

log = logging.getLogger(__name__)

LOCK = "LOCK"
HEAD = 4096  # most bytes read of a LOCK
REFUSED = {
    errno.ELOOP: "a link",
    errno.ENXIO: "a socket or a device",
    errno.EISDIR: "a folder",
    errno.EACCES: "one that this user may not open",
}


# --- folders --------------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> _cache.io.Folder:
    """The folder, made where it is missing; its owner, this user, alone may write it."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow the link that is refused below)
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{whole.parent}: cannot be made: {error.strerror}; name another output_dir",
            op="mkdir",
            path=str(whole.parent),
            offset=-1,
            errno=error.errno or 0,
        ) from None
    parent = _cache.io.Folder(str(whole.parent))
    try:
        parent.make_folder(whole.name)
        parent.fsync()
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
    finally:
        parent.close()
    try:
        files = _cache.io.Folder(str(path), follow=False)
    except StorageError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EACCES):
            raise
        raise PermissionRefusedError(
            f"{path}: expected a folder of this user, found a link, a file or what this user may not open; name another"
        ) from None
    try:
        check_owner(files, path)
    except NFError:
        files.close()
        raise
    return files


def check_owner(files: _cache.io.Folder, path: Path) -> None:
    status = files.stat()
    if status.owner != os.geteuid():
        raise PermissionRefusedError(
            f"{path}: expected a folder of user {os.geteuid()}, found one of user {status.owner}; name another folder"
        )
    if status.mode & 0o022:
        raise PermissionRefusedError(
            f"{path}: expected a folder that its owner alone may write, found mode {status.mode:o}; "
            f"chmod go-w {path}, if you trust what is in it"
        )


def lock_folder(files: _cache.io.Folder, path: Path) -> _cache.io.FolderLock:
    try:
        lock = files.lock(LOCK)
    except StorageError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise _as_refusal(error) from None
        raise _held(files, path) from None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}) + "\n"
    try:
        with appending(files, LOCK) as file:
            file.truncate(0)
            file.write(0, text.encode("ascii"))
    except NFError:
        lock.release()
        raise
    return lock


def _held(files: _cache.io.Folder, path: Path) -> RunLockedError:
    for pause in (0.0, 0.01, 0.1, 0.4):  # whoever has just got it has not yet written over the name of the last one
        time.sleep(pause)
        pid, host, since = _holder(files)
        if pid and (host != platform.node() or Path("/proc", str(pid)).exists()):
            break
    who = f"process {pid} on {host!r} since {since!r}" if pid else "another process"
    return RunLockedError(
        f"{path} is in use by {who}; wait for its end, or name another folder", pid=pid, host=host, since=since
    )


def _holder(files: _cache.io.Folder) -> tuple[int, str, str]:
    try:
        found = json.loads(read_file(files, LOCK, HEAD))
        return int(found["pid"]), str(found["host"]), str(found["since"])
    except (NFError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return 0, "", ""


class Staging:
    """A private folder for what will get its name when it is complete."""

    def __init__(self, path: Path, files: _cache.io.Folder) -> None:
        self.path, self._files = path, files

    def write(self, name: str, data: bytes) -> Path:
        """A new file, synced."""
        write_file(self._files, name, data)
        self._files.fsync()
        return self.path / name

    def put(self, part: Path, target: Path) -> None:
        """Gives the folder, or a file in it, its name. Raises StorageError: that cannot be done."""
        try:
            part.rename(target)
        except OSError as error:
            raise StorageError(
                f"{target}: cannot rename {part}: {error.strerror}; give the result a new name",
                op="rename",
                path=str(target),
                offset=-1,
                errno=error.errno or 0,
            ) from None


@contextmanager
def staging(target: Path) -> Iterator[Staging]:
    """A folder beside the target that is gone afterwards; what is right in it is renamed before."""
    path = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    files = make_folder(path)
    try:
        yield Staging(path, files)
    finally:
        files.close()
        shutil.rmtree(path, ignore_errors=True)


# --- files ----------------------------------------------------------------------------------------------------------


def read_file(files: _cache.io.Folder, name: str, most: int, *, start: bool = False) -> bytes:
    """A whole file of ours of at most `most` bytes, or the first so many.

    Raises CorruptFileError: it is longer; PermissionRefusedError: it is a link, a device, or not this user's.
    """
    file = _opened(files, name)
    try:
        size = _own(file).size
        if size > most and not start:
            raise CorruptFileError(f"{file.path}: expected {most} bytes at most, found {size}")
        data = bytearray(min(size, most))
        if data:
            file.read(0, data)
        return bytes(data)
    except MemoryError:
        raise CorruptFileError(f"{file.path}: expected a file that fits into memory, found {size} bytes") from None
    finally:
        file.close()


def _opened(files: _cache.io.Folder, name: str, *, append: bool = False) -> _cache.io.File:
    try:
        return files.append(name) if append else files.open(name, direct=False)
    except StorageError as error:
        raise _as_refusal(error) from None


def _as_refusal(error: StorageError) -> NFError:
    """What the kernel will not open says what it is; any other error stays."""
    if error.errno not in REFUSED:
        return error
    return PermissionRefusedError(f"{error.path}: expected a regular file, found {REFUSED[error.errno]}; remove it")


def _own(file: _cache.io.File) -> _cache.io.Status:
    status = file.stat()
    if not status.regular or status.links != 1 or status.owner != os.geteuid():
        kind = "a" if status.regular else "no"
        raise PermissionRefusedError(
            f"{file.path}: expected a regular file of user {os.geteuid()} with one name, found {kind} regular file of "
            f"user {status.owner} with {status.links} names; remove it"
        )
    return status


@contextmanager
def appending(files: _cache.io.Folder, name: str) -> Iterator[_cache.io.File]:
    """A file that grows or shrinks at its end, made where it is missing."""
    file = _opened(files, name, append=True)
    try:
        _own(file)
        yield file
    finally:
        file.close()


def write_file(files: _cache.io.Folder, name: str, data: bytes) -> None:
    """A new file, synced; none where that fails."""
    file = _new(files, name)
    try:
        file.write(0, data)
        file.fsync()
        file.close()
    except NFError:
        _give_up(files, file, name)
        raise


def _new(files: _cache.io.Folder, name: str) -> _cache.io.File:
    """Created; a file of that name that a failed attempt left is removed before."""
    try:
        return files.create(name, direct=False)
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
    files.unlink(name)
    return files.create(name, direct=False)


def _give_up(files: _cache.io.Folder, file: _cache.io.File, name: str) -> None:
    for clean_up in (file.close, lambda: files.unlink(name)):
        try:
            clean_up()
        except NFError as error:  # the first error says more
            log.warning("%s: not cleaned up: %s", name, error)

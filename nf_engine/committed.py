"""Committed: files of a run as its manifest lists them, verified before use; and the step back to the commit before.

A reader needs no lock: a committed file is never changed, and of metrics.jsonl the manifest says how much counts.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path

from nf_engine import _cache
from nf_engine.errors import ConfigError, CorruptFileError, PermissionRefusedError, StorageError
from nf_engine.folder_files import check_owner, lock_folder, make_folder, read_file, write_file
from nf_engine.manifest import LIMIT, MANIFEST, PREVIOUS, FileEntry, Manifest, digest_of

__all__ = ["go_back", "how_to_go_back", "read_entry", "read_previous", "read_run"]

log = logging.getLogger(__name__)


def read_run(path: Path, roles: Sequence[str]) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a run and the verified bytes of its files of some roles, by name; the folder may be in use.

    Raises:
        ConfigError: the path is no run folder. CorruptFileError, PermissionRefusedError: as RunFolder.read.
    """
    try:
        files = _cache.io.Folder(str(path), follow=False)
    except StorageError as error:
        raise ConfigError(f"{path}: expected a run folder, found: {error}") from None
    try:
        if MANIFEST not in files.list():
            raise ConfigError(f"{path}: expected a run folder with {MANIFEST}, found none; name such a folder")
        check_owner(files, path)
        manifest = Manifest.parse(read_file(files, MANIFEST, LIMIT), f"{path / MANIFEST}")
        return manifest, {e.name: read_entry(files, path, e) for e in manifest.files if e.role in roles}
    finally:
        files.close()


def go_back(path: Path) -> Manifest:
    """Makes the commit before the last one the last one, as `nf-engine doctor --recover` does; returns it.

    For a run whose MANIFEST.json, or a file that only it lists, is damaged. Work since that commit is done again.

    Raises:
        ConfigError: there is no commit before. CorruptFileError: that one is damaged, too.
        RunLockedError, PermissionRefusedError, StorageError: as for RunFolder.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: expected a run folder, found none")
    files = make_folder(path)
    try:
        if PREVIOUS not in files.list():
            raise ConfigError(f"{path}: expected {PREVIOUS}, found none; the run has one commit or none")
        lock = lock_folder(files, path)
        try:
            data, manifest = read_previous(files, path, _present(files, path))
            for entry in manifest.files:
                if entry.role != "cache":
                    read_entry(files, path, entry)
            if f"{MANIFEST}.tmp" in files.list():
                files.unlink(f"{MANIFEST}.tmp")
            write_file(files, f"{MANIFEST}.tmp", data)
            files.rename(f"{MANIFEST}.tmp", MANIFEST)
            files.fsync()
            return manifest
        finally:
            lock.release()
    finally:
        files.close()


def _present(files: _cache.io.Folder, path: Path) -> bytes | None:
    """The bytes of MANIFEST.json, unless it is damaged or gone."""
    try:
        data = read_file(files, MANIFEST, LIMIT)
        Manifest.parse(data, f"{path / MANIFEST}")
        return data
    except (CorruptFileError, PermissionRefusedError, StorageError) as error:
        log.warning("%s", error)
        return None


def read_previous(files: _cache.io.Folder, path: Path, present: bytes | None) -> tuple[bytes, Manifest]:
    """MANIFEST.prev.json, as bytes and parsed.

    present: of MANIFEST.json; None where that cannot be read.

    Raises:
        CorruptFileError: it is damaged, or not what the present commit followed.
    """
    data = read_file(files, PREVIOUS, LIMIT)
    found = Manifest.parse(data, f"{path / PREVIOUS}")
    # Both are equal after a step back, and where a crash came before the new manifest's rename.
    if present is None or present == data:
        return data, found
    now = Manifest.parse(present, f"{path / MANIFEST}")
    if digest_of(data) != now.prev_sha256:
        raise CorruptFileError(
            f"{path / PREVIOUS}: expected the commit that generation {now.generation} followed, with sha256 "
            f"{now.prev_sha256}, found generation {found.generation} with {digest_of(data)}; restore it, or delete it"
        )
    return data, found


def read_entry(files: _cache.io.Folder, path: Path, entry: FileEntry) -> bytes:
    """The bytes that the manifest speaks of: metrics.jsonl may have more by now."""
    try:
        data = read_file(files, entry.name, entry.bytes, start=entry.role == "metrics")
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        raise CorruptFileError(f"{path / entry.name} is missing; {how_to_go_back(path)}") from None
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; {how_to_go_back(path)}") from None
    _check_digest(path, entry, data)
    return data


def _check_digest(path: Path, entry: FileEntry, data: bytes) -> None:
    if len(data) != entry.bytes or digest_of(data) != entry.sha256:
        raise CorruptFileError(
            f"{path / entry.name}: expected {entry.bytes} bytes with sha256 {entry.sha256}, found {len(data)} with "
            f"{digest_of(data)}; {how_to_go_back(path)}"
        )


def how_to_go_back(path: Path) -> str:
    return f"restore it, or go one commit back: nf-engine doctor --recover {path}"

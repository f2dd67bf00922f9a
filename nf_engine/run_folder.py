"""Run folder: everything that a run leaves on disk, flat, and the only writer of durable files.

    LOCK                       held by the process that writes; its content says which
    MANIFEST.json              what the run consists of: every file below with length and digest (manifest.py)
    MANIFEST.prev.json         the commit before, whose durable files stay: one step back is always possible
    config.toml profile.json plan.json initial.safetensors        written by the first commit
    b003-g0007.safetensors     a finished block; c0000412.safetensors  the block in training
    x004-g0009.nfc v004-...    caches of training and held-out activations: listed, but derivable, so never synced
    metrics.jsonl              a line an epoch; the manifest says how much of it counts
    exits.json model.json      written by the last commit; log.jsonl: times and events, in no manifest

No file is changed in place. A commit has four barriers: new files are written under other names and synced; renamed,
and the folder synced; the manifest is written and synced; renamed over the old one, and the folder synced. A crash at
any point leaves the old commit or the new one. Files that neither manifest lists are deleted after it, or by the sweep
of the next start. Every operation goes through nf_engine._cache.io, where faults can be injected.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nf_engine import _cache
from nf_engine.committed import how_to_go_back, read_entry, read_previous
from nf_engine.errors import ConfigError, CorruptFileError, DiskFullError, NFError, StorageError
from nf_engine.folder_files import LOCK, appending, lock_folder, make_folder, read_file, write_file
from nf_engine.manifest import FORMAT, LIMIT, MANIFEST, PREVIOUS, FileEntry, Manifest, Position, digest_of, is_ours

__all__ = ["NewFile", "RunFolder", "default_path"]

log = logging.getLogger(__name__)

LOG, METRICS, BALLAST = "log.jsonl", "metrics.jsonl", "ballast.tmp"
FIXED = {MANIFEST, PREVIOUS, LOCK, LOG}


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file for the next commit to write: its name follows from role, block and generation."""

    role: str
    data: bytes
    block: int = 0

    def name(self, generation: int) -> str:
        if self.role == "block":
            return f"b{self.block:03d}-g{generation:04d}.safetensors"
        if self.role == "train":
            return f"c{generation:07d}.safetensors"
        if self.role == "plan":
            return "plan.json" if generation == 1 else f"plan-g{generation:04d}.json"
        return {"config": "config.toml", "initial": "initial.safetensors"}.get(self.role, f"{self.role}.json")


def default_path(model: str) -> Path:
    """runs/<time>-<model>"""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model)
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


class RunFolder:
    """The folder of one run, locked for this process until `close`.

    Attributes:
        path: of the folder. files: its descriptor, for caches. manifest: of the last commit, None before the first.
        strangers: names in it that no run of ours could have written.
    """

    def __init__(self, path: str | Path) -> None:
        """Makes the folder where it is missing, locks it, reads its manifest, and removes what a crash left.

        Raises:
            ConfigError: it holds files of somebody else and no manifest.
            RunLockedError: another process has it.
            PermissionRefusedError: it is a link, another user's, or others may write it.
            CorruptFileError: its manifest is damaged; says how to go one commit back.
            DiskFullError, StorageError: it cannot be made or read.
        """
        self.path = Path(path)
        self.files = make_folder(self.path)
        try:
            _check_unused(self.files, self.path)
            self._lock = lock_folder(self.files, self.path)
        except BaseException:
            self.files.close()
            raise
        try:
            self._present: bytes | None = None
            self.manifest = self._read_manifest()
            self.strangers = self._sweep()
            self._lines = self._read_metrics()
        except BaseException:
            self.close()
            raise
        self._condemned: NFError | None = None
        self._tail_lost = False  # of metrics.jsonl: its fsync has failed

    def close(self) -> None:
        """Gives the lock back. Can be called again."""
        self._lock.release()
        self.files.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- start ---

    def _read_manifest(self) -> Manifest | None:
        names = set(self.files.list())
        if MANIFEST in names:
            self._present = read_file(self.files, MANIFEST, LIMIT)
            try:
                return Manifest.parse(self._present, f"{self.path / MANIFEST}")
            except CorruptFileError as error:
                raise CorruptFileError(f"{error}; {how_to_go_back(self.path)}") from None
        if PREVIOUS in names:
            raise CorruptFileError(f"{self.path / MANIFEST} is missing; {how_to_go_back(self.path)}")
        return None

    def _sweep(self) -> list[str]:
        """Removes what a crash has left, of our own names alone, and never through a link; returns the other names."""
        strangers = []
        kept = FIXED | _listed(self.manifest) | _durable(self._previous())
        for name in self.files.list():
            if name in kept:
                continue
            status = self.files.lstat(name)
            if is_ours(name) and status.regular:
                self.files.unlink(name)
            else:
                strangers.append(name)
        return strangers

    def _previous(self) -> Manifest | None:
        """The commit before, where it can be read: it only keeps files from being deleted."""
        if PREVIOUS not in self.files.list():
            return None
        try:
            return read_previous(self.files, self.path, self._present)[1]
        except (CorruptFileError, StorageError) as error:
            log.warning("%s cannot be read, there is no step back before the next commit: %s", PREVIOUS, error)
            return None

    def _read_metrics(self) -> bytes:
        """The lines that count; the tail of an interrupted run is cut off."""
        entries = self.manifest.of_role("metrics") if self.manifest else []
        if not entries:
            return b""
        (entry,) = entries
        data = self.read(entry)
        with appending(self.files, METRICS) as file:
            if file.stat().size > len(data):
                file.truncate(len(data))
        return data

    # --- read ---

    def read(self, entry: FileEntry) -> bytes:
        """The bytes of a file of the manifest, once they have its digest.

        Raises:
            CorruptFileError: they are not what was committed. PermissionRefusedError: it is a link or another's.
        """
        return read_entry(self.files, self.path, entry)

    @property
    def manifest_now(self) -> Manifest:
        """Of the last commit; there has been one."""
        assert self.manifest is not None
        return self.manifest

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        try:
            return [json.loads(line) for line in self._lines.splitlines()]
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(
                f"{self.path / METRICS}: expected a JSON object a line, found: {error}; {how_to_go_back(self.path)}"
            ) from None

    # --- write ---

    @property
    def next_generation(self) -> int:
        return self.manifest.generation + 1 if self.manifest else 1

    def begin(self, config_sha256: str, data_sha256: str, env: dict[str, str], new: Sequence[NewFile]) -> None:
        """The first commit."""
        assert self.manifest is None
        first = Manifest(
            format=FORMAT,
            generation=0,
            prev_sha256="",
            run_id=secrets.token_hex(16),
            done=False,
            position=Position(),
            config_sha256=config_sha256,
            data_sha256=data_sha256,
            env=env,
            files=(),
        )
        self.files.fsync()  # LOCK: without it a power cut could leave files that look like somebody else's
        self._commit(first, new, (), ())

    def commit(
        self,
        position: Position,
        new: Sequence[NewFile] = (),
        *,
        there: Sequence[FileEntry] = (),
        drop: Sequence[str] = (),
        done: bool = False,
    ) -> None:
        """Makes a state of the run durable: after the return a crash leaves this one, before it the last one.

        Args:
            position: how far the run has come.
            new: files to write; one of the same role and block takes the place of the last one's.
            there: caches that are in the folder already.
            drop: roles whose files leave the manifest.
            done: the run is complete.

        Raises:
            DiskFullError, StorageError: the state is the last commit's or, where the last barrier failed, the new one.
        """
        assert self.manifest is not None
        if self._condemned is not None:
            raise self._condemned
        wanted = replace(self.manifest, position=position, done=done)
        try:
            self._commit(wanted, new, there, drop)
        except DiskFullError:
            if self._condemned is not None or not self.drop_ballast():
                raise
            self.log("ballast_dropped")  # its room was kept for this moment
            self._commit(wanted, new, there, drop)
        except StorageError as error:
            self._condemned = error  # what is on the disk is not known any more: the next start looks
            raise

    def _commit(
        self, wanted: Manifest, new: Sequence[NewFile], there: Sequence[FileEntry], drop: Sequence[str]
    ) -> None:
        generation = wanted.generation + 1
        data = {file.name(generation): file.data for file in new}
        entries = [
            FileEntry(name, file.role, file.block, len(file.data), digest_of(file.data))
            for name, file in zip(data, new, strict=True)
        ]
        entries += there
        replaced = {(e.role, e.block) for e in entries if e.role != "cache"}
        kept = [
            e for e in wanted.files if (e.role, e.block) not in replaced and e.role not in drop and e.role != "metrics"
        ]
        metrics = FileEntry(METRICS, "metrics", 0, len(self._lines), digest_of(self._lines))
        made = replace(
            wanted,
            generation=generation,
            prev_sha256=digest_of(self._present) if self._present is not None else "",
            files=tuple(sorted((*kept, *entries, metrics), key=lambda e: e.name)),
        )
        self._publish(made, data)

    def _publish(self, made: Manifest, data: dict[str, bytes]) -> None:
        """The four barriers."""
        content = made.to_bytes()
        everything = {**data, PREVIOUS: self._present} if self._present is not None else data
        published = False
        try:
            for name, part in everything.items():
                self._write_synced(f"{name}.tmp", part)
            self._sync_metrics()
            for name in everything:
                self.files.rename(f"{name}.tmp", name)
            self.files.fsync()
            self._write_synced(f"{MANIFEST}.tmp", content)
            published = True  # as far as anybody can tell from here on
            self.files.rename(f"{MANIFEST}.tmp", MANIFEST)
            self.files.fsync()
        except NFError as error:
            if published:
                self._condemned = error  # a second attempt would touch what the manifest on the disk may list
            for name in (*(f"{n}.tmp" for n in (*everything, MANIFEST)), *(() if published else data)):
                self._remove_quietly(name)
            raise
        before, self.manifest, self._present = self.manifest, made, content
        self._clean(before)

    def _write_synced(self, name: str, data: bytes) -> None:
        """A new file on the disk. After a failed fsync its pages count as clean though they are not: written anew."""
        try:
            write_file(self.files, name, data)
        except StorageError as error:
            if error.op != "fsync":
                raise
            log.warning("%s; the file is written again, once", error)
            write_file(self.files, name, data)

    def _sync_metrics(self) -> None:
        if not self._tail_lost:
            try:
                with appending(self.files, METRICS) as file:
                    self._tail_lost = True  # until fsync has said otherwise: asked again, it would lie
                    file.fsync()
                self._tail_lost = False
                return
            except (StorageError, DiskFullError) as error:
                if not self._tail_lost:
                    raise
                log.warning("%s; the file is written again, once", error)
        write_file(self.files, f"{METRICS}.tmp", self._lines)
        self.files.rename(f"{METRICS}.tmp", METRICS)
        self._tail_lost = False

    def _clean(self, before: Manifest | None) -> None:
        """Deletes what neither this commit nor the one before lists; of the one before, caches go too."""
        kept = FIXED | {BALLAST} | _listed(self.manifest) | _durable(before)
        for name in self.files.list():
            if name not in kept and is_ours(name) and not name.endswith(".tmp") and self.files.lstat(name).regular:
                self._remove_quietly(name)

    def _remove_quietly(self, name: str) -> None:
        """Of a file that the next start would sweep anyway."""
        try:
            self.files.unlink(name)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                log.warning("%s stays until the next start: %s", name, error)

    def remove(self, name: str) -> None:
        """Deletes a file that no commit lists any more; after a failed commit only the next start can tell."""
        if self._condemned is None:
            self._remove_quietly(name)

    def add_metrics(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, which counts from the next commit on."""
        line = json.dumps(record).encode("ascii") + b"\n"
        with appending(self.files, METRICS) as file:
            file.write(len(self._lines), line)
        self._lines += line

    def cut_metrics(self, count: int | None = None) -> None:
        """Keeps the first `count` lines, or those that the last commit counts."""
        if count is None:
            (entry,) = self.manifest_now.of_role("metrics")
            count = self._lines[: entry.bytes].count(b"\n")
        self._lines = b"".join(self._lines.splitlines(keepends=True)[:count])
        with appending(self.files, METRICS) as file:
            file.truncate(len(self._lines))

    def log(self, event: str, **values: Any) -> None:
        """A line of log.jsonl, control characters escaped; a disk that refuses it is told of and stops nothing."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, default=str) + "\n"
        try:
            with appending(self.files, LOG) as file:
                file.write(file.stat().size, line.encode("ascii"))
        except (StorageError, DiskFullError) as error:
            log.warning("not in %s: %s: %s", LOG, event, error)

    # --- room ---

    def reserve(self, size: int) -> None:
        """Takes room now for what will be written later, before anyone works for it.

        Raises:
            DiskFullError: there is none.
        """
        self.drop_ballast()
        file = self.files.create(BALLAST, direct=False)
        try:
            file.reserve(max(1, size))
        except NFError:
            file.close()
            self._remove_quietly(BALLAST)
            raise
        file.close()

    def drop_ballast(self) -> bool:
        """Gives the reserved room back; whether there was any."""
        there = BALLAST in self.files.list()
        if there:
            self._remove_quietly(BALLAST)
        return there


def _check_unused(files: _cache.io.Folder, path: Path) -> None:
    """Raises ConfigError where a folder without a commit holds what no first commit has left: a run makes LOCK first,
    and without it config.toml is the user's own."""
    names = set(files.list())
    if names & {MANIFEST, PREVIOUS}:
        return
    taken = sorted(n for n in names if LOCK not in names or not (n in FIXED or is_ours(n)))
    if taken:
        raise ConfigError(
            f"output_dir {path} holds {taken[0]!r}{f' and {len(taken) - 1} more' * (len(taken) > 1)} and no run of "
            "nf_engine; name a new or empty folder"
        )


def _listed(manifest: Manifest | None) -> set[str]:
    return {e.name for e in manifest.files} if manifest else set()


def _durable(manifest: Manifest | None) -> set[str]:
    return {e.name for e in manifest.files if e.role != "cache"} if manifest else set()

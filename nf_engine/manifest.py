"""Manifest: the one file that says what a run folder holds, and how far the run has come.

MANIFEST.json is canonical JSON (sorted keys, indented by one, ASCII, no floats, one newline at its end) that carries
the digest of itself and of every other file but LOCK and log.jsonl. It is read strictly: `parse` takes the bytes that
`to_bytes` writes and no others, so that no changed byte passes. This module touches no disk and imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from nf_engine.errors import CorruptFileError
from nf_engine.records import Record

__all__ = ["MANIFEST", "PREVIOUS", "FileEntry", "Manifest", "Position", "digest_of", "is_ours"]

MANIFEST, PREVIOUS = "MANIFEST.json", "MANIFEST.prev.json"
FORMAT = "nf-manifest/1"
LIMIT = 1 << 20  # bytes of a manifest
MOST_FILES = 4096
MOST = 1 << 53  # what any reader of JSON keeps exactly
ROLES = {  # role -> its file names; {g} is the generation that published the file
    "config": r"config\.toml",
    "profile": r"profile\.json",
    "plan": r"plan(-g\d{4,})?\.json",
    "initial": r"initial\.safetensors",
    "block": r"b\d{3,}-g\d{4,}\.safetensors",
    "train": r"c\d{7,}\.safetensors",
    "metrics": r"metrics\.jsonl",
    "cache": r"[xv]\d{3,}-g\d{4,}\.nfc",
    "exits": r"exits\.json",
    "model": r"model\.json",
}
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
RUN_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
END = b"\n}\n"
SEAL = re.compile(rb',\n "self_sha256": "([0-9a-f]{64})"\n}\n\Z')
OURS = re.compile(
    rf"(MANIFEST(\.prev)?\.json|{'|'.join(ROLES.values())}|probe\.nfc)(\.tmp)?|ballast\.tmp", re.ASCII
)  # what a sweep may remove


def is_ours(name: str) -> bool:
    """Whether a run of ours could have written a file of this name, finished or not."""
    return OURS.fullmatch(name) is not None


def digest_of(data: bytes) -> str:
    """SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry(Record):
    """One file of the run.

    Attributes:
        name: in the folder. role: a key of ROLES. block: its block, or the block whose inputs a cache holds; else 0.
        bytes: its length; of metrics.jsonl, what counts of it.
        sha256: of these bytes; of a cache, of its table of checksums, hence of its contents.
    """

    name: str
    role: str
    block: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Position(Record):
    """What is trained: all blocks before `block`, `epoch` epochs of it, and `step` steps of the next epoch."""

    block: int = 0
    epoch: int = 0
    step: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest(Record):
    """A commit.

    Attributes:
        generation: counts commits from 1. prev_sha256: of the bytes of the manifest before, "" of the first.
        run_id: drawn at the start of the run. done: nothing is left to do.
        config_sha256, data_sha256: of the settings that decide the result, and of the images.
        env: versions, device, threads: what bitwise equality depends on.
        files: all files, ordered by name.
    """

    format: str
    generation: int
    prev_sha256: str
    run_id: str
    done: bool
    position: Position
    config_sha256: str
    data_sha256: str
    env: dict[str, str]
    files: tuple[FileEntry, ...]

    def to_bytes(self) -> bytes:
        """The file."""
        body = _canonical(dataclasses.asdict(self))
        return body[: -len(END)] + f',\n "self_sha256": "{digest_of(body)}"'.encode("ascii") + END

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """The manifest of these bytes.

        Args:
            data: the whole file.
            where: its path, for the error.

        Raises:
            CorruptFileError: anything is not as `to_bytes` would write it.
        """
        try:
            return cls._parsed(data)
        except (ValueError, RecursionError, CorruptFileError) as error:
            found = (str(error) or type(error).__name__)[:500]  # it may show what it found
            raise CorruptFileError(f"{where}: not a manifest: {found}") from None

    @classmethod
    def _parsed(cls, data: bytes) -> Manifest:
        if len(data) > LIMIT:
            raise ValueError(f"expected {LIMIT} bytes at most, found {len(data)}")
        value = json.loads(
            _unsealed(data), object_pairs_hook=_object, parse_float=_refuse_number, parse_constant=_refuse_number
        )
        if value.get("format") != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, found {value.get('format')!r}; read it with its own version")
        manifest = cls.from_value(value)
        for problem in manifest._problems():
            raise ValueError(problem)
        if manifest.to_bytes() != data:
            raise ValueError("expected canonical JSON, found other white space, order or escapes")
        return manifest

    def _problems(self) -> Iterator[str]:
        """What types alone do not refuse."""
        numbers = {"generation": self.generation, **dataclasses.asdict(self.position)}
        for entry in self.files:
            numbers |= {f"{entry.name}.bytes": entry.bytes, f"{entry.name}.block": entry.block}
            if entry.role not in ROLES or not re.fullmatch(ROLES[entry.role], entry.name, re.ASCII):
                yield f"files: expected a name that belongs to its role, found {entry.name!r} as {entry.role!r}"
            if not DIGEST.fullmatch(entry.sha256):
                yield f"{entry.name}.sha256: expected 64 hex digits, found {entry.sha256!r}"
        for name, number in numbers.items():
            if not 0 <= number < MOST:
                yield f"{name}: expected 0..{MOST - 1}, found {number}"
        names = [entry.name for entry in self.files]
        if names != sorted(set(names)) or len(names) > MOST_FILES:
            yield f"files: expected at most {MOST_FILES} different names in order, found {len(names)}"
        if self.generation < 1:
            yield f"generation: expected 1 or more, found {self.generation}"
        if not RUN_ID.fullmatch(self.run_id):
            yield f"run_id: expected 32 hex digits, found {self.run_id!r}"
        if not all(text.isprintable() for pair in self.env.items() for text in pair):
            yield f"env: expected printable text, found {self.env!r}"
        for field in ("prev_sha256", "config_sha256", "data_sha256"):
            value = getattr(self, field)
            if not DIGEST.fullmatch(value) and not (field == "prev_sha256" and value == "" and self.generation == 1):
                yield f"{field}: expected 64 hex digits, found {value!r}"

    def of_role(self, role: str) -> list[FileEntry]:
        """Entries of a role, in the order of their blocks."""
        return sorted((e for e in self.files if e.role == role), key=lambda e: (e.block, e.name))


def _unsealed(data: bytes) -> str:
    """What self_sha256, the last key, is the digest of: nothing is parsed before it is known to be what was written."""
    found = SEAL.search(data)
    if not found:
        raise ValueError(f"expected self_sha256 and 64 hex digits at the end, found {data[-90:]!r}")
    body = data[: found.start()] + END
    if digest_of(body) != found[1].decode("ascii"):
        raise ValueError(f"self_sha256: expected {digest_of(body)}, found {found[1].decode('ascii')}")
    return body.decode("ascii")


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("expected each key once, found one twice")
    return made


def _refuse_number(text: str) -> Any:
    raise ValueError(f"expected whole numbers, found {text[:40]}")

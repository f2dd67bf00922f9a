"""Crash states: every folder that a power cut may leave, by the log of what a run did (commit_scenes.recorded).

An effect writes a page of an inode, sets its size, or changes names. fsync makes the data of its inode durable, fsync
of the folder all changes of names; nothing else is promised. So a power cut leaves what is durable and any subset of
the other effects, in their order. This is stricter than a file system that keeps a journal. Left out is what no reader
depends on: the content of LOCK, and log.jsonl.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

PAGE = 4096
LEFT_OUT = {"LOCK", "log.jsonl", "."}  # the name LOCK counts
State = frozenset[tuple[str, bytes]]


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    inode: int
    size: int
    shrinks: bool


@dataclass(frozen=True)
class Names:
    """name -> inode, or None where the name goes."""

    changes: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Sync:
    """fsync of the file `name`, or of the folder where inode is 0; lost: it failed, and the pages count as clean."""

    inode: int
    name: str
    lost: bool = False


@dataclass(frozen=True)
class Committed:
    generation: int


Effect = Write | Resize | Names
Event = Effect | Sync | Committed


def events_of(lines: Iterable[str], writes: Sequence[str]) -> Iterator[Event]:
    """What the operations of a log do; `writes` are the bytes of its pwrites, in hexadecimal."""
    names: dict[str, int] = {}
    inodes, data_of = itertools.count(1), iter(writes)
    for line in lines:
        op, name, *numbers = line.split()
        if op in ("committed", "lost"):
            yield Committed(int(name)) if op == "committed" else Sync(names[name], name, lost=True)
            continue
        offset, length, result = map(int, numbers)
        data = bytes.fromhex(next(data_of)) if op == "pwrite" else b""
        assert op != "pwrite" or len(data) == length == result, line
        if result < 0:
            continue
        if name in LEFT_OUT and op != "fsyncdir" and (op, name) != ("open", "LOCK"):
            continue
        if op == "open" and offset & os.O_CREAT and name not in names:
            names[name] = next(inodes)
            yield Names(((name, names[name]),))
        elif op == "pwrite":
            for at in range(0, length, PAGE):
                yield Write(names[name], offset + at, data[at : at + PAGE])
        elif op in ("fallocate", "ftruncate"):
            yield Resize(names[name], length, op == "ftruncate")
        elif op == "rename":
            old, new = name.split(">")
            names[new] = names.pop(old)
            yield Names(((old, None), (new, names[new])))
        elif op == "unlink":
            del names[name]
            yield Names(((name, None),))
        elif op in ("fsync", "fsyncdir"):
            yield Sync(names[name] if op == "fsync" else 0, name)


@dataclass
class Disk:
    """What is on it for certain."""

    names: dict[str, int] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)

    def apply(self, effect: Effect) -> None:
        if isinstance(effect, Names):
            for name, inode in effect.changes:
                if inode is None:
                    self.names.pop(name, None)
                else:
                    self.names[name] = inode
            return
        old = self.data.get(effect.inode, b"")
        if isinstance(effect, Resize):
            self.data[effect.inode] = (old[: effect.size] if effect.shrinks else old).ljust(effect.size, b"\0")
        else:
            end = effect.offset + len(effect.data)
            self.data[effect.inode] = old[: effect.offset].ljust(effect.offset, b"\0") + effect.data + old[end:]

    def with_effects(self, effects: Iterable[Effect]) -> State:
        disk = Disk(dict(self.names), dict(self.data))
        for effect in effects:
            disk.apply(effect)
        return frozenset((name, disk.data.get(inode, b"")) for name, inode in disk.names.items())


@dataclass(frozen=True)
class Moment:
    """All states that a cut at one moment may leave: `disk` and any of the pending effects."""

    disk: Disk
    pending: tuple[Effect, ...]
    committed: int

    def masked(self, mask: int) -> tuple[Effect, ...]:
        return tuple(e for i, e in enumerate(self.pending) if mask >> i & 1)


Choice = Callable[[Moment], Iterable[tuple[Effect, ...]]]


def all_or_nothing(moment: Moment) -> Iterator[tuple[Effect, ...]]:
    """What the kernel has not written back is lost, or none of it."""
    yield ()
    yield moment.pending


def subsets(exhaustive: int, samples: int) -> Choice:
    """Every subset of up to `exhaustive` effects; of more: each alone, all but each, all up to each, and samples."""

    def choose(moment: Moment) -> Iterator[tuple[Effect, ...]]:
        pending, many = moment.pending, len(moment.pending)
        if many <= exhaustive:
            yield from map(moment.masked, range(1 << many))
            return
        yield ()
        for i in range(many):
            yield pending[i : i + 1]
            yield pending[:i] + pending[i + 1 :]
            yield pending[: i + 1]
        generator = random.Random(many)
        for _ in range(samples):
            yield moment.masked(generator.getrandbits(many))

    return choose


def moments(events: Iterable[Event]) -> Iterator[Moment]:
    """Just before each sync and each report, and the end: the subsets of any other moment are among these."""
    disk, pending, committed = Disk(), [], 0
    for event in events:
        if not isinstance(event, Sync | Committed):
            pending.append(event)
            continue
        pending = list(reachable(disk, pending))
        yield Moment(Disk(dict(disk.names), dict(disk.data)), tuple(pending), committed)
        if isinstance(event, Committed):
            committed = event.generation
            continue
        ours = [e for e in pending if (0 if isinstance(e, Names) else e.inode) == event.inode]
        pending = [e for e in pending if e not in ours]
        for effect in () if event.lost else ours:
            disk.apply(effect)
    yield Moment(disk, tuple(reachable(disk, pending)), committed)


def reachable(disk: Disk, pending: Sequence[Effect]) -> Iterator[Effect]:
    """Without the data of inodes that have lost their last name for good."""
    named = set(disk.names.values())
    named |= {inode for e in pending if isinstance(e, Names) for _, inode in e.changes if inode is not None}
    return (e for e in pending if isinstance(e, Names) or e.inode in named)


@dataclass
class Tally:
    """states: (moment, subset) pairs; distinct: different folders among them; rebuilds: with a cache to build again."""

    states: int = 0
    distinct: int = 0
    rebuilds: int = 0
    wrong: list[str] = field(default_factory=list)


def enumerate_states(
    events: Sequence[Event],
    verdict: Callable[[State], tuple[int, bool] | str],
    choose: Choice,
    *,
    stop: bool = False,
) -> Tally:
    """Judges every state: its generation must be the reported one or the next.

    Args:
        events: of a run.
        verdict: generation of a state and whether a cache must be built again, or what is wrong with it.
        choose: subsets of the pending effects of a moment.
        stop: at the first wrong state.
    """
    tally, known = Tally(), {}
    for moment in moments(events):
        for chosen in choose(moment):
            state = moment.disk.with_effects(chosen)
            if state not in known:
                known[state] = verdict(state)
            found, tally.states = known[state], tally.states + 1
            problem = found if isinstance(found, str) else ""
            if not isinstance(found, str):
                tally.rebuilds += found[1]
                if not moment.committed <= found[0] <= moment.committed + 1:
                    problem = f"{moment.committed} was reported, {found[0]} is there"
            if problem:
                tally.wrong.append(f"{problem}; with {[str(e)[:80] for e in chosen]}")
                if stop:
                    return tally
    tally.distinct = len(known)
    return tally


# ---- Mutants: the log of a program that leaves something out -------------------------------------------------------


def without_syncs(events: Sequence[Event], leave_out: Callable[[int, Sync], bool]) -> list[Event]:
    """leave_out: of the i-th sync of the run, from 0."""
    counted = itertools.count()
    return [e for e in events if not (isinstance(e, Sync) and leave_out(next(counted), e))]


def with_early_unlinks(events: Sequence[Event], before: Callable[[Names], bool], commits: int = 0) -> list[Event]:
    """Deletions of a run's files moved in front of the rename that `before` names, so many commits back."""
    made: list[Event] = []
    marks: list[int] = []  # where to, in `made`
    for event in events:
        deletes = isinstance(event, Names) and all(inode is None for _, inode in event.changes)
        if deletes and "tmp" not in event.changes[0][0] and len(marks) > commits:
            made.insert(marks[-1 - commits], event)
            marks = [m + (m > marks[-1 - commits]) for m in marks]
            continue
        if isinstance(event, Names) and before(event) and not (marks and _same_commit(made, marks[-1])):
            marks.append(len(made))
        made.append(event)
    return made


def _same_commit(made: Sequence[Event], mark: int) -> bool:
    return not any(isinstance(e, Committed) for e in made[mark:])


def renames(name: str) -> Callable[[Names], bool]:
    return lambda event: any(new == name and inode is not None for new, inode in event.changes[1:])


def with_a_second_fsync(events: Sequence[Event], name: str) -> list[Event]:
    """A program whose fsync of a file fails, and which asks the same file again."""
    again = [[replace(e, lost=True), e] if isinstance(e, Sync) and e.name == name else [e] for e in events]
    return list(itertools.chain.from_iterable(again))


def events_from(log: str, facts: dict[str, Any]) -> list[Event]:
    return list(events_of(log.splitlines(), facts["writes"]))

"""The commit against power cuts, by enumeration: the folder is the old commit or the new one in every crash state.

The states: crash_states.py; the run: commit_scenes.py. Leaving out any fsync, or deleting early, must give a bad state.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commit_scenes as scenes
import crash_states as crash
import pytest

from nf_engine.errors import NFError

# Every subset of up to so many pending effects; else so many samples of them.
BOUNDS = pytest.mark.parametrize(("exhaustive", "samples"), [(7, 20), pytest.param(12, 200, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    yield from scenes.programs()


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def record(program: Any, folder: Path, *more: Any) -> tuple[list[Any], dict[str, Any]]:
    """The events of a run and how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_name("log")
    ended = program(folder, "", *more, scene="recorded", log=str(log))
    assert ended.result == "done", ended
    return crash.events_from(log.read_text(), ended.facts), ended.facts


@pytest.fixture(scope="module")
def events(program: Any, memory: Path) -> list[Any]:
    return record(program, memory / "recorded")[0]


@pytest.fixture
def verdict(memory: Path) -> Callable[[Any], tuple[int, bool] | str]:
    """Opens a state as the next start would; checks what is there, the way back, and that nothing stray is left."""
    folder = memory / "state"

    def judge(state: Any) -> tuple[int, bool] | str:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        for name, data in state:
            (folder / name).write_bytes(data)
        try:
            return scenes.opened(folder)  # type: ignore[no-any-return]
        except (NFError, AssertionError, OSError, KeyError, ValueError) as error:
            return f"{type(error).__name__}: {str(error)[:200]}"

    return judge


@BOUNDS
def test_every_crash_state_is_the_old_commit_or_the_new_one(events, verdict, figure, exhaustive, samples):
    tally = crash.enumerate_states(events, verdict, crash.subsets(exhaustive, samples))
    pending = [len(moment.pending) for moment in crash.moments(events)]
    print(
        f"{tally.states} states of {len(pending)} moments ({sum(many <= exhaustive for many in pending)} with every "
        f"subset, at most {max(pending)} effects pending), {tally.distinct} different; {tally.rebuilds} need a cache "
        f"built again; {len(tally.wrong)} wrong"
    )
    what = f"crash states, every subset of up to {exhaustive} pending effects"
    figure("P3", what, tally.states - len(tally.wrong), tally.states)
    assert not tally.wrong, tally.wrong[:5]
    assert tally.rebuilds > 10  # listed, and its data never reached the disk


def test_a_run_goes_on_from_crash_states(events, verdict, memory, figure):
    """To the same end, with the caches that were lost built again; one state of each kind."""
    good = total = 0
    states = {
        moment.disk.with_effects(chosen)
        for moment in crash.moments(events)
        for chosen in (*crash.all_or_nothing(moment), moment.pending[::2], moment.pending[-1:])
    }
    seen = set()
    for state in states:
        found = verdict(state)
        if found not in seen:
            seen.add(found)
            assert not isinstance(found, str), found
            total += 1
            folder = memory / "state"
            scenes.play(str(folder), lambda _: None)
            manifest, contents = scenes.found(folder)
            good += manifest["done"] and contents == scenes.expected(len(scenes.STEPS))
            # What is done already is only read.
            stray = {*os.listdir(folder)} ^ scenes.listed(folder)  # noqa: PTH208
            assert stray <= {"log.jsonl"} if found[0] == len(scenes.STEPS) else not stray
    figure("P3", "kinds of crash states (generation, caches lost) from which the run ends equal", good, total)
    assert good == total
    assert total > len(scenes.STEPS) + 2


# ---- Mutants


def metadata(name: str) -> bool:
    return name in (".", "metrics.jsonl") or name.startswith("MANIFEST")


def mutants(events: list[Any]) -> dict[str, list[Any]]:
    """Programs that leave out one thing; the first sync is of the folder above the run's, the second for LOCK."""
    folder_syncs = [i for i, e in enumerate(e for e in events if isinstance(e, crash.Sync)) if e.name == "."]
    second, fourth = set(folder_syncs[2::2]), set(folder_syncs[3::2])
    return {
        "fsync of a new file": crash.without_syncs(events, lambda _, e: not metadata(e.name)),
        "fsync of MANIFEST.prev.json": crash.without_syncs(events, lambda _, e: e.name == "MANIFEST.prev.json.tmp"),
        "fsync of metrics.jsonl": crash.without_syncs(events, lambda _, e: e.name == "metrics.jsonl"),
        "fsync of the folder before its first file": crash.without_syncs(events, lambda i, _: i == 1),
        "fsync of the folder after the renames": crash.without_syncs(events, lambda i, _: i in second),
        "fsync of MANIFEST.json": crash.without_syncs(events, lambda _, e: e.name == "MANIFEST.json.tmp"),
        "fsync of the folder after MANIFEST.json": crash.without_syncs(events, lambda i, _: i in fourth),
        "deletes before the copy of the manifest": crash.with_early_unlinks(
            events, crash.renames("MANIFEST.prev.json")
        ),
        "deletes one commit early": crash.with_early_unlinks(events, crash.renames("MANIFEST.json"), 1),
    }


def test_every_mutant_of_the_commit_is_detected(events, verdict, figure):
    found = {}
    for name, changed in mutants(events).items():
        assert changed != events, name
        tally = crash.enumerate_states(changed, verdict, crash.subsets(7, 20), stop=True)
        found[name] = tally.wrong
        print(f"{name}: {tally.wrong[0][:150] if tally.wrong else 'not detected'}")
    figure("P3", "mutants of the commit detected", sum(map(bool, found.values())), len(found))
    assert all(found.values()), [name for name, wrong in found.items() if not wrong]


@pytest.mark.slow
def test_every_single_fsync_is_needed(events, verdict, figure):
    """But that of metrics.jsonl in a commit that adds no line to it.

    The folder's is, also where a commit adds caches alone: without it the copy of the manifest before could be an older
    one, to which there is no step back.
    """
    syncs = [e for e in events if isinstance(e, crash.Sync)]
    undetected = []
    for n, sync in enumerate(syncs[1:], 1):
        changed = crash.without_syncs(events, lambda i, _, n=n: i == n)
        if not crash.enumerate_states(changed, verdict, crash.subsets(7, 20), stop=True).wrong:
            undetected.append((n, sync.name))
    figure("P3", "single fsyncs of a run whose absence is detected", len(syncs) - 1 - len(undetected), len(syncs) - 1)
    print("not needed:", undetected)
    assert [name for _, name in undetected] == ["metrics.jsonl"] * sum(not step.line for step in scenes.STEPS)


# ---- P4


@pytest.mark.parametrize("part", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_no_manifest_names_a_file_whose_fsync_failed(program, memory, events, verdict, figure, part):
    """The n-th fsync of a file fails once and its pages are lost for good: the commit after it holds without them."""
    syncs = [e.name for e in events if isinstance(e, crash.Sync) and e.name != "."]
    good = total = 0
    for code, full in ((errno.EIO, False), (errno.ENOSPC, False), (errno.EIO, True)):
        # The one file that lives on after a failure, metrics.jsonl, in any case.
        for n in (n for n, name in enumerate(syncs, 1) if n % part == 0 or name == "metrics.jsonl"):
            changed, facts = record(program, memory / "recorded", n, code, full)
            assert any(isinstance(e, crash.Sync) and e.lost for e in changed)
            # Without a ballast there is no room for a second attempt.
            assert facts["error"] in ({"", "DiskFullError"} if full or code == errno.ENOSPC else {""})
            tally = crash.enumerate_states(changed, verdict, crash.all_or_nothing)
            total += 1
            good += not tally.wrong
            assert not tally.wrong, (n, code, full, tally.wrong[:3])
    what = "fsync fails and loses its pages: crash states of the run after it" + (f", 1 in {part}" if part > 1 else "")
    figure("P4", what, good, total)


def test_a_file_synced_again_after_a_failed_fsync_is_detected(events, verdict):
    for name in ("metrics.jsonl", "MANIFEST.json.tmp", "c0000005.safetensors.tmp"):
        changed = crash.with_a_second_fsync(events, name)
        assert crash.enumerate_states(changed, verdict, crash.all_or_nothing, stop=True).wrong, name

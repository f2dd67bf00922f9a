"""bench_reliability: what it counts is what happened, by candidates whose every fault is known."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import bench_reliability as bench
from bench import reliability_peers as peers

STATE = {"value": torch.tensor([7, 8], dtype=torch.uint8)}
OTHER = {"value": torch.tensor([9, 10], dtype=torch.uint8)}
MAGIC, UNREAD, DEADLY = 0x4E, 0x55, 0x33


def fake(save, load):
    """A candidate of two functions."""

    @contextmanager
    def opened(folder):
        yield lambda state: save(state, folder)

    return peers.Candidate("fake", opened, lambda _, folder: load(folder), lambda name: name != "LOCK")


def save_in_place(state, folder):
    (folder / "LOCK").write_bytes(b"mine")
    with (folder / "state").open("wb", buffering=0) as file:
        file.write(bytes([MAGIC, *state["value"].tolist(), UNREAD, DEADLY]))


def save_renamed(state, folder):
    with (folder / "state.tmp").open("wb", buffering=0) as file:
        file.write(bytes([MAGIC, *state["value"].tolist(), UNREAD, DEADLY]))
    (folder / "state.tmp").replace(folder / "state")


def load_careless(folder):
    """Checks the first byte, believes the next two, skips one; another last one is the end of the process."""
    magic, a, b, _, last = (folder / "state").read_bytes()
    if last != DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    if magic != MAGIC:
        raise LookupError(f"magic {magic}")
    return {"value": torch.tensor([a, b], dtype=torch.uint8)}


IN_PLACE, RENAMED = fake(save_in_place, load_careless), fake(save_renamed, load_careless)


@pytest.mark.parametrize("candidate", peers.CANDIDATES, ids=lambda c: c.name)
def test_each_candidate_gives_back_what_was_saved_over_another_state(candidate, tmp_path):
    old, new = peers.state_of_size(4096, 1), peers.state_of_size(4096, 2)
    assert sum(t.nbytes for t in old.values()) == 4096
    assert not peers.same(old, new)
    (tmp_path / "run").mkdir(mode=0o700)
    for state in (old, new):
        candidate.save(state, tmp_path / "run")
        kind, error = peers.look(candidate, tmp_path / "run", {"old": old, "new": new})
        assert (kind, error) == ("old" if state is old else "new", "")


def test_a_state_is_the_same_only_with_the_same_names_types_and_values():
    a = {"w": torch.tensor([1.0, 2.0])}
    assert peers.same(a, {"w": torch.tensor([1.0, 2.0])})
    for b in ({"v": a["w"]}, {}, {"w": a["w"].double()}, {"w": torch.tensor([1.0, 2.5])}, a | {"b": a["w"]}):
        assert not peers.same(a, b)


def test_changed_bytes_are_counted_by_what_became_of_them(tmp_path):
    found = peers.byte_changes(IN_PLACE, STATE, tmp_path, 1)
    assert found == {
        "changes": 5, "error": 2, "wrong": 2, "no effect": 1, "errors": {"LookupError": 1, "SIGKILL": 1},
    }  # fmt: skip
    assert (tmp_path / "state").read_bytes() == bytes([MAGIC, 7, 8, UNREAD, DEADLY])
    assert peers.byte_changes(IN_PLACE, STATE, tmp_path, 2)["changes"] == 3


def test_a_load_that_never_ends_is_an_error(tmp_path, monkeypatch):
    def load(folder):
        while (folder / "state").read_bytes()[0] != MAGIC:
            time.sleep(0.01)
        return load_careless(folder)

    monkeypatch.setattr(peers, "PATIENCE", 1)
    found = peers.byte_changes(fake(save_in_place, load), STATE, tmp_path, 5)
    assert (found["changes"], found["errors"]) == (1, {"SIGALRM": 1})


def test_calls_are_numbered_by_kind_and_thread():
    log = (
        '7  openat(AT_FDCWD, "/a write(", O_RDONLY) = 3\n7  write(3, "x\\n", 2) = 2\n'
        '8  write(4, "y", 1 <unfinished ...>\n7  write(3, "z", 1) = 1\n8  <... write resumed>) = 1\n'
        "7  +++ exited with 0 +++\n"
    )
    assert peers.parse_calls(log) == [("openat", 1), ("write", 1), ("write", 1), ("write", 2)]


def scene(candidate, place):
    place.mkdir()
    return peers.Scene(candidate, STATE, OTHER, place)


def load_strict(folder):
    """As careless, but an odd length is an error and not the end of this process."""
    if len((folder / "state").read_bytes()) != 5:
        raise LookupError("cut")
    return load_careless(folder)


def test_a_save_is_killed_before_each_of_its_calls(tmp_path):
    renamed = peers.kills(scene(fake(save_renamed, load_strict), tmp_path / "renamed"))
    if renamed["kills"] is None:
        pytest.skip(renamed["why"])
    assert renamed == {
        "kills": 3, "old": 3, "new": 0, "lost": 0, "wrong": 0, "calls": {"openat": 1, "write": 1, "rename": 1},
    }  # fmt: skip
    # LOCK: openat, write; state: openat, which cuts it, write.
    in_place = peers.kills(scene(fake(save_in_place, load_strict), tmp_path / "in_place"))
    assert in_place == {
        "kills": 4, "old": 3, "new": 0, "lost": 1, "wrong": 0, "calls": {"openat": 2, "write": 2},
    }  # fmt: skip


def test_a_mixture_of_two_states_counts_as_wrong(tmp_path):
    def save(state, folder):
        for k, value in enumerate(state["value"].tolist()):
            with (folder / f"{k}.tmp").open("wb", buffering=0) as file:
                file.write(bytes([value]))
            (folder / f"{k}.tmp").replace(folder / str(k))

    def load(folder):
        return {"value": torch.tensor([(folder / str(k)).read_bytes()[0] for k in range(2)], dtype=torch.uint8)}

    found = peers.kills(scene(fake(save, load), tmp_path / "mixed"))
    if found["kills"] is None:
        pytest.skip(found["why"])
    assert [found[k] for k in ("old", "new", "lost", "wrong")] == [3, 0, 0, 3]


def test_without_strace_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert peers.kills(scene(RENAMED, tmp_path / "a"))["kills"] is None


@pytest.mark.slow
def test_ours_survives_each_operation_of_the_hook(tmp_path):
    old, new = peers.state_of_size(4096, 1), peers.state_of_size(4096, 2)
    found = peers.hook_kills(peers.Scene(peers.OURS, old, new, tmp_path), ["kill"])
    assert found["kills"] == found["old"] + found["new"] >= 20
    assert found["old"] > found["new"] > 0


@pytest.mark.parametrize("mounts", [True, False])
def test_a_full_disk_gives_its_error_and_what_is_left(mounts, monkeypatch):
    if not mounts:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    small, large = {"value": torch.zeros(1000, dtype=torch.uint8)}, {"value": torch.zeros(1 << 20, dtype=torch.uint8)}

    def save(state, folder):
        with (folder / "state").open("wb", buffering=0) as file:
            rest = bytes(state["value"].tolist())
            while rest:
                rest = rest[file.write(rest) :]

    def load(folder):
        return {"value": torch.tensor(list((folder / "state").read_bytes()), dtype=torch.uint8)}

    candidate = fake(save, load)
    found = peers.full_disk(candidate, small, large, 512 << 10)
    assert found["left"] == "wrong"
    if found["by"] == "tmpfs":
        assert (found["error"], found["text"]) == ("OSError", "[Errno 28] No space left on device")
    else:
        assert (found["error"], found["text"]) == ("OSError", "[Errno 27] File too large")
    assert found["says why"]
    assert peers.full_disk(candidate, small, small, 512 << 10)["error"] == "no error"


def test_times_have_a_row_for_each_way_and_sync_where_they_say_so(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()) or fsync(fd))
    rows = list(bench.times(1 << 20, 2, tmp_path))
    names = [r["candidate"] for r in rows]
    assert names == [
        *("torch.save", "torch.save + fsync", "safetensors", "safetensors + fsync", "torch.distributed.checkpoint"),
        *("torch.distributed.checkpoint + fsync", "nf_engine"),
    ]
    assert all(0 < r["low_ms"] <= r["median_ms"] <= r["high_ms"] and r["mib"] == 1 for r in rows)
    folder = tmp_path / "safetensors+fsync"
    assert [p for p in synced if folder in (p, p.parent)] == [folder / "state.safetensors", folder] * 3
    assert tmp_path / "safetensors" not in synced


def test_a_clock_sums_what_it_times():
    clock = bench.Clock()

    def double(x):
        time.sleep(0.01)
        return 2 * x

    def fail():
        raise LookupError

    assert clock.timed("double", double)(3) == 6
    assert clock.timed("double", double)(x=4) == 8
    with pytest.raises(LookupError):
        clock.timed("fail", fail)()
    assert clock.calls == {"double": 2, "fail": 1}
    assert 0.02 <= clock.seconds < 1


def rows(**changes):
    """Rows with two rounds of trainings; `changes` are of the rows of nf_engine's damage."""
    ours = {"candidate": "nf_engine"}
    damage = [
        ours | {"what": "changed byte", "wrong": changes.get("wrong_byte", 0)},
        ours
        | {
            "what": "kill",
            "by": "strace",
            "kills": changes.get("kills", 9),
            "lost": changes.get("lost", 0),
            "wrong": 0,
        },
        ours | {"what": "kill", "by": "hook", "kills": 9, "lost": 0, "wrong": changes.get("mixed", 0)},
        ours | {"what": "full disk", "left": changes.get("left", "old")},
        {"candidate": "peer", "what": "changed byte", "wrong": 99},
        {"candidate": "peer", "what": "kill", "by": "strace", "kills": 9, "lost": 8, "wrong": 1},
        {"candidate": "peer", "what": "full disk", "left": "lost"},
    ]
    seconds = {"default": (11, 30), "one a second": (15, 22), "none inside blocks": (10, 20)}
    trained = [
        {
            "what": "training",
            "arm": arm,
            "round": k,
            "seconds": s,
            "share": 0.01 * s / 10,
            "same": changes.get("same", True),
        }
        for arm, both in seconds.items()
        for k, s in enumerate(both)
    ]
    found = [*damage, *trained, {"what": "resume", "round": 0, "same": True}]
    return [*found, *bench.summary(found)]


def test_the_summary_compares_arms_within_their_rounds():
    found = {r["arm"]: r for r in bench.of_kind(rows(), "commit share")}
    assert found["default"]["to none inside blocks"] == pytest.approx((1.1 + 1.5) / 2)
    assert found["default"]["share"] == pytest.approx((0.011 + 0.030) / 2)
    assert found["one a second"]["to none inside blocks"] == pytest.approx((1.5 + 1.1) / 2)
    assert found["none inside blocks"]["to none inside blocks"] == 1


def test_checks_hold_ours_and_not_the_peers():
    good = bench.checks(rows())
    assert [entry["value"] for entry in good.values()] == [0, 0, 0, 0, 0.0205, 0]
    assert all(entry["ok"] for entry in good.values())
    for change in ({"wrong_byte": 1}, {"lost": 1}, {"mixed": 1}, {"left": "lost"}, {"same": False}):
        assert [e["ok"] for e in bench.checks(rows(**change)).values()].count(False) == 1, change
    unknown = bench.checks(rows(kills=None))
    assert [e["ok"] for e in unknown.values()].count(None) == 1


def test_a_line_names_the_row_and_all_its_figures():
    text = bench.line({"what": "commit", "candidate": "torch.save", "mib": 1, "median_ms": 5.26049})
    assert text.split() == ["commit", "torch.save", "mib", "1,", "median_ms", "5.26"]


@pytest.mark.slow
def test_trainings_are_clocked_and_the_same(tmp_path):
    data, test = bench.images("synthetic:400", 400, 100)
    training = bench.Training(data, test, 2)
    found = list(bench.trainings(training, 1, tmp_path))
    assert [r.get("arm", r["what"]) for r in found] == [*bench.MINUTES, "resume"]
    assert all(r["same"] and r["status"] == "completed" for r in found)
    default, often, off, resumed = found
    assert often["commits"] >= default["commits"] == off["commits"] >= default["blocks"] + 2  # first and last
    assert all(0 < r["commit_seconds"] < r["seconds"] for r in found)
    assert 0 < resumed["first_step_seconds"] < resumed["seconds"]


def test_functions_that_are_clocked_are_those_that_a_training_calls():
    with bench.clocked_commits() as clock:
        for module in (bench.engine, bench.trainer, bench.controller):
            module.to_bytes({"w": torch.zeros(1)}, {})
    assert clock.calls == {"to_bytes": 3}
    assert bench.engine.to_bytes is peers.to_bytes

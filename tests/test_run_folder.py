"""Run folder: what it takes for its own, what a commit leaves, what the next start finds, and who may write.

Faults, crashes and power cuts: test_commit_faults.py, test_crash_states.py. Damage: test_damage.py. Names, links and
other users: test_paths.py.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nf_engine.committed import go_back, read_run
from nf_engine.errors import ConfigError, CorruptFileError, PermissionRefusedError, RunLockedError, StorageError
from nf_engine.folder_files import staging
from nf_engine.manifest import FileEntry, Manifest, Position
from nf_engine.run_folder import NewFile, RunFolder, default_path

ROOT = Path(__file__).parent.parent
SCENES = Path(__file__).with_name("folder_scenes.py")
RUNS: list[Path] = []


def names(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def descriptors() -> set[str]:
    """What the process has open, but for the listing itself."""
    gc.collect()
    found = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 (names, not paths: one is gone when it is looked at)
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")  # noqa: PTH115
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path, figure):
    """P24: every run holds its manifests, what they list, LOCK and log.jsonl, and nothing stays open."""
    RUNS[:] = []
    before = descriptors()
    yield
    for path in RUNS:
        listed = set()
        for manifest in ("MANIFEST.json", "MANIFEST.prev.json"):
            if (path / manifest).exists():
                listed |= {manifest} | {f["name"] for f in json.loads((path / manifest).read_text())["files"]}
        with RunFolder(path) as run:
            strangers = set(run.strangers)
        assert names(path) - strangers - {"LOCK", "log.jsonl"} <= listed, "stray files"
    assert descriptors() - before == set(), "left open"
    figure("P24", "tests of the run folder that leave no stray file and no descriptor", 1, 1)


def begun(path: Path) -> RunFolder:
    RUNS.append(path)
    run = RunFolder(path)
    run.begin("a" * 64, "b" * 64, {"torch": "2.13.0"}, [NewFile("config", b"lr = 0.1\n"), NewFile("plan", b"{}\n")])
    return run


def committed(path: Path, steps: int = 2) -> RunFolder:
    run = begun(path)
    for step in range(1, steps):
        run.add_metrics({"epoch": step})
        run.commit(Position(0, step, 0), [NewFile("train", f"weights {step}".encode())])
    return run


# --- which folder ---


def test_a_new_folder_is_made_with_its_parents_for_its_owner_alone(tmp_path):
    with begun(tmp_path / "a" / "run") as run:
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
        assert {stat.S_IMODE(p.stat().st_mode) for p in run.path.iterdir()} == {0o600}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    with begun(tmp_path / "run") as run:
        assert run.strangers == []


@pytest.mark.parametrize(
    "found",
    [["plan.json", "b000.safetensors", "x"], ["config.toml"], ["model.json", "config.toml.tmp"], ["log.jsonl"]],
)
def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path, found):
    """Even where a run might have written each of the names: without LOCK none has been there."""
    for name in found:
        (tmp_path / name).write_text("old")
    rest = f" and {len(found) - 1} more" * (len(found) > 1)
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            RunFolder(tmp_path)
        assert str(caught.value) == (
            f"output_dir {tmp_path} holds {min(found)!r}{rest} and no run of nf_engine; name a new or empty folder"
        )
    with pytest.raises(ConfigError, match="expected MANIFEST"):
        go_back(tmp_path)
    with pytest.raises(ConfigError, match="expected a run folder with MANIFEST"):
        read_run(tmp_path, [])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(found, "old")


def test_a_folder_with_a_lock_and_other_files_is_refused_and_left_alone(tmp_path):
    """As a database has it."""
    for name in ("LOCK", "CURRENT", "MANIFEST-000001", "config.toml"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ConfigError, match=r"holds 'CURRENT' and 1 more|holds 'CURRENT'"):
        RunFolder(tmp_path)
    assert {p.read_text() for p in tmp_path.iterdir()} == {"old"}


def test_what_a_first_commit_left_behind_is_swept(tmp_path):
    """It made LOCK first, so the rest is its own."""
    begun(tmp_path / "run").close()
    (tmp_path / "run" / "MANIFEST.json").rename(tmp_path / "run" / "MANIFEST.json.tmp")
    with RunFolder(tmp_path / "run") as run:
        assert (run.manifest, run.strangers, run.next_generation) == (None, [], 1)
        assert names(run.path) == {"LOCK"}


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(PermissionRefusedError, match=r"run: expected a folder of this user, found a link, a file"):
        RunFolder(tmp_path / "run")
    with pytest.raises(StorageError) as caught:
        RunFolder(tmp_path / "run" / "inner")
    assert (caught.value.op, caught.value.errno) == ("mkdir", errno.EEXIST)


def test_without_a_name_the_folder_is_named_after_time_and_model():
    path = default_path("../my net/v2")
    assert path.parent == Path("runs")
    assert path.name.endswith("-..-my-net-v2")


def test_a_relative_path_and_a_slash_at_the_end_are_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "run").close()
    with RunFolder("run/") as run, pytest.raises(RunLockedError):
        RunFolder(tmp_path / "run")
    assert run.manifest is not None


# --- commits ---


def test_a_commit_lists_what_was_written_and_a_reader_gets_it(tmp_path):
    with committed(tmp_path / "run", 3) as run:
        assert names(run.path) == {
            *("LOCK", "MANIFEST.json", "MANIFEST.prev.json", "config.toml", "plan.json", "metrics.jsonl"),
            *("c0000002.safetensors", "c0000003.safetensors"),
        }
        manifest, files = read_run(run.path, ["config", "train", "metrics"])
        assert manifest == run.manifest
    assert files == {
        "config.toml": b"lr = 0.1\n",
        "c0000003.safetensors": b"weights 2",
        "metrics.jsonl": b'{"epoch": 1}\n{"epoch": 2}\n',
    }
    for entry in manifest.files:  # against the disk itself
        data = (tmp_path / "run" / entry.name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (manifest.generation, manifest.position, manifest.done) == (3, Position(0, 2, 0), False)


def test_each_manifest_carries_the_digest_of_the_one_before(tmp_path):
    with begun(tmp_path / "run") as run:
        assert run.manifest is not None
        assert (run.manifest.generation, run.manifest.prev_sha256) == (1, "")
        for step in range(4):
            before = (run.path / "MANIFEST.json").read_bytes()
            run.commit(Position(0, step, 0))
            assert (run.path / "MANIFEST.prev.json").read_bytes() == before
            assert run.manifest.prev_sha256 == hashlib.sha256(before).hexdigest()


def test_a_finished_block_takes_the_place_of_its_training(tmp_path):
    with committed(tmp_path / "run") as run:
        cache = FileEntry("x001-g0003.nfc", "cache", 1, 6, "c" * 64)
        (run.path / cache.name).write_bytes(b"floats")
        run.commit(Position(1), [NewFile("block", b"done", 0)], there=[cache], drop=["train"])
        assert run.manifest is not None
        assert {e.role for e in run.manifest.files} == {"config", "plan", "metrics", "block", "cache"}
        assert "c0000002.safetensors" in names(run.path)  # of the commit before
        run.commit(Position(2), [NewFile("block", b"next", 1)], drop=["cache"])
        assert names(run.path) & {"c0000002.safetensors", cache.name} == set()
        assert {"b000-g0003.safetensors", "b001-g0004.safetensors"} <= names(run.path)
        run.commit(Position(2), [NewFile("exits", b"{}"), NewFile("model", b"{}")], done=True)
        assert run.manifest.done
        assert {"exits.json", "model.json"} <= names(run.path)


def test_a_plan_made_again_has_another_name_while_the_old_one_may_be_gone_back_to(tmp_path):
    with begun(tmp_path / "run") as run:
        run.commit(Position(), [NewFile("plan", b"smaller")])
        assert {"plan.json", "plan-g0002.json"} <= names(run.path)
        assert read_run(run.path, ["plan"])[1] == {"plan-g0002.json": b"smaller"}
        run.commit(Position())
        assert "plan.json" not in names(run.path)


def test_metrics_count_from_the_commit_on(tmp_path):
    run = committed(tmp_path / "run", 3)
    run.add_metrics({"epoch": 3, "text": "größe\n"})
    assert run.metrics()[2] == {"epoch": 3, "text": "größe\n"}
    run.close()
    with RunFolder(tmp_path / "run") as again:
        assert again.metrics() == [{"epoch": 1}, {"epoch": 2}]
        assert (again.path / "metrics.jsonl").read_bytes() == b'{"epoch": 1}\n{"epoch": 2}\n'
        again.cut_metrics(1)
        again.add_metrics({"epoch": 9})
        again.commit(Position(0, 9, 0))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b'{"epoch": 1}\n{"epoch": 9}\n'


def test_the_log_holds_one_line_an_event_with_control_characters_escaped(tmp_path):
    with begun(tmp_path / "run") as run:
        run.log("start", name="a\nb\x1b[2Jé", path=Path("x"))
        run.log("end")
    lines = (tmp_path / "run" / "log.jsonl").read_bytes().decode("ascii").splitlines()
    assert all(line.isprintable() for line in lines)
    first, second = map(json.loads, lines)
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"event": "start", "name": "a\nb\x1b[2Jé", "path": "x"}
    assert second["event"] == "end"


def test_reserved_room_is_on_the_disk_until_it_is_dropped(tmp_path):
    with begun(tmp_path / "run") as run:
        run.reserve(1 << 20)
        assert (run.path / "ballast.tmp").stat().st_blocks * 512 >= 1 << 20
        run.commit(Position(0, 1, 0))
        run.reserve(1 << 16)
        assert (run.path / "ballast.tmp").stat().st_size == 1 << 16
        assert run.drop_ballast()
        assert not run.drop_ballast()
        run.reserve(4096)  # and is not there any more after the next start
    with RunFolder(tmp_path / "run") as run:
        assert "ballast.tmp" not in names(run.path)


def test_a_staged_folder_gets_its_name_when_it_is_complete(tmp_path):
    with staging(tmp_path / "out") as place:
        assert place.path.parent == tmp_path
        assert stat.S_IMODE(place.path.stat().st_mode) == 0o700
        place.put(place.write("part.bin", b"1234"), tmp_path / "part.bin")
        place.write("model.json", b"{}")
        place.put(place.path, tmp_path / "out")
    assert (tmp_path / "part.bin").read_bytes() == b"1234"
    assert names(tmp_path / "out") == {"model.json"}
    with pytest.raises(StorageError), staging(tmp_path / "never") as place:
        place.put(place.write("model.json", b"{}"), tmp_path / "part.bin" / "model.json")
    assert names(tmp_path) == {"part.bin", "out"}


def test_after_a_failed_commit_only_the_next_start_can_tell(tmp_path, monkeypatch):
    """The same commit again might touch what the manifest on the disk lists by now."""
    with committed(tmp_path / "run", 2) as run:
        lost = StorageError("the disk is gone", op="pwrite", path="it", offset=0, errno=errno.EIO)

        def broken(*_):
            raise lost

        monkeypatch.setattr("nf_engine.run_folder.write_file", broken)
        with pytest.raises(StorageError, match="the disk is gone"):
            run.commit(Position(0, 2, 0))
        monkeypatch.undo()
        for _ in range(2):
            with pytest.raises(StorageError) as again:
                run.commit(Position(0, 2, 0))
            assert again.value is lost
    with RunFolder(tmp_path / "run") as run:
        assert run.manifest_now.position == Position(0, 1, 0)
        run.commit(Position(0, 2, 0))


# --- the next start ---


def test_the_sweep_takes_our_own_names_alone_and_reports_the_others(tmp_path):
    committed(tmp_path / "run").close()
    ours = ["c0000009.safetensors", "c0000003.safetensors.tmp", "x001-g0001.nfc", "MANIFEST.json.tmp", "exits.json"]
    others = ["notes.txt", "b000-g0001.safetensors.bak", "\udcff", "Config.toml", "sub"]
    for name in (*ours, *others[:-1]):
        (tmp_path / "run" / name).write_text("x")
    (tmp_path / "run" / "sub").mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run" / "x002-g0001.nfc").symlink_to(tmp_path / "victim")
    with RunFolder(tmp_path / "run") as run:
        assert run.strangers == sorted([*others, "x002-g0001.nfc"])
        assert names(run.path) & set(ours) == set()
        assert set(others) <= names(run.path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_that_is_missing_or_changed_is_named_with_the_way_back(tmp_path):
    with committed(tmp_path / "run", 3) as run:
        assert run.manifest is not None
        (entry,) = run.manifest.of_role("train")
        (run.path / entry.name).write_bytes(b"weights 3")
        way = rf"restore it, or go one commit back: nf-engine doctor --recover {run.path}"
        with pytest.raises(
            CorruptFileError, match=rf"{entry.name}: expected 9 bytes with sha256 .*, found 9 .*; {way}"
        ):
            run.read(entry)
        (run.path / entry.name).write_bytes(b"weights 2" + b"\0")
        with pytest.raises(CorruptFileError, match=rf"{entry.name}: expected 9 bytes at most, found 10; {way}"):
            run.read(entry)
        (run.path / entry.name).unlink()
        with pytest.raises(CorruptFileError, match=rf"{entry.name} is missing; {way}"):
            run.read(entry)
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    with pytest.raises(CorruptFileError, match=rf"metrics.jsonl is missing; {way}"):
        RunFolder(tmp_path / "run")
    (tmp_path / "metrics.jsonl").rename(tmp_path / "run" / "metrics.jsonl")
    assert go_back(tmp_path / "run").position == Position(0, 1, 0)
    with RunFolder(tmp_path / "run") as run:
        assert run.manifest is not None
        assert run.read(run.manifest.of_role("train")[0]) == b"weights 1"
        assert run.metrics() == [{"epoch": 1}]
        run.commit(Position(0, 2, 0), [NewFile("train", b"weights 2")])
        assert run.manifest.generation == 3


def test_a_damaged_manifest_is_never_rolled_back_in_silence(tmp_path):
    committed(tmp_path / "run", 3).close()
    path = tmp_path / "run" / "MANIFEST.json"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-1]), path.unlink):
        damage()
        listing = names(tmp_path / "run")
        with pytest.raises(CorruptFileError, match=r"MANIFEST.json.*nf-engine doctor --recover"):
            RunFolder(tmp_path / "run")
        assert names(tmp_path / "run") == listing
    assert go_back(tmp_path / "run").generation == 2


def test_one_can_go_back_once_and_not_into_a_damaged_commit(tmp_path):
    committed(tmp_path / "run", 3).close()
    old = tmp_path / "run" / "c0000002.safetensors"
    old.write_bytes(b"weights 9")
    present = (tmp_path / "run" / "MANIFEST.json").read_bytes()
    with pytest.raises(CorruptFileError, match=old.name):
        go_back(tmp_path / "run")
    assert (tmp_path / "run" / "MANIFEST.json").read_bytes() == present
    begun(tmp_path / "short").close()
    with pytest.raises(ConfigError, match="the run has one commit or none"):
        go_back(tmp_path / "short")
    with pytest.raises(ConfigError, match="expected a run folder, found none"):
        go_back(tmp_path / "nowhere")


def test_a_commit_of_another_time_or_run_is_no_way_back(tmp_path):
    """Its files may be there and whole: only the present manifest says what came before it."""
    with committed(tmp_path / "run", 2) as run:
        older = (run.path / "MANIFEST.prev.json").read_bytes()
        run.commit(Position(0, 2, 0))
        previous = run.path / "MANIFEST.prev.json"
        right = previous.read_bytes()
    committed(tmp_path / "other", 3).close()
    other = (tmp_path / "other" / "MANIFEST.prev.json").read_bytes()
    for wrong in (older, other):
        assert Manifest.parse(wrong, "whole").generation < 3
        previous.write_bytes(wrong)
        with pytest.raises(CorruptFileError, match=r"prev.json: expected the commit that generation 3 followed, with"):
            go_back(tmp_path / "run")
    previous.write_bytes(right)
    assert go_back(tmp_path / "run").generation == 2
    assert go_back(tmp_path / "run").generation == 2  # again: both manifests are the same one now
    previous.write_bytes(older)
    (tmp_path / "run" / "MANIFEST.json").write_bytes(b"torn")  # then nothing says what it followed
    assert go_back(tmp_path / "run").generation == 1


def test_the_sweep_keeps_nothing_for_a_commit_that_is_not_the_one_before(tmp_path):
    committed(tmp_path / "run", 3).close()
    committed(tmp_path / "other", 3).close()
    (tmp_path / "run" / "MANIFEST.prev.json").write_bytes((tmp_path / "other" / "MANIFEST.prev.json").read_bytes())
    assert "c0000002.safetensors" in names(tmp_path / "run")  # of the same name in both
    with RunFolder(tmp_path / "run"):
        assert "c0000002.safetensors" not in names(tmp_path / "run")
        assert "c0000003.safetensors" in names(tmp_path / "run")


# --- one writer ---


def test_a_second_writer_is_told_who_is_first(tmp_path):
    with begun(tmp_path / "run") as run:
        for call in (RunFolder, go_back) if (run.path / "MANIFEST.prev.json").exists() else (RunFolder,):
            with pytest.raises(RunLockedError, match=rf"is in use by process {os.getpid()} on ") as caught:
                call(run.path)
            assert caught.value.pid == os.getpid()
        read_run(run.path, ["config"])  # a reader needs no lock
    RunFolder(tmp_path / "run").close()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 4096, b"x" * 5000, b'{"pid": 1e999}', b'{"pid": 1, "host": {}}', b"[" * 4000, b"\xff\xfe", b"null"],
)
def test_a_lock_that_says_nonsense_is_still_a_lock(tmp_path, content):
    with begun(tmp_path / "run") as run:
        (run.path / "LOCK").write_bytes(content)
        before = time.monotonic()
        with pytest.raises(RunLockedError) as caught:
            RunFolder(run.path)
        assert time.monotonic() - before < 1
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_of_processes_that_start_at_once_one_runs_and_the_others_learn_which(tmp_path, count, figure):
    command = [sys.executable, SCENES, "races", tmp_path, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    right = 0
    for line in done.stdout.splitlines():
        race = json.loads(line)
        winners = [r["won"] for r in race["reports"] if "won" in r]
        losers = [r for r in race["reports"] if "won" not in r]
        assert all(r.keys() == {"pid", "host", "since", "seconds"} for r in losers), losers
        told = all((r["pid"], r["host"]) == (*winners, race["host"]) and r["seconds"] < 1 for r in losers)
        right += len(winners) == 1 and len(losers) == 3 and told
    figure("P23", "starts of 4 processes at once with one winner, named to the losers in 1 s", right, count)
    assert right == count


# --- a folder that is moved ---


def test_a_run_goes_on_in_the_folder_it_opened_whatever_takes_its_place(tmp_path, figure):
    run = committed(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").write_text("precious")
    for name in ("MANIFEST.json.tmp", "c0000003.safetensors.tmp", "metrics.jsonl", "log.jsonl", "LOCK"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with run:
        run.add_metrics({"epoch": 2})
        run.log("event")
        run.commit(Position(0, 2, 0), [NewFile("train", b"weights 2")])
    RUNS[:] = [tmp_path / "moved"]
    assert (tmp_path / "victim").read_text() == "precious"
    assert len(names(tmp_path / "run")) == 5
    manifest = Manifest.parse((tmp_path / "moved" / "MANIFEST.json").read_bytes(), "m")
    assert (manifest.generation, manifest.position) == (3, Position(0, 2, 0))
    assert {"c0000003.safetensors", "log.jsonl"} <= names(tmp_path / "moved")
    figure("P14", "folders replaced in mid-run: the run writes into its own", 1, 1)

"""Run folder: files whole or not at all, a full and a broken disk by a failing fsync, weights against safetensors."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nf_engine.errors import ConfigError, DiskFullError, StorageError
from nf_engine.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "a" / "run", "model")


def failing(number):
    def call(*_arguments, **_more):
        raise OSError(number, os.strerror(number))

    return call


def test_a_new_folder_is_made_with_its_parents_for_its_owner_alone(folder):
    assert folder.path.is_dir()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunFolder(str(tmp_path / "run"), "model").path == tmp_path / "run"


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    for name in ("plan.json", "b000.safetensors", "x"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path, "model")
    assert str(caught.value) == (f"output_dir {tmp_path} holds b000.safetensors and 2 more; name a new or empty folder")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("plan.json", "b000.safetensors", "x"), "old"
    )


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError) as caught:
        RunFolder(tmp_path / "run", "model")
    assert (caught.value.op, caught.value.path, caught.value.errno) == ("mkdir", str(tmp_path / "run"), errno.EEXIST)


def test_without_a_name_the_folder_is_named_after_time_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RunFolder(None, "../my net/v2").path
    assert path.parent.resolve() == tmp_path / "runs"
    assert path.name.endswith("-..-my-net-v2")
    assert path.is_dir()


def test_what_is_written_is_read_back(folder):
    assert folder.write("a.bin", b"\x00\xff") == folder.path / "a.bin"
    folder.write("a.txt", "größe")
    assert (folder.path / "a.bin").read_bytes() == b"\x00\xff"
    assert (folder.path / "a.txt").read_text(encoding="utf-8") == "größe"
    assert sorted(p.name for p in folder.path.iterdir()) == ["a.bin", "a.txt"]


def test_a_file_has_its_final_name_only_after_its_bytes_are_synced(folder, monkeypatch):
    seen = []
    sync = os.fsync

    def watch(number):
        seen.append(sorted((p.name, p.stat().st_size) for p in folder.path.iterdir()))
        sync(number)

    monkeypatch.setattr(os, "fsync", watch)
    folder.write("plan.json", b"12345")
    assert seen == [[("plan.json.tmp", 5)]]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_full_disk_is_named_and_leaves_the_old_file(folder, monkeypatch, number):
    folder.write("plan.json", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(DiskFullError) as caught:
        folder.write("plan.json", "new")
    error = caught.value
    assert error.path == str(folder.path / "plan.json")
    assert error.free > 0
    assert f"{error.path}: the disk is full, {error.free} bytes are free" in str(error)
    assert {p.name: p.read_text() for p in folder.path.iterdir()} == {"plan.json": "old"}


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename"])
def test_a_broken_disk_is_a_storage_error_with_its_number_and_leaves_nothing(folder, monkeypatch, call):
    monkeypatch.setattr(call, failing(errno.EIO))
    with pytest.raises(StorageError) as caught:
        folder.write("plan.json", "new")
    error = caught.value
    assert (error.op, error.path, error.offset, error.errno) == ("write", str(folder.path / "plan.json"), -1, errno.EIO)
    assert f"write of {error.path} failed: Input/output error" in str(error)
    assert isinstance(error, OSError)
    assert list(folder.path.iterdir()) == []


def test_a_write_into_a_folder_that_is_gone_is_a_storage_error(folder):
    folder.path.rmdir()
    for write in (lambda: folder.write("a", "b"), lambda: folder.append("a", {})):
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.errno == errno.ENOENT


def test_a_log_holds_one_json_object_a_line(folder):
    folder.append("metrics.jsonl", {"epoch": 0, "name": "a\nb"})
    folder.append("metrics.jsonl", {"epoch": 1, "name": "größe"})
    folder.log("start", samples=5)
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 0, "name": "a\nb"}, {"epoch": 1, "name": "größe"}]
    (event,) = map(json.loads, (folder.path / "log.jsonl").read_text().splitlines())
    assert event.pop("time") > 1.7e9
    assert event == {"event": "start", "samples": 5}


def test_a_removed_file_is_gone_and_may_be_removed_again(folder):
    folder.write("x001-g0001.nfc", b"cache")
    folder.remove("x001-g0001.nfc")
    folder.remove("x001-g0001.nfc")
    assert list(folder.path.iterdir()) == []


def stored(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def test_weights_and_buffers_are_stored_bit_for_bit_under_the_names_of_their_modules(folder):
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)
    body[1].running_mean.normal_()
    head = nn.Linear(5, 2)
    path = folder.write_weights("b000.safetensors", {"unit0.body": body, "unit0.head": head}, {"format": "f"})
    found, facts = stored(path)
    expected = {f"unit0.body.{k}": v for k, v in body.state_dict().items()}
    expected |= {f"unit0.head.{k}": v for k, v in head.state_dict().items()}
    assert found.keys() == expected.keys()
    assert len(found) == 2 + 5 + 2
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    assert facts == {"format": "f"}


def test_tied_weights_are_stored_under_each_of_their_names(folder):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    found, _ = stored(folder.write_weights("b.safetensors", {"a": nn.Sequential(first, second), "b": first}, {}))
    assert found.keys() == {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias", "b.weight", "b.bias"}
    for key in ("a.0.weight", "a.1.weight", "b.weight"):
        assert torch.equal(found[key], first.weight)

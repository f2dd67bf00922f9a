"""The cache benches: their pure parts against arithmetic done by hand, every candidate against what it was given."""

import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from bench import bench_cache, bench_cache_vs_recompute, cache_peers, plots
from bench.cache_peers import CHUNK, Batch, Candidate
from nf_engine.records import TierProbe
from nf_engine.storage import sample_order

# --- fio ------------------------------------------------------------------------------------------------------------


def fio_json(*jobs):
    """fio's document with a job for each (error, read, write) in bytes a second."""
    each = [{"jobname": "b", "error": e, "read": {"bw_bytes": r}, "write": {"bw_bytes": w}} for e, r, w in jobs]
    return json.dumps({"fio version": "fio-3.33", "jobs": each})


def test_the_rates_of_fios_jobs_are_summed_past_its_notes():
    text = "note: both iodepth >= 1 and synchronous I/O engine are selected\n" + fio_json((0, 0, 1e9), (0, 0, 5e8))
    assert bench_cache.parse_fio(text, "write") == 1.5
    assert bench_cache.parse_fio(fio_json((0, 3e9, 7)), "randread") == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fio: engine not found", "expected JSON from fio, got 'fio: engine"),
        (fio_json((0, 1, 1), (22, 1, 1)), r"fio write: errors \[0, 22\]"),
        (fio_json((0, 1, 0)), "fio write: nothing was moved"),
    ],
)
def test_a_run_of_fio_that_measured_nothing_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        bench_cache.parse_fio(text, "write")


def test_a_rate_is_held_against_the_mean_of_the_two_runs_around_it():
    row = {"write_gb_s": 1.5, "read_gb_s": 3.0}
    before, after = {"write": 1.0, "randread": 2.0}, {"write": 3.0, "randread": 4.0}
    assert bench_cache.of_fio(row, before, after) == {"write_of_fio": 0.75, "read_of_fio": 1.0}
    assert bench_cache.of_fio(row, {}, after) == {}
    assert bench_cache.of_fio({"failed": "why"}, before, after) == {}


def test_without_fio_there_are_no_brackets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_cache.shutil, "which", lambda _: None)
    assert bench_cache.Fio(tmp_path / "f", 1 << 20).bracket() == {}
    assert "fio: not installed" in capsys.readouterr().out


# --- report ---------------------------------------------------------------------------------------------------------


def rows():
    ours = [
        {"write_of_fio": w, "read_of_fio": r, "write_cpu_s_gb": c, "write_gb_s": 1.0, "read_gb_s": 2.0, "peak_rss": 1e6}
        for w, r, c in ((0.7, 0.95, 0.3), (0.95, 0.5, 0.5), (0.92, 0.91, 0.4))
    ]
    named = [
        {"candidate": "nf_engine", "shuffle": "chunk", "direct": True, "samples": 64, "right": True} | o for o in ours
    ]
    other = {"candidate": "zarr", "shuffle": "chunk", "direct": False, "samples": 64, "right": False, "warm_gb_s": 3.0}
    return [*named, other | ours[0], {"candidate": "lmdb", "shuffle": "sample", "failed": "not installed"}]


def test_the_checks_are_medians_over_the_rounds_of_ours():
    found = bench_cache.checks(rows())
    assert {name: (entry["value"], entry["ok"]) for name, entry in found.items()} == {
        "write and fsync / fio": (0.92, True),
        "chunk-shuffled read / fio": (0.91, True),
        "write from CPU tensors, CPU s/GB": (0.4, True),
        "write from a device, CPU s/GB": (None, None),
        "candidates with wrong contents": (1, False),
    }


def test_a_check_against_fio_is_open_where_there_is_none():
    without = [{k: v for k, v in r.items() if not k.endswith("of_fio")} for r in rows()]
    assert bench_cache.checks(without)["write and fsync / fio"] == {"value": None, "target": ">= 0.9", "ok": None}


def test_the_table_has_a_part_for_each_shuffle_and_says_who_is_missing():
    lines = bench_cache.table(rows()).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["--", "nf_engine", "zarr", "--", "lmdb"]
    assert "1.00 (1.00-1.00)    92%" in lines[2]
    assert lines[3].endswith("page cache, 64 samples")
    assert lines[5].split() == ["lmdb", "not", "installed"]


# --- candidates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written():
    """200 samples: the last batch is not full, nor is the last chunk."""
    return cache_peers.samples(200)


def test_no_two_samples_are_alike():
    made = cache_peers.samples(3 * 2048)
    x = torch.cat([b.x for b in made]).flatten(1).view(torch.int64)
    assert len({row.numpy().tobytes() for row in x}) == 3 * 2048
    ids = torch.cat([b.ids for b in made])
    assert sorted(ids.tolist()) == list(range(3 * 2048))
    assert ids.tolist() != sorted(ids.tolist())


@pytest.mark.filterwarnings("default")  # peers warn as they like
@pytest.mark.parametrize("candidate", cache_peers.candidates(), ids=lambda c: c.name)
def test_every_candidate_gives_back_what_it_was_given(candidate, written, tmp_path):
    pytest.importorskip(candidate.needs)

    def call():
        torch.set_num_threads(1)  # other tests may have started OpenMP's threads, which a fork does not take along
        return bench_cache.measure(candidate, written, tmp_path, 0, True)

    found = bench_cache.in_child(call)
    if candidate.needs == "kvikio" and "libcuda" in found.get("failed", ""):
        pytest.skip(found["failed"])
    assert found.get("right"), found
    assert found["samples"] == 200
    assert ("warm_gb_s" in found) == (not candidate.direct)
    assert min(found["write_gb_s"], found["read_gb_s"], found["write_cpu_s_gb"]) > 0


def spoiled(kind, batches):
    """The batches as a store would hand them out, with one fault."""
    out = [Batch(*(t.clone() for t in b)) for b in batches]
    if kind == "bit":
        out[1].x.view(torch.int16)[3, 0, 0, 0] ^= 1
    if kind == "label":
        out[0].labels[5] += 1
    if kind == "twice":
        out.append(out[0])
    if kind == "missing":
        del out[2]
    if kind == "unknown":
        out[0].ids[0] = 10**6
    return out


@pytest.mark.parametrize("kind", ["", "bit", "label", "twice", "missing", "unknown"])
def test_wrong_contents_are_seen(kind, written):
    assert bench_cache.is_right(written, iter([None, *spoiled(kind, written)])) is (kind == "")


def test_a_reader_that_loses_a_sample_is_no_result(written, tmp_path):
    def write(folder, batches):
        yield

    def read(folder, key):
        yield None
        yield from spoiled("missing", written)

    with pytest.raises(OSError, match="expected 6553600 bytes, got 4456448"):
        bench_cache.measure(Candidate("x", "sample", write, read), written, tmp_path, 0, True)


def test_a_peer_shuffled_by_chunk_comes_in_the_caches_order_within_its_window():
    count = 100 * CHUNK + 7
    tags = np.stack([np.arange(count) % 10, np.arange(count)], 1)
    held, most = set(), 0

    def load(chunk):
        held.add(chunk)
        size = min(CHUNK, count - chunk * CHUNK)
        return np.broadcast_to(
            (chunk * CHUNK + np.arange(size))[:, None, None, None] % 2048, (size, *cache_peers.SHAPE)
        )

    seen = []
    for batch in cache_peers.chunk_shuffled(load, tags, 5):
        assert batch.x[:, 0, 0, 0].tolist() == [i % 2048 for i in batch.ids.tolist()]
        seen += batch.ids.tolist()
        done = {c for c in list(held) if set(range(c * CHUNK, min(count, (c + 1) * CHUNK))) <= set(seen)}
        most = max(most, len(held - done))
    assert seen == sample_order(5, count, cache_peers.GEOMETRY).tolist()
    assert 60 <= most <= cache_peers.WINDOW == 67


def test_a_peer_that_fails_crashes_or_hangs_costs_only_its_row(monkeypatch):
    monkeypatch.setattr(bench_cache, "PATIENCE", 0.2)
    assert bench_cache.in_child(lambda: {"a": 1}) == {"a": 1}
    assert bench_cache.in_child(lambda: [][1]) == {"failed": "IndexError: list index out of range"}
    assert bench_cache.in_child(lambda: os._exit(3)) == {"failed": "ended with code 3"}
    monkeypatch.setattr(bench_cache, "GRACE", 0.2)
    assert bench_cache.in_child(lambda: time.sleep(60)) == {"failed": "took over 0.2 s"}


# --- against recomputing --------------------------------------------------------------------------------------------


ROOM = {"ram": 5_000, "disk": 100_000}
ROW = {
    "bytes": 1_000, "recompute": 0.5, "auto": "disk",
    "ram_write": 0.1, "ram_read": 0.01, "disk_write": 0.8, "disk_read": 0.2,
}  # fmt: skip


def test_the_sums_of_the_tiers_are_those_done_by_hand():
    # 4 samples, 10 epochs: recompute 4*10*0.5; ram 4*(0.5 + 10*0.01); disk 4*(0.8 + 10*0.2)
    assert bench_cache_vs_recompute.totals(ROW, 4, 10, ROOM) == pytest.approx(
        {"recompute": 20, "ram": 2.4, "disk": 11.2}
    )
    assert bench_cache_vs_recompute.totals(ROW, 6, 10, ROOM).keys() == {"recompute", "disk"}


@pytest.mark.parametrize(
    ("seconds", "best", "right"),
    [
        ({"recompute": 9.0, "ram": 10.0, "disk": 8.0}, "disk", True),
        ({"recompute": 9.0, "ram": 7.7, "disk": 8.0}, "ram", True),  # 3.9 % longer
        ({"recompute": 9.0, "ram": 7.5, "disk": 8.0}, "ram", False),  # 6.7 % longer
        ({"recompute": 9.0}, "recompute", False),  # no room on the disk
    ],
)
def test_auto_is_right_within_5_percent_of_the_best(seconds, best, right):
    found = bench_cache_vs_recompute.judged(ROW, seconds)
    assert (found["best"], found["right"]) == (best, right)
    json.dumps(found, allow_nan=False)


def test_auto_is_asked_with_the_rates_and_rooms_of_the_probe():
    stages = [("a", (64, 16, 16), 1e-4), ("b", (64, 16, 16), 1e-3), ("c", (8, 4, 4), 1e-3)]

    def pick(cut, ram, disk, read):
        probe = TierProbe(read, read, 4e9, 4e9, 4e9, 0.0, {"ram": ram, "disk": disk})
        return bench_cache_vs_recompute.pick(stages, cut, probe, 1000, 10)

    assert pick(1, 1 << 30, 1 << 30, 1e9) == "ram"
    assert pick(1, 0, 1 << 30, 1e9) == "disk"
    assert pick(1, 0, 0, 1e9) == "recompute"
    # 32 KiB at 0.2 GB/s are 0.164 ms to write and, ten times, to read: 1.8 ms. Recomputed: 10 x 0.1 ms or 10 x 1.1 ms.
    assert pick(0, 0, 1 << 30, 2e8) == "recompute"
    assert pick(1, 0, 1 << 30, 2e8) == "disk"


# --- plots ----------------------------------------------------------------------------------------------------------


def test_a_plot_lies_beside_its_json(tmp_path):
    pytest.importorskip("matplotlib")
    plots.save(tmp_path / "new" / "cache.json", "t", 3, (6, 3), lambda *axes: bench_cache.draw(rows(), *axes))
    assert (tmp_path / "new" / "cache.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plots.save(None, "t", 1, (6, 3), lambda *axes: pytest.fail("drawn without a JSON file"))


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.save(tmp_path / "cache.json", "t", 1, (6, 3), lambda *axes: pytest.fail("drawn without matplotlib"))
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

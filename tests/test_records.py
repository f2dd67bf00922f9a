"""Records: hand-made ones through JSON and back, what the reader refuses, the tables against numbers done by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nf_engine.errors import CorruptFileError
from nf_engine.records import (
    BlockPlan,
    Bounds,
    CachePlan,
    ExitScore,
    HeadProfile,
    HeadSpec,
    Line,
    Plan,
    Profile,
    StageProfile,
    UnitPlan,
    format_bytes,
)

MIB = 2**20


def head_profile(**changes):
    fields = {
        "spec": HeadSpec("deep", 2, 64, 3),
        "weights": 1,
        "gradients": 2,
        "optimizer": 3,
        "parameters": 4,
        "flops": 5,
        "transient": Line(1.5, 2.5, 0.125),
        "path": "fused",
        "seconds": Line(0.25, 0.5),
    }
    return HeadProfile(**{**fields, **changes})


def stage_profile(name, **changes):
    fields = {
        "name": name,
        "output_shape": (64, 16, 8),
        "output": 32768,
        "parameters": 1234567,
        "weights": 10,
        "gradients": 20,
        "optimizer": 30,
        "kept": Line(0.0, 3 * 1024.0, 0.01),
        "input": Line(0.0, 1024.0, 0.0),
        "loose": Line(0.0, 0.0, 0.0),
        "transient": Line(7.0, 2 * 1024.0, 0.25),
        "forward": Line(8.0, 9.0, 0.02),
        "flops": 99,
        "seconds": Line(0.001, 0.0125),
        "forward_seconds": None,
        "rerun_seconds": None,
        "head": head_profile(),
    }
    return StageProfile(**{**fields, **changes})


PROFILE = Profile(
    model="größe \"7\" \\ \n",
    device="none",
    torch="2.13.0",
    optimizer="sgd",
    augment="crop-flip",
    precision="bf16-mixed",
    input_shape=(3, 32, 32),
    classes=10,
    input=12288,
    batch_sizes=(8, 32, 128),
    loading=Line(1.0, 2.0, 0.0),
    stages=(stage_profile("features.0"), stage_profile("features.4", seconds=None, head=head_profile(seconds=None))),
)  # fmt: skip

PLAN = Plan(
    model="toy",
    strategy="windows",
    device="cpu",
    budget=200 * MIB,
    allowed=190 * MIB,
    overhead=3 * MIB,
    samples=50000,
    epochs=10,
    stages=("stem", "body.1", "body.2", "tail"),
    blocks=(
        BlockPlan(
            units=(
                UnitPlan(0, 1, HeadSpec("deep", 1, 48, 2), "fused", 140 * MIB, (1,)),
                UnitPlan(2, 2, HeadSpec("linear", 4), "reference", 90 * MIB),
            ),
            batch=96,
            lr=0.075,
            peak=150 * MIB,
            seconds=None,
            cache=CachePlan("images", "fp16", 1, 0, {}, "first block"),
        ),
        BlockPlan(
            units=(UnitPlan(3, 3, HeadSpec("classifier"), "autograd", 100 * MIB),),
            batch=512,
            lr=0.4,
            peak=120 * MIB,
            seconds=1.5,
            cache=CachePlan("disk", "fp16", 2, 1536 * MIB, {"disk": 2.0, "ram": 3.25}, "least time", 256),
        ),
    ),
    bounds=Bounds(128, 457 * MIB, 330 * MIB, 150 * MIB, 17 * MIB),
    host_bytes=64 * MIB,
    epoch_seconds=12.5,
    warnings=("one cached copy",),
)

SCORE = ExitScore(1, 3, "tail", 0.875, 0.5, 1000, 2000, 300.5, 32)


@pytest.mark.parametrize("record", [PROFILE, PLAN, SCORE], ids=lambda r: type(r).__name__)
def test_a_record_survives_json_and_a_file(record, tmp_path):
    back = type(record).from_json(record.to_json())
    assert back == record
    assert repr(back) == repr(record).replace("Line(fixed=3, per_sample=4", "Line(fixed=3.0, per_sample=4.0")
    assert json.loads(record.to_json()) == json.loads(json.dumps(dataclasses.asdict(record)))
    record.save(tmp_path / "r.json")
    assert type(record).load(str(tmp_path / "r.json")) == record


def refusal(change, record=PLAN):
    """What from_json says about a record whose JSON was changed."""
    value = json.loads(record.to_json())
    change(value)
    with pytest.raises(CorruptFileError) as caught:
        type(record).from_json(json.dumps(value))
    text = str(caught.value)
    assert text.startswith(f"not a {type(record).__name__} in JSON: ")
    return text


def test_a_missing_and_an_unknown_field_are_named_with_their_place():
    assert "Plan: missing ['budget'], unknown []" in refusal(lambda v: v.pop("budget"))
    assert "Plan: missing [], unknown ['extra']" in refusal(lambda v: v.update(extra=1))
    text = refusal(lambda v: v["blocks"][1]["units"][0].pop("head"))
    assert "Plan.blocks[1].units[0]: missing ['head'], unknown []" in text
    assert "Profile.stages[1].head.spec: missing [], unknown ['x']" in refusal(
        lambda v: v["stages"][1]["head"]["spec"].update(x=0), PROFILE
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("budget", "12", "Plan.budget: expected int, found '12'"),
        ("budget", 12.0, "Plan.budget: expected int, found 12.0"),
        ("budget", True, "Plan.budget: expected int, found True"),
        ("budget", None, "Plan.budget: expected int, found None"),
        ("model", 3, "Plan.model: expected str, found 3"),
        ("stages", "stem", "Plan.stages: expected a list, found str"),
        ("stages", ["a", 1], "Plan.stages[1]: expected str, found 1"),
        ("bounds", [1], "Plan.bounds: expected an object, found list"),
        ("epoch_seconds", "1", "Plan.epoch_seconds: expected float, found '1'"),
        ("epoch_seconds", True, "Plan.epoch_seconds: expected float, found True"),
        ("epoch_seconds", float("nan"), "Plan.epoch_seconds: expected float, found nan"),
        ("epoch_seconds", float("-inf"), "Plan.epoch_seconds: expected float, found -inf"),
        ("epoch_seconds", 10**400, "int too large to convert to float"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, expected):
    assert expected in refusal(lambda v: v.update({name: value}))


def test_the_values_of_a_table_are_checked():
    text = refusal(lambda v: v["blocks"][1]["cache"].update(seconds={"disk": "fast"}))
    assert "Plan.blocks[1].cache.seconds['disk']: expected float, found 'fast'" in text
    assert "cache.seconds: expected an object, found list" in refusal(
        lambda v: v["blocks"][1]["cache"].update(seconds=[])
    )


def test_a_whole_number_is_a_float_and_null_is_none():
    value = json.loads(PLAN.to_json())
    value["epoch_seconds"] = 3
    seconds = Plan.from_json(json.dumps(value)).epoch_seconds
    assert (seconds, type(seconds)) == (3.0, float)
    value["epoch_seconds"] = None
    assert Plan.from_json(json.dumps(value)).epoch_seconds is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"plan"', "[" * 100_000, '{"a":' * 100_000, "1" * 5000])
def test_text_that_is_no_record_is_refused(text):
    with pytest.raises(CorruptFileError, match=r"^not a Plan in JSON: .*; write it again with to_json\(\)$"):
        Plan.from_json(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "half.json").write_text(PLAN.to_json()[:100])
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("half.json", "bytes.json", "gone.json", "."):
        with pytest.raises(CorruptFileError) as caught:
            Plan.load(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024, "10.0 KiB"),
        (123.44 * MIB, "123.4 MiB"),
        (-3 * MIB, "-3.00 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (3 * 2**50, "3072.00 TiB"),
    ],
)
def test_bytes_are_printed_with_a_binary_unit(count, text):
    assert format_bytes(count) == text


def test_a_line_is_its_fixed_part_and_its_slope():
    assert Line(100.0, 2.5).at(8) == 120.0


def test_a_plan_knows_its_units_its_ends_and_its_peak():
    assert [(b.first, b.last) for b in PLAN.blocks] == [(0, 2), (3, 3)]
    assert [u.first for u in PLAN.units] == [0, 2, 3]
    assert PLAN.peak == 150 * MIB


def test_the_table_of_a_plan_holds_its_numbers():
    rows = [" ".join(row.split()) for row in PLAN.table().splitlines()]
    assert rows == [
        "block unit stages head step batch lr peak inputs",
        "0 0 stem .. body.1 deep 48 fused 96 0.075 150.0 MiB images",
        "1 body.2 linear reference",
        "1 2 tail classifier autograd 512 0.4 120.0 MiB disk, 1.50 GiB fp16, 2 copies",
        "budget 200.0 MiB, plan 150.0 MiB (75%); 3.00 MiB of it beside every block; host buffers 64.0 MiB",
        "at batch 128: backpropagation 457.0 MiB, checkpointed 330.0 MiB, this plan 150.0 MiB; "
        "lower bound (largest stage at batch 1) 17.0 MiB",
        "an epoch of every block: 12.5 s of computing predicted",
        "note: unit 0 runs stem again in its backward",
        "note: one cached copy",
    ]


def test_a_tier_without_a_cache_is_printed_alone():
    block = dataclasses.replace(PLAN.blocks[1], cache=CachePlan("recompute", "fp16", 1, 0, {}, ""))
    assert dataclasses.replace(PLAN, blocks=(block,)).table().splitlines()[1].endswith("MiB  recompute")


def test_the_table_of_a_profile_holds_its_numbers():
    rows = [row.split() for row in PROFILE.table().splitlines()]
    assert rows[0] == ["stage", "output", "params", "kept/img", "peak/img", "fit", "ms/img"]
    # peak: input 1 KiB + kept 3 KiB + transient 2 KiB; fit: the largest residual, of transient; 0.0125 s
    assert rows[1] == ["features.0", "64x16x8", "1,234,567", "3.00", "KiB", "6.00", "KiB", "25.0%", "12.500"]
    assert rows[2] == ["features.4", "64x16x8", "1,234,567", "3.00", "KiB", "6.00", "KiB", "25.0%", "-"]

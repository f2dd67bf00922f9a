"""TrainConfig: bounds and their messages, bytes as text, and the TOML file against the standard library's reader."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_engine.config import CHOICES, TrainConfig, parse_bytes
from nf_engine.errors import ConfigError

# name: (kind, least value, first value that is too large; None: no bound)
NUMBERS = {
    "max_units": (int, 1, None),
    "min_batch_size": (int, 1, None),
    "max_batch_size": (int, 1, None),
    "epochs": (int, 1, None),
    "head_depth": (int, 1, None),
    "augment_copies": (int, 0, None),
    "head_width": (int, 0, None),
    "seed": (int, 0, None),
    "batch_size": (int, 1, None),
    "lr": (float, 0, None),
    "weight_decay": (float, 0, None),
    "warmup_epochs": (float, 0, None),
    "memory_margin": (float, 0, 1),
    "momentum": (float, 0, 1),
    "grouping_threshold": (float, 0, 1),
    "label_smoothing": (float, 0, 1),
    "val_fraction": (float, 0, 1),
    "max_drop": (float, 0, 1),
    "io_timeout": (float, 1, None),
    "checkpoint_minutes": (float, 0, None),
}
FLAGS = ("recompute", "durable_cache", "compile", "deterministic")
OTHER = {"memory_budget", "max_cache_bytes", "pinned_bytes", "split_points", "head_pool", *FLAGS}


def refused(**fields):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**fields)
    return str(caught.value)


def test_every_field_is_checked_by_a_test_below():
    assert {f.name for f in dataclasses.fields(TrainConfig)} == {*NUMBERS, *CHOICES, *OTHER}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_accepted_at_its_bound_and_refused_outside(name):
    kind, low, high = NUMBERS[name]
    pair = {"min_batch_size": 1} if name == "max_batch_size" else {}
    assert getattr(TrainConfig(**{**pair, name: low}), name) == low
    wrong = [
        low - 1,
        True,
        None,
        [low],
        *([low + 0.5, float(low + 1)] if kind is int else [float("nan"), float("inf")]),
    ]
    wrong += [f"{low + 1}"] + ([] if high is None else [high, high + 0.5])
    for value in wrong:
        text = refused(**{name: value})
        assert name in text
        assert f"got {value!r}" in text
        assert ("an integer" if kind is int else "a number") in text
        assert (f">= {low}" if high is None else f"[{low}, {high})") in text


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_lists_what_is_allowed(name):
    for allowed in CHOICES[name]:
        assert getattr(TrainConfig(**{name: allowed}), name) == allowed
    for value in ("nothing", "", None, CHOICES[name][0].upper()):
        assert refused(**{name: value}) == f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}"


def test_head_pool_is_one_two_or_four():
    assert [TrainConfig(head_pool=q).head_pool for q in (1, 2, 4)] == [1, 2, 4]
    for value in (0, 3, 8, True, 4.0, "4"):
        assert refused(head_pool=value) == f"head_pool must be 1, 2 or 4, got {value!r}"


def test_the_smallest_batch_may_not_pass_the_largest():
    assert TrainConfig(min_batch_size=9, max_batch_size=9).max_batch_size == 9
    assert refused(min_batch_size=10, max_batch_size=9) == "min_batch_size 10 is above max_batch_size 9"


def test_split_points_are_a_list_or_tuple_of_names():
    assert TrainConfig(split_points=["layer1", "layer2"]).split_points == ("layer1", "layer2")
    assert hash(TrainConfig(split_points=["layer1"])) == hash(TrainConfig(split_points=("layer1",)))
    for value in ("layer1", 3, None, [3], ["layer1", None]):
        assert refused(split_points=value) == f"split_points must be a list of module names, got {value!r}"


def test_a_budget_is_bytes_a_share_text_or_auto():
    for value in (2**20, 1e-9, 0.5, 1.0, "auto", "1MiB", "1 gib", "1048576"):
        assert TrainConfig(memory_budget=value).memory_budget == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2**20 - 1, "at least 1 MiB (1048576 bytes), got 1048575 = 1048575 bytes"),
        (1, "at least 1 MiB (1048576 bytes), got 1 = 1 bytes"),
        ("1MB", "at least 1 MiB (1048576 bytes), got '1MB' = 1000000 bytes"),
        (-1, "memory_budget must be bytes such as 268435456, '256MiB' or '2GB', got -1"),
        (0.0, "memory_budget as a share must be in (0, 1], got 0.0; for bytes give an int or text"),
        (-0.5, "(0, 1], got -0.5"),
        (1.001, "(0, 1], got 1.001"),
        (float("nan"), "(0, 1], got nan"),
        ("much", "'256MiB' or '2GB', got 'much'"),
        (True, "'256MiB' or '2GB', got True"),
        (None, "'256MiB' or '2GB', got None"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(value, expected):
    assert expected in refused(memory_budget=value)


def test_the_bound_of_the_caches_is_bytes_or_none():
    for value in (None, 0, 10**12, "3GiB"):
        assert TrainConfig(max_cache_bytes=value).max_cache_bytes == value
    for value in (-1, 0.5, "half", False, ["1GB"]):
        assert f"max_cache_bytes must be bytes such as 268435456, '256MiB' or '2GB', got {value!r}" in refused(
            max_cache_bytes=value
        )


def test_the_bound_of_pinned_memory_is_bytes():
    assert TrainConfig().pinned_bytes == "64MiB"
    for value in (0, 10**9, "1GiB"):
        assert TrainConfig(pinned_bytes=value).pinned_bytes == value
    for value in (-1, 0.5, "half", False, None):
        assert f"pinned_bytes must be bytes such as 268435456, '256MiB' or '2GB', got {value!r}" in refused(
            pinned_bytes=value
        )


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name):
    assert [getattr(TrainConfig(**{name: v}), name) for v in (True, False)] == [True, False]
    for value in (1, 0, None, "true"):
        assert refused(**{name: value}) == f"{name} must be true or false, got {value!r}"


def test_what_caches_hold_follows_from_the_setting():
    held = {name: TrainConfig(cache_dtype=name).stored_dtype for name in CHOICES["cache_dtype"]}
    assert held == {"auto": "fp16", "exact": "fp32", "fp16": "fp16", "bf16": "bf16", "u8": "u8"}
    for precision, computed, auto in (("bf16-mixed", "bf16", "bf16"), ("16-mixed", "fp16", "fp16")):
        config = TrainConfig(precision=precision)
        assert (config.compute_dtype, config.stored_dtype) == (computed, auto)
        assert config.with_fields({"cache_dtype": "exact"}).stored_dtype == computed
        assert config.with_fields({"cache_dtype": "u8"}).stored_dtype == "u8"
    plain = TrainConfig()
    assert (plain.precision, plain.compute_dtype, plain.cache_dtype) == ("32-true", "fp32", "auto")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("123B", 123),
        ("1k", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512MiB", 536870912),
        ("512 mib", 536870912),
        ("2GB", 2000000000),
        ("2Gi", 2147483648),
        ("1.5GiB", 1610612736),
        ("700e6", 700000000),
        ("1T", 1000000000000),
        (" 1TiB ", 1099511627776),
    ],
)
def test_bytes_are_read_from_text(text, expected):
    assert parse_bytes(text, "x") == expected


@pytest.mark.parametrize(
    "value", ["", "MiB", "1.2.3", "-1MiB", "1PiB", "1iB", "1e999", "1 M iB", "1_000", "nan", "0x10", -1, 0.5, 2e9, True]
)
def test_what_is_not_bytes_is_refused_by_its_name(value):
    with pytest.raises(ConfigError, match=r"^some_name must be bytes such as .*, got ") as caught:
        parse_bytes(value, "some_name")
    assert str(caught.value).endswith(repr(value))


def test_an_unknown_setting_names_the_closest_one():
    with pytest.raises(ConfigError, match=r"^unknown setting 'memory_buget'; did you mean memory_budget\?$"):
        TrainConfig().with_fields({"memory_buget": 1})
    with pytest.raises(ConfigError, match=r"^unknown setting 'zzz'; known: memory_budget, .*, precision$"):
        TrainConfig().with_fields({"zzz": 1})


def test_with_fields_replaces_what_it_names_and_checks_it():
    base = TrainConfig(lr=0.5, epochs=3)
    changed = base.with_fields({"epochs": 7})
    assert (changed.lr, changed.epochs, base.epochs) == (0.5, 7, 3)
    assert base.with_fields({}) == base
    with pytest.raises(ConfigError, match="epochs must be an integer >= 1, got 0"):
        base.with_fields({"epochs": 0})


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0


def share(**bounds):
    return st.floats(0, 1, exclude_max=True, **bounds)


VALID = st.fixed_dictionaries(
    {},
    optional={
        "memory_budget": st.one_of(
            st.integers(2**20, 2**62), st.floats(0, 1, exclude_min=True), st.sampled_from(["auto", "512MiB", "2 GB\t"])
        ),
        "memory_margin": share(),
        "split_points": st.lists(st.text(), max_size=4).map(tuple),
        "max_units": st.integers(1, 2**63 - 1),
        "batch_size": st.one_of(st.just("auto"), st.integers(1, 9999)),
        "head_pool": st.sampled_from([1, 2, 4]),
        "lr": st.one_of(st.floats(0, allow_infinity=False), st.integers(0, 9)),
        "weight_decay": st.floats(0, allow_infinity=False),
        "momentum": share(),
        "max_cache_bytes": st.one_of(st.none(), st.integers(0, 2**62), st.just("7GiB")),
        "pinned_bytes": st.one_of(st.integers(0, 2**62), st.just("1GiB")),
        **{name: st.booleans() for name in FLAGS},
        "io_timeout": st.floats(1, allow_infinity=False),
        "checkpoint_minutes": st.floats(0, allow_infinity=False),
        "seed": st.integers(0, 2**63 - 1),
        **{name: st.sampled_from(allowed) for name, allowed in CHOICES.items()},
    },
)


@settings(max_examples=100, deadline=None)
@given(fields=VALID)
def test_toml_text_is_read_back_to_an_equal_configuration(fields):
    config = TrainConfig(**fields)
    values = tomllib.loads(config.to_toml())  # the standard library's reader, not ours
    assert TrainConfig(**values) == config
    assert {name: type(v) for name, v in values.items() if name in fields and name != "split_points"} == {
        name: type(v) for name, v in fields.items() if v is not None and name != "split_points"
    }


NASTY = (
    '"',
    "\\",
    "\\n",
    "a\nb\tc\r\x00\x1f\x7f",
    "\u2028\x85\u200e",
    "\U000e0001\U0010ffff",
    "'''",
    '"""',
    "größe = 1 # ]",
    "",
)


def test_quotes_backslashes_and_control_characters_survive_a_file(tmp_path):
    config = TrainConfig(split_points=NASTY)
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert TrainConfig.load(tmp_path / "c.toml").split_points == NASTY
    assert TrainConfig.load(str(tmp_path / "c.toml")) == config


def test_a_setting_that_the_file_leaves_out_has_its_default(tmp_path):
    (tmp_path / "c.toml").write_text('lr = 0.25\nsplit_points = ["a"]\n')
    assert TrainConfig.load(tmp_path / "c.toml") == TrainConfig(lr=0.25, split_points=("a",))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"lr = ", "is not valid TOML: "),
        (b"lr = 1\nlr = 2\n", "is not valid TOML: "),
        (b"\xff\xfe", "is not valid TOML: "),
        (b"lrr = 1\n", "unknown setting 'lrr'; did you mean lr?"),
        (b"epochs = 0\n", "epochs must be an integer >= 1, got 0"),
        (b"split_points = 3\n", "split_points must be a list of module names, got 3"),
        (b"[train]\nlr = 1\n", "unknown setting 'train'"),
        (b"lr = inf\n", "lr must be a number >= 0, got inf"),
        (b"memory_budget = 2026-01-01\n", "memory_budget must be bytes"),
    ],
)
def test_an_error_in_a_file_names_the_file(tmp_path, content, expected):
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^cannot read configuration .*gone\.toml: No such file"):
        TrainConfig.load(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match=r"^cannot read configuration .*: Is a directory"):
        TrainConfig.load(tmp_path)

"""The manifest: what is written is read back, and each rule of the reader refuses what breaks it alone.

Most cases change the text and then seal it anew, as whoever forges a manifest would: the digest alone refuses nothing
of them. The seal is computed here from the specification, not by the code under test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_engine.errors import CorruptFileError
from nf_engine.manifest import FileEntry, Manifest, Position, is_ours

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
WHERE = "run/MANIFEST.json"
EXAMPLE = Manifest(
    format="nf-manifest/1",
    generation=412,
    prev_sha256=A,
    run_id="0123456789abcdef" * 2,
    done=False,
    position=Position(4, 7, 1880),
    config_sha256=B,
    data_sha256=C,
    env={"torch": "2.13.0", "device": "cpu"},
    files=(
        FileEntry("b003-g0007.safetensors", "block", 3, 1843200, D),
        FileEntry("metrics.jsonl", "metrics", 0, 90112, A),
        FileEntry("plan.json", "plan", 0, 5120, B),
        FileEntry("x004-g0009.nfc", "cache", 4, 268439552, C),
    ),
)


def seal(body: bytes) -> bytes:
    """The body of an object, ending in a line of "}", with its own digest as the last key."""
    assert body.endswith(b"\n}\n")
    return body[:-3] + f',\n "self_sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def written(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode("ascii")


PLAIN = dataclasses.asdict(EXAMPLE)
BODY = written(PLAIN)


def parse(data: bytes) -> Manifest:
    return Manifest.parse(data, WHERE)


def test_the_bytes_are_sorted_json_with_the_digest_of_all_but_itself():
    assert EXAMPLE.to_bytes() == seal(BODY)
    assert list(json.loads(EXAMPLE.to_bytes())) == [*sorted(PLAIN), "self_sha256"]


def test_what_is_written_is_read_back():
    assert parse(EXAMPLE.to_bytes()) == EXAMPLE
    first = dataclasses.replace(EXAMPLE, generation=1, prev_sha256="", files=(), env={})
    assert parse(first.to_bytes()) == first


def replaced(old: str, new: str) -> bytes:
    """One place of the text, sealed anew."""
    assert BODY.count(old.encode()) == 1, old
    return seal(BODY.replace(old.encode(), new.encode()))


def changed(**fields: object) -> bytes:
    return seal(written({**PLAIN, **fields}))


def entry(**fields: object) -> bytes:
    """The second file changed."""
    files = [dict(f) for f in PLAIN["files"]]
    files[1] |= fields
    return changed(files=files)


GENERATION = '"generation": 412'
SEALED = seal(BODY)
NAMES = [{**PLAIN["files"][3], "name": f"x{i:07d}-g0001.nfc"} for i in range(4097)]
REFUSED = {
    # numbers
    "bool for a number": (replaced(GENERATION, '"generation": true'), "expected int, found True"),
    "float": (replaced(GENERATION, '"generation": 412.0'), "expected whole numbers, found 412.0"),
    "exponent": (replaced(GENERATION, '"generation": 412e0'), "expected whole numbers, found 412e0"),
    "infinite": (replaced(GENERATION, '"generation": 1e999'), "expected whole numbers, found 1e999"),
    "NaN": (replaced(GENERATION, '"generation": NaN'), "expected whole numbers, found NaN"),
    "Infinity": (replaced(GENERATION, '"generation": Infinity'), "expected whole numbers, found Infinity"),
    "-Infinity": (replaced(GENERATION, '"generation": -Infinity'), "expected whole numbers, found -Infinity"),
    "5,000 digits": (replaced(GENERATION, f'"generation": {"9" * 5000}'), "4300"),
    "text": (replaced(GENERATION, '"generation": "412"'), "expected int, found '412'"),
    "null": (replaced(GENERATION, '"generation": null'), "expected int, found None"),
    "leading zero": (replaced(GENERATION, '"generation": 0412'), "delimiter"),
    "minus zero": (replaced('"epoch": 7', '"epoch": -0'), "canonical"),
    "number for a bool": (replaced('"done": false', '"done": 0'), "expected bool, found 0"),
    "generation 0": (changed(generation=0), "generation: expected 1 or more, found 0"),
    "negative": (changed(position={"block": -1, "epoch": 0, "step": 0}), r"block: expected 0\.\.\d+, found -1"),
    "2^53": (changed(generation=1 << 53), r"generation: expected 0\.\.9007199254740991, found 9007199254740992"),
    "2^63 steps": (changed(position={"block": 0, "epoch": 0, "step": 1 << 63}), "step: expected"),
    "2^64 bytes": (entry(bytes=1 << 64), r"metrics\.jsonl\.bytes: expected"),
    "block of a file": (entry(block=-5), r"metrics\.jsonl\.block: expected"),
    # text
    "byte order mark": (seal(b"\xef\xbb\xbf" + BODY), "ascii"),
    "UTF-16": (SEALED.decode().encode("utf-16"), "self_sha256 and 64 hex digits at the end"),
    "UTF-8": (replaced('"cpu"', '"é"'), "ascii"),
    "Latin-1": (seal(BODY.replace(b"cpu", b"\xe9")), "ascii"),
    "NUL": (replaced('"cpu"', '"\0"'), "control character"),
    "lone surrogate": (replaced('"cpu"', r'"\ud800"'), "printable"),
    "lone surrogate as a key": (replaced('"device"', r'"\udfff"'), "printable"),
    "escape sequence": (replaced('"cpu"', r'"\u001b[2J"'), "printable"),
    "lone surrogate in run_id": (changed(run_id="\ud800"), "run_id: expected 32 hex digits"),
    # form
    "equal keys": (replaced('"done": false', '"done": true,\n "done": false'), "each key once"),
    "equal keys of the position": (replaced('"epoch": 7', '"epoch": 0,\n  "epoch": 7'), "each key once"),
    "equal keys of env": (replaced('"device": "cpu"', '"device": "",\n  "device": "cpu"'), "each key once"),
    "equal keys of a file": (replaced('"bytes": 5120', '"bytes": 1,\n   "bytes": 5120'), "each key once"),
    "self_sha256 twice": (seal(seal(BODY)), "unknown"),
    "nested 100,000 deep": (replaced('"cpu"', "[" * 100_000 + "]" * 100_000), "recursion"),
    "nested 900 deep": (replaced('"cpu"', "[" * 900 + "]" * 900), "expected str, found"),
    "keys in another order": (seal(b'{\n "run_id": "' + b"0123456789abcdef" * 2 + b'",' + BODY[1:].replace(
        b' "run_id": "' + b"0123456789abcdef" * 2 + b'"', b'').replace(b',\n\n}', b'\n}')), "canonical"),
    "two blanks": (replaced(": 412", ":  412"), "canonical"),
    "carriage returns": (seal(BODY[:-3].replace(b"\n", b"\r\n") + b"\n}\n"), "canonical"),
    "tabs": (seal(BODY.replace(b"\n ", b"\n\t")), "canonical"),
    "no blanks": (seal(json.dumps(PLAIN, sort_keys=True, separators=(",", ":")).encode()[:-1] + b"\n}\n"), "canon"),
    "escaped letter": (replaced('"cpu"', r'"\u0063pu"'), "canonical"),
    "escaped slash": (replaced('"nf-manifest/1"', r'"nf-manifest\/1"'), "canonical"),
    "upper case escape": (replaced('"cpu"', r'"\u00E9"'), "canonical"),
    "comment": (replaced(GENERATION, f"/* */ {GENERATION}"), "property name"),
    "comma at the end": (seal(BODY[:-3] + b",\n}\n"), "property name"),
    "blank before": (seal(b" " + BODY), "canonical"),
    "line after": (SEALED + b"\n", "self_sha256"),
    "no line at the end": (SEALED[:-1], "self_sha256"),
    "NUL after": (SEALED + b"\0", "self_sha256"),
    "twice": (SEALED + SEALED, "self_sha256"),
    "nothing": (b"", "self_sha256"),
    "a list": (b"[]\n", "self_sha256"),
    "the seal alone": (seal(b"\n}\n"), "Expecting value"),
    "upper case digest": (BODY[:-3] + b',\n "self_sha256": "' + hashlib.sha256(BODY).hexdigest().upper().encode()
                          + b'"\n}\n', "self_sha256"),
    "wrong digest": (seal(BODY).replace(b"2.13.0", b"2.13.1"), "self_sha256: expected [0-9a-f]{64}, found"),
    "no digest": (BODY, "self_sha256"),
    # fields
    "newer format": (changed(format="nf-manifest/2"), "format: expected nf-manifest/1, found 'nf-manifest/2'; read it "
                     "with its own version"),
    "no format": (seal(written({k: v for k, v in PLAIN.items() if k != "format"})), "format: expected"),
    "another object": (seal(b'{\n "a": 1\n}\n'), "format: expected"),
    "unknown key": (changed(extra=1), r"unknown \['extra'\]"),
    "unknown key of a file": (entry(extra=1), r"unknown \['extra'\]"),
    "unknown key of the position": (changed(position={**PLAIN["position"], "extra": 1}), r"unknown \['extra'\]"),
    "files as an object": (changed(files={}), "expected a list, found dict"),
    "a file as a list": (changed(files=[[]]), "expected an object, found list"),
    "env as a list": (changed(env=[]), "expected an object, found list"),
    "a number in env": (changed(env={"threads": 1}), "expected str, found 1"),
    "first without generation 1": (changed(prev_sha256=""), "prev_sha256: expected 64 hex digits, found ''"),
    "digest in upper case": (changed(config_sha256=B.upper()), "config_sha256: expected 64 hex digits"),
    "digest of 63 digits": (changed(data_sha256=C[1:]), "data_sha256: expected 64 hex digits"),
    "digest of other digits": (changed(data_sha256="\uff11" * 64), "data_sha256: expected 64 hex digits"),
    "digest and a line": (changed(prev_sha256=A + "\n"), "prev_sha256: expected 64 hex digits"),
    "no digest of a file": (entry(sha256=""), r"metrics\.jsonl\.sha256: expected 64 hex digits, found ''"),
    "short run_id": (changed(run_id="0" * 31), "run_id: expected 32 hex digits"),
    # files
    "unknown role": (entry(role="code"), "a name that belongs to its role, found 'metrics.jsonl' as 'code'"),
    "name of another role": (entry(role="plan"), "found 'metrics.jsonl' as 'plan'"),
    "name with a folder": (entry(name="../metrics.jsonl"), "a name that belongs to its role"),
    "name with a line": (entry(name="metrics.jsonl\n"), "a name that belongs to its role"),
    "name of a pickle": (entry(name="model.pt", role="model"), "a name that belongs to its role"),
    "name with other digits": (entry(name="b\uff10\uff10\uff10-g0007.safetensors", role="block"), "its role"),
    "the manifest itself": (entry(name="MANIFEST.json"), "belongs to its role"),
    "names out of order": (changed(files=PLAIN["files"][::-1]), "different names in order, found 4"),
    "equal names": (changed(files=[PLAIN["files"][0]] * 2), "different names in order, found 2"),
    "4,097 files": (changed(files=NAMES), "at most 4096 different names in order, found 4097"),
    "more than 1 MiB": (changed(env={"a": "b" * (1 << 20)}), "expected 1048576 bytes at most, found"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_that_breaks_one_rule_is_refused(name):
    data, message = REFUSED[name]
    begun = time.monotonic()
    with pytest.raises(CorruptFileError, match=message) as caught:
        parse(data)
    assert str(caught.value).startswith(f"{WHERE}: not a manifest: ")
    assert str(caught.value).isprintable()
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("field", PLAIN)
def test_a_field_that_is_missing_is_named(field):
    with pytest.raises(CorruptFileError, match=rf"missing \['{field}'\]|format: expected"):
        parse(seal(written({key: value for key, value in PLAIN.items() if key != field})))


def test_as_many_files_as_allowed_are_read():
    made = dataclasses.replace(EXAMPLE, files=tuple(FileEntry(**f) for f in NAMES[:4096]))
    assert parse(made.to_bytes()) == made


# --- random manifests and random damage ---

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
NUMBERS = st.integers(0, (1 << 53) - 1)
PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z")), max_size=20)
ENTRIES = st.builds(
    lambda kind, block, generation, size, digest: FileEntry(
        f"{kind}{block:03d}-g{generation:04d}.{'safetensors' if kind == 'b' else 'nfc'}",
        "block" if kind == "b" else "cache",
        block,
        size,
        digest,
    ),
    st.sampled_from("bxv"),
    st.integers(0, 2000),
    st.integers(0, 20000),
    NUMBERS,
    DIGESTS,
)
MANIFESTS = st.builds(
    Manifest,
    format=st.just("nf-manifest/1"),
    generation=st.integers(1, (1 << 53) - 1),
    prev_sha256=DIGESTS,
    run_id=st.text("0123456789abcdef", min_size=32, max_size=32),
    done=st.booleans(),
    position=st.builds(Position, NUMBERS, NUMBERS, NUMBERS),
    config_sha256=DIGESTS,
    data_sha256=DIGESTS,
    env=st.dictionaries(PRINTABLE, PRINTABLE, max_size=5),
    files=st.lists(ENTRIES, max_size=8, unique_by=lambda e: e.name).map(
        lambda files: tuple(sorted(files, key=lambda e: e.name))
    ),
)


@given(MANIFESTS)
@settings(max_examples=200, deadline=None)
def test_any_manifest_is_read_back(manifest):
    data = manifest.to_bytes()
    assert data == seal(written(dataclasses.asdict(manifest)))
    assert parse(data) == manifest


@given(st.integers(0, len(SEALED)), st.integers(0, 40), st.binary(max_size=40), st.booleans())
@settings(max_examples=500, deadline=None)
def test_any_other_bytes_are_refused_or_are_canonical(at, cut, put, sealed_anew):
    """Bytes cut out and put in anywhere; sealed anew, they may be another manifest, which is then read as it stands."""
    data = SEALED[:at] + put + SEALED[at + cut :]
    if sealed_anew:
        body = BODY[:at] + put + BODY[at + cut :]
        data = seal(body) if body.endswith(b"\n}\n") else body
    try:
        found = parse(data)
    except CorruptFileError:
        return
    assert found.to_bytes() == data
    assert sealed_anew or data == SEALED


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*PLAIN, "file", "place"]), st.sampled_from(["name", "role", "block", "bytes", "sha256"]), JSON)
@settings(max_examples=500, deadline=None)
def test_any_value_in_any_field_is_refused_or_written_back(field, part, value):
    plain = json.loads(BODY)
    if field == "file":
        plain["files"][0][part] = value
    elif field == "place":
        plain["position"]["step"] = value
    else:
        plain[field] = value
    data = seal(written(plain))
    try:
        found = parse(data)
    except CorruptFileError:
        return
    assert found.to_bytes() == data


# --- names ---


def test_only_names_that_a_run_writes_are_ours():
    ours = ["MANIFEST.json", "MANIFEST.prev.json", "config.toml", "plan-g0004.json", "b003-g0007.safetensors"]
    ours += ["c0000412.safetensors", "x004-g0009.nfc", "v004-g0009.nfc", "metrics.jsonl", "exits.json", "model.json"]
    assert all(is_ours(name) and is_ours(f"{name}.tmp") for name in ours)
    assert is_ours("ballast.tmp")
    others = [
        "",
        "LOCK",
        "log.jsonl",
        "notes.txt",
        "b003.safetensors",
        "b003-g0007.safetensors.bak",
        "x.nfc",
        "ballast",
    ]
    others += [
        "config.toml\n",
        "Config.toml",
        "b\u0660\u0660\u0660-g0007.safetensors",
        "plan.json.tmp.tmp",
        "../plan.json",
    ]
    assert not any(map(is_ours, others))

"""Fuzz target: a manifest or a configuration is refused by the error of its kind, or is written back as it was read.

python fuzz_manifest.py [RUNS]                  with atheris where it is installed, guided by coverage; else by mutation
A seal is put under most manifests, or the digest would keep everything from the rules behind it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
import tempfile
import time
from pathlib import Path

COVERED = importlib.util.find_spec("atheris") is not None
if COVERED:
    import atheris

    with atheris.instrument_imports(include=["nf_engine"]):
        from nf_engine.config import TrainConfig
        from nf_engine.errors import ConfigError, CorruptFileError
        from nf_engine.manifest import FileEntry, Manifest, Position
else:
    from nf_engine.config import TrainConfig
    from nf_engine.errors import ConfigError, CorruptFileError
    from nf_engine.manifest import FileEntry, Manifest, Position

END = b"\n}\n"
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b" ",
    b"true",
    b"null",
    b"NaN",
    b"1e999",
    b"-0",
    b"0.5",
    b"\\u",
]
TOKENS += [
    b"\\ud800",
    b"9007199254740992",
    b"18446744073709551616",
    b'"files": [',
    b'"sha256": "',
    b".nfc",
    b"inf",
    b"0x",
]
TOKENS += [
    b"safetensors",
    b'"role": "cache"',
    b"= ",
    b"[a]\n",
    b"'''",
    b"nan",
    b"1979-05-27",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
]


def seeds() -> list[bytes]:
    """A manifest without its seal, one with it, a configuration; the first byte says which."""
    files = [FileEntry(f"b00{i}-g000{i + 2}.safetensors", "block", i, 100, "e" * 64) for i in range(3)]
    files += [FileEntry("metrics.jsonl", "metrics", 0, 7, "f" * 64)]
    head = ("nf-manifest/1", 4, "a" * 64, "b" * 32, False, Position(3, 1, 2), "c" * 64, "d" * 64, {"torch": "2.13.0"})
    sealed = Manifest(*head, tuple(files)).to_bytes()
    body = sealed[: sealed.index(b',\n "self_sha256"')]
    return [b"\0" + body, b"\1" + sealed, b"\2" + TrainConfig().to_toml().encode()]


def check(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    if kind == b"\0":
        body = rest + END
        check_manifest(rest + f',\n "self_sha256": "{hashlib.sha256(body).hexdigest()}"'.encode() + END)
    elif kind == b"\1":
        check_manifest(rest)
    else:
        check_config(rest.decode("utf-8", "surrogateescape"))


def check_manifest(data: bytes) -> None:
    message = ""
    try:
        found = Manifest.parse(data, "m")
    except CorruptFileError as error:
        message = str(error)
    if message:
        assert message.startswith("m: not a manifest: ")
        assert len(message) < 600
        return
    assert found.to_bytes() == data


def check_config(text: str) -> None:
    try:
        found = TrainConfig.from_toml(text, "c")
    except ConfigError:
        return
    assert TrainConfig.from_toml(found.to_toml(), "c") == found


def mutated(parts: list[bytes], draw: random.Random) -> bytes:
    """One of them with a few bytes, tokens or slices of another put in, cut out or exchanged."""
    data = bytearray(draw.choice(parts))
    for _ in range(draw.randint(1, 4)):
        at, cut = draw.randrange(len(data) + 1), draw.choice([0, 0, 1, 1, 4, 64, 2000])
        other = draw.choice(parts)
        begin = draw.randrange(len(other))
        put = [b"", bytes([draw.randrange(256)]), draw.choice(TOKENS), other[begin : begin + draw.randint(0, 200)]]
        data[at : at + draw.randint(0, cut)] = draw.choice(put)
    return bytes(data)


def without_coverage(runs: int) -> None:
    draw, parts = random.Random(0), seeds()
    for _ in range(runs):
        check(mutated(parts, draw))


def main() -> None:
    runs, begun = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, time.monotonic()
    for seed in seeds():
        check(seed)
    if not COVERED:
        without_coverage(runs)
        print(f"{runs} runs without coverage, 0 crashes, {runs / (time.monotonic() - begun):.0f} a second")
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "seeds").mkdir()
    for i, seed in enumerate(seeds()):
        (folder / "seeds" / str(i)).write_bytes(seed)
    tokens = "".join('"' + "".join(f"\\x{b:02x}" for b in token) + '"\n' for token in TOKENS)
    (folder / "tokens").write_text(tokens)
    options = [f"-runs={runs}", f"-dict={folder}/tokens", "-max_len=4096", f"-artifact_prefix={folder}/", "-timeout=5"]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", f"{folder}/seeds"], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

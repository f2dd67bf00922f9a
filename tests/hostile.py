"""Hostile corpus: some 200 run folders, tensor files and caches, each wrong in one way that nobody writes by accident.

python hostile.py OUT      writes OUT/<kind>-<name>/, kind one of
    run     a run folder: it, or a file that it lists, must be refused
    model   a run folder that is sound, but for what model.json says
    state   state.safetensors, for a model with one tensor "m.x" of (4,) float32
    cache   x000-g0001.nfc, whose sound twin is in OUT/sound-cache
    config  config.toml
The five named sound-<kind> are as they should be. Digests and checksums hold unless they are
what is wrong. It needs no nf_engine: formats are written from their descriptions.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import marshal
import os
import pickle
import socket
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TIB = 1 << 40
PAGE = 4096
EXTREMES = [0, 1, (1 << 16) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]


class Runs:
    """A pickle of this makes a file in the folder of whoever loads it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("pwned", "w")


# --- runs ---


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def body_of(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode("ascii", "surrogatepass")


def seal(body: bytes) -> bytes:
    return body[:-3] + f',\n "self_sha256": "{digest(body)}"\n}}\n'.encode()


SOUND = {
    "config.toml": ("config", 0, b"lr = 0.1\n"),
    "plan.json": ("plan", 0, b"{}\n"),
    "metrics.jsonl": ("metrics", 0, b'{"epoch": 0}\n'),
    "c0000002.safetensors": ("train", 0, b"weights"),
}


def listed(files: dict[str, tuple[str, int, bytes]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "role": role, "block": block, "bytes": len(data), "sha256": digest(data)}
        for name, (role, block, data) in sorted(files.items())
    ]


def plain(files: dict[str, tuple[str, int, bytes]] = SOUND) -> dict[str, Any]:
    return {
        "format": "nf-manifest/1",
        "generation": 2,
        "prev_sha256": "a" * 64,
        "run_id": "b" * 32,
        "done": True,
        "position": {"block": 1, "epoch": 0, "step": 0},
        "config_sha256": "c" * 64,
        "data_sha256": "d" * 64,
        "env": {"torch": "2.13.0"},
        "files": listed(files),
    }


def write_run(path: Path, manifest: bytes | None = None, **files: tuple[str, int, bytes]) -> None:
    """A run folder; manifest: in the place of the right one. files: more of them, dots written as "__"."""
    path.mkdir(mode=0o700)
    whole = SOUND | {name.replace("__", "."): file for name, file in files.items()}
    for name, (_, _, data) in whole.items():
        (path / name).write_bytes(data)
    right = seal(body_of(plain(whole)))
    (path / "MANIFEST.json").write_bytes(right if manifest is None else manifest)
    (path / "MANIFEST.prev.json").write_bytes(right if manifest is None else manifest)


def manifests() -> Iterator[tuple[str, bytes]]:
    text = body_of(plain()).decode()

    def put(old: str, new: str) -> bytes:
        assert old in text
        return seal(text.replace(old, new, 1).encode("utf-8", "surrogatepass"))

    def field(**fields: object) -> bytes:
        return seal(body_of({**plain(), **fields}))

    def file(**fields: object) -> bytes:
        files = listed(SOUND)
        files[2] |= fields
        return field(files=files)

    number = '"generation": 2'
    for name in (
        "true",
        "2.0",
        "2e0",
        "1e999",
        "NaN",
        "-Infinity",
        '"2"',
        "null",
        "9" * 5000,
        "-1",
        "0x2",
        "[2]",
        "{}",
    ):
        yield f"number {name[:9]}", put(number, f'"generation": {name}')
    for value in EXTREMES[5:]:
        yield f"length {value}", file(bytes=value)
        yield f"block {value}", field(position={"block": value, "epoch": 0, "step": 0})
    yield "length of 8 TiB", file(bytes=8 * TIB)
    yield "equal keys", put('"done": true', '"done": false,\n "done": true')
    yield "deep", put('"2.13.0"', "[" * 100_000)
    yield "deep objects", put('"2.13.0"', '{"a":' * 100_000)
    yield "surrogate", put('"2.13.0"', r'"\ud800"')
    yield "escape sequence", put('"2.13.0"', r'"\u001b]0;x\u0007"')
    yield "UTF-8", put('"2.13.0"', '"é"')
    yield "byte order mark", seal(b"\xef\xbb\xbf" + text.encode())
    yield "UTF-16", text.encode("utf-16")
    yield "newer", field(format="nf-manifest/2")
    yield "a class", field(format="torch.nn.Linear")
    yield "a list", b"[1]\n"
    yield "empty", b""
    yield "zeros", bytes(65_536)
    yield "no seal", text.encode()
    yield "wrong seal", seal(text.encode())[:-10] + b'0000000"\n}\n'
    yield "1 MiB and more", field(env={"a": "b" * (1 << 20)})
    for name in ("../../etc/passwd", "/etc/passwd", "a\0b", "", "LOCK", "MANIFEST.json", "x" * 5000, "plan.json"):
        yield f"name {name[:20]!a}", file(name=name)
    yield "role code", file(role="code")
    yield "no digest", file(sha256="")
    yield "many files", field(files=[{**listed(SOUND)[0], "name": f"c{i:07d}.safetensors"} for i in range(6000)])


def archives() -> Iterator[tuple[str, bytes]]:
    tar, packed, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        info = tarfile.TarInfo("../../pwned")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("../../pwned", "x")
        file.writestr("archive/data.pkl", pickle.dumps(Runs()))  # as torch.save names it
        file.writestr("archive/version", "3\n")
    with zipfile.ZipFile(array, "w") as file:
        file.writestr("x.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
                      .ljust(117) + b"\n" + pickle.dumps(Runs()))  # fmt: skip
    yield "tar", tar.getvalue()
    yield "zip of torch", packed.getvalue()
    yield "npz", array.getvalue()
    for name, pack in (("gzip", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zlib", zlib.compress)):
        yield name, pack(bytes(1 << 22))  # 4 MiB of zeros in a few KiB


def pickles() -> Iterator[tuple[str, bytes]]:
    for protocol in range(6):
        yield f"pickle {protocol}", pickle.dumps(Runs(), protocol)
    yield "marshal", marshal.dumps(compile("open('pwned', 'w')", "x", "exec"))
    yield "zipped pickle", zlib.compress(pickle.dumps(Runs()))  # as joblib writes it
    yield "source", b"import os; open('pwned', 'w')\n"


def objects(root: bool) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What stands in a sound run in the place of a file."""

    def sparse(path: Path) -> None:
        path.unlink()
        with path.open("wb") as file:
            file.truncate(8 * TIB)

    def sock(path: Path) -> None:
        path.unlink()
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)

    def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda path: (path.unlink(), make(path))

    yield "link", instead(lambda path: path.symlink_to("/etc/passwd"))
    yield "link to itself", instead(lambda path: path.symlink_to(path.name))
    yield "hard link", lambda path: os.link(path, path.parent / f"other {path.name}")
    yield "fifo", instead(os.mkfifo)
    yield "folder", instead(lambda path: path.mkdir())
    yield "socket", sock
    yield "8 TiB", sparse
    if root:
        yield "device", instead(lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5)))
        yield "of another", lambda path: os.chown(path, 65534, 65534)


def run_folders(out: Path) -> None:
    for name, manifest in manifests():
        write_run(fresh(out, f"run-manifest {name}"), manifest)
    for name, data in (*pickles(), *archives()):
        write_run(fresh(out, f"run-manifest as {name}"), data)
    for file in ("MANIFEST.json", "c0000002.safetensors", "metrics.jsonl"):
        for name, put in objects(os.geteuid() == 0):
            path = fresh(out, f"run-{file} {name}")
            write_run(path)
            put(path / file)
            if file == "MANIFEST.json":  # or there would be a way back
                put(path / "MANIFEST.prev.json")
    whole = {**plain(), "files": [{**f, "bytes": 8 * TIB} if f["role"] == "train" else f for f in listed(SOUND)]}
    write_run(out / "run-8 TiB as listed", seal(body_of(whole)))
    os.truncate(out / "run-8 TiB as listed" / "c0000002.safetensors", 8 * TIB)
    for name, data in (("text", b"lr = 0.2\n"), ("nothing", b""), ("long", b"lr = 0.1\n" * 9999)):
        write_run(out / f"run-config changed, {name}")
        (out / f"run-config changed, {name}" / "config.toml").write_bytes(data)


def models() -> Iterator[tuple[str, bytes]]:
    """model.json of a finished run: what its model is made of."""
    sound = {"format": "nf-model/1", "model": "torch.nn.Linear", "exits": [], "chosen": 0}
    yield "fields missing", json.dumps(sound).encode()
    yield "newer", json.dumps({**sound, "format": "nf-model/2"}).encode()
    yield "deep", b"[" * 100_000
    yield "deep objects", b'{"format":' * 100_000
    yield "UTF-16", json.dumps(sound).encode("utf-16")
    yield "NaN", b'{"format": "nf-model/1", "chosen": NaN}'
    yield "1e999", b'{"format": "nf-model/1", "chosen": 1e999}'
    yield "long number", b'{"format": "nf-model/1", "chosen": ' + b"9" * 5000 + b"}"
    yield "equal keys", b'{"format": "nf-model/1", "format": "nf-model/1"}'
    yield "a list", b'["format"]'
    yield "a number", b"1"
    yield "empty", b""
    yield from pickles()
    yield from archives()


# --- tensors ---


def tensors(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: object = "F32", shape: object = (4,), begin: object = 0, end: object = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def states() -> Iterator[tuple[str, bytes]]:
    one = {"m.x": tensor()}
    for value in EXTREMES[3:]:
        yield f"header of {value}", tensors(one, length=value)
    yield "100 MB claimed in 20 bytes", struct.pack("<Q", 100_000_000) + b"{}".ljust(12)
    yield "header past the end", tensors(one, b"", 200)
    yield "overlap", tensors({"m.x": tensor(), "m.y": tensor(begin=8, end=24)}, bytes(24))
    yield "hole", tensors({"m.x": tensor(begin=8, end=24)}, bytes(24))
    yield "bytes after", tensors(one, bytes(17))
    yield "bytes missing", tensors(one, bytes(15))
    yield "odd bytes", tensors({"m.x": tensor(end=15)}, bytes(15))
    yield "backwards", tensors({"m.x": tensor(begin=16, end=0)})
    for offset in (-16, 16.0, "16", None, 1 << 63, (1 << 64) - 1, 1 << 64):
        yield f"end {offset}", tensors({"m.x": tensor(end=offset)})
    for shape in (
        [1 << 32, 1 << 32],
        [1 << 62, 4],
        [1 << 63],
        [1 << 64],
        [-4],
        [0],
        [4.0],
        ["4"],
        None,
        [[4]],
        [4] * 99_999,
    ):
        yield f"shape {str(shape)[:24]}", tensors({"m.x": tensor(shape=shape)})
    for dtype in ("F64", "I32", "O", "", None, 5, "F32 "):
        yield f"dtype {dtype}", tensors({"m.x": tensor(dtype)})
    yield (
        "equal keys",
        tensors(b'{"m.x":' + json.dumps(tensor()).encode() + b',"m.x":' + json.dumps(tensor()).encode() + b"}"),
    )
    yield "no key", tensors({}, b"")
    yield "another key", tensors({"m.y": tensor()})
    yield "one key too many", tensors({"m.x": tensor(), "__class__": tensor(begin=16, end=32)}, bytes(32))
    yield "metadata of numbers", tensors({**one, "__metadata__": {"a": 1}})
    yield "metadata alone", tensors({"__metadata__": {"a": "b"}}, b"")
    yield "header of a list", tensors(b"[]", b"")
    yield "header of bytes", tensors(b"\xff" * 64)
    yield "header deep", tensors(b'{"m.x":' * 50_000)
    yield "header of NaN", tensors({"m.x": tensor(shape=[float("nan")])})
    yield "empty", b""
    yield "7 bytes", bytes(7)
    yield "zeros", bytes(4096)


# --- caches ---

TABLE = [0] * 256
for _i in range(256):
    _value = _i
    for _ in range(8):
        _value = _value >> 1 ^ (0x82F63B78 if _value & 1 else 0)
    TABLE[_i] = _value
FIELDS = [("version", 8, 4), ("header_bytes", 12, 4), ("byte_order", 16, 4), ("flags", 20, 4), ("dtype", 24, 2)]
FIELDS += [("codec", 26, 2), ("layout", 28, 2), ("ndim", 30, 2), ("shape[0]", 32, 8), ("shape[2]", 48, 8)]
FIELDS += [
    ("sample_bytes", 96, 8),
    ("n_samples", 104, 8),
    ("per_chunk", 112, 4),
    ("stride", 116, 4),
    ("n_chunks", 120, 4),
]
FIELDS += [("copies", 124, 4), ("rank", 132, 2), ("world", 134, 2), ("table_offset", 184, 8), ("footer_offset", 192, 8)]
FIELDS += [("file_bytes", 200, 8)]


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def page(data: bytes) -> bytes:
    data = data[: PAGE - 4].ljust(PAGE - 4, b"\0")
    return data + struct.pack("<I", crc32c(data))


def cache_file(header: bytes | None = None, chunks: list[bytes] | None = None, table: bytes | None = None) -> bytes:
    """5 samples (2, 3) of float32 in 3 chunks, all checksums right for whatever is given."""
    floats = struct.pack("<30f", *range(30))
    if chunks is None:
        chunks = []
        for i in (0, 2, 4):
            records = b"".join(struct.pack("<QiI", 100 + j, j % 3, 0) for j in range(i, min(i + 2, 5)))
            chunks.append((floats[i * 24 : (i + 2) * 24].ljust(48, b"\0") + records).ljust(PAGE, b"\0"))
    head = b"\x89NFC\r\n\x1a\n" + struct.pack("<4I4H8Q", 1, PAGE, 0x0A0B0C0D, 0, 1, 0, 0, 2, 2, 3, *[0] * 6)
    head += struct.pack("<2Q5I2H2Q32s3Q", 24, 5, 2, PAGE, 3, 1, 0, 0, 1, 1, 0, bytes(32), 16384, 20480, 24576)
    head = page(head) if header is None else page(header)
    if table is None:
        table = struct.pack(f"<{len(chunks)}I", *map(crc32c, chunks)).ljust(PAGE, b"\0")
    foot = b"\x89NFE\r\n\x1a\n" + struct.pack("<II", 1, *struct.unpack("<I", head[-4:]))
    foot += struct.pack("<QIIQQ", 5, 3, crc32c(table), 1, 24576) + bytes(32)
    return head + b"".join(chunks) + table + page(foot)


def caches() -> Iterator[tuple[str, bytes]]:
    sound = cache_file()
    for name, at, size in FIELDS:
        whole = (1 << 8 * size) - 1
        now = int.from_bytes(sound[at : at + size], "little")
        for value in {0, whole, (whole + 1) // 2, now + 1} - {now}:
            yield f"{name} {value}", cache_file(sound[:at] + value.to_bytes(size, "little") + sound[at + size : PAGE])
    for size in (0, 1, 7, 8, 4095, 4096, 4097, 8192, 16384, 20479, 20480, 24575):
        yield f"{size} bytes", sound[:size]
    for more in (1, 8, 4096, 1 << 16):
        yield f"{more} bytes more", sound + bytes(more)
    chunks = [sound[i : i + PAGE] for i in (4096, 8192, 12288)]
    table = sound[16384:20480]
    for name, other in (("swapped", table[4:8] + table[:4] + table[8:]), ("zero", bytes(PAGE)), ("one", b"\xff" * PAGE),
                        ("doubled", table[:4] * 3 + table[12:]), ("padded", table[:-1] + b"\1")):  # fmt: skip
        yield f"table {name}", cache_file(table=other)
    for name, order in (("swapped", (1, 0, 2)), ("doubled", (0, 0, 2)), ("turned", (2, 1, 0))):
        yield f"chunks {name}", cache_file(chunks=[chunks[i] for i in order])
        yield f"chunks {name}, old table", cache_file(chunks=[chunks[i] for i in order], table=table)
    yield "magic", cache_file(b"\x89PNG" + sound[4:PAGE])


# --- configs ---


def configs() -> Iterator[tuple[str, bytes]]:
    for value in (
        "nan",
        "inf",
        "-inf",
        "1e999",
        "-1",
        "0x" + "f" * 5000,
        "2020-01-01",
        "true",
        '"a"',
        "[]",
        "{}",
        "'''",
    ):
        yield f"lr = {value[:9]}", f"lr = {value}\n".encode()
    yield "equal keys", b"lr = 0.1\nlr = 0.2\n"
    yield "unknown key", b"learning_rate = 0.1\n"
    yield "dotted key", b"lr.x = 0.1\n"
    yield "deep", b"lr = " + b"[" * 100_000
    yield "a table", b"[lr]\nx = 1\n"
    yield "bytes", b"\xff\xfe\0"
    yield "code", b"optimizer = \"__import__('os').system('touch pwned')\"\n"


NUMBERS = itertools.count()


def fresh(out: Path, name: str) -> Path:
    """A path of its own, which shows what is in it."""
    kind, _, rest = name.partition("-")
    return out / f"{kind}-{next(NUMBERS):03d} {''.join(c if c.isalnum() or c in '-_. ' else '_' for c in rest)[:60]}"


def write_corpus(out: Path) -> int:
    """How many are hostile."""
    out.mkdir(parents=True, exist_ok=True)
    write_run(out / "sound-run")
    run_folders(out)
    write_run(out / "sound-model", model__json=("model", 0, b'{"format": "nf-model/1"}'))  # as far as one gets
    for name, data in models():
        write_run(fresh(out, f"model-{name}"), model__json=("model", 0, data))
    parts = {"state": ("state.safetensors", states, tensors({"m.x": tensor()}))}
    parts["cache"] = ("x000-g0001.nfc", caches, cache_file())
    parts["config"] = ("config.toml", configs, b"lr = 0.1\n")
    for kind, (file, make, sound) in parts.items():
        every = [(out / f"sound-{kind}", sound), *((fresh(out, f"{kind}-{name}"), data) for name, data in make())]
        if kind != "config":
            every += [(fresh(out, f"{kind}-as {name}"), data) for name, data in (*pickles(), *archives())]
        for path, data in every:
            path.mkdir()
            (path / file).write_bytes(data)
    (out / "cache-8 TiB").mkdir()
    (out / "cache-8 TiB" / "x000-g0001.nfc").write_bytes(cache_file())
    os.truncate(out / "cache-8 TiB" / "x000-g0001.nfc", 8 * TIB)
    return sum(1 for path in out.iterdir() if not path.name.startswith("sound-"))


if __name__ == "__main__":
    print(write_corpus(Path(sys.argv[1])), "hostile folders")

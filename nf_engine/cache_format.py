"""Cache format: what describes a cache, a pass over it and its counts, and the header page that follows from it.

File, version 1, little endian, every part at a multiple of 4096 bytes, so that O_DIRECT accepts it:
    header 4096 | chunks, n x chunk_stride | table, CRC32C of each chunk | footer 4096
Chunk: samples (C, H, W) back to back, then a record of 16 bytes for each {u64 id, i32 label, u32 copy}, then zeros.
`CacheGeometry` holds shapes and sizes, `CacheRecord` what a manifest says of one file. The engine (csrc/cache/format.h)
parses files by themselves; here a file is held against its record. Source: the format is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import NamedTuple

import numpy as np

from nf_engine import _cache
from nf_engine.errors import CacheStaleError
from nf_engine.records import Record, stored_bytes

__all__ = [
    "MIB",
    "PAGE",
    "SAMPLE_RECORD",
    "CacheGeometry",
    "CacheRecord",
    "CacheStats",
    "Pass",
    "check_file",
    "check_range",
    "pack_header",
]

MIB = 1 << 20
PAGE = 4096
VERSION = 1
CODES = {"fp32": (1, 0), "fp16": (2, 0), "bf16": (3, 0), "u8": (1, 1)}  # stored dtype -> dtype given back, codec
SAMPLE_RECORD = np.dtype([("id", "<u8"), ("label", "<i4"), ("copy", "<u4")])

HEADER_MAGIC = b"\x89NFC\r\n\x1a\n"
HEADER = struct.Struct("<8s4I4H8Q2Q2I3I2H2Q32s3Q")
HEADER_FIELDS = (
    *("magic", "version", "header_bytes", "byte_order", "flags", "dtype", "codec", "layout", "ndim"),
    *(f"shape[{i}]" for i in range(8)),
    *("sample_bytes", "n_samples", "samples_per_chunk", "chunk_stride", "n_chunks", "copies", "block"),
    *("rank", "world", "generation", "order_key", "fingerprint", "table_offset", "footer_offset", "file_bytes"),
)


def page_up(value: int) -> int:
    """Bytes, up to the next multiple of 4096."""
    return -(-value // PAGE) * PAGE


def check_range(what: str, value: int, low: int, high: int) -> None:
    """Raises ValueError, naming what it is, for a value outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"expected {what} in {low}..{high}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheGeometry(Record):
    """Shapes and sizes of one cache; every other number of the file follows from these.

    Attributes:
        sample_shape: of one sample, (C, H, W) or any 1 to 8 sizes.
        dtype: stored as "fp32", "fp16", "bf16", or "u8": 8 bits per sample and channel, see `codec`.
        samples: number of samples, all copies together.
        copies: augmented copies of the data set among them.
        channels_last: (H, W, C) in memory; needs three sizes.
        chunk_bytes: aim for the samples of one chunk; a smaller chunk mixes better, a larger one reads faster.
    """

    sample_shape: tuple[int, ...]
    dtype: str
    samples: int
    copies: int = 1
    channels_last: bool = False
    chunk_bytes: int = MIB

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ValueError(f"expected dtype {', '.join(CODES)}, got {self.dtype!r}")
        check_range("number of sizes in sample_shape", len(self.sample_shape), 1, 8)
        for size in self.sample_shape:
            check_range("size in sample_shape", size, 1, 1 << 31)
        for name in ("channels_last",) * self.channels_last + ("u8",) * (self.dtype == "u8"):
            if len(self.sample_shape) != 3:
                raise ValueError(f"{name} expects a sample of shape (C, H, W), got {self.sample_shape}")
        check_range("samples", self.samples, 1, 1 << 40)
        check_range("copies", self.copies, 1, 65535)
        check_range("chunk_bytes", self.chunk_bytes, 1, 1 << 26)
        check_range("bytes of a sample", self.sample_bytes, 1, 1 << 26)
        check_range("number of chunks", self.chunks, 1, 1 << 23)

    @property
    def sample_bytes(self) -> int:
        return stored_bytes(self.sample_shape, self.dtype)

    @property
    def samples_per_chunk(self) -> int:
        # A sample counts for at least 64 bytes: its record of 16 would else dwarf it.
        return min(self.samples, max(1, self.chunk_bytes // max(self.sample_bytes, 64)))

    @property
    def chunk_stride(self) -> int:
        return page_up(self.samples_per_chunk * (self.sample_bytes + SAMPLE_RECORD.itemsize))

    @property
    def chunks(self) -> int:
        return -(-self.samples // self.samples_per_chunk)

    @property
    def table_offset(self) -> int:
        return PAGE + self.chunks * self.chunk_stride

    @property
    def footer_offset(self) -> int:
        return self.table_offset + page_up(4 * self.chunks)

    @property
    def file_bytes(self) -> int:
        return self.footer_offset + PAGE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheRecord(Record):
    """What a manifest says of one finished cache; `open` holds the file against it.

    Attributes:
        name: file name in its folder.
        tier: "disk", "ram" or "device"; the last two end with the object that holds them.
        geometry: shapes and sizes.
        block: number of the block whose inputs these are.
        generation: counts rebuilds.
        fingerprint: 64 hex digits for what the samples were made from.
        order_key, seed_key: keys of the producing pass, kept for a rebuild.
        table_sha256: of the padded table of checksums, hence of the contents; "" where there is no file.
    """

    name: str
    tier: str
    geometry: CacheGeometry
    block: int
    generation: int
    fingerprint: str
    order_key: int
    seed_key: int
    table_sha256: str = ""


class Pass(NamedTuple):
    """One pass over a cache: every sample once, in the order of `key`, in batches from number `first` on."""

    key: int
    batch: int  # samples
    window: int  # chunks
    first: int
    drop_last: bool


@dataclasses.dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was created or opened.

    bytes_written, bytes_read: moved to and from chunks; write_busy, read_busy: seconds inside the disk's system calls,
    summed over threads; write_stall, read_stall: seconds that the caller waited; rereads: chunks read a second time;
    peak_slabs: most slabs in use; direct: the disk is reached past the page cache; pinned: bytes of the engine's host
    memory that the driver has pinned.
    """

    bytes_written: int = 0
    bytes_read: int = 0
    write_busy: float = 0.0
    read_busy: float = 0.0
    write_stall: float = 0.0
    read_stall: float = 0.0
    rereads: int = 0
    peak_slabs: int = 0
    direct: bool = False
    pinned: int = 0


def _sealed(data: bytes) -> bytes:
    """Padded to a page whose last four bytes are the CRC32C of the others."""
    page = data.ljust(PAGE - 4, b"\0")
    return page + struct.pack("<I", _cache.crc32c(page))


def pack_header(record: CacheRecord) -> bytes:
    """The header page, 4096 bytes, that the record fixes; ValueError where a field of the record is out of range."""
    geometry = record.geometry
    check_range("block", record.block, 0, 65535)
    check_range("generation", record.generation, 0, (1 << 64) - 1)
    check_range("order_key", record.order_key, 0, (1 << 64) - 1)
    shape = geometry.sample_shape + (0,) * (8 - len(geometry.sample_shape))
    fields = (
        *(HEADER_MAGIC, VERSION, PAGE, 0x0A0B0C0D, 0),
        *(*CODES[geometry.dtype], int(geometry.channels_last), len(geometry.sample_shape)),
        *shape,
        *(geometry.sample_bytes, geometry.samples, geometry.samples_per_chunk, geometry.chunk_stride),
        *(geometry.chunks, geometry.copies, record.block, 0, 1, record.generation, record.order_key),
        *(bytes.fromhex(record.fingerprint), geometry.table_offset, geometry.footer_offset, geometry.file_bytes),
    )
    return _sealed(HEADER.pack(*fields))


def check_file(path: str, header: bytes, table: bytes, record: CacheRecord) -> None:
    """Holds a sound file against its record: every byte of the header and of the table follows from it.

    Raises:
        CacheStaleError: the file is not the one of the record; names what differs.
    """
    expected = pack_header(record)
    if header != expected:
        pairs = zip(HEADER_FIELDS, HEADER.unpack_from(expected), HEADER.unpack_from(header), strict=True)
        wrong = [f"{name} {want!r}, got {got!r}" for name, want, got in pairs if want != got]
        raise CacheStaleError(f"{path}: expected {'; '.join(wrong)}; delete it to rebuild")
    found = hashlib.sha256(table).hexdigest()
    if found != record.table_sha256:
        raise CacheStaleError(f"{path}: expected contents {record.table_sha256}, got {found}; delete it to rebuild")

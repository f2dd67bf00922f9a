"""Cache format: the layout of a .nfc file, what describes it, and the checks of all but its chunks.

File, version 1, little endian, every part at a multiple of 4096 bytes, so that O_DIRECT accepts it:
    header 4096 | chunks, n x chunk_stride | table, CRC32C of each chunk | footer 4096
Chunk: samples (C, H, W) back to back, then a record of 16 bytes for each {u64 id, i32 label, u32 copy}, then zeros.
`CacheGeometry` holds shapes and sizes, `CacheRecord` what a manifest says of one file. Source: the format is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct

import numpy as np
import torch
from numpy.typing import NDArray

from nf_engine import _cache
from nf_engine.errors import CacheCorruptError, CacheIncompleteError, CacheStaleError
from nf_engine.records import Record

__all__ = [
    "DTYPES",
    "MIB",
    "PAGE",
    "SAMPLE_RECORD",
    "CacheGeometry",
    "CacheRecord",
    "check_file",
    "check_range",
    "pack_footer",
    "pack_header",
    "page_up",
    "write_part",
]

MIB = 1 << 20
PAGE = 4096
VERSION = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_CODES = {"fp32": 1, "fp16": 2, "bf16": 3}
SAMPLE_RECORD = np.dtype([("id", "<u8"), ("label", "<i4"), ("copy", "<u4")])

HEADER_MAGIC = b"\x89NFC\r\n\x1a\n"
FOOTER_MAGIC = b"\x89NFE\r\n\x1a\n"
HEADER = struct.Struct("<8s4I4H8Q2Q2I3I2H2Q32s3Q")
FOOTER = struct.Struct("<8sIIQIIQQ32s")
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
        dtype: stored as "fp32", "fp16" or "bf16".
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
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype fp32, fp16 or bf16, got {self.dtype!r}")
        check_range("number of sizes in sample_shape", len(self.sample_shape), 1, 8)
        for size in self.sample_shape:
            check_range("size in sample_shape", size, 1, 1 << 31)
        if self.channels_last and len(self.sample_shape) != 3:
            raise ValueError(f"channels_last expects a sample of shape (C, H, W), got {self.sample_shape}")
        check_range("samples", self.samples, 1, 1 << 40)
        check_range("copies", self.copies, 1, 65535)
        check_range("chunk_bytes", self.chunk_bytes, 1, 1 << 26)
        check_range("bytes of a sample", self.sample_bytes, 1, 1 << 26)
        check_range("number of chunks", self.chunks, 1, 1 << 23)

    @property
    def sample_bytes(self) -> int:
        return math.prod(self.sample_shape) * DTYPES[self.dtype].itemsize

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
        tier: "disk" or "ram"; a ram cache ends with the object that holds it.
        geometry: shapes and sizes.
        block: number of the block whose inputs these are.
        generation: counts rebuilds.
        fingerprint: 64 hex digits for what the samples were made from.
        order_key, seed_key: keys of the producing pass, kept for a rebuild.
        table_sha256: of the padded table of checksums, hence of the contents; "" for tier ram.
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


def write_part(file: _cache.File, offset: int, data: bytes) -> None:
    """Writes whole pages, the header, the table or the footer, from memory that O_DIRECT accepts.

    Raises:
        DiskFullError, StorageError: the file system refuses.
    """
    buffer = _cache.AlignedBuffer(len(data))
    memoryview(buffer)[:] = data
    file.write_chunk(offset, buffer)


def _read_part(file: _cache.File, offset: int, size: int) -> bytes:
    buffer = _cache.AlignedBuffer(size)
    file.read(offset, buffer)
    return bytes(memoryview(buffer))


def _sealed(data: bytes) -> bytes:
    """Padded to a page whose last four bytes are the CRC32C of the others."""
    page = data.ljust(PAGE - 4, b"\0")
    return page + struct.pack("<I", _cache.crc32c(page))


def _is_sealed(page: bytes) -> bool:
    return _sealed(page[:-4]) == page


def pack_header(record: CacheRecord) -> bytes:
    """The header page, 4096 bytes, that the record fixes; ValueError where a field of the record is out of range."""
    geometry = record.geometry
    check_range("block", record.block, 0, 65535)
    check_range("generation", record.generation, 0, (1 << 64) - 1)
    check_range("order_key", record.order_key, 0, (1 << 64) - 1)
    shape = geometry.sample_shape + (0,) * (8 - len(geometry.sample_shape))
    fields = (
        *(HEADER_MAGIC, VERSION, PAGE, 0x0A0B0C0D, 0),
        *(DTYPE_CODES[geometry.dtype], 0, int(geometry.channels_last), len(geometry.sample_shape)),
        *shape,
        *(geometry.sample_bytes, geometry.samples, geometry.samples_per_chunk, geometry.chunk_stride),
        *(geometry.chunks, geometry.copies, record.block, 0, 1, record.generation, record.order_key),
        *(bytes.fromhex(record.fingerprint), geometry.table_offset, geometry.footer_offset, geometry.file_bytes),
    )
    return _sealed(HEADER.pack(*fields))


def pack_footer(record: CacheRecord, table_crc: int) -> bytes:
    """The footer page, 4096 bytes, that the record and the CRC32C of the padded table fix."""
    geometry = record.geometry
    header_crc = struct.unpack("<I", pack_header(record)[-4:])[0]
    counts = (geometry.samples, geometry.chunks, table_crc, record.generation, geometry.file_bytes)
    return _sealed(FOOTER.pack(FOOTER_MAGIC, VERSION, header_crc, *counts, bytes.fromhex(record.fingerprint)))


def check_file(file: _cache.File, record: CacheRecord) -> NDArray[np.uint32]:
    """Every check but those of the chunks.

    The record fixes every byte of the header, and with the table every byte of the footer: no field is believed because
    the file says so, and comparing whole pages checks all rules of the format at once.

    Returns:
        The table: CRC32C of each chunk, zeros up to the end of its last page, little endian.

    Raises:
        CacheIncompleteError: the file is shorter or longer than it should be, or was not finished.
        CacheCorruptError: a checksum does not hold.
        CacheStaleError: the file is sound, but not the one of the record.
        StorageError: the file cannot be read.
    """
    geometry, path = record.geometry, file.path
    size, links, regular = file.stat()
    if not regular or links != 1:
        raise CacheCorruptError(f"{path}: expected a regular file with one link, got {links} links; delete it")
    if size != geometry.file_bytes:
        raise CacheIncompleteError(f"{path}: expected {geometry.file_bytes} bytes, got {size}; delete it to rebuild")
    _check_header(path, _read_part(file, 0, PAGE), record)
    footer = _read_part(file, geometry.footer_offset, PAGE)
    if footer == bytes(PAGE):
        raise CacheIncompleteError(f"{path}: has no footer, the writing run stopped early; delete it to rebuild")
    if not footer.startswith(FOOTER_MAGIC) or not _is_sealed(footer):
        raise CacheCorruptError(f"{path}: the checksum of the footer does not hold; delete it to rebuild")
    table = _read_part(file, geometry.table_offset, geometry.footer_offset - geometry.table_offset)
    if footer != pack_footer(record, _cache.crc32c(table)):
        raise CacheCorruptError(f"{path}: the table of checksums is not that of the footer; delete it to rebuild")
    found = hashlib.sha256(table).hexdigest()
    if found != record.table_sha256:
        raise CacheStaleError(f"{path}: expected contents {record.table_sha256}, got {found}; delete it to rebuild")
    return np.frombuffer(table, "<u4")


def _check_header(path: str, header: bytes, record: CacheRecord) -> None:
    expected = pack_header(record)
    if header == expected:
        return
    if not header.startswith(HEADER_MAGIC) or not _is_sealed(header):
        raise CacheCorruptError(f"{path}: the checksum of the header does not hold; delete it to rebuild")
    pairs = zip(HEADER_FIELDS, HEADER.unpack_from(expected), HEADER.unpack_from(header), strict=True)
    wrong = [f"{name} {want!r}, got {got!r}" for name, want, got in pairs if want != got]
    raise CacheStaleError(f"{path}: expected {'; '.join(wrong) or 'zeros behind the header'}; delete it to rebuild")

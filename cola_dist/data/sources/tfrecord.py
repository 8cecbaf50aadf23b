"""TFRecord files of ``tf.train.Example``, read from front to back; neither TensorFlow nor protobuf is needed.

A TFRecord is the length (uint64), its masked CRC-32C, the data, their masked CRC-32C, all little endian; a file of them may be compressed with
gzip as a whole. An Example maps names to lists of bytes, floats or integers. Of both formats only the little that TFDS writes is read here.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cola_dist import storage

PIECE = 8 * 1024**2
"""Bytes that one read of a file asks for: a request for each record would be slow on object storage."""
LONGEST = 2**31
"""Bytes of the longest record: protobuf has no longer message."""
_MOST_VALUES = 2**24
"""Bytes that encode a list of integers, and texts in a list: in Python each takes many times its own size."""
_SEARCHED = 1024**2
"""Bytes of the window in which the next record is searched."""
_INFLATED = 16 * 1024
"""Compressed bytes that are inflated at a time: at most 16 MiB come out, and at most they are lost before damage."""
_GZIP = b"\x1f\x8b\x08"
_HEADER, _FOOTER = 12, 4
_ONES = (0x641F6454).to_bytes(4, "little")

Values = list[bytes] | NDArray[np.float32] | NDArray[np.int64]


@dataclass(frozen=True)
class Record:
    """The record that begins at byte ``at`` of the (inflated) file: its values by name, or else what is damaged."""

    number: int
    at: int
    values: Mapping[str, Values] = field(default_factory=dict)
    damage: str = ""


def read_records(uri: str) -> Iterator[Record]:
    """Every record of a file, in order, with one record and one piece of the file in memory.

    Damaged data cost one record, a damaged header all up to the next sound one. Raises FileNotFoundError, and OSError where storage fails.
    """
    stream = _Stream(uri)
    number, ended = -1, False
    while header := stream.peek(_HEADER):
        number, at = number + 1, stream.at
        length = int.from_bytes(header[:8], "little")
        if not _is_header(header) or length > LONGEST:
            yield Record(number, at, damage="its header is damaged or cut off")
            ended = not _find_header(stream)
            continue
        stream.skip(_HEADER)
        data = memoryview(stream.peek(length + _FOOTER))
        stream.skip(len(data))
        missing = length + _FOOTER - len(data)
        ended = missing > 0
        if missing:
            yield Record(number, at, damage=stream.fault or f"the file ends {missing} bytes too early")
        elif masked_crc32c(data[:length]) != int.from_bytes(data[length:], "little"):
            yield Record(number, at, damage="the checksum of its data differs")
        else:
            yield _parsed(number, at, data[:length])
    if stream.fault and not ended:  # between two records; or else the record that it broke off is counted already
        yield Record(number + 1, stream.at, damage=stream.fault)


def _parsed(number: int, at: int, data: memoryview) -> Record:
    try:
        return Record(number, at, parse_example(data))
    except ValueError as error:
        return Record(number, at, damage=str(error))


def _is_header(header: bytes) -> bool:
    return len(header) == _HEADER and masked_crc32c(header[:8]) == int.from_bytes(header[8:], "little")


def _find_header(stream: _Stream) -> bool:
    """Move past the byte here to the next 12 that are a length and its checksum; to the end, and false, when there are none."""
    tables = _crc_tables(0)
    stream.skip(1)
    while len(window := stream.peek(_SEARCHED)) >= _HEADER:
        data = np.frombuffer(window, np.uint8)
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(data, 4)).view(np.uint32)[:, 0]
        crc = ~_advanced(tables, _advanced(tables, ~words[:-8]) ^ words[4:-4])
        places = np.flatnonzero(_masked(crc) == words[8:])
        if len(places):
            stream.skip(int(places[0]))
            return True
        stream.skip(len(window) - _HEADER + 1)
    stream.skip(len(window))
    return False


class _Stream:
    """The bytes of a file in their order, inflated where it is compressed."""

    def __init__(self, uri: str) -> None:
        self.at = 0
        self.fault = ""
        """Why there are no more bytes, when that is not the file's proper end."""
        self._pieces = _contents(uri)
        self._held = bytearray()

    def peek(self, count: int) -> bytes:
        """The next bytes; fewer where the file ends."""
        try:
            while len(self._held) < count and (piece := next(self._pieces, b"")):
                self._held += piece
        except zlib.error:
            self.fault = "the compressed data are damaged or cut off"
        with memoryview(self._held) as view:
            return bytes(view[:count])

    def skip(self, count: int) -> None:
        """Move on by bytes that were peeked at."""
        del self._held[:count]
        self.at += count


def _contents(uri: str) -> Iterator[bytes]:
    pieces = _pieces(uri)
    first = next(pieces, b"")
    compressed = first.startswith(_GZIP) and not _is_header(first[:_HEADER])  # a record may be as long as those bytes say
    return (_inflated if compressed else iter)(itertools.chain([first], pieces))


def _pieces(uri: str) -> Iterator[bytes]:
    for start in itertools.count(0, PIECE):
        if piece := storage.read_bytes(uri, start, PIECE):
            yield piece
        if len(piece) < PIECE:
            return


def _inflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Raises zlib.error."""
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
    for piece in pieces:
        for start in range(0, len(piece), _INFLATED):
            rest = piece[start : start + _INFLATED]
            while rest:
                if inflate.eof:
                    inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)  # gzip files may be joined end to end
                if data := inflate.decompress(rest):
                    yield data
                rest = inflate.unused_data
    if not inflate.eof:
        raise zlib.error("cut off")


@functools.cache
def _crc_tables(level: int) -> NDArray[np.uint32]:
    """What ``4 * 2 ** level`` zero bytes make of a CRC register: uint32 ``[2, 65536]``, one row for each of its halves."""
    if level:
        half = _crc_tables(level - 1)
        return np.stack([_advanced(half, half[0]), _advanced(half, half[1])])
    low = np.arange(65536, dtype=np.uint32)
    rows = np.stack([low, low << 16])
    for _ in range(32):
        rows = np.bitwise_xor(rows >> 1, (rows & 1) * np.uint32(0x82F63B78))
    return rows


def _advanced(tables: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    halves = np.ascontiguousarray(registers).view(np.uint16)
    moved: NDArray[np.uint32] = tables[0].take(halves[0::2]) ^ tables[1].take(halves[1::2])
    return moved


def masked_crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C (Castagnoli) of ``data`` as TFRecord stores it: rotated right by 15 bits, plus a constant.

    A CRC is linear: neighbouring words are joined in pairs, then pairs in pairs, which numpy does for all of them at once.
    """
    # Leading zeros leave an empty register empty; the first word after them fills it with ones, as the standard begins.
    words = np.frombuffer(bytes(-len(data) % 4) + _ONES + data, np.uint32)
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        words = _advanced(_crc_tables(level), words[0::2]) ^ words[1::2]
        level += 1
    return int(_masked(~_advanced(_crc_tables(0), words))[0])


def _masked(crc: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)  # type: ignore[return-value]


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """A number of protobuf's variable length, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & (2**64 - 1), at + place + 1
    raise ValueError("a number does not end")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field of a protobuf message; of one that is a bare number, the bytes that encode it."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire, end = tag & 7, at
        if wire == 0:
            end = _varint(data, at)[1]
        elif wire == 2:
            length, at = _varint(data, at)
            end = at + length
        elif wire in (1, 5):
            end = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if end > len(data):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[at:end]
        at = end


def _values(kind: int, items: list[bytes]) -> Values:
    """What a feature holds, from the fields of its bytes_list (1), float_list (2) or int64_list (3)."""
    if kind == 1:
        return items
    if kind == 2:
        return np.frombuffer(b"".join(items), np.float32)
    data, numbers, at = b"".join(items), [], 0
    if len(data) > _MOST_VALUES:
        raise ValueError("too many numbers in a list")
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return np.array(numbers, np.uint64).view(np.int64)


def parse_example(data: bytes | memoryview) -> dict[str, Values]:
    """A serialised ``tf.train.Example``: each feature's values by name, a list of bytes, float32 ``[n]`` or int64 ``[n]``.

    A feature without a list of any kind is left out. Raises ValueError when the bytes are no such message.
    """
    found: dict[str, Values] = {}
    for _, features in _fields(memoryview(data)):
        for _, entry in _fields(features):
            pair = dict(_fields(entry))
            name = bytes(pair.get(1, b"")).decode()
            for kind, values in _fields(memoryview(pair.get(2, b""))):
                items = [bytes(item) for _, item in itertools.islice(_fields(values), _MOST_VALUES + 1)]
                if len(items) > _MOST_VALUES:
                    raise ValueError("too many values in a list")
                found[name] = _values(kind, items)
    return found

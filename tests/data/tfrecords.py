"""TFRecord files of ``tf.train.Example``, written byte by byte by the plain algorithms, so that tests need no TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import numpy as np

from cola_dist.data.sources.tfrecord import Values


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def checksum(data: bytes) -> int:
    """The plain algorithm, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return masked(crc ^ 0xFFFFFFFF)


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode_example(features: Mapping[str, Values], packed: bool = True) -> bytes:
    entries = b""
    for name, values in features.items():
        if isinstance(values, list):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif values.dtype == np.float32:
            parts = [value.tobytes() for value in values]
            feature = field(2, field(1, b"".join(parts)) if packed else b"".join(varint(1 << 3 | 5) + part for part in parts))
        else:
            parts = [varint(int(value) & (2**64 - 1)) for value in values]
            feature = field(3, field(1, b"".join(parts)) if packed else b"".join(varint(1 << 3) + part for part in parts))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", checksum(length)) + data + struct.pack("<I", checksum(data))


def records_file(examples: Iterable[Mapping[str, Values]]) -> bytes:
    return b"".join(framed(encode_example(one)) for one in examples)

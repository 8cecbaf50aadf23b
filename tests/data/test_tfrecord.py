"""TFRecord files: exact values, damage that costs no more than itself, and files that come in pieces or compressed."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist import storage
from cola_dist.data.sources import tfrecord
from cola_dist.data.sources.tfrecord import Record, Values, masked_crc32c, parse_example, read_records
from tests.data.tfrecords import checksum, encode_example, field, framed, masked, records_file

EXAMPLES: list[Mapping[str, Values]] = [{"name": [f"record {number}".encode() * 30 * number]} for number in range(1, 7)]


def read(path: Path, data: bytes) -> list[Record]:
    path.write_bytes(data)
    return list(read_records(str(path)))


def told(records: list[Record]) -> list[str]:
    """What each record holds, or what is damaged."""
    return [record.damage or record.values["name"][0][:8].decode() for record in records]


def test_checksum_has_the_published_values() -> None:
    # RFC 3720, section B.4, and the check value of the CRC catalogues.
    assert masked_crc32c(bytes(32)) == masked(0x8A9136AA)
    assert masked_crc32c(b"\xff" * 32) == masked(0x62A8AB43)
    assert masked_crc32c(bytes(range(32))) == masked(0x46DD794E)
    assert masked_crc32c(b"123456789") == masked(0xE3069283)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_checksum_of_any_length(data: bytes) -> None:
    assert masked_crc32c(data) == checksum(data)


VALUES = st.one_of(
    st.lists(st.binary(max_size=300), max_size=4),
    st.lists(st.integers(0, 2**32 - 1), max_size=9).map(lambda bits: np.array(bits, np.uint32).view(np.float32)),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda numbers: np.array(numbers, np.int64)),
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5), st.booleans())
def test_examples_come_back_bit_for_bit(features: dict[str, Values], packed: bool) -> None:
    found = parse_example(encode_example(features, packed))
    assert found.keys() == features.keys()
    for name, values in features.items():
        got = found[name]
        if isinstance(values, list) or isinstance(got, list):
            assert got == values
        else:
            assert (got.dtype, got.tobytes()) == (values.dtype, values.tobytes())


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=40).map(lambda data: field(1, field(1, data)))))
def test_other_bytes_are_a_value_error_or_an_example(data: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse_example(data), dict)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("piece", [13, 100, 10**6])
def test_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, compressed: bool) -> None:
    monkeypatch.setattr(tfrecord, "PIECE", piece)
    data = records_file(EXAMPLES)
    if compressed:  # in two members, as gzip files joined end to end
        data = gzip.compress(data[:333]) + gzip.compress(data[333:])
    records = read(tmp_path / "a", data)
    assert [record.values for record in records] == EXAMPLES
    assert [record.number for record in records] == list(range(6))
    assert [record.at for record in records] == [len(records_file(EXAMPLES[:number])) for number in range(6)]


def test_reads_are_few_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfrecord, "PIECE", 1000)
    data, asked, real = records_file(EXAMPLES * 20), list[tuple[int, int]](), storage.read_bytes

    def watched(uri: str, start: int = 0, length: int | None = None) -> bytes:
        assert length is not None
        asked.append((start, length))
        return real(uri, start, length)

    monkeypatch.setattr(storage, "read_bytes", watched)
    (tmp_path / "a").write_bytes(data)
    records = read_records(str(tmp_path / "a"))
    next(records)
    assert asked == [(0, 1000)], "no more than the first record needs"
    assert len(list(records)) == len(EXAMPLES) * 20 - 1
    assert asked == [(start, 1000) for start in range(0, len(data), 1000)]


def test_a_record_as_long_as_the_mark_of_gzip_says(tmp_path: Path) -> None:
    long = 0x088B1F
    rest = long - len(encode_example({"name": [b"x" * (long - 100)]}))
    data = framed(encode_example({"name": [b"x" * (long - 100 + rest)]}))
    assert data.startswith(b"\x1f\x8b\x08")
    assert told(read(tmp_path / "a", data)) == ["x" * 8]


@pytest.mark.parametrize("window", [40, 1024**2])
def test_the_next_sound_header_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(tfrecord, "_SEARCHED", window)
    data = bytearray(records_file(EXAMPLES))
    for number in (0, 2, 3):
        data[len(records_file(EXAMPLES[:number])) + 9] ^= 1
    lost = "its header is damaged or cut off"
    # The data of a record without a header are searched through, so that the second of two in a row is not told from the first.
    assert told(read(tmp_path / "a", bytes(data))) == [lost, "record 2", lost, "record 5", "record 6"]


def test_lengths_that_no_record_has(tmp_path: Path) -> None:
    length = (2**40).to_bytes(8, "little")
    data = length + checksum(length).to_bytes(4, "little") + records_file(EXAMPLES[:1])
    assert told(read(tmp_path / "a", data)) == ["its header is damaged or cut off", "record 1"]


def test_damaged_compression_keeps_what_came_before(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(40_000)
    examples: list[Mapping[str, Values]] = [{"name": [b"number %d" % number + noise]} for number in range(9)]
    data, fault = gzip.compress(records_file(examples)), "the compressed data are damaged or cut off"
    cut = told(read(tmp_path / "a", data[:-50_000]))
    assert cut == [*(f"number {number}" for number in range(len(cut) - 1)), fault]
    assert len(cut) > 3
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    # Noise is stored as it is, so that one byte changes one record; the checksum of the whole then fails, in the last piece that is inflated.
    numbers = [f"number {number}" for number in range(8)]
    assert told(read(tmp_path / "a", bytes(flipped))) == [*numbers[:4], "the checksum of its data differs", *numbers[5:], fault]
    assert told(read(tmp_path / "a", data + b"rubbish"))[-2:] == ["number 8", fault], "counted when it strikes between records too"
    assert told(read(tmp_path / "a", b"\x1f\x8b\x08 and no more")) == [fault]
    assert read(tmp_path / "a", b"") == []

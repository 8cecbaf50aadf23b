"""Shard folders of others: tar headers, indexes and members that are made to mislead."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_dist.config import DataConfig
from cola_dist.data.lint import lint
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.preview import preview
from cola_dist.data.shards import (
    FORMAT_VERSION,
    INDEX,
    PACKING,
    open_folder,
    read_index,
    read_member,
    read_packing,
    to_parquet,
    write_index,
)
from cola_dist.data.sources import SourceEpisode
from cola_dist.data.stream import open_reader
from cola_dist.data.summary import summarise
from cola_dist.errors import UserError
from tests.security.limits import bounded
from tests.toy import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "shards", "toy", episodes=3, frames=8)
    return tmp_path / "shards"


def reindex(path: Path, change: dict[str, Any], source: str = "toy") -> None:
    """An index as an attacker writes it: its digest is right, and its rows say what they like."""
    table = pq.read_table(path / INDEX)
    rows = [row | change for row in table.to_pylist()]
    found = type(table).from_pylist(rows, schema=table.schema.remove_metadata())
    metadata = {"cola_dist.version": str(FORMAT_VERSION), "source": source, "domain": "robot"}
    (path / INDEX).write_bytes(to_parquet(found, metadata))


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """One header block; a size that octal digits cannot say stands in base 256."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    digits = b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + (256**11 + size).to_bytes(11, "big")
    block[124:136] = f"{size:011o}\0".encode() if 0 <= size < 8**11 else digits
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def pax(**fields: str) -> bytes:
    """A header of further fields for the next member."""
    lines = b""
    for name, value in fields.items():
        body = f" {name.replace('_', '.')}={value}\n"
        length = len(body) + len(str(len(body) + len(str(len(body)))))
        lines += f"{length}{body}".encode()
    return header("pax", len(lines), b"x") + lines + bytes(-len(lines) % 512)


HOLES = pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_name="clip.mp4", GNU_sparse_realsize=str(2**60))
MEMBERS = {
    "climbs": header("../clip.mp4"),
    "absolute": header("/tmp/clip.mp4"),
    "symlink": header("clip.mp4", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "hardlink": header("clip.mp4", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "device": header("clip.mp4", kind=tarfile.CHRTYPE),
    "block device": header("clip.mp4", kind=tarfile.BLKTYPE),
    "pipe": header("clip.mp4", kind=tarfile.FIFOTYPE),
    "holes": HOLES + header("clip.mp4", 512) + b"0\n" + bytes(510),
    "a map of holes without end": HOLES + header("clip.mp4", 512) + b"999999999\n" + b"0" * 502,
    "petabytes": header("clip.mp4", 2**50) + bytes(1024),
    "petabytes of fields": header("pax", 2**50, b"x") + bytes(1024),
    "petabytes of a name": header("name", 2**50, b"L") + bytes(1024),
    "less than nothing": header("clip.mp4", -512) + bytes(1024),
    "fields of less than nothing": header("pax", -512, b"x") + bytes(1024),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_lint_names_the_shard_and_unpacks_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    (shard,) = folder.glob("*.tar")
    before = set(tmp_path.rglob("*"))
    # In front of what is sound, so that nothing can be read without passing it.
    shard.write_bytes(MEMBERS[name] + shard.read_bytes())
    reindex(folder, {"shard_bytes": shard.stat().st_size})
    with bounded():
        found = lint(str(folder))
    assert found
    assert all(shard.name in line for line in found)
    assert set(tmp_path.rglob("*")) == before, "nothing new, here or above"
    # Training reads what the index names and never looks at a header: this index names other bytes than its checksums are of.
    reader = open_reader(DataConfig(mixture={str(folder): 1.0}, frames=4, resolution=16, mixture_block=8), seed=0)
    with bounded(), pytest.raises(UserError, match="clips in a row could not be read"):
        reader.read(0, np.empty((4, 3, 16, 16), np.uint8))


def test_a_compressed_shard_is_not_unfolded(folder: Path) -> None:
    (shard,) = folder.glob("*.tar")
    with io.BytesIO() as bomb:
        with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=9) as file:
            file.write(header("clip.mp4", 2**27))
            for _ in range(2**7):
                file.write(bytes(2**20))
        shard.write_bytes(bomb.getvalue())
    reindex(folder, {"shard_bytes": shard.stat().st_size, "offset": 0, "size": 10})
    with bounded(cpu_s=2):
        found = lint(str(folder))
    assert any("checksum differs" in line for line in found)
    assert not any(line.startswith(f"{shard.name}: clip.mp4") for line in found), "its members were not looked for"


OUTSIDE: Sequence[tuple[dict[str, Any], str]] = (
    ({"shard": "../secret.tar"}, "is no file of this folder"),
    ({"shard": "/etc/passwd"}, "is no file of this folder"),
    ({"shard": "s3://bucket/secret.tar"}, "is no file of this folder"),
    ({"shard": "a/../../secret.tar"}, "is no file of this folder"),
    ({"sha256": "../../marker"}, "is no SHA-256"),
    ({"key": "../clip"}, "no key"),
    ({"key": "$\\frac{"}, "no key"),
    ({"offset": -512}, "lie outside of a shard"),
    ({"size": -1}, "lie outside of a shard"),
    ({"size": 2**60}, "lie outside of a shard"),
    ({"offset": 2**62, "size": 2**62}, "lie outside of a shard"),
    ({"frames": -1}, "-1 frames"),
    ({"fps": float("nan")}, "at nan/s"),
    ({"height": 0}, "x 0 at"),
)


@pytest.mark.parametrize(("change", "complaint"), OUTSIDE)
def test_an_index_that_leads_outside_is_refused_by_all_that_read_it(folder: Path, change: dict[str, Any], complaint: str) -> None:
    reindex(folder, change)
    reads: Sequence[Callable[[], object]] = (
        lambda: open_folder(str(folder)),
        lambda: lint(str(folder)),
        lambda: open_reader(DataConfig(mixture={str(folder): 1.0}, frames=4, resolution=16), seed=0),
    )
    for read in reads:
        with bounded(), pytest.raises(UserError, match=f"(?s){INDEX}.*{complaint}.*do not use the folder"):
            read()


def test_a_checksum_that_is_a_path_deletes_nothing(folder: Path, tmp_path: Path) -> None:
    """The disk cache names its files by checksums, and removes one whose content is another."""
    marker = tmp_path / "marker"
    marker.write_text("of another program")
    reindex(folder, {"sha256": str(marker)})
    config = DataConfig(mixture={str(folder): 1.0}, frames=4, resolution=16, mixture_block=8, disk_cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="is no SHA-256"):
        open_reader(config, seed=0).read_many(range(2))
    assert marker.read_text() == "of another program"


def test_a_sources_name_is_no_path(folder: Path, tmp_path: Path) -> None:
    reindex(folder, {}, source="../../marker")
    with pytest.raises(UserError, match=r"source '\.\./\.\./marker' is no name"):
        preview(open_folder(str(folder)), str(tmp_path / "deep" / "out"))
    assert not list(tmp_path.rglob("*marker*"))


def bomb(rows: int, text: str = "x") -> bytes:
    """A Parquet file of some kilobytes with so many rows, all of one text."""
    schema = pa.schema([("key", pa.dictionary(pa.int32(), pa.string()))])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema) as writer:
        step = min(rows, 2**20)
        part = pa.table({"key": pa.DictionaryArray.from_arrays(pa.array(np.zeros(step, np.int32)), pa.array([text]))})
        for _ in range(0, rows, step):
            writer.write_table(part)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rows", "length", "complaint"), [(12 * 2**20, 1, "rows, more than the"), (2**18, 100_000, "unfolds to more than")]
)
def test_an_index_that_unfolds_to_gigabytes_is_refused(tmp_path: Path, rows: int, length: int, complaint: str) -> None:
    (tmp_path / INDEX).write_bytes(bomb(rows, "x" * length))
    assert (tmp_path / INDEX).stat().st_size < 2**20
    with bounded(memory=2**30), pytest.raises(UserError, match=f"{INDEX}: .*{complaint}"):
        read_index(str(tmp_path))


def test_json_without_end_is_damage(folder: Path) -> None:
    deep = "[" * 10**6
    (folder / PACKING).write_text(deep)
    with bounded(), pytest.raises(UserError, match=rf"{PACKING}: damaged"):
        read_packing(str(folder))
    (folder / PACKING).unlink()
    reindex(folder, {"provenance": deep})
    with bounded():
        assert summarise(open_folder(str(folder)))["datasets"]


def test_a_members_json_and_arrays_are_data(tmp_path: Path) -> None:
    """A pickle where an array belongs, and JSON without end where the episode's figures do."""
    marker = tmp_path / "marker"

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (open, (str(marker), "w"))

    folder = write_folder(tmp_path / "shards", "toy", episodes=2, frames=8)
    pickled = io.BytesIO()
    np.save(pickled, np.array([[Runs()] * 2] * 7, dtype=object), allow_pickle=True)
    hostile = {"actions.npy": pickled.getvalue(), "json": b"[" * 10**5}
    with PartWriter(str(tmp_path / "hostile"), "toy", "robot", "part", 2**30) as writer:
        video = read_member(folder, folder.episodes[0], "mp4")
        writer.add(SourceEpisode("one", np.zeros((8, 32, 32, 3), np.uint8), 5.0, {}, "one", "one", "train"), video)
        rows = writer.close().to_pylist()
    place = tmp_path / "hostile" / rows[0]["shard"]
    end = place.stat().st_size
    for ext, data in hostile.items():
        rows = [row for row in rows if row["ext"] != ext]
        rows.append(rows[0] | {"ext": ext, "offset": end, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        with place.open("ab") as file:
            file.write(data)
        end += len(data)
    table = pa.Table.from_pylist([row | {"shard_bytes": end} for row in rows])
    write_index(str(tmp_path / "hostile"), "toy", "robot", table)
    with bounded():
        found = lint(str(tmp_path / "hostile"))
    assert not marker.exists()
    assert any("one.actions.npy: no table of 32-bit floats" in line for line in found)
    assert any("one.json: not readable as JSON" in line for line in found)

"""What a shard folder is: WebDataset tar files of bounded size and an index with the byte range and checksum of every member.

    FOLDER/SOURCE-PART-00000.tar   KEY.json, KEY.mp4 and, where the source has them, KEY.actions.npy, KEY.state.npy
    FOLDER/parts/PART.parquet      what one packing task wrote: with these, a later pack goes on where an earlier one ended
    FOLDER/packing.json            how it was packed, and what was left out and why
    FOLDER/index.parquet           one row per member; version, source, domain and a digest in the schema's metadata; written last

Plain ``tar`` and plain ``webdataset`` read the shards; here one member is one ranged read. Only the index and the shards are needed to train.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cola_dist import storage
from cola_dist.data.parquet import read_parquet
from cola_dist.errors import UserError

FORMAT_VERSION = 2
INDEX = "index.parquet"
PACKING = "packing.json"
PARTS = "parts"
NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
"""Characters of a source's name and of a key: safe in a tar, in a file name and for webdataset, which cuts keys at the first dot."""
DOMAINS = ("robot", "human")
SPLITS = ("train", "heldout")
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("provenance", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_bytes", pa.int64(), nullable=False),
        pa.field("ext", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


_FOREIGN = "this project did not write that: do not use the folder"


class CorruptMember(ValueError):
    """The bytes of a member are not those that the index promises."""


@dataclass(frozen=True)
class Member:
    """One file of an episode: where its bytes lie in the shard, and their SHA-256."""

    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Episode:
    """One video with what belongs to it; ``members`` maps an extension ("mp4", "json", "actions.npy") to its bytes' place.

    ``width`` and ``height`` are in pixels; ``provenance`` is JSON: data set, licence, original file and times.
    """

    key: str
    shard: str
    split: str
    frames: int
    fps: float
    width: int
    height: int
    provenance: str
    members: Mapping[str, Member]


@dataclass(frozen=True)
class ShardFolder:
    """An opened folder; episodes are sorted by key, ``shards`` maps file names to bytes.

    ``content_hash`` depends on what the episodes hold and on their split, not on where or when they were written, nor on the shards' size.
    """

    uri: str
    source: str
    domain: str
    episodes: tuple[Episode, ...]
    shards: Mapping[str, int]
    content_hash: str

    def split(self, name: str) -> tuple[Episode, ...]:
        """The episodes of "train" or "heldout"."""
        return tuple(episode for episode in self.episodes if episode.split == name)


def open_folder(uri: str) -> ShardFolder:
    """Read the index and check that every shard has the size that it promises.

    Raises UserError when there is no index, it is unreadable, damaged or of another format version, or a shard is missing or of another size.
    """
    folder = read_index(uri)
    present = storage.list_files(uri)
    for shard, promised in folder.shards.items():
        if shard not in present:
            raise UserError(f"{storage.join(uri, shard)}: listed in the index but missing; pack or copy the folder again")
        if present[shard] != promised:
            raise UserError(
                f"{storage.join(uri, shard)}: {present[shard]} bytes where the index says {promised}; pack or copy the folder again"
            )
    return folder


def read_member(folder: ShardFolder, episode: Episode, ext: str) -> bytes:
    """One member by one ranged read. Raises KeyError for an absent extension and CorruptMember when length or checksum disagree."""
    member = episode.members[ext]
    data = storage.read_bytes(storage.join(folder.uri, episode.shard), member.offset, member.size)
    if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
        raise CorruptMember(f"{storage.join(folder.uri, episode.shard)}: {episode.key}.{ext} does not match its checksum")
    return data


def read_index(uri: str) -> ShardFolder:
    """The folder as its index describes it, without a look at the shards. Raises UserError, as ``open_folder`` does."""
    where = storage.join(uri, INDEX)
    try:
        raw = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise UserError(f"{where}: not found; {uri} is no finished shard folder (jobs/pack.py makes one)") from error
    table, metadata = read_table(raw, where)
    for name in ("source", "domain"):
        if not metadata.get(name) or not set(metadata[name]) <= NAME:
            raise UserError(f"{where}: {name} {metadata.get(name)!r} is no name; {_FOREIGN}")
    rows: dict[str, list[dict[str, Any]]] = {}
    shards: dict[str, int] = {}
    for row in table.to_pylist():
        if problem := _misplaced(row):
            raise UserError(f"{where}: {row['key']!r}: {problem}; {_FOREIGN}")
        rows.setdefault(row["key"], []).append(row)
        shards[row["shard"]] = row["shard_bytes"]
    episodes = tuple(_episode(rows[key]) for key in sorted(rows))
    return ShardFolder(uri, metadata["source"], metadata["domain"], episodes, dict(sorted(shards.items())), content_hash(episodes))


def write_index(uri: str, source: str, domain: str, table: pa.Table) -> None:
    """Write the index of a folder: columns of ``SCHEMA``, a row per member."""
    metadata = {"cola_dist.version": str(FORMAT_VERSION), "source": source, "domain": domain}
    storage.write_bytes(storage.join(uri, INDEX), to_parquet(table.select(SCHEMA.names).cast(SCHEMA), metadata))


def to_parquet(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A table with text metadata as the bytes of a Parquet file. A digest in it makes a flipped byte noticeable: Parquet itself has none."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({**metadata, "digest": _digest(table, metadata)}), buffer)
    return buffer.getvalue()


def read_table(raw: bytes, where: str) -> tuple[pa.Table, dict[str, str]]:
    """Table and text metadata of what ``to_parquet`` made, in this format version. Raises UserError, naming ``where``."""
    try:
        table = read_parquet(raw, where)
        table.validate(full=True)
        metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        promised, found = metadata.pop("digest", None), _digest(table, metadata)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # a damaged footer shows in many ways
        raise UserError(f"{where}: not a readable Parquet file; pack or copy the folder again") from error
    version = metadata.get("cola_dist.version")
    if version != str(FORMAT_VERSION):
        raise UserError(f"{where}: shard format {version}, this version reads {FORMAT_VERSION}; pack the folder again")
    missing = [name for name in SCHEMA.names if name not in table.schema.names]
    if missing:
        raise UserError(f"{where}: column {missing[0]} missing; pack the folder again")
    other = [field.name for field in SCHEMA if table.schema.field(field.name).type != field.type or table[field.name].null_count]
    if other:
        raise UserError(f"{where}: column {other[0]} is empty in places, or of another type; {_FOREIGN}")
    if found != promised:
        raise UserError(f"{where}: damaged (its digest differs); pack or copy the folder again")
    return table, metadata


def read_packing(uri: str) -> dict[str, Any] | None:
    """``packing.json``: settings, recordings and segments by outcome, and (name, reason, level) of all left out; none where there is none.

    Raises UserError when it is damaged.
    """
    where = storage.join(uri, PACKING)
    try:
        raw = storage.read_bytes(where)
    except FileNotFoundError:
        return None
    try:
        found = storage.json_of(raw)
        sound = all(isinstance(found[name], dict) for name in ("settings", "recordings", "segments"))
        sound = sound and all(isinstance(entry, list) and len(entry) == 3 for entry in found["skipped"])
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{where}: damaged; pack once more to write it anew, or copy the folder again")
    return dict(found)


def content_hash(episodes: tuple[Episode, ...]) -> str:
    """SHA-256 over keys, splits and members' checksums: equal exactly when the folders hold the same episodes in the same splits."""
    found = hashlib.sha256()
    for episode in sorted(episodes, key=lambda one: one.key):
        lines = [f"{episode.key} {episode.split} {episode.frames} {episode.fps!r}"]
        lines += [f"{ext} {member.sha256}" for ext, member in sorted(episode.members.items())]
        found.update(("\n".join(lines) + "\n").encode())
    return found.hexdigest()


def _misplaced(row: Mapping[str, Any]) -> str:
    """Why a row of an index cannot be a file in a shard; empty where it can. Its names become parts of paths: of shards, of the disk cache."""
    if not row["key"] or not set(row["key"]) <= NAME:
        return "no key"
    if not re.fullmatch(r"[\w-]+\.tar", row["shard"], re.ASCII):
        return f"shard {row['shard']!r} is no file of this folder"
    if not re.fullmatch(r"[0-9a-f]{64}", row["sha256"]):
        return f"{row['sha256']!r} is no SHA-256"
    if min(row["offset"], row["size"]) < 0 or row["offset"] + row["size"] > row["shard_bytes"]:
        return f"{row['size']} bytes from {row['offset']} on lie outside of a shard of {row['shard_bytes']}"
    if row["frames"] < 1 or min(row["width"], row["height"]) < 1 or not 0 < row["fps"] < math.inf:
        return f"{row['frames']} frames of {row['width']} x {row['height']} at {row['fps']:g}/s"
    return ""


def _episode(rows: list[dict[str, Any]]) -> Episode:
    first = rows[0]
    members = {row["ext"]: Member(row["offset"], row["size"], row["sha256"]) for row in rows}
    figures = {name: first[name] for name in ("key", "shard", "split", "frames", "fps", "width", "height", "provenance")}
    return Episode(**figures, members=members)


def _digest(table: pa.Table, metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata, names, types and all values, column by column."""
    found = hashlib.sha256(json.dumps([sorted(metadata.items()), table.num_rows]).encode())
    for field, column in zip(table.schema, table.columns, strict=True):
        found.update(json.dumps([field.name, str(field.type)]).encode())
        if pa.types.is_string(field.type):
            found.update(json.dumps(column.to_pylist()).encode())
        else:
            found.update(np.ascontiguousarray(column.to_numpy()).tobytes())
    return found.hexdigest()

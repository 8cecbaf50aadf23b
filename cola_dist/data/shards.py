"""What a shard folder is: WebDataset tar files of bounded size and an index with the byte range and checksum of every member.

    FOLDER/SOURCE-00000.tar   KEY.json, KEY.mp4 and, where the source has them, KEY.actions.npy, KEY.state.npy
    FOLDER/index.parquet      one row per member; format version, source and domain in the schema's metadata; written last

Plain ``tar`` and plain ``webdataset`` read the shards; here one member is one ranged read. Split, frame count and rate stand in the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.decode import GOP, CorruptClip, decode_clip, probe_video
from cola_dist.errors import UserError

FORMAT_VERSION = 1
INDEX = "index.parquet"
DOMAINS = ("robot", "human")
SPLITS = ("train", "heldout")
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_bytes", pa.int64(), nullable=False),
        pa.field("ext", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


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
    """One video with what belongs to it; ``members`` maps an extension ("mp4", "json", "actions.npy") to its bytes' place."""

    key: str
    shard: str
    split: str
    frames: int
    fps: float
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

    Raises UserError when there is no index, it is unreadable or of another format version, or a shard is missing or of another size.
    """
    folder = _read_index(uri)
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


def _read_index(uri: str) -> ShardFolder:
    where = storage.join(uri, INDEX)
    try:
        table = pq.ParquetFile(io.BytesIO(storage.read_bytes(where)), pre_buffer=False).read(use_threads=False)
    except FileNotFoundError as error:
        raise UserError(f"{where}: not found; {uri} is no finished shard folder (jobs/pack.py makes one)") from error
    except pa.ArrowException as error:
        raise UserError(f"{where}: not a readable Parquet file; pack or copy the folder again") from error
    metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    version = metadata.get("cola_dist.version")
    if version != str(FORMAT_VERSION):
        raise UserError(f"{where}: shard format {version}, this version reads {FORMAT_VERSION}; pack the folder again")
    missing = [name for name in SCHEMA.names if name not in table.schema.names]
    if missing:
        raise UserError(f"{where}: column {missing[0]} missing; pack the folder again")
    rows: dict[str, list[dict[str, Any]]] = {}
    shards: dict[str, int] = {}
    for row in table.to_pylist():
        rows.setdefault(row["key"], []).append(row)
        shards[row["shard"]] = row["shard_bytes"]
    episodes = tuple(_episode(rows[key]) for key in sorted(rows))
    return ShardFolder(uri, metadata["source"], metadata["domain"], episodes, dict(sorted(shards.items())), content_hash(episodes))


def _episode(rows: list[dict[str, Any]]) -> Episode:
    first = rows[0]
    members = {row["ext"]: Member(row["offset"], row["size"], row["sha256"]) for row in rows}
    return Episode(first["key"], first["shard"], first["split"], first["frames"], first["fps"], members)


def content_hash(episodes: tuple[Episode, ...]) -> str:
    """SHA-256 over keys, splits and members' checksums: equal exactly when the folders hold the same episodes in the same splits."""
    digest = hashlib.sha256()
    for episode in sorted(episodes, key=lambda one: one.key):
        lines = [f"{episode.key} {episode.split} {episode.frames} {episode.fps!r}"]
        lines += [f"{ext} {member.sha256}" for ext, member in sorted(episode.members.items())]
        digest.update(("\n".join(lines) + "\n").encode())
    return digest.hexdigest()


class ShardWriter:
    """Writes a shard folder; nothing reads it before ``close`` has written the index.

    ``max_bytes`` bounds a shard (one episode may exceed it alone). Raises UserError when the folder holds an index already, or for a
    key, domain or split that the format does not know.
    """

    def __init__(self, uri: str, source: str, domain: str, max_bytes: int = 256 * 1024**2) -> None:
        if domain not in DOMAINS:
            raise UserError(f"domain {domain}: give one of {', '.join(DOMAINS)}")
        if not source or not set(source) <= _NAME:
            raise UserError(f"source {source!r}: use letters, digits, - and _")
        if storage.exists(storage.join(uri, INDEX)):
            raise UserError(f"{uri}: holds shards already; give another folder or delete that one")
        for name in storage.list_files(uri):
            if re.fullmatch(rf"{source}-\d{{5,}}\.tar", name):
                storage.delete(storage.join(uri, name))  # left by a pack that did not finish
        self.uri, self.source, self.domain, self.max_bytes = uri, source, domain, max_bytes
        self._rows: list[dict[str, Any]] = []
        self._keys: dict[str, str] = {}
        self._shards: dict[str, int] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="cola-dist-pack-")
        self._tar: tarfile.TarFile | None = None

    def add(
        self,
        key: str,
        split: str,
        mp4: bytes,
        meta: Mapping[str, Any],
        frames: int,
        fps: float,
        actions: NDArray[np.float32] | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> None:
        """Append one episode. ``actions`` float32 ``[frames - 1, A]``, ``state`` float32 ``[frames, S]``. Raises UserError."""
        if split not in SPLITS:
            raise UserError(f"split {split}: give one of {', '.join(SPLITS)}")
        if not key or not set(key) <= _NAME or key in self._keys:
            raise UserError(f"episode key {key!r}: use letters, digits, - and _, each key once")
        for name, rows, promised in (("actions", actions, frames - 1), ("state", state, frames)):
            if rows is not None and (rows.ndim != 2 or len(rows) != promised):
                raise UserError(f"{key}: {name} has shape {list(rows.shape)} where {frames} frames need {promised} rows")
        about = {**meta, "source": self.source, "domain": self.domain, "frames": frames, "fps": fps}
        members = {"json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(), "mp4": mp4}
        for name, rows in (("actions", actions), ("state", state)):
            if rows is not None:
                members[f"{name}.npy"] = _npy(rows)
        self._roll(sum(tarfile.BLOCKSIZE + _padded(len(data), tarfile.BLOCKSIZE) for data in members.values()))
        assert self._tar is not None
        self._keys[key] = split
        for ext, data in sorted(members.items()):
            offset = _append(self._tar, f"{key}.{ext}", data)
            self._rows.append(
                {"key": key, "frames": frames, "fps": float(fps), "shard": self._name(), "ext": ext}
                | {"offset": offset, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            )

    def close(self) -> ShardFolder:
        """Finish the last shard, write the index and return the folder as a reader sees it. Raises UserError when nothing was added.

        When episodes were left out on the way and none of two or more is held out, the last one is.
        """
        self._finish_shard()
        self._scratch.cleanup()
        if not self._keys:
            raise UserError(f"{self.uri}: no episode to write")
        if len(self._keys) > 1 and "heldout" not in self._keys.values():
            self._keys[max(self._keys)] = "heldout"
        rows = [row | {"split": self._keys[row["key"]], "shard_bytes": self._shards[row["shard"]]} for row in self._rows]
        rows.sort(key=lambda row: (row["key"], row["ext"]))
        schema = SCHEMA.with_metadata({"cola_dist.version": str(FORMAT_VERSION), "source": self.source, "domain": self.domain})
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
        storage.write_bytes(storage.join(self.uri, INDEX), buffer.getvalue())
        return open_folder(self.uri)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what ``close`` did not finish: uploaded shards stay, but nothing reads them without an index."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        self._scratch.cleanup()

    def _name(self) -> str:
        return f"{self.source}-{len(self._shards):05d}.tar"

    def _path(self) -> Path:
        return Path(self._scratch.name) / self._name()

    def _roll(self, coming: int) -> None:
        if self._tar is not None:
            end_mark = 2 * tarfile.BLOCKSIZE
            if self._tar.offset and _padded(self._tar.offset + coming + end_mark, tarfile.RECORDSIZE) > self.max_bytes:
                self._finish_shard()
        if self._tar is None:
            self._tar = tarfile.open(self._path(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed in _finish_shard

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path, name = self._path(), self._name()
        storage.upload_file(path, storage.join(self.uri, name))
        self._shards[name] = path.stat().st_size
        path.unlink()


_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, np.float32), allow_pickle=False)
    return buffer.getvalue()


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file with a header that depends on its name and size only; returns where its bytes begin."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o644
    tar.addfile(header, io.BytesIO(data))
    return tar.offset - _padded(len(data), tarfile.BLOCKSIZE)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def lint(uri: str) -> list[str]:
    """Every disagreement between index, shards and their contents, one line each; empty for a sound folder.

    Reads all bytes and decodes every video. Raises UserError only when the index itself cannot be read.
    """
    folder = _read_index(uri)
    present = storage.list_files(uri)
    found = [f"{name}: not in the index" for name in present if name != INDEX and name not in folder.shards]
    by_shard: dict[str, list[Episode]] = {name: [] for name in folder.shards}
    for episode in folder.episodes:
        by_shard[episode.shard].append(episode)
    for shard, promised in folder.shards.items():
        if shard not in present:
            found.append(f"{shard}: missing")
            continue
        if present[shard] != promised:
            found.append(f"{shard}: {present[shard]} bytes where the index says {promised}")
        found += _lint_shard(folder, shard, by_shard[shard])
    return found


def _lint_shard(folder: ShardFolder, shard: str, episodes: list[Episode]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="cola-dist-lint-") as scratch:
        path = Path(scratch) / shard
        storage.download_file(storage.join(folder.uri, shard), path)
        headers = _tar_members(path)
        indexed = {f"{episode.key}.{ext}": (member.offset, member.size) for episode in episodes for ext, member in episode.members.items()}
        for name in sorted(headers.keys() | indexed.keys()):
            if headers.get(name) != indexed.get(name):
                yield f"{shard}: {name}: (offset, size) {headers.get(name)} in the tar, {indexed.get(name)} in the index"
        local = ShardFolder(scratch, folder.source, folder.domain, folder.episodes, folder.shards, folder.content_hash)
        for episode in episodes:
            yield from _lint_episode(local, episode)


def _tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Name to (offset, size) of each member that the tar's headers show, up to the first broken one."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                found[entry.name] = (entry.offset_data, entry.size)
    except (tarfile.TarError, EOFError):
        pass  # what is missing from the answer is what the caller reports
    return found


def _lint_episode(local: ShardFolder, episode: Episode) -> Iterator[str]:
    where = f"{episode.shard}: {episode.key}"
    data: dict[str, bytes] = {}
    for ext in sorted(episode.members):
        try:
            data[ext] = read_member(local, episode, ext)
        except CorruptMember:
            yield f"{where}.{ext}: checksum differs"
    if episode.split not in SPLITS:
        yield f"{where}: split {episode.split} in the index"
    for ext in ("json", "mp4"):
        if ext not in episode.members:
            yield f"{where}.{ext}: missing"
    if "mp4" in data:
        try:
            frames, fps, _, _ = probe_video(data["mp4"])
            if frames != episode.frames or abs(fps - episode.fps) > 0.01 * episode.fps:
                yield f"{where}.mp4: {frames} frames at {fps:g}/s where the index says {episode.frames} at {episode.fps:g}/s"
            # The last frame only comes out when all before it in its group do.
            for start in range(0, episode.frames, GOP):
                count = min(GOP, episode.frames - start)
                decode_clip(data["mp4"], start, count, 1, 16, None)
        except CorruptClip as error:
            yield f"{where}.mp4: {error}"
    for ext, promised in (("actions.npy", episode.frames - 1), ("state.npy", episode.frames)):
        if ext in data:
            rows = np.load(io.BytesIO(data[ext]), allow_pickle=False).shape[0]
            if rows != promised:
                yield f"{where}.{ext}: {rows} rows where {episode.frames} frames need {promised}"

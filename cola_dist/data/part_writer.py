"""Writes the shards of one part of a shard folder: what one packing task makes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.shards import NAME, SCHEMA
from cola_dist.data.sources import SourceEpisode

PART_SCHEMA = SCHEMA.append(pa.field("group", pa.string(), nullable=False))
"""The index's columns and what decides the split; ``split`` is empty where the data set leaves it open."""


class PartWriter:
    """Tar files ``SOURCE-PART-NNNNN.tar`` below ``uri``, each of at most ``max_bytes`` unless one episode alone exceeds that.

    A context manager: what ``close`` did not finish is dropped; uploaded shards stay, but nothing reads them.
    """

    def __init__(self, uri: str, source: str, domain: str, part: str, max_bytes: int) -> None:
        self.uri, self.source, self.domain, self.part, self.max_bytes = uri, source, domain, part, max_bytes
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._shards: dict[str, int] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="cola-dist-pack-")
        self._tar: tarfile.TarFile | None = None

    def add(self, episode: SourceEpisode, mp4: bytes) -> None:
        """Append an episode with its encoded video. Raises ValueError where the episode breaks the format's rules."""
        frames, height, width = episode.video.shape[:3]
        if not episode.key or not set(episode.key) <= NAME or episode.key in self._keys:
            raise ValueError(f"episode key {episode.key!r}: letters, digits, - and _, each key once")
        for name, rows, promised in (("actions", episode.actions, frames - 1), ("state", episode.state, frames)):
            if rows is not None and (rows.ndim != 2 or len(rows) != promised or not np.isfinite(rows).all()):
                raise ValueError(
                    f"{episode.key}: {name} of shape {list(rows.shape)}; {frames} frames need {promised} rows of finite numbers"
                )
        figures = {"frames": frames, "fps": float(episode.fps), "width": width, "height": height}
        about = {**episode.meta, "source": self.source, "domain": self.domain} | figures
        members = {"json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(), "mp4": mp4}
        for name, rows in (("actions", episode.actions), ("state", episode.state)):
            if rows is not None:
                members[f"{name}.npy"] = _npy(rows)
        origin = json.dumps({**episode.meta.get("provenance", {}), "licence": episode.meta.get("licence", "")}, sort_keys=True)
        tar = self._roll(sum(tarfile.BLOCKSIZE + _padded(len(data), tarfile.BLOCKSIZE) for data in members.values()))
        self._keys.add(episode.key)
        common = {"key": episode.key, "split": episode.split, "group": episode.group, "provenance": origin, "shard": self._name()} | figures
        for ext, data in sorted(members.items()):
            offset = _append(tar, f"{episode.key}.{ext}", data)
            self._rows.append(common | {"ext": ext, "offset": offset, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    def close(self) -> pa.Table:
        """Upload the last shard; returns the rows of the part, columns of ``PART_SCHEMA``."""
        self._finish_shard()
        self._scratch.cleanup()
        return pa.Table.from_pylist([row | {"shard_bytes": self._shards[row["shard"]]} for row in self._rows], schema=PART_SCHEMA)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        self._scratch.cleanup()

    def _name(self) -> str:
        return f"{self.source}-{self.part}-{len(self._shards):05d}.tar"

    def _path(self) -> Path:
        return Path(self._scratch.name) / self._name()

    def _roll(self, coming: int) -> tarfile.TarFile:
        """The tar that has room for ``coming`` bytes."""
        if self._tar is not None:
            end_mark = 2 * tarfile.BLOCKSIZE
            if self._tar.offset and _padded(self._tar.offset + coming + end_mark, tarfile.RECORDSIZE) > self.max_bytes:
                self._finish_shard()
        if self._tar is None:
            self._tar = tarfile.open(self._path(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed in _finish_shard
        return self._tar

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path, name = self._path(), self._name()
        storage.upload_file(path, storage.join(self.uri, name))
        self._shards[name] = path.stat().st_size
        path.unlink()


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

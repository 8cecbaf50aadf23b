"""What was fetched from object storage, kept on a node's own disk (NVMe) up to a size limit.

Files are named by the checksum that the index promises, so all runs and all reader processes of a node share them. What a run has used stays:
an epoch asks for every clip once, and to evict one for another would only churn. What no run has used since this process began goes first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger("cola_dist.data")
_ROOM_AFTER_EVICTION = 0.1


class DiskCache:
    """Bytes by their SHA-256 below ``folder``, at most ``limit`` bytes over all processes that use the folder."""

    def __init__(self, folder: str, limit: int) -> None:
        self._folder, self._limit = Path(folder).expanduser(), limit
        self._began = time.time()
        self._counted = False
        self._usable = True
        self._full = False

    def get(self, sha256: str, load: Callable[[], bytes]) -> bytes:
        """The bytes with this checksum: from disk, or from ``load``, whose answer is kept where there is room.

        A damaged file is loaded anew. A disk that fails is told once and not used again: training goes on without.
        """
        if not self._usable:
            return load()
        assert sha256.isalnum(), "it names a file"
        path = self._folder / sha256[:2] / sha256
        try:
            with suppress(FileNotFoundError):
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() == sha256:
                    os.utime(path)
                    return data
                self._forget(path, len(data))
        except OSError as error:
            self._give_up(error)
        data = load()
        if self._usable and not self._full:
            try:
                self._keep(path, data)
            except OSError as error:
                self._give_up(error)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._usage() as usage:
            if usage[0] + len(data) > self._limit:
                usage[0] = self._evict()
            if usage[0] + len(data) > self._limit:
                self._full = True
                return
            if not path.exists():
                _write(path, data)
                usage[0] += len(data)

    def _forget(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        with self._usage() as usage:
            usage[0] -= size

    def _evict(self) -> int:
        """Delete files that were last used before this process began, oldest first, until a tenth is free. Returns the bytes that stay."""
        files = sorted((stat.st_mtime, stat.st_size, path) for path, stat in self._files())
        usage = sum(size for _, size, _ in files)
        for used, size, path in files:
            if used >= self._began or usage <= (1 - _ROOM_AFTER_EVICTION) * self._limit:
                break
            path.unlink(missing_ok=True)
            usage -= size
        return usage

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                yield path, path.stat()

    @contextmanager
    def _usage(self) -> Iterator[list[int]]:
        """The bytes kept by all processes, under a lock; what the caller leaves in the list is written back."""
        with (self._folder / "usage").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            # A process that was killed may have left a wrong number: each process counts once.
            usage = [int(file.read() or 0) if self._counted else sum(stat.st_size for _, stat in self._files())]
            self._counted = True
            try:
                yield usage
            finally:
                file.truncate(0)
                file.write(str(usage[0]).encode())

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        _log.warning("data.disk_cache %s cannot be used (%s); reading goes on without it", self._folder, error.strerror or error)


def _write(path: Path, data: bytes) -> None:
    handle, part = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(part).replace(path)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise

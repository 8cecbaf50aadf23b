"""Video latents made in the stream, on actors of their own, and kept by the content of the clips.

A clip's latents depend on its pixels and on the encoder alone. So they are kept under a hash of both, in a folder that any number of runs and
actors may share: what one has encoded the others read. A cache that fails is never what a run fails of.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import numpy as np

from cola_dist import storage
from cola_dist.errors import UserError

ENCODER_CPUS = 0.2
"""CPUs that Ray reserves for one encoding actor: little, so that it finds room beside workers and readers."""
_log = logging.getLogger("cola_dist.data")
_FILES_AT_ONCE = 8
"""Files of the cache that one actor reads or writes at the same time: in object storage each takes a round trip."""
_CHECKSUM_BYTES = 32


class Encoder(Protocol):
    """From clips to the latents that the generator models."""

    hash: str
    """Identity of the transform and its weights: encoders with the same hash give the same latents, bit for bit."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """uint8 ``[B, T, 3, H, W]`` to float32 latents ``[B, L, C, h, w]``. ``video`` may be read-only."""


class LatentCache:
    """Latents by key below ``folder``, a path or a URI. Each file is the array as ``.npy`` and, after it, SHA-256 of key and array.

    Files are written whole or not at all. A damaged one counts as missing. Where reading or writing fails, the cache says so once and leaves it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._readable = self._writable = True
        self._threads = ThreadPoolExecutor(_FILES_AT_ONCE)

    def read(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """The latents ``[L, C, h, w]`` of those keys that are there."""
        if not self._readable:
            return {}
        wanted = list(dict.fromkeys(keys))
        try:
            found = list(self._threads.map(self._read_one, wanted))
        except (OSError, UserError) as error:
            self._readable = self._writable = False
            _log.warning("data.latents_cache %s cannot be read (%s); encoding goes on without it", self._folder, error)
            return {}
        return {key: latents for key, latents in zip(wanted, found, strict=True) if latents is not None}

    def write(self, latents: Mapping[str, np.ndarray]) -> None:
        """Keep latents ``[L, C, h, w]`` under their keys."""
        if not self._writable:
            return
        try:
            list(self._threads.map(self._write_one, latents, latents.values()))
        except (OSError, UserError) as error:
            self._writable = False
            _log.warning("data.latents_cache %s cannot be written (%s); encoding goes on, new latents are not kept", self._folder, error)

    def _read_one(self, key: str) -> np.ndarray | None:
        with suppress(FileNotFoundError):
            data = storage.read_bytes(self._uri(key))
            array, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
            if _checksum(key, array) == checksum:
                latents: np.ndarray = np.load(io.BytesIO(array), allow_pickle=False)
                return latents
        return None

    def _write_one(self, key: str, latents: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, latents, allow_pickle=False)
        array = buffer.getvalue()
        storage.write_bytes(self._uri(key), array + _checksum(key, array))

    def _uri(self, key: str) -> str:
        return storage.join(self._folder, key[:2], f"{key}.npy")


class EncodeLatents:
    """Adds latents to batches of clips. Ray Data builds one in each actor of the stage and calls it with batch after batch."""

    def __init__(self, factory: Callable[[], Encoder], cache: str) -> None:
        """``factory`` builds the encoder here, so that its weights need not travel; ``cache`` is the cache's folder, empty for none."""
        self._encoder = factory()
        self._cache = LatentCache(cache) if cache else None
        self._shape: tuple[int, ...] = ()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch (the columns of ``cola_dist.data.stream.Batch``) with ``latents`` float32 ``[B, L, C, h, w]``; zeros where a row failed."""
        video = batch["video"]
        rows = [row for row, reason in enumerate(batch["failed"]) if not reason]
        if len(rows) == len(video):
            latents = self._latents(video)
            self._shape = latents.shape[1:]
            return batch | {"latents": latents}
        if not self._shape:
            self._shape = self._encoder.encode(video[:1]).shape[1:]
        latents = np.zeros((len(video), *self._shape), np.float32)
        if rows:
            latents[rows] = self._latents(video[rows])
        return batch | {"latents": latents}

    def _latents(self, video: np.ndarray) -> np.ndarray:
        """From the cache what it has; all others are encoded in one call."""
        if self._cache is None:
            return self._encoder.encode(video)
        keys = [_key(self._encoder.hash, clip) for clip in video]
        known = self._cache.read(keys)
        missing = {key: row for row, key in enumerate(keys) if key not in known}
        if missing:
            made = dict(zip(missing, self._encoder.encode(video[list(missing.values())]), strict=True))
            self._cache.write(made)
            known |= made
        return np.stack([known[key] for key in keys])


def _key(encoder: str, clip: np.ndarray) -> str:
    """SHA-256 of the encoder's identity and of a clip's shape and pixels."""
    digest = hashlib.sha256(repr((encoder, clip.shape)).encode())
    digest.update(np.ascontiguousarray(clip).data)
    return digest.hexdigest()


def _checksum(key: str, array: bytes) -> bytes:
    return hashlib.sha256(key.encode() + array).digest()

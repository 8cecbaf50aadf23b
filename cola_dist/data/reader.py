"""From a position in the order of clips to the clip itself: fetched, decoded, and with a robot's actions where they are asked for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from cola_dist import storage
from cola_dist.config import DataConfig
from cola_dist.data import order as orders
from cola_dist.data.cache import EpisodeCache
from cola_dist.data.decode import CorruptClip, Crop, decode_clip, to_clip
from cola_dist.data.disk_cache import DiskCache
from cola_dist.data.labels import Labels, check_strides, dims_of, labelled, read_rows
from cola_dist.data.memory import Recycler
from cola_dist.data.shards import CorruptMember, Episode, ShardFolder, open_folder, read_member
from cola_dist.errors import UserError

MAX_ATTEMPTS = 16
SKIP_REASONS = ("checksum", "undecodable")
"""Why a clip is skipped: its bytes are not those that were packed, or they were packed but do not decode."""
_RATE_TOLERANCE = 1.25
_ROWS_KEPT = 4096
"""Episodes whose labels a reader keeps: some kilobytes each."""


@dataclass(frozen=True)
class Batch:
    """Clips of one rank for one step: ``video`` uint8 [B, T, 3, H, W], ``position`` and ``source`` int64 [B].

    ``sample`` [B] names each clip, ``source/episode@start``. ``skipped`` [B] holds, where unreadable clips of the same source were replaced, one
    line for each: reason, file and what is wrong. ``cost`` float64 [B, 3] is what each clip took: bytes fetched, seconds of fetching them, seconds
    of decoding. ``failed`` [B] is empty, or says why the whole batch could not be read. ``latents`` float32 [B, L, C, h, w] is there where the
    stream encodes them. ``actions`` float32 [B, T-1, A] and ``state`` float32 [B, T, S] are there where the reader was asked for them.
    """

    video: np.ndarray
    position: np.ndarray
    source: np.ndarray
    sample: np.ndarray
    skipped: np.ndarray
    cost: np.ndarray
    failed: np.ndarray
    latents: np.ndarray | None = None
    actions: np.ndarray | None = None
    state: np.ndarray | None = None


@dataclass(frozen=True)
class Clip:
    """One row of a batch, besides its video."""

    source: int
    sample: str
    skipped: str
    cost: tuple[float, float, float]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    """``actions`` [T-1, A] and ``state`` [T, S], as far as they were asked for."""


class ClipReader:
    """Reads the clips that an order names. Picklable: it travels to Ray Data tasks."""

    def __init__(
        self,
        folders: tuple[ShardFolder, ...],
        config: DataConfig,
        seed: int,
        split: str,
        global_batch: int | None = None,
        labels: Labels | None = None,
    ) -> None:
        """``folders`` in the order of ``_uris``; the rest as for ``open_reader``.

        Raises ``UserError`` if a folder has no episode of the split that is long enough, or two folders share a name.
        """
        self.folders, self.config, self.split, self.labels = folders, config, split, labels
        self.episodes: tuple[tuple[Episode, ...], ...] = tuple(
            labelled(folder, split, labels) if labels else folder.split(split) for folder in folders
        )
        self._open_caches()
        uris = _uris(config, split)
        spans = [tuple(_span(episode, config) for episode in episodes) for episodes in self.episodes]
        self.label_dims = (0, 0)
        """A and S of the labels; 0 for what is not read."""
        if labels:
            for folder, episodes, own in zip(folders, self.episodes, spans, strict=True):
                check_strides(folder, episodes, [span.stride for span in own], config.rate_hz)
            self.label_dims = dims_of(folders, self.episodes, labels)
        sources = [
            orders.Source(folder.source, config.mixture.get(uri, 0.0), own, folder.content_hash)
            for folder, uri, own in zip(folders, uris, spans, strict=True)
        ]
        names = [s.name for s in sources]
        if len(set(names)) < len(names):
            raise UserError(
                f"data.mixture: two shard folders are both named {max(names, key=names.count)!r}: pack one of them again with another --source"
            )
        stages = {}
        if split == "train" and config.stages:
            if global_batch is None:
                raise ValueError("data.stages are given by step: global_batch is needed to tell their positions")
            name_of = dict(zip(uris, names, strict=True))
            stages = {
                step * global_batch: {name_of[uri]: weight for uri, weight in mixture.items()} for step, mixture in config.stages.items()
            }
        try:
            self.order = orders.Order(sources, config.frames, config.mixture_block, seed, stages, config.temperature)
        except ValueError as error:
            raise UserError(f"data ({split} split): {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # What a process has decoded and counted stays with it: the reader travels to others.
        return {name: value for name, value in vars(self).items() if name not in ("_cache", "_disk", "_memory", "_fetched", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()
        storage.trust_endpoints()

    def _open_caches(self) -> None:
        self._cache = EpisodeCache(self.config.decoded_cache_bytes)
        self._disk = DiskCache(self.config.disk_cache, self.config.disk_cache_bytes) if self.config.disk_cache else None
        self._memory = Recycler()
        self._fetched = [0.0, 0.0]
        self._rows = lru_cache(_ROWS_KEPT)(self._read_rows)

    def decode(self, ref: orders.ClipRef, crop: Crop, into: np.ndarray | None = None) -> np.ndarray:
        """The clip that ``ref`` names, uint8 [T, 3, H, W], written to ``into`` where it is given. Raises ``CorruptMember`` or ``CorruptClip``."""
        episode = self.episodes[ref.source][ref.episode]
        frames, resolution = self.config.frames, self.config.resolution
        kept = self._cache.frames((ref.source, ref.episode), episode.frames, lambda: self._video(ref))
        if kept is not None:
            return to_clip(kept[ref.start : ref.start + (frames - 1) * ref.stride + 1 : ref.stride], resolution, crop, into)
        return decode_clip(self._video(ref), ref.start, frames, ref.stride, resolution, crop, into)

    def read(self, position: int, into: np.ndarray) -> Clip:
        """Write the clip at a position to ``into``, uint8 [T, 3, H, W]. What it is, and of unreadable ones that it replaces a line each."""
        skipped: list[str] = []
        self._fetched, began = [0.0, 0.0], time.perf_counter()
        for attempt in range(MAX_ATTEMPTS):
            ref = self.order.clip(position, attempt)
            folder, episode = self.folders[ref.source], self.episodes[ref.source][ref.episode]
            crop = orders.crop_of(ref.key, self.config.crop_scale) if self.config.random_crop and self.split == "train" else None
            try:
                self.decode(ref, crop, into)
                labels = self._labels(ref)
            except (CorruptMember, CorruptClip) as error:
                reason = SKIP_REASONS[isinstance(error, CorruptClip)]
                skipped.append(f"{reason}: {folder.source}/{episode.shard}:{episode.key}.mp4: {error}")
                continue
            read_bytes, seconds = self._fetched
            cost = (read_bytes, seconds, time.perf_counter() - began - seconds)
            return Clip(ref.source, f"{folder.source}/{episode.key}@{ref.start}", "\n".join(skipped), cost, labels)
        raise UserError(
            f"{MAX_ATTEMPTS} clips in a row could not be read for position {position}, the last: {skipped[-1]}: "
            f"find the damage with `python jobs/data.py lint {folder.uri}` and pack it again"
        )

    def read_many(self, positions: Iterable[int]) -> Batch:
        """Clips at the given positions as one batch. Its memory is used again once nobody holds any of it."""
        positions = list(positions)
        shape = (self.config.frames, 3, self.config.resolution, self.config.resolution)
        video = self._memory.take((len(positions), *shape))
        clips = [self.read(position, place) for position, place in zip(positions, video, strict=True)]
        return Batch(
            video=video,
            position=np.array(positions, dtype=np.int64),
            source=np.array([clip.source for clip in clips], dtype=np.int64),
            sample=np.array([clip.sample for clip in clips], dtype=object),
            skipped=np.array([clip.skipped for clip in clips], dtype=object),
            cost=np.array([clip.cost for clip in clips]),
            failed=np.array([""] * len(clips), dtype=object),
            **{name: np.stack([clip.labels[name] for clip in clips]) for name in self._label_shapes()},
        )

    def unread(self, positions: Iterable[int], reason: str) -> Batch:
        """In place of a batch that could not be read at all: the reason, for whoever waits for the batch."""
        positions = list(positions)
        count, size = len(positions), self.config.resolution
        names = np.array([""] * count, dtype=object)
        return Batch(
            video=np.zeros((count, self.config.frames, 3, size, size), np.uint8),
            position=np.array(positions, dtype=np.int64),
            source=np.zeros(count, np.int64),
            sample=names,
            skipped=names,
            cost=np.zeros((count, 3)),
            failed=np.array([reason] * count, dtype=object),
            **{name: np.zeros((count, *shape), np.float32) for name, shape in self._label_shapes().items()},
        )

    @property
    def label_bytes(self) -> int:
        """Size of a clip's labels."""
        return sum(4 * rows * dim for rows, dim in self._label_shapes().values())

    def _label_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of a clip's labels, by their name in a batch."""
        actions, state = self.label_dims
        frames = self.config.frames
        return ({"actions": (frames - 1, actions)} if actions else {}) | ({"state": (frames, state)} if state else {})

    def _labels(self, ref: orders.ClipRef) -> dict[str, np.ndarray]:
        """The clip's labels: row t of its actions leads from its frame t to t + 1. Raises ``CorruptMember`` or ``CorruptClip``."""
        return {
            name: self._rows(ref.source, ref.episode, f"{name}.npy", dim)[ref.start : ref.start + length]
            for name, (length, dim) in self._label_shapes().items()
        }

    def _read_rows(self, source: int, episode: int, ext: str, dim: int) -> np.ndarray:
        return read_rows(self.folders[source], self.episodes[source][episode], ext, dim)

    def _video(self, ref: orders.ClipRef) -> bytes:
        """The episode's mp4, from the node's disk or from where the shards are."""
        folder, episode = self.folders[ref.source], self.episodes[ref.source][ref.episode]
        began = time.perf_counter()

        def fetch() -> bytes:
            data = read_member(folder, episode, "mp4")
            self._fetched[0] += len(data)
            return data

        data = self._disk.get(episode.members["mp4"].sha256, fetch) if self._disk else fetch()
        self._fetched[1] += time.perf_counter() - began
        return data


def open_reader(
    config: DataConfig, seed: int, split: str = "train", global_batch: int | None = None, labels: Labels | None = None
) -> ClipReader:
    """Open every shard folder of the mixture and its stages. Raises ``UserError`` for what is missing, damaged or too short.

    Stages hold for the split ``train`` and need ``global_batch``, clips per step, to place them. The split ``heldout`` is of the first mixture
    alone, so that held-out clips are the same over the whole run. With ``labels`` only episodes that have them are read, and they are read too.
    """
    return ClipReader(tuple(open_folder(uri) for uri in _uris(config, split)), config, seed, split, global_batch, labels)


def _uris(config: DataConfig, split: str) -> list[str]:
    """Shard folders in order of first appearance, so that a later stage leaves the sources before it where they are."""
    stages = [config.stages[step] for step in sorted(config.stages)] if split == "train" else []
    return list(dict.fromkeys(itertools.chain(config.mixture, *stages)))


def _span(episode: Episode, config: DataConfig) -> orders.EpisodeSpan:
    if episode.fps * _RATE_TOLERANCE < config.rate_hz:
        raise UserError(
            f"data.rate_hz is {config.rate_hz:g} but episode {episode.key!r} in {episode.shard} has {episode.fps:g} frames per second: "
            f"lower data.rate_hz to {episode.fps:g}"
        )
    return orders.EpisodeSpan(episode.frames, max(1, round(episode.fps / config.rate_hz)))

"""Decoded episodes kept in a reader's memory.

A data set that fits is decoded once instead of once per clip; of one that does not fit, the first episodes stay and the rest is decoded clip by
clip as ever. What a clip looks like, and whether it is readable, does not depend on what the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable

import av

from cola_dist.data.decode import CorruptClip, decode_episode

_LARGEST_SHARE = 1 / 32


class EpisodeCache:
    """Frames of episodes by key, up to ``limit`` bytes. Nothing is evicted: a stream without repetition would only churn."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = limit
        self._episodes: dict[tuple[int, int], list[av.VideoFrame]] = {}
        self._refused: set[tuple[int, int]] = set()

    def frames(self, key: tuple[int, int], count: int, load: Callable[[], bytes]) -> list[av.VideoFrame] | None:
        """All ``count`` frames of an episode, decoded now (``load`` gives its mp4) or earlier; none if it has to be decoded clip by clip.

        An episode with damage anywhere is left to clip-wise decoding, which fails for the damaged part alone.
        """
        if key in self._episodes:
            return self._episodes[key]
        if self._room <= 0 or key in self._refused:
            return None
        try:
            frames = decode_episode(load())
        except CorruptClip:
            frames = []
        size = sum(plane.buffer_size for frame in frames for plane in frame.planes)
        if len(frames) != count or size > self._limit * _LARGEST_SHARE:
            self._refused.add(key)
            return None
        self._room -= size
        self._episodes[key] = frames
        return frames

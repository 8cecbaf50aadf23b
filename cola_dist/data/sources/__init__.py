"""Origins of episodes: each module turns one origin into ``SourceEpisode`` objects, and ``write_source`` alone writes them as shards."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_dist.data.decode import encode_mp4
from cola_dist.data.shards import ShardWriter
from cola_dist.errors import UserError


@dataclass(frozen=True)
class SourceEpisode:
    """One episode before it is encoded.

    ``video`` is uint8 ``[frames, H, W, 3]``; ``actions``, where known, float32 ``[frames - 1, A]`` with row t moving frame t to t + 1;
    ``state`` float32 ``[frames, S]``; ``meta`` is what ``KEY.json`` will say beside the figures that the writer adds.
    """

    key: str
    split: str
    video: NDArray[np.uint8]
    fps: float
    meta: Mapping[str, Any]
    actions: NDArray[np.float32] | None = None
    state: NDArray[np.float32] | None = None


def held_out(names: Collection[str], share: float, salt: str = "") -> frozenset[str]:
    """The names set aside for evaluation: ``share`` of them, at least one of two or more, chosen by hash.

    The choice depends on the names and the salt alone, not on their order.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"held-out share {share:g}: give a number between 0 and 1, such as 0.1")
    if len(names) < 2:
        return frozenset()
    count = min(max(1, round(share * len(names))), len(names) - 1)
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).hexdigest())
    return frozenset(ranked[:count])


def write_source(writer: ShardWriter, episodes: Iterable[SourceEpisode], crf: int) -> None:
    """Encode every episode as H.264 and hand it to the writer, which the caller closes."""
    for episode in episodes:
        height, width = episode.video.shape[1:3]
        writer.add(
            episode.key,
            episode.split,
            encode_mp4(episode.video, episode.fps, crf=crf),
            {**episode.meta, "width": width, "height": height},
            frames=len(episode.video),
            fps=episode.fps,
            actions=episode.actions,
            state=episode.state,
        )

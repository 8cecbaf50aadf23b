"""Small shard folders for tests: any episodes, or a square moved by known random actions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cola_dist.data.decode import encode_mp4
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.shards import ShardFolder, open_folder, write_index
from cola_dist.data.sources import SourceEpisode


class FolderWriter:
    """A shard folder of one part, episode by episode, with any bytes for a video."""

    def __init__(self, uri: str, source: str, domain: str, max_bytes: int = 256 * 1024**2) -> None:
        self.uri, self.source, self.domain = uri, source, domain
        self._part = PartWriter(uri, source, domain, "toy", max_bytes)

    def add(
        self,
        key: str,
        split: Literal["train", "heldout"],
        mp4: bytes,
        meta: Mapping[str, Any],
        frames: int,
        fps: float,
        actions: np.ndarray | None = None,
        state: np.ndarray | None = None,
    ) -> None:
        """Append one episode; pictures are said to be 2 x 2, which nobody reads."""
        self._part.add(SourceEpisode(key, np.zeros((frames, 2, 2, 3), np.uint8), fps, meta, key, key, split, actions, state), mp4)

    def close(self) -> ShardFolder:
        """Write the index and open the folder."""
        write_index(self.uri, self.source, self.domain, self._part.close())
        return open_folder(self.uri)


def write_folder(
    path: Path, source: str, episodes: int = 6, frames: int = 20, actions: bool = True, fps: float = 5.0, seed: int = 0
) -> ShardFolder:
    """Episodes of ``frames`` frames of 32 pixels; every third is held out."""
    rng = np.random.default_rng(seed)
    writer = FolderWriter(str(path), source, "robot" if actions else "human")
    for number in range(episodes):
        moves = rng.uniform(-4, 4, size=(frames - 1, 2)).astype(np.float32)
        place = np.array([16.0, 16.0])
        colour = rng.integers(100, 255, 3)
        video = np.zeros((frames, 32, 32, 3), np.uint8)
        for t in range(frames):
            if t:
                place = np.clip(place + moves[t - 1], 4, 28)
            y, x = place.astype(int)
            video[t, y - 3 : y + 3, x - 3 : x + 3] = colour
        split: Literal["train", "heldout"] = "heldout" if number % 3 == 2 else "train"
        meta = {"source": source, "domain": "robot" if actions else "human", "note": "toy"}
        writer.add(f"{source}-{number:04d}", split, encode_mp4(video, fps), meta, frames, fps, actions=moves if actions else None)
    return writer.close()

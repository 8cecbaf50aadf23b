"""Small shard folders for tests: a square moved by known random actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cola_dist.data.decode import encode_mp4
from cola_dist.data.shards import ShardFolder, ShardWriter, open_folder


def write_folder(
    path: Path, source: str, episodes: int = 6, frames: int = 20, actions: bool = True, fps: float = 5.0, seed: int = 0
) -> ShardFolder:
    """Episodes of ``frames`` frames of 32 pixels; every third is held out."""
    rng = np.random.default_rng(seed)
    writer = ShardWriter(str(path), source, "robot" if actions else "human")
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
        split = "heldout" if number % 3 == 2 else "train"
        meta = {"source": source, "domain": "robot" if actions else "human", "note": "toy"}
        writer.add(f"{source}-{number:04d}", split, encode_mp4(video, fps), meta, frames, fps, actions=moves if actions else None)
    writer.close()
    return open_folder(str(path))

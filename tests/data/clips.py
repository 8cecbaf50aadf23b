"""A sound shard folder of five short clips, for tests of what is done with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cola_dist.data.decode import encode_mp4
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.shards import ShardFolder, open_folder, write_index
from cola_dist.data.sources import SourceEpisode
from tests.data.videos import moving_square

FRAMES = 12
PICTURES = {f"clip-{i}": moving_square(FRAMES, seed=i) for i in range(5)}
VIDEOS = {key: encode_mp4(pictures, 5.0) for key, pictures in PICTURES.items()}


def write_clips(uri: str, max_bytes: int = 256 * 1024**2, order: Callable[[list[str]], list[str]] = sorted) -> ShardFolder:
    """Source "toy" of robots: clips 1 and 3 have actions and state, clip 3 is held out."""
    with PartWriter(uri, "toy", "robot", "part", max_bytes) as writer:
        for key in order(list(VIDEOS)):
            number = int(key[-1])
            actions = np.full((FRAMES - 1, 2), number, np.float32) if number % 2 else None
            state = np.full((FRAMES, 3), number, np.float32) if number % 2 else None
            meta = {"task": f"näher {key}", "licence": "none", "provenance": {"dataset": "drawn", "file": f"{key}.mkv"}}
            split = "heldout" if number == 3 else "train"
            writer.add(SourceEpisode(key, PICTURES[key], 5.0, meta, key, key, split, actions, state), VIDEOS[key])
        write_index(uri, "toy", "robot", writer.close())
    return open_folder(uri)


def flip(path: Path, offset: int) -> None:
    """Turn over the bits of one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def spot(path: Path, key: str, ext: str) -> tuple[Path, int]:
    """The shard that holds a member, and the offset of the member's first byte."""
    episode = next(episode for episode in open_folder(str(path)).episodes if episode.key == key)
    return path / episode.shard, episode.members[ext].offset

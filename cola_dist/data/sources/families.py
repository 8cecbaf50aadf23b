"""The families of sources that ``jobs/pack.py`` packs: the options of each, and how it is opened."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import tyro

from cola_dist.data.sources import SourceEpisode
from cola_dist.data.sources.lerobot import LeRobotFolder
from cola_dist.data.sources.rlds import RldsFolder
from cola_dist.data.sources.simulate import SOURCES, simulate
from cola_dist.data.sources.video import VideoFolder


@dataclass(frozen=True)
class Opened:
    """Episodes to pack: how many to expect (an estimate), under which source and domain, and counts of what became of each input."""

    episodes: Iterator[SourceEpisode]
    expected: int
    source: str
    domain: str
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Family:
    """What every family takes."""

    output: str
    """Folder to write, local or s3://BUCKET/FOLDER; must not hold shards yet."""
    heldout_share: float = 0.1
    """Share set aside for evaluation: of the episodes (simulate, rlds, lerobot) or of the files (video)."""
    shard_mb: int = 256
    """Largest size of one shard in MiB."""
    crf: int = 28
    """H.264 quality: 0 is lossless, 51 the worst; 23 is near to transparent."""
    debug: bool = False
    """Show the stack trace of an error."""

    @abstractmethod
    def open(self) -> Opened:
        """Look at the input. Raises UserError where there is nothing usable in it."""


@dataclass(frozen=True)
class Simulate(Family):
    """Record simulated episodes (needs the "sim" extra)."""

    domain: Literal["robot", "hand"] = "robot"
    episodes: int = 240
    seed: int = 0

    def open(self) -> Opened:
        source, domain = SOURCES[self.domain]
        return Opened(simulate(self.domain, self.episodes, self.seed, self.heldout_share), self.episodes, source, domain)


@dataclass(frozen=True)
class Video(Family):
    """Pack plain video files of any container."""

    folder: tyro.conf.Positional[str] = "."
    """Folder with the files, local or s3://."""
    resolution: int = 128
    """Short side of the stored video in pixels; smaller videos keep their size."""
    source: str = "video"
    domain: Literal["human", "robot"] = "human"

    def open(self) -> Opened:
        files = VideoFolder(self.folder, self.resolution, self.heldout_share)
        return Opened(files.episodes(), files.segments, self.source, self.domain, files.outcomes)


@dataclass(frozen=True)
class Rlds(Family):
    """Pack a robot dataset in RLDS (Open X-Embodiment): TFRecord files and features.json."""

    folder: tyro.conf.Positional[str] = "."
    """Folder of one dataset, local or s3://."""
    resolution: int = 128
    """Short side of the stored video in pixels; smaller videos keep their size."""
    source: str = "rlds"
    camera: str = ""
    """Name of the camera; empty = the first that shows something."""
    fps: float = 5.0
    """Frames per second, which the format does not say."""

    def open(self) -> Opened:
        records = RldsFolder(self.folder, self.resolution, self.heldout_share, self.camera, self.fps)
        return Opened(records.episodes(), records.segments, self.source, "robot", records.outcomes)


@dataclass(frozen=True)
class Lerobot(Family):
    """Pack a robot dataset in the LeRobot format, version 2 or 3."""

    folder: tyro.conf.Positional[str] = "."
    """Folder of one dataset, local or s3://."""
    resolution: int = 128
    """Short side of the stored video in pixels; smaller videos keep their size."""
    source: str = "lerobot"
    camera: str = ""
    """Name of the camera; empty = the first that is not on the wrist."""

    def open(self) -> Opened:
        dataset = LeRobotFolder(self.folder, self.resolution, self.heldout_share, self.camera)
        return Opened(dataset.episodes(), dataset.segments, self.source, "robot", dataset.outcomes)


FAMILIES = Simulate | Video | Rlds | Lerobot

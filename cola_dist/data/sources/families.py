"""The families of sources that ``jobs/pack.py`` packs: the options of each, and how it is opened."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from cola_dist.data.sources import Origin
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.lerobot import LeRobotOrigin
from cola_dist.data.sources.rlds import RldsOrigin
from cola_dist.data.sources.robot_files import RobotFilesOrigin
from cola_dist.data.sources.simulate import SimulateOrigin
from cola_dist.data.sources.video import VideoOrigin
from cola_dist.errors import UserError

_NOT_CONTENT = ("input", "output", "shard_mb", "debug")
"""Options that leave the packed episodes as they are."""


@dataclass(frozen=True)
class Family:
    """What every family takes."""

    output: str
    """Folder to write, local or s3://BUCKET/FOLDER. What it holds already is not packed again."""
    heldout_share: float = 0.1
    """Share set aside for evaluation: of the robot episodes, of the video files or of the people."""
    shard_mb: int = 256
    """Largest size of one shard in MiB."""
    crf: int = 28
    """H.264 quality: 0 is lossless, 51 the worst; 23 is near to transparent."""
    debug: bool = False
    """Show the stack trace of an error."""

    @abstractmethod
    def open(self) -> Origin:
        """Look at the input. Raises UserError where there is nothing usable in it."""

    def content_settings(self) -> dict[str, Any]:
        """All options that shape what is packed."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_CONTENT}
        return {"family": type(self).__name__.lower()} | options


@dataclass(frozen=True)
class Simulate(Family):
    """Record simulated episodes. ``robot`` and ``hand`` need the "sim" extra, ``square`` is drawn and needs nothing."""

    domain: Literal["robot", "hand", "square"] = "robot"
    episodes: int = 240
    seed: int = 0

    def open(self) -> Origin:
        return SimulateOrigin(self.domain, self.episodes, self.seed, self.heldout_share)


@dataclass(frozen=True)
class Files(Family):
    """What the families of recorded files take besides."""

    input: str = "."
    """Folder with the files of one data set, local or s3://."""
    source: str = ""
    """Name of the source in the shards; empty = the family's or the preset's."""
    resolution: int = 128
    """Short side of the stored video in pixels; smaller videos keep their size."""
    licence: str = ""
    """Licence to note in each sample; empty = what the data set or the preset says."""
    cut: CutRules = field(default_factory=CutRules)

    def checked_input(self) -> str:
        """The input, once the options are known to make sense. Raises UserError (while it is parsed, tyro would make a box of it)."""
        if self.resolution < 16:
            raise UserError(f"resolution {self.resolution}: give at least 16 pixels")
        if self.cut.fps <= 0 or self.cut.segment_frames < 2:
            raise UserError(
                f"cut.fps {self.cut.fps:g}, cut.segment_frames {self.cut.segment_frames}: give a rate above 0 and at least 2 frames"
            )
        if not 0 <= self.cut.scene_cut <= 100 or self.cut.still < 0 or self.cut.min_seconds < 0:
            raise UserError("cut.scene_cut is 0 to 100, cut.still and cut.min_seconds are 0 or more")
        return self.input


@dataclass(frozen=True)
class Video(Files):
    """Pack videos of any container, or folders of numbered pictures: a folder, a table of segments, or a known data set."""

    domain: Literal["human", "robot"] = "human"
    preset: str = ""
    """A known data set's layout, such as ego4d; an unknown name lists them all."""
    table: str = ""
    """CSV, JSON or Parquet file with a row for each video or segment; below the input or a URI."""
    fps: float = 0.0
    """Frames per second of pictures, or of videos whose time stamps are wrong; 0 = the preset's or the file's own."""

    def open(self) -> Origin:
        source = self.source or self.preset or "video"
        return VideoOrigin(
            self.checked_input(), source, self.domain, self.resolution, self.cut, self.preset, self.table, self.licence, self.fps
        )


@dataclass(frozen=True)
class Rlds(Files):
    """Pack a robot dataset in RLDS (Open X-Embodiment): TFRecord files and features.json."""

    camera: str = ""
    """Name of the camera; empty = the first that shows something."""
    fps: float = 5.0
    """Frames per second, which the format does not say."""

    def open(self) -> Origin:
        return RldsOrigin(self.checked_input(), self.source or "rlds", self.resolution, self.cut, self.camera, self.fps, self.licence)


@dataclass(frozen=True)
class Lerobot(Files):
    """Pack a robot dataset in the LeRobot format, version 2 or 3."""

    camera: str = ""
    """Name of the camera; empty = the first that is not on the wrist."""

    def open(self) -> Origin:
        return LeRobotOrigin(self.checked_input(), self.source or "lerobot", self.resolution, self.cut, self.camera, self.licence)


@dataclass(frozen=True)
class RobotFiles(Files):
    """Pack robot episodes in HDF5 (robomimic, LIBERO, ALOHA) or npz files."""

    camera: str = ""
    """Name of the camera; empty = the first that is not on the wrist."""
    fps: float = 20.0
    """Frames per second, where a file does not say it; ALOHA has 50."""

    def open(self) -> Origin:
        return RobotFilesOrigin(
            self.checked_input(), self.source or "robot-files", self.resolution, self.cut, self.camera, self.fps, self.licence
        )


FAMILIES = Simulate | Video | Rlds | Lerobot | RobotFiles

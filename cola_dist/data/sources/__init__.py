"""Origins of episodes. Each module reads one family of data sets; all of them give ``SourceEpisode`` objects, which ``data.packing`` writes.

An origin is made and listed on the driver and then travels to tasks, each of which reads the episodes of some of its items. What belongs to the
pictures alone (frame rate, scene cuts, length of segments, standstill) is the same for all and lies in ``sources.cut``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

_KEY_STEM = 60


@dataclass(frozen=True)
class SourceEpisode:
    """One episode, or one segment of it, before it is encoded.

    ``video`` is uint8 ``[frames, H, W, 3]``, H and W even; ``actions``, where known, float32 ``[frames - 1, A]`` with row t moving frame t to
    t + 1; ``state`` float32 ``[frames, S]``. ``meta`` is what ``KEY.json`` will say beside the figures that the writer adds; its "provenance" says
    where the frames come from, its "licence" under what terms.
    """

    key: str
    video: NDArray[np.uint8]
    fps: float
    meta: Mapping[str, Any]
    recording: str
    """Name of the video or robot episode that it is taken from, for counting."""
    group: str
    """What is never torn between splits: a file, a robot episode, a person."""
    split: Literal["", "train", "heldout"] = ""
    """Empty: by a hash of the group."""
    actions: NDArray[np.float32] | None = None
    state: NDArray[np.float32] | None = None
    note: str = ""
    """What was left out, such as "without actions (not finite)"."""


@dataclass(frozen=True)
class Skipped:
    """Something that is not packed, and why. Reasons are counted, so they hold no names; ``name`` may add the place."""

    name: str
    reason: str
    level: Literal["recording", "segment"] = "recording"


@dataclass(frozen=True)
class Item:
    """A piece of an origin that one task reads at a time: a file, an episode. ``name`` is unique in the origin and the same in every run.

    ``size`` is a measure of work, bytes as a rule; an item whose size differs from the one that was packed has changed.
    """

    name: str
    size: int


class Origin(Protocol):
    """Picklable. Making one raises UserError where there is nothing to read, or what is asked for does not exist."""

    source: str
    """Name of the source: letters, digits, - and _."""
    domain: str
    """"robot" or "human"."""

    def items(self) -> Sequence[Item]:
        """Everything there is, without reading it; on the driver."""

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        """What an item holds; in a task. Bad data gives ``Skipped``, never an exception; OSError where storage fails."""


class Unusable(Exception):
    """Data that cannot be used; the message is the reason, as in ``Skipped``."""


def key_of(name: str) -> str:
    """The key of a file by its name below the folder: its readable part, and a hash that keeps ``a b.mp4``, ``a-b.mp4`` and ``a-b.mkv`` apart."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", str(PurePosixPath(name).with_suffix(""))).strip("-")[-_KEY_STEM:].strip("-")
    return "-".join([*([stem] if stem else []), hashlib.sha256(name.encode()).hexdigest()[:8]])

"""A folder of plain video files of any container that FFmpeg reads, cut into segments of bounded length.

Frame rate is kept (a variable one becomes its constant average by repeating or dropping frames), audio is dropped, rotation is applied.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.sources import SourceEpisode, held_out
from cola_dist.errors import UserError

SEGMENT_FRAMES = 64
MIN_SECONDS = 2.0
"""A shorter video is skipped, a shorter last piece joins the segment before it."""
MAX_FPS = 240.0
_TEXT_ART = {"tty", "bin", "xbin", "adf", "idf"}
"""Demuxers that make video of text files."""
_VIDEO_NAMES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
"""Endings by which an unreadable file counts as a damaged video; what is read does not depend on names."""
_UNREADABLE = (av.FFmpegError, UnicodeDecodeError, ValueError, OverflowError)


@dataclass(frozen=True)
class VideoFile:
    """A readable video: its name below the folder, the key of its segments, frames as counted without decoding, frames per second."""

    name: str
    key: str
    frames: int
    fps: float

    @property
    def shortest(self) -> int:
        """Frames in ``MIN_SECONDS``."""
        return int(np.ceil(MIN_SECONDS * self.fps))

    @property
    def segment_frames(self) -> int:
        return max(SEGMENT_FRAMES, self.shortest)

    @property
    def segments(self) -> int:
        """Segments to expect; decoding may show that a header lied."""
        return 1 + max(0, self.frames - self.shortest) // self.segment_frames


class VideoFolder:
    """The videos below ``uri`` (local or object storage) as episodes whose short side is at most ``resolution`` pixels.

    Whole files are held out, so that no scene stands in both splits; of a single file, its end. ``outcomes`` counts files by the reason why
    they give nothing, and as "packed" or "damaged" while ``episodes`` runs. Raises UserError when the folder holds no usable video.
    """

    def __init__(self, uri: str, resolution: int, heldout_share: float) -> None:
        if resolution < 16:
            raise UserError(f"resolution {resolution}: give at least 16 pixels")
        self.uri, self.resolution, self.heldout_share = uri, resolution, heldout_share
        self.outcomes: Counter[str] = Counter()
        self.files: list[VideoFile] = []
        names = storage.list_files(uri)
        if not names:
            raise UserError(f"{uri}: no such folder, or nothing in it")
        for name in names:
            self._scan(name)
        if not self.files:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.outcomes.items()))
            raise UserError(f"{uri}: no usable video among {len(names)} files ({reasons})")
        self._heldout = held_out([file.name for file in self.files], heldout_share)

    @property
    def segments(self) -> int:
        """Episodes to expect."""
        return sum(file.segments for file in self.files)

    def episodes(self) -> Iterator[SourceEpisode]:
        """Every segment of every file, in the order of names."""
        for file in self.files:
            start = index = 0
            for video in _segments(self._frames(file), file):
                span = {"file": file.name, "start_s": round(start / file.fps, 3), "end_s": round((start + len(video)) / file.fps, 3)}
                meta = {"licence": "as the original file", "provenance": span}
                yield SourceEpisode(f"{file.key}-{index:05d}", self._split(file, index), video, file.fps, meta)
                start, index = start + len(video), index + 1
            self.outcomes["packed" if index else "damaged"] += 1

    def _split(self, file: VideoFile, index: int) -> str:
        if len(self.files) > 1:
            return "heldout" if file.name in self._heldout else "train"
        tail = max(1, round(self.heldout_share * file.segments))
        return "heldout" if 0 < file.segments - tail <= index else "train"

    def _scan(self, name: str) -> None:
        try:
            with _opened(storage.join(self.uri, name)) as (container, stream):
                rate = stream.average_rate or stream.guessed_rate
                count = sum(1 for packet in container.demux(stream) if packet.size)
                fps = float(rate) if rate else 0.0
        except _NoVideo:
            self.outcomes["not a video"] += 1
            return
        except _UNREADABLE:
            self.outcomes["damaged" if PurePosixPath(name).suffix.lower() in _VIDEO_NAMES else "not a video"] += 1
            return
        if count < 2:
            self.outcomes["single picture"] += 1
        elif not 0 < fps <= MAX_FPS:
            self.outcomes["no usable frame rate"] += 1
        elif count / fps < MIN_SECONDS:
            self.outcomes[f"shorter than {MIN_SECONDS:g} s"] += 1
        else:
            stem = re.sub(r"[^A-Za-z0-9_-]+", "-", str(PurePosixPath(name).with_suffix(""))).strip("-") or "video"
            taken = {file.key for file in self.files}
            key = next(key for key in (stem, *(f"{stem}-v{n}" for n in range(2, len(taken) + 3))) if key not in taken)
            self.files.append(VideoFile(name, key, count, fps))

    def _frames(self, file: VideoFile) -> Iterator[NDArray[np.uint8]]:
        """Frames uint8 ``[H, W, 3]`` at the file's constant rate, up to the first that does not decode."""
        shown: NDArray[np.uint8] | None = None
        given = 0
        origin: float | None = None
        reformatter = VideoReformatter()
        try:
            with _opened(storage.join(self.uri, file.name)) as (container, stream):
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    time = frame.time if frame.time is not None else given / file.fps
                    origin = time if origin is None else origin
                    due = round((time - origin) * file.fps)
                    if due < given:
                        continue
                    while shown is not None and given < due:
                        yield shown
                        given += 1
                    shown = self._small(reformatter, frame)
                    yield shown
                    given = due + 1
        except _UNREADABLE:
            return

    def _small(self, reformatter: VideoReformatter, frame: av.VideoFrame) -> NDArray[np.uint8]:
        factor = min(1.0, self.resolution / min(frame.width, frame.height))
        # H.264 with subsampled colour needs even sides.
        width, height = (2 * max(1, round(side * factor / 2)) for side in (frame.width, frame.height))
        small = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA", threads=1)
        return np.ascontiguousarray(np.rot90(small.to_ndarray(), round(frame.rotation / 90) % 4))


class _NoVideo(Exception):
    """The file opens, but there is no moving picture in it."""


@contextmanager
def _opened(uri: str) -> Iterator[tuple[Any, Any]]:
    path = storage.local_path(uri)
    with av.open(str(path) if path is not None else io.BytesIO(storage.read_bytes(uri))) as container:
        if not container.streams.video or container.format.name in _TEXT_ART:
            raise _NoVideo
        if container.streams.video[0].codec_context is None:
            raise ValueError(f"{uri}: unknown codec")
        yield container, container.streams.video[0]


def _segments(frames: Iterator[NDArray[np.uint8]], file: VideoFile) -> Iterator[NDArray[np.uint8]]:
    """Pieces of ``segment_frames``; a last piece that is shorter than ``MIN_SECONDS`` joins the one before."""
    held: list[NDArray[np.uint8]] = []
    for frame in frames:
        if held and frame.shape != held[0].shape:
            break  # the picture's size changes inside the file
        held.append(frame)
        if len(held) >= file.segment_frames + file.shortest:
            yield np.stack(held[: file.segment_frames])
            del held[: file.segment_frames]
    # A file whose header promised two seconds may still end a frame early.
    if len(held) >= min(file.shortest, file.frames):
        yield np.stack(held)

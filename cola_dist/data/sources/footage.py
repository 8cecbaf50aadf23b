"""Frames of one video file, or of one folder of numbered pictures, by time: whole, or part by part."""

from __future__ import annotations

import math
import re
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.decode import is_playlist, opened, small_picture
from cola_dist.data.sources import Unusable

MAX_FPS = 240.0
_FAR_S = 10.0
"""A part that begins so much later is looked for by its time stamp; a nearer one by decoding what lies between."""
_RESTART_S = 10.0
"""Gap that stands for a place where time stamps begin again: too long to be bridged by repeating a frame."""
BEYOND_S = 1.0
"""A part may end so much after its file does: tables round, and headers too."""
_SHORT_S, _SHORT_SHARE = 2.0, 0.05
"""A file that ends so many seconds, and such a share, before its header says is cut short, which most formats do not notice."""
VIDEO_NAMES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
"""Endings by which an unreadable file counts as a damaged video, and which a table may leave out."""
_UNREADABLE = (av.FFmpegError, UnicodeDecodeError, ValueError, OverflowError, IndexError)

Frames = Iterator[tuple[float, NDArray[np.uint8]]]


@contextmanager
def on_disk(uri: str) -> Iterator[Path]:
    """The file on this machine, for as long as the block lasts. Raises FileNotFoundError."""
    path = storage.local_path(uri)
    if path is not None:
        storage.read_bytes(uri, length=1)  # names what is wrong with the file system, where FFmpeg would call the file unreadable
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video")
        storage.download_file(uri, path)
        yield path


class VideoFile:
    """A video file that is read part by part. Raises Unusable where it is none, or shows less than two frames."""

    def __init__(self, path: Path, name: str, resolution: int, fps: float) -> None:
        self._path, self._name, self._resolution, self._fixed = path, name, resolution, fps > 0
        self._reformatter = VideoReformatter()
        self._origin: float | None = None
        self._broken_at = math.inf
        if not path.stat().st_size:
            raise Unusable("empty file")
        self._open()
        try:
            self.fps = fps or float(self._stream.average_rate or self._stream.guessed_rate or 0)
            if not 0 < self.fps <= MAX_FPS:
                raise Unusable("no usable frame rate")
            self.duration = self._stated_duration()
            first = [frame for frame in (self._next(), self._next()) if frame]
            self._stamped = not self._fixed and all(frame.time is not None for _, frame in first)
            if len(first) < 2:
                raise Unusable("single picture" if first else "no frames")
            self._ahead.extend(first)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

    def between(self, start: float, end: float) -> Frames:
        """Frames from ``start`` up to, without, ``end``, in seconds from the first frame, as uint8 ``[H, W, 3]``. Raises Unusable."""
        slack = 0.25 / self.fps
        self._go_to(start, slack)
        while (entry := self._next()) is not None:
            time, frame = entry
            if time >= end - slack:
                self._ahead.appendleft(entry)
                return
            self._at = time
            if time >= start - slack:
                yield time, self._picture(frame)

    def _picture(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        try:
            small = small_picture(frame, self._resolution, self._reformatter)
        except _UNREADABLE as error:
            raise Unusable("damaged") from error
        return np.ascontiguousarray(np.rot90(small, round(frame.rotation / 90) % 4))

    def _stated_duration(self) -> float:
        """Seconds that the header promises; endless where it does not say."""
        if self._fixed:
            return math.inf
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        return self._container.duration / av.time_base if self._container.duration else math.inf

    def _open(self) -> None:
        try:
            self._container = opened(self._path)
        except _UNREADABLE as error:
            raise Unusable("damaged" if PurePosixPath(self._name).suffix.lower() in VIDEO_NAMES else "not a video") from error
        moving = [stream for stream in self._container.streams.video if not stream.disposition & Disposition.attached_pic]
        problem = ""
        if not moving or is_playlist(self._container):
            problem = "sound without pictures" if self._container.streams.audio else "not a video"
        elif moving[0].codec_context is None:
            problem = "unknown codec"
        if problem:
            self._container.close()
            raise Unusable(problem)
        self._stream = moving[0]
        self._stream.thread_type = "NONE"  # tasks run side by side
        self._rewind()

    def _rewind(self) -> None:
        self._decoded = self._decode()
        self._ahead: deque[tuple[float, Any]] = deque()
        self._at = -math.inf

    def _next(self) -> tuple[float, Any] | None:
        return self._ahead.popleft() if self._ahead else next(self._decoded, None)

    def _decode(self) -> Iterator[tuple[float, Any]]:
        """Frames and their times, which ascend, up to the first damage."""
        last, until, shift, number, whole = -math.inf, 0.0, 0.0, 0, False
        try:
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt:
                    if whole:
                        raise ValueError("damaged frame")
                    continue  # the first frames may refer to others before them that are not there
                whole = True
                if self._fixed or frame.time is None:
                    time = number / self.fps if self._fixed or not number else last + 1 / self.fps
                else:
                    if self._origin is None:
                        self._origin = frame.time - max(0.0, last + 1 / self.fps)
                    time = frame.time - self._origin + shift
                number += 1
                if last - time > 1.0:
                    shift += last + _RESTART_S - time
                    time = last + _RESTART_S
                if time > last:
                    yield time, frame
                    last = time
                    until = time + float((frame.duration or 0) * (frame.time_base or 0))
        except _UNREADABLE as error:
            if number:
                self._broken_at = min(self._broken_at, last)
            raise Unusable("damaged") from error
        if whole and until + max(_SHORT_S, _SHORT_SHARE * self.duration) < self.duration < math.inf:
            self._broken_at = min(self._broken_at, last)
            raise Unusable("ends before its header says")

    def _go_to(self, start: float, slack: float) -> None:
        """Let the next frame be one that lies not after the first from ``start`` on."""
        if start > self._broken_at:
            raise Unusable("damaged")
        passed = self._at >= start - slack
        if not passed and (start - max(self._at, 0.0) < _FAR_S or not self._stamped):
            return
        if self._stamped and self._origin is not None and self._stream.time_base and math.isinf(self._broken_at):
            with_room = start - 1 / self.fps + self._origin
            try:
                self._container.seek(int(with_room / self._stream.time_base), stream=self._stream)
                self._rewind()
                entry = self._next()
            except (av.FFmpegError, Unusable):
                entry = None
            if entry is not None and entry[0] <= start + slack:
                self._ahead.append(entry)
                return
        self._container.close()
        self._open()


class PictureFolder:
    """Pictures of a folder in the order of their numbers, one frame each. Raises Unusable where there are less than two."""

    def __init__(self, folder: str, prefix: str, pattern: re.Pattern[str], resolution: int, fps: float) -> None:
        place = prefix.rpartition("/")[0]
        numbers: dict[str, int] = {}
        for below in storage.list_files(storage.join(folder, place) if place else folder):
            name = f"{place}/{below}" if place else below
            match = pattern.search(name)
            if match is not None and name[: match.start("number")] == prefix:
                numbers[name] = int(match["number"])
        if len(numbers) < 2:
            raise Unusable("single picture" if numbers else "file missing")
        self._uris = [storage.join(folder, name) for name in sorted(numbers, key=lambda name: (numbers[name], name))]
        self._resolution = resolution
        self.fps = fps
        self.duration = len(self._uris) / fps

    def between(self, start: float, end: float) -> Frames:
        """Frames from ``start`` up to, without, ``end``, in seconds from the first picture, as uint8 ``[H, W, 3]``. Raises Unusable."""
        reformatter = VideoReformatter()
        for number in range(math.ceil(start * self.fps - 0.25), len(self._uris)):
            time = number / self.fps
            if time >= end - 0.25 / self.fps:
                return
            data = storage.read_bytes(self._uris[number])
            try:
                with opened(data) as container:
                    small = small_picture(next(container.decode(video=0)), self._resolution, reformatter)
            except (*_UNREADABLE, StopIteration) as error:
                raise Unusable("damaged") from error
            yield time, small

"""LeRobot datasets of versions 2.0, 2.1 and 3.0, as AgiBot World, DROID, BridgeData and most of Open X are published, without that package."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.decode import is_playlist, opened, small_picture
from cola_dist.data.parquet import read_parquet
from cola_dist.data.sources import Item, Skipped, SourceEpisode, Unusable
from cola_dist.data.sources.cut import CutRules, Recording, cut
from cola_dist.data.sources.lerobot_meta import BAD_TABLE, Episode, chosen_camera, meta_rows, numeric, read_episodes, read_info
from cola_dist.errors import UserError

SEEK_SECONDS = 1.0
"""A gap up to this is decoded and dropped, a longer one skipped; seeks aim this far ahead of what is wanted, to land on a keyframe before."""
_BAD_VIDEO = (av.FFmpegError, ValueError, OverflowError, IndexError)


@dataclass(frozen=True)
class LeRobotItem(Item):
    """The episodes that lie in the same data file and the same video file, in their order there: one in version 2."""

    data: str
    video: str | None
    episodes: tuple[Episode, ...]


class LeRobotOrigin:
    """The episodes of the LeRobot dataset in ``input`` (local or s3://), seen by one camera; ``resolution`` bounds the short side in pixels.

    ``camera`` is a feature's name or its last part ("top" for "observation.images.top"); by default the first in the order of names that is
    not on the hand, else the first. Depth is left out. Actions are ``action``, else ``actions``, else all numeric ``action.*`` or
    ``actions.*`` one after the other in the order of names; states likewise. Where they are not recorded, missing, not finite or not one row
    per frame, the video is packed without them. Raises UserError when ``input`` is no LeRobot dataset of a known version, the camera does not
    exist, or no episode has pictures.
    """

    domain = "robot"

    def __init__(self, input: str, source: str, resolution: int, rules: CutRules, camera: str = "", licence: str = "") -> None:
        if resolution < 16:
            raise UserError(f"resolution {resolution}: give at least 16 pixels")
        self.source = source
        self._input, self._resolution, self._rules = input, resolution, rules
        self._info = read_info(input)
        self.camera = chosen_camera(input, self._info.features, camera)
        self._licence = licence or self._info.licence or "as the original dataset"
        self._action_columns = numeric(self._info.features, "action", "actions")
        self._state_columns = numeric(self._info.features, "observation.state", "observation.states")
        self._tasks: dict[Any, str] = {}
        self._items: tuple[LeRobotItem, ...] = self._listed()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_items": ()}  # there may be 100,000 of them, and a task is given those that it reads

    def items(self) -> Sequence[LeRobotItem]:
        self._items = self._items or self._listed()
        return self._items

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        """Segments of each episode of an item; each of its two files is read once and forwards."""
        assert isinstance(item, LeRobotItem)
        data = _DataFile(storage.join(self._input, item.data), [*self._action_columns, *self._state_columns, self.camera])
        with (
            tempfile.TemporaryDirectory() as scratch,
            closing(_VideoFile(storage.join(self._input, item.video or ""), self._info.fps, scratch)) as video,
        ):
            for episode in item.episodes:
                recording = self._recording(episode, data, video)
                if isinstance(recording, Skipped):
                    yield recording
                else:
                    yield from cut(recording, self._rules)

    def _listed(self) -> tuple[LeRobotItem, ...]:
        """All episodes by the files that hold them; fills the table of tasks where it is needed."""
        names = storage.list_files(self._input)
        groups: dict[tuple[str, str | None], list[Episode]] = {}
        missing: Counter[str] = Counter()
        episodes = read_episodes(self._input, self._info, self.camera, names)
        for episode in episodes:
            groups.setdefault((episode.data, episode.video), []).append(episode)
            if (episode.video or episode.data) not in names:
                missing[episode.video or episode.data] += 1
        if missing.total() == len(episodes):
            reason = f"{missing.total()} missing video, such as {next(iter(missing))}" if missing else "none listed"
            raise UserError(f"{self._input}: no usable episode ({reason}); download the dataset again or give another")
        if not all(episode.task for episode in episodes):
            # pandas writes the index of version 3's table under its own name where it has none.
            rows = meta_rows(self._input, self._info, "tasks", names)
            self._tasks = {row.get("task_index"): str(row.get("task") or row.get("__index_level_0__") or "") for row in rows}
        items = []
        for (data, video), some in sorted(groups.items(), key=lambda group: (group[0][1] or "", group[0][0])):
            size = names.get(data, 0) + names.get(video or "", 0)
            ordered = tuple(sorted(some, key=lambda one: (one.start or 0.0, one.index)))
            items.append(LeRobotItem(data if video is None else f"{data}+{video}", size, data, video, ordered))
        return tuple(items)

    def _recording(self, episode: Episode, data: _DataFile, video: _VideoFile) -> Recording | Skipped:
        name = f"episode {episode.index}"
        columns = [*self._action_columns, *self._state_columns]
        table, why = data.rows(episode) if columns or self._tasks or episode.video is None else (None, "")
        if table is None and episode.video is None:
            return Skipped(name, why)
        actions, no_actions = _matrix(table, why, self._action_columns, episode.frames - 1)
        state, no_state = _matrix(table, why, self._state_columns, episode.frames)
        lost = [f"{what} ({why})" for what, why in (("actions", no_actions), ("state", no_state)) if why]
        # Most episodes name their tasks; else the first row's number does.
        task = episode.task
        if not task and table is not None and "task_index" in table.column_names:
            task = self._tasks.get(table["task_index"][0].as_py(), "")
        place = {"dataset": storage.name(self._input), "version": self._info.version, "episode": episode.index}
        return Recording(
            name=name,
            key=f"episode-{episode.index:06d}",
            group=name,
            fps=self._info.fps,
            frames=self._frames(episode, table, video),
            meta={
                "embodiment": self._info.robot,
                "camera": self.camera,
                "task": task,
                "action": ", ".join(self._action_columns if actions is not None else ()),
                "state": ", ".join(self._state_columns if state is not None else ()),
                "licence": self._licence,
                "provenance": {**place, "file": episode.video or episode.data},
            },
            start_s=episode.start or 0.0,
            split=episode.split,
            actions=actions,
            state=state,
            note=f"without {' and '.join(lost)}" if lost else "",
        )

    def _frames(self, episode: Episode, table: Any, video: _VideoFile) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """Time since the first frame and the small picture of each. Raises Unusable."""
        reformatter = VideoReformatter()
        pictures = _pictures(table, self.camera) if episode.video is None else video.frames(episode.start, episode.frames)
        try:
            for number, frame in enumerate(pictures):
                yield number / self._info.fps, small_picture(frame, self._resolution, reformatter)
        except UserError:  # a ValueError too: of the storage, not of the file
            raise
        except FileNotFoundError as error:
            raise Unusable("missing video") from error
        except _BAD_VIDEO as error:
            video.close()  # the state of a decoder that failed is unknown: the next episode opens the file anew
            raise Unusable("damaged video") from error


class _DataFile:
    """Rows of episodes; read when the first is asked for, and kept."""

    def __init__(self, uri: str, columns: Sequence[str]) -> None:
        self._uri, self._columns = uri, {*columns, "episode_index", "frame_index", "task_index"}
        self._table: Any = None
        self._owners: NDArray[np.int64] = np.empty(0, np.int64)
        self._fault = ""

    def rows(self, episode: Episode) -> tuple[Any, str]:
        """The episode's rows as a table, in the order of its frames; or none, and why."""
        if self._table is None and not self._fault:
            self._fault = self._open()
        if self._fault:
            return None, self._fault
        found = np.flatnonzero(self._owners == episode.index)
        if not len(found):
            return None, "missing rows"
        table, expected = self._table.slice(found[0], len(found)), np.arange(len(found))
        numbers = table["frame_index"].to_numpy() if "frame_index" in table.column_names else expected
        sound = len(found) == episode.frames and np.array_equal(found - found[0], expected) and np.array_equal(numbers, expected)
        return (table, "") if sound else (None, "not one row per frame")

    def _open(self) -> str:
        """Returns why it cannot be read, else nothing."""
        try:
            raw = storage.read_bytes(self._uri)
        except FileNotFoundError:
            return "missing rows"
        try:
            table = read_parquet(raw, self._uri, list(self._columns))
            self._owners = table["episode_index"].to_numpy()
        except (*BAD_TABLE, KeyError):
            return "unreadable rows"
        self._table = table
        return ""


class _VideoFile:
    """Frames by time. The file is read forwards; it seeks only where what is wanted lies behind, or more than ``SEEK_SECONDS`` ahead.

    One on object storage is copied to the folder ``scratch`` first: it may be larger than the memory of a task.
    """

    def __init__(self, uri: str, fps: float, scratch: str) -> None:
        self._uri, self._fps, self._copy = uri, fps, Path(scratch, "video")
        self._container: Any = None
        self._stream: Any = None
        self._frames: Iterator[tuple[float, av.VideoFrame]] = iter(())
        self._shown: tuple[float, av.VideoFrame] | None = None
        self._coming: tuple[float, av.VideoFrame] | None = None

    def frames(self, start: float | None, count: int) -> Iterator[av.VideoFrame]:
        """``count`` frames: frame k is the one nearest to ``start + k / fps`` seconds, at most half a frame from it.

        Raises FileNotFoundError, and ValueError or another of ``_BAD_VIDEO`` where there is no such frame.
        """
        if self._container is None:
            self._open()
        if start is None:
            start = float((self._stream.start_time or 0) * self._stream.time_base)
        here = self._shown[0] if self._shown else 0.0
        if not here - 0.5 / self._fps <= start <= here + SEEK_SECONDS:
            self._container.seek(max(0, round((start - SEEK_SECONDS) / self._stream.time_base)), stream=self._stream)
            self._frames, self._shown, self._coming = self._decoded(), None, None
        for k in range(count):
            yield self._nearest(start + k / self._fps)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._shown, self._coming = None, None, None

    def _open(self) -> None:
        path = storage.local_path(self._uri)
        if path is None:
            path = self._copy
            if not path.exists():
                storage.download_file(self._uri, path)
        if not path.is_file():
            raise FileNotFoundError(self._uri)
        self._container = opened(path)
        if is_playlist(self._container):
            raise ValueError(f"{self._uri}: no video but a list of others")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise ValueError(f"{self._uri}: unknown codec")
        self._stream.thread_type = "AUTO"
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[tuple[float, av.VideoFrame]]:
        return ((frame.time, frame) for frame in self._container.decode(self._stream) if frame.time is not None)

    def _nearest(self, due: float) -> av.VideoFrame:
        self._coming = self._coming or next(self._frames, None)
        while self._coming and (not self._shown or abs(self._coming[0] - due) <= abs(self._shown[0] - due)):
            self._shown, self._coming = self._coming, next(self._frames, None)
        if not self._shown or abs(self._shown[0] - due) > 0.5 / self._fps or self._shown[1].is_corrupt:
            raise ValueError(f"no sound frame at {due:.3f} s")
        return self._shown[1]


def _pictures(table: Any, column: str) -> Iterator[av.VideoFrame]:
    """The pictures (PNG or JPEG) that the rows hold. Raises Unusable."""
    try:
        for value in table[column]:
            with opened(value["bytes"].as_py()) as container:
                yield next(container.decode(video=0))
    except (*_BAD_VIDEO, TypeError, KeyError, StopIteration) as error:  # no such column, a null in it, or no picture
        raise Unusable("damaged video") from error


def _matrix(table: Any, why: str, columns: Sequence[str], rows: int) -> tuple[NDArray[np.float32] | None, str]:
    """The columns' first rows side by side, float32 ``[rows, sum of their sizes]``; or none, and why: ``why`` where there is no table."""
    if not columns or table is None:
        return None, why if columns else ""
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            # A null becomes NaN.
            parts = [np.asarray(table[column].slice(0, rows).to_pylist(), np.float64).astype(np.float32) for column in columns]
        matrix = np.concatenate([part.reshape(rows, -1) for part in parts], axis=1)
    except (KeyError, ValueError, TypeError):  # no such column, rows of different lengths, or no numbers
        return None, "rows of different lengths"
    return (matrix, "") if np.isfinite(matrix).all() else (None, "not finite")

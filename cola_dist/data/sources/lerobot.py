"""LeRobot datasets of versions 2.0, 2.1 and 3.0, as AgiBot World, DROID, BridgeData and most of Open X are published, without that package.

    2.x  meta/episodes.jsonl, meta/tasks.jsonl, one data/….parquet and, per camera, one videos/….mp4 for each episode
    3.0  meta/episodes/….parquet, meta/tasks.parquet; data and video files hold many episodes, told apart by number and by time
Where the files lie is what the templates in ``meta/info.json`` say. Source: github.com/huggingface/lerobot, ``src/lerobot/datasets``.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.sources import SourceEpisode, held_out
from cola_dist.data.sources.video import MAX_FPS, MIN_SECONDS
from cola_dist.errors import UserError

SEGMENT_FRAMES = 256
"""A longer episode becomes several segments of about equal length: whole ones would need gigabytes, here and where they are read."""
SEEK_SECONDS = 1.0
"""A gap up to this is decoded and dropped, a longer one skipped; seeks aim this far ahead of what is wanted, to land on a keyframe before."""
_ON_THE_HAND = re.compile(r"wrist|hand|gripper", re.IGNORECASE)
_BAD_VIDEO = (av.FFmpegError, ValueError, OverflowError, IndexError)
_BAD_TABLE = (pa.ArrowException, OSError, ValueError)
_log = logging.getLogger("cola_dist.data")


@dataclass(eq=False)
class _Unusable(Exception):
    """Why an episode gives nothing (more): the reason as counted, and the file."""

    reason: str
    file: str


@dataclass(frozen=True)
class _Info:
    """What ``meta/info.json`` says. ``version`` is as written, such as "v2.1"."""

    version: str
    major: int
    fps: float
    robot: str
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str
    chunks_size: int


@dataclass(frozen=True)
class _Episode:
    """``video`` is none where the pictures lie in the data file; ``start`` is the first frame's time in it, none for the file's own start."""

    index: int
    frames: int
    task: str
    data: str
    video: str | None
    start: float | None

    @property
    def key(self) -> str:
        return f"episode-{self.index:06d}"

    @property
    def segments(self) -> int:
        return -(-self.frames // SEGMENT_FRAMES)


class LeRobotFolder:
    """The episodes of the LeRobot dataset in ``uri`` (local or s3://), seen by one camera, with actions and, where recorded, state.

    The short side becomes at most ``resolution`` pixels. ``camera`` is a feature's name or its last part ("top" for
    "observation.images.top"); by default the first in the order of names that is not on the hand, else the first. Depth is left out.
    Actions are ``action``, else ``actions``, else all numeric ``action.*`` or ``actions.*`` one after the other in the order of names;
    states likewise. Whole episodes are held out. ``outcomes`` counts episodes by the reason why they give nothing, and as "packed" or
    damaged while ``episodes`` runs; each damaged file is named once in the log. Raises UserError when ``uri`` is no LeRobot dataset of a
    known version, the camera or the actions do not exist, or no episode is usable.
    """

    def __init__(self, uri: str, resolution: int, heldout_share: float, camera: str = "") -> None:
        if resolution < 16:
            raise UserError(f"resolution {resolution}: give at least 16 pixels")
        self.uri, self.resolution, self.outcomes = uri, resolution, Counter[str]()
        self._info = _read_info(uri)
        self.camera = _chosen_camera(uri, self._info.features, camera)
        self._action_columns = _numeric(self._info.features, "action", "actions")
        self._state_columns = _numeric(self._info.features, "observation.state", "observation.states")
        if not self._action_columns:
            raise UserError(f"{uri}: no feature 'action' in meta/info.json; give a dataset with recorded actions")
        names = storage.list_files(uri)
        # pandas writes the index of version 3's table under its own name where it has none.
        tasks = _meta_rows(uri, self._info, "tasks", names)
        self._tasks = {row.get("task_index"): str(row.get("task") or row.get("__index_level_0__") or "") for row in tasks}
        self._episodes: list[_Episode] = []
        missing: list[_Unusable] = []
        for episode in _read_episodes(uri, self._info, self.camera, names):
            if episode.frames < MIN_SECONDS * self._info.fps:
                self.outcomes[f"shorter than {MIN_SECONDS:g} s"] += 1
            elif episode.video is not None and episode.video not in names:
                missing.append(_Unusable("missing video", episode.video))
            elif episode.data not in names:
                missing.append(_Unusable("missing action rows", episode.data))
            else:
                self._episodes.append(episode)
        self.outcomes.update(error.reason for error in missing)
        if not self._episodes:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.outcomes.items()))
            reasons += f", such as {missing[0].file}" if missing else ""
            raise UserError(f"{uri}: no usable episode ({reasons or 'none listed'}); download the dataset again or give another")
        self._named: set[tuple[str, str]] = set()
        for error in missing:
            self._name(error)
        self._heldout = held_out([episode.key for episode in self._episodes], heldout_share)
        # By place in the files, so that each is read once and forwards.
        self._episodes.sort(key=lambda one: (one.video or one.data, one.start or 0.0, one.index))

    @property
    def segments(self) -> int:
        """Episodes to expect from ``episodes``, which cuts those above ``SEGMENT_FRAMES``."""
        return sum(episode.segments for episode in self._episodes)

    def episodes(self) -> Iterator[SourceEpisode]:
        """Every usable episode, in the order of the video files.

        One above ``SEGMENT_FRAMES`` comes in segments, its actions and states cut with it (the action across a cut is dropped); of one whose
        video breaks off, those segments that are whole are given, and it counts as damaged.
        """
        data = _DataFiles(self.uri, [*self._action_columns, *self._state_columns, self.camera])
        videos = _VideoFiles(self.uri, self._info.fps)
        try:
            for episode in self._episodes:
                try:
                    yield from self._segments(episode, data, videos)
                    self.outcomes["packed"] += 1
                except _Unusable as error:
                    self.outcomes[error.reason] += 1
                    self._name(error)
        finally:
            videos.close()

    def _segments(self, episode: _Episode, data: _DataFiles, videos: _VideoFiles) -> Iterator[SourceEpisode]:
        table = data.rows(episode)
        actions = _matrix(table.slice(0, episode.frames - 1), self._action_columns, "action", episode.data)
        state = _matrix(table, self._state_columns, "state", episode.data) if self._state_columns else None
        # Most episodes name their tasks; else the first row's number does.
        task = episode.task or (self._tasks.get(table["task_index"][0].as_py(), "") if "task_index" in table.column_names else "")
        if episode.video is None:
            frames = _pictures(table, self.camera, episode.data)
        else:
            frames = videos.frames(episode.video, episode.start, episode.frames)
        cuts = [round(part * episode.frames / episode.segments) for part in range(episode.segments + 1)]
        for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
            video = self._stacked(frames, stop - start, episode)
            key, split = f"{episode.key}-{part:05d}", "heldout" if episode.key in self._heldout else "train"
            meta, states = self._meta(episode, task, start, stop), None if state is None else state[start:stop]
            yield SourceEpisode(key, split, video, self._info.fps, meta, actions[start : stop - 1], states)

    def _stacked(self, frames: Iterator[av.VideoFrame], count: int, episode: _Episode) -> NDArray[np.uint8]:
        """The next ``count`` frames, made small: uint8 ``[count, H, W, 3]``, H and W even, as H.264 with subsampled colour needs them."""
        reformatter, small = VideoReformatter(), []
        for frame in itertools.islice(frames, count):
            factor = min(1.0, self.resolution / min(frame.width, frame.height))
            width, height = (2 * max(1, round(side * factor / 2)) for side in (frame.width, frame.height))
            small.append(reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1).to_ndarray())
        if len({pixels.shape for pixels in small}) != 1:
            raise _Unusable("damaged video", episode.video or episode.data)
        return np.stack(small).astype(np.uint8, copy=False)

    def _meta(self, episode: _Episode, task: str, start: int, stop: int) -> dict[str, Any]:
        start_s, end_s = (round((episode.start or 0.0) + frame / self._info.fps, 3) for frame in (start, stop))
        origin = {"dataset": self.uri.rstrip("/").rpartition("/")[2], "version": self._info.version, "episode": episode.index}
        origin |= {"file": episode.video or episode.data, "start_s": start_s, "end_s": end_s}
        about = {"embodiment": self._info.robot, "camera": self.camera, "task": task, "licence": "as the original dataset"}
        return {**about, "action": ", ".join(self._action_columns), "state": ", ".join(self._state_columns), "provenance": origin}

    def _name(self, error: _Unusable) -> None:
        if (error.file, error.reason) not in self._named:
            self._named.add((error.file, error.reason))
            _log.warning("%s: %s", storage.join(self.uri, error.file), error.reason)


class _DataFiles:
    """Rows of episodes; the file read last stays in memory, since one of version 3 holds many episodes."""

    def __init__(self, uri: str, columns: Sequence[str]) -> None:
        self._uri, self._name, self._columns = uri, "", {*columns, "episode_index", "frame_index", "task_index"}
        self._table, self._owners = pa.table({}), np.empty(0, np.int64)

    def rows(self, episode: _Episode) -> Any:
        """The episode's rows as a table, in the order of its frames. Raises _Unusable."""
        if episode.data != self._name:
            self._open(episode.data)
        found = np.flatnonzero(self._owners == episode.index)
        if not len(found):
            raise _Unusable("missing action rows", episode.data)
        table, expected = self._table.slice(found[0], len(found)), np.arange(episode.frames)
        numbers = table["frame_index"].to_numpy() if "frame_index" in table.column_names else expected
        if not (np.array_equal(found - found[0], expected) and np.array_equal(numbers, expected)):
            raise _Unusable("mismatched action rows", episode.data)
        return table

    def _open(self, name: str) -> None:
        self._name = ""
        raw = storage.read_bytes(storage.join(self._uri, name))
        try:
            file = pq.ParquetFile(io.BytesIO(raw), pre_buffer=False)
            columns = [column for column in file.schema_arrow.names if column in self._columns]
            self._table = file.read(columns=columns, use_threads=False)
            self._owners = self._table["episode_index"].to_numpy()
        except (*_BAD_TABLE, KeyError) as error:
            raise _Unusable("unreadable action rows", name) from error
        self._name = name


class _VideoFiles:
    """Frames by time. A file is read forwards; it seeks only where what is wanted lies behind, or more than ``SEEK_SECONDS`` ahead."""

    def __init__(self, uri: str, fps: float) -> None:
        self._uri, self._fps, self._name = uri, fps, ""
        self._container: Any = None
        self._stream: Any = None
        self._frames: Iterator[tuple[float, av.VideoFrame]] = iter(())
        self._shown: tuple[float, av.VideoFrame] | None = None
        self._coming: tuple[float, av.VideoFrame] | None = None

    def frames(self, name: str, start: float | None, count: int) -> Iterator[av.VideoFrame]:
        """``count`` frames: frame k is the one nearest to ``start + k / fps`` seconds, at most half a frame from it. Raises _Unusable."""
        try:
            if name != self._name:
                self._open(name)
            if start is None:
                start = float((self._stream.start_time or 0) * self._stream.time_base)
            here = self._shown[0] if self._shown else 0.0
            if not here - 0.5 / self._fps <= start <= here + SEEK_SECONDS:
                self._container.seek(max(0, round((start - SEEK_SECONDS) / self._stream.time_base)), stream=self._stream)
                self._frames, self._shown, self._coming = self._decoded(), None, None
            for k in range(count):
                yield self._nearest(start + k / self._fps)
        except UserError:  # a ValueError too: of the storage, not of the file
            raise
        except _BAD_VIDEO as error:
            self.close()  # the state of a decoder that failed is unknown: the next episode opens the file anew
            raise _Unusable("damaged video", name) from error

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._name, self._container, self._shown, self._coming = "", None, None, None

    def _open(self, name: str) -> None:
        self.close()
        path = storage.local_path(uri := storage.join(self._uri, name))
        self._container = av.open(str(path) if path is not None else io.BytesIO(storage.read_bytes(uri)))
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise ValueError(f"{name}: unknown codec")
        self._stream.thread_type = "AUTO"
        self._frames, self._name = self._decoded(), name

    def _decoded(self) -> Iterator[tuple[float, av.VideoFrame]]:
        return ((frame.time, frame) for frame in self._container.decode(self._stream) if frame.time is not None)

    def _nearest(self, due: float) -> av.VideoFrame:
        self._coming = self._coming or next(self._frames, None)
        while self._coming and (not self._shown or abs(self._coming[0] - due) <= abs(self._shown[0] - due)):
            self._shown, self._coming = self._coming, next(self._frames, None)
        if not self._shown or abs(self._shown[0] - due) > 0.5 / self._fps or self._shown[1].is_corrupt:
            raise ValueError(f"no sound frame at {due:.3f} s")
        return self._shown[1]


def _pictures(table: Any, column: str, file: str) -> Iterator[av.VideoFrame]:
    """The pictures (PNG or JPEG) that the rows hold. Raises _Unusable."""
    try:
        for value in table[column]:
            with av.open(io.BytesIO(value["bytes"].as_py()), "r") as container:
                yield next(container.decode(video=0))
    except (*_BAD_VIDEO, TypeError, KeyError, StopIteration) as error:  # no such column, a null in it, or no picture
        raise _Unusable("damaged video", file) from error


def _matrix(table: Any, columns: Sequence[str], name: str, file: str) -> NDArray[np.float32]:
    """The columns side by side: float32 ``[rows, sum of their sizes]``; a null is not a number. Raises _Unusable."""
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            parts = [np.asarray(table[column].to_pylist(), np.float64).astype(np.float32) for column in columns]
        matrix = np.concatenate([part.reshape(len(table), -1) for part in parts], axis=1)
    except (KeyError, ValueError, TypeError) as error:  # no such column, rows of different lengths, or no numbers
        raise _Unusable(f"mismatched {name} rows", file) from error
    if not np.isfinite(matrix).all():
        raise _Unusable(f"{name}s not finite", file)
    return matrix


def _read_info(uri: str) -> _Info:
    where = storage.join(uri, "meta/info.json")
    try:
        raw = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise UserError(f"{where}: not found; give the folder of a LeRobot dataset, which holds meta, data and videos") from error
    try:
        info = json.loads(raw)
        version, features, fps = str(info["codebase_version"]), info["features"], float(info["fps"])
        known = re.fullmatch(r"v?(2)\.[01]|v?(3)\.0", version)
        if known is None:
            raise ValueError(f"dataset version {version}, this reads 2.0, 2.1 and 3.0")
        if not (0 < fps <= MAX_FPS and all(isinstance(feature, dict) for feature in features.values())):
            raise ValueError(f"fps {fps:g}, or features that are none")
        robot, video_path, chunks_size = info.get("robot_type") or "unknown", info.get("video_path") or "", info.get("chunks_size") or 1000
        return _Info(version, int(known[1] or known[2]), fps, robot, features, info["data_path"], video_path, int(chunks_size))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: not usable ({reason}); convert the dataset with the lerobot package or download it again") from error


def _meta_rows(uri: str, info: _Info, what: str, names: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of ``meta/WHAT.jsonl`` (2.x), or of ``meta/WHAT.parquet`` or all files in ``meta/WHAT`` (3.0); none where there is no file."""
    ending = "parquet" if info.major == 3 else "jsonl"
    rows: list[dict[str, Any]] = []
    for name in (name for name in names if re.fullmatch(rf"meta/{what}(/.+)?\.{ending}", name)):
        raw = storage.read_bytes(storage.join(uri, name))
        try:
            if info.major == 3:
                file = pq.ParquetFile(io.BytesIO(raw), pre_buffer=False)
                columns = [column for column in file.schema_arrow.names if not column.startswith("stats/")]
                rows += file.read(columns=columns, use_threads=False).to_pylist()
            else:
                rows += [dict(json.loads(line)) for line in raw.split(b"\n") if line.strip()]
        except (*_BAD_TABLE, TypeError) as error:
            raise UserError(f"{storage.join(uri, name)}: unreadable; download the dataset again") from error
    return rows


def _read_episodes(uri: str, info: _Info, camera: str, names: Mapping[str, int]) -> list[_Episode]:
    """What the dataset lists; a file that it does not place has a name that no file has."""
    episodes: dict[int, _Episode] = {}
    embedded = info.features[camera]["dtype"] == "image"
    for row in _meta_rows(uri, info, "episodes", names):
        try:
            index, frames = int(row["episode_index"]), int(row["length"])
            start = row[f"videos/{camera}/from_timestamp"] if info.major == 3 and not embedded else None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{uri}: meta/episodes lists an episode without number, length or place; download the dataset again") from error
        place = {"episode_index": index, "episode_chunk": index // info.chunks_size, "video_key": camera}
        data = _placed(info.data_path, place, row, "data")
        video = None if embedded else _placed(info.video_path, place, row, f"videos/{camera}")
        tasks = row.get("tasks") or []
        task = "; ".join(text for text in ([tasks] if isinstance(tasks, str) else tasks) if isinstance(text, str))
        episodes[index] = _Episode(index, frames, task, data, video, start)
    return list(episodes.values())


def _placed(template: str, place: Mapping[str, Any], row: Mapping[str, Any], kind: str) -> str:
    columns = {name: f"{kind}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")}
    try:
        # Null where the video was never written; and then pandas turns the others into floats.
        return template.format(**place, **{name: int(row[column]) for name, column in columns.items() if column in row})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return template  # the name of no file


def _chosen_camera(uri: str, features: Mapping[str, Mapping[str, Any]], wanted: str) -> str:
    cameras = sorted(name for name, feature in features.items() if _is_colour(name, feature))
    if not cameras:
        raise UserError(f"{uri}: no colour camera in meta/info.json; give a dataset with pictures")
    if not wanted:
        return next((name for name in cameras if not _ON_THE_HAND.search(name)), cameras[0])
    fitting = [name for name in cameras if name == wanted] or [name for name in cameras if name.endswith(f".{wanted}")]
    if not fitting:
        raise UserError(f"{uri}: no colour camera {wanted}; give one of {', '.join(cameras)}")
    return fitting[0]


def _is_colour(name: str, feature: Mapping[str, Any]) -> bool:
    """Whether it is a camera with three channels (at either end of its shape) and not marked as depth in any of the known ways."""
    marks = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
    depth = marks.get("is_depth_map") or marks.get("video.is_depth_map") or "depth" in name.lower()
    return feature.get("dtype") in ("video", "image") and not depth and 3 in (feature.get("shape") or [3])


def _numeric(features: Mapping[str, Mapping[str, Any]], *names: str) -> list[str]:
    """The first of ``names`` that is a feature, else all floating-point features below them (AgiBot World splits actions by joint group)."""
    whole = [name for name in names if name in features]
    parts = [key for key in features if key.startswith(tuple(f"{name}." for name in names))]
    return whole[:1] or sorted(key for key in parts if str(features[key].get("dtype")).startswith("float"))

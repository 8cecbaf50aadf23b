"""What the meta folder of a LeRobot dataset of version 2.0, 2.1 or 3.0 says: its features, and where each episode lies.

    2.x  meta/episodes.jsonl, meta/tasks.jsonl, one data/….parquet and, per camera, one videos/….mp4 for each episode
    3.0  meta/episodes/….parquet, meta/tasks.parquet; data and video files hold many episodes, told apart by number and by time
Where the files lie is what the templates in ``meta/info.json`` say. Source: github.com/huggingface/lerobot, ``src/lerobot/datasets``.
"""

from __future__ import annotations

import io
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cola_dist import storage
from cola_dist.data.parquet import read_parquet
from cola_dist.errors import UserError

BAD_TABLE = (pa.ArrowException, OSError, ValueError)
"""What reading the bytes of a damaged table raises."""
_ON_THE_HAND = re.compile(r"wrist|hand|gripper", re.IGNORECASE)


@dataclass(frozen=True)
class Info:
    """What ``meta/info.json`` says. ``version`` is as written, such as "v2.1"; ``licence`` is mostly empty.

    ``splits`` maps names to spans of episodes, such as {"train": "0:90", "test": "90:100"}.
    """

    version: str
    major: int
    fps: float
    robot: str
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str
    chunks_size: int
    licence: str
    splits: Mapping[str, Any]


@dataclass(frozen=True)
class Episode:
    """``video`` is none where the pictures lie in the data file; ``start`` is the first frame's time in it, none for the file's own start.

    A file that the dataset does not place has a name that no file has. ``task`` is empty where only the rows name it, by number.
    """

    index: int
    frames: int
    task: str
    data: str
    video: str | None
    start: float | None
    split: Literal["", "train", "heldout"]


def read_info(uri: str) -> Info:
    """Raises UserError when there is none, or of another version."""
    where = storage.join(uri, "meta/info.json")
    try:
        raw = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise UserError(f"{where}: not found; give the folder of a LeRobot dataset, which holds meta, data and videos") from error
    try:
        info = storage.json_of(raw)
        version, features, fps = str(info["codebase_version"]), info["features"], float(info["fps"])
        known = re.fullmatch(r"v?(2)\.[01]|v?(3)\.0", version)
        if known is None:
            raise ValueError(f"dataset version {version}, this reads 2.0, 2.1 and 3.0")
        if not (0 < fps <= 240 and all(isinstance(feature, dict) for feature in features.values())):
            raise ValueError(f"fps {fps:g}, or features that are none")
        robot, video_path, chunks_size = info.get("robot_type") or "unknown", info.get("video_path") or "", info.get("chunks_size") or 1000
        licence = next((text for text in (info.get("license"), info.get("licence")) if isinstance(text, str)), "")
        splits = dict(info.get("splits") or {})
        for name in ("data_path", "video_path"):
            if problem := _wrong_template(str(info.get(name) or "")):
                raise ValueError(f"{name} {problem}")
        return Info(
            version, int(known[1] or known[2]), fps, robot, features, info["data_path"], video_path, int(chunks_size), licence, splits
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: not usable ({reason}); convert the dataset with the lerobot package or download it again") from error


def meta_rows(uri: str, info: Info, what: str, names: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of ``meta/WHAT.jsonl`` (2.x), or of ``meta/WHAT.parquet`` or all files in ``meta/WHAT`` (3.0); none where there is no file.

    ``names`` are the files of the dataset. Raises UserError.
    """
    ending = "parquet" if info.major == 3 else "jsonl"
    rows: list[dict[str, Any]] = []
    for name in (name for name in names if re.fullmatch(rf"meta/{what}(/.+)?\.{ending}", name)):
        raw = storage.read_bytes(storage.join(uri, name))
        try:
            if info.major == 3:
                columns = [column for column in pq.read_schema(io.BytesIO(raw)).names if not column.startswith("stats/")]
                rows += read_parquet(raw, storage.join(uri, name), columns).to_pylist()
            else:
                rows += [dict(storage.json_of(line)) for line in raw.split(b"\n") if line.strip()]
        except UserError:
            raise
        except (*BAD_TABLE, TypeError) as error:
            raise UserError(f"{storage.join(uri, name)}: unreadable; download the dataset again") from error
    return rows


def read_episodes(uri: str, info: Info, camera: str, names: Mapping[str, int]) -> list[Episode]:
    """The episodes that the dataset lists, with their pictures from one camera. Raises UserError."""
    episodes: dict[int, Episode] = {}
    embedded = info.features[camera]["dtype"] == "image"
    for row in meta_rows(uri, info, "episodes", names):
        try:
            index, frames = int(row["episode_index"]), int(row["length"])
            time = row[f"videos/{camera}/from_timestamp"] if info.major == 3 and not embedded else None
            start = None if time is None else float(time)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{uri}: meta/episodes lists an episode without number, length or place; download the dataset again") from error
        place = {"episode_index": index, "episode_chunk": index // info.chunks_size, "video_key": camera}
        data = _placed(info.data_path, place, row, "data")
        video = None if embedded else _placed(info.video_path, place, row, f"videos/{camera}")
        tasks = row.get("tasks") or []
        task = "; ".join(text for text in ([tasks] if isinstance(tasks, str) else tasks) if isinstance(text, str))
        episodes[index] = Episode(index, frames, task, data, video, start, _split(info.splits, index))
    return list(episodes.values())


def _split(splits: Mapping[str, Any], index: int) -> Literal["", "train", "heldout"]:
    spans = {name: re.fullmatch(r"(\d{1,18}):(\d{1,18})", str(span)) for name, span in splits.items()}
    names = [name for name, span in spans.items() if span and int(span[1]) <= index < int(span[2])]
    if any(re.match("val|test|eval", name) for name in names):
        return "heldout"
    return "train" if "train" in names else ""


def _wrong_template(template: str) -> str:
    """Why a template for names of files is none; empty where it is. Python's formats can do more than name files, such as write a billion zeros."""
    for _, field, form, conversion in string.Formatter().parse(template):
        if field is not None and (not re.fullmatch(r"\w+", field) or not re.fullmatch(r"0?\d?d?", form or "") or conversion):
            return f"holds {{{field[:40]}}}, which names no file"
    return "leads out of the dataset" if ".." in template.split("/") else ""


def _placed(template: str, place: Mapping[str, Any], row: Mapping[str, Any], kind: str) -> str:
    columns = {name: f"{kind}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")}
    try:
        # Null where the video was never written; and then pandas turns the others into floats.
        found = template.format(**place, **{name: int(row[column]) for name, column in columns.items() if column in row})
        return template if ".." in found.split("/") else found
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return template  # the name of no file


def chosen_camera(uri: str, features: Mapping[str, Mapping[str, Any]], wanted: str) -> str:
    """The feature that is ``wanted`` or ends in it; of an empty wish, the first that is not on the hand, else the first. Raises UserError."""
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


def numeric(features: Mapping[str, Mapping[str, Any]], *names: str) -> list[str]:
    """The first of ``names`` that is a feature, else all floating-point features below them (AgiBot World splits actions by joint group)."""
    whole = [name for name in names if name in features]
    parts = [key for key in features if key.startswith(tuple(f"{name}." for name in names))]
    return whole[:1] or sorted(key for key in parts if str(features[key].get("dtype")).startswith("float"))

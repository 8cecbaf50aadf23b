"""Tables that say which files, or which parts of them, a data set consists of: CSV, JSON, JSON lines and Parquet.

A table has one row per video or per part of one. Where nobody says which column is which, usual names are looked for.
"""

from __future__ import annotations

import csv
import io
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from cola_dist import storage
from cola_dist.data.parquet import read_parquet
from cola_dist.errors import UserError

Split = Literal["", "train", "heldout"]
Unit = Literal["seconds", "milliseconds", "frames"]

_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "dev", "eval", "test", "testing", "heldout", "held-out")
_SPLITS: dict[str, Split] = {**dict.fromkeys(_TRAIN, "train"), **dict.fromkeys(_HELD_OUT, "heldout")}
_FILE = (
    *("file", "path", "video", "filename", "file_name", "file_path", "filepath", "video_file", "video_path"),
    *("video_id", "video_name", "video_uid", "clip", "folder"),
)
_TEXT = ("text", "narration", "caption", "description", "label", "task", "instruction", "action")
_GROUP = ("group", "person", "person_id", "participant", "participant_id", "subject", "subject_id", "actor")
_ID = ("id", "narration_id", "segment_id", "clip_id", "uid")
_TIMES: tuple[tuple[Unit, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "seconds",
        ("start", "start_s", "start_sec", "start_seconds", "start_time", "start_timestamp", "begin", "t_start"),
        ("end", "end_s", "end_sec", "end_seconds", "end_time", "end_timestamp", "stop", "stop_s", "stop_time", "stop_timestamp", "t_end"),
    ),
    ("milliseconds", ("start_ms", "start_time_ms", "begin_ms"), ("end_ms", "end_time_ms", "stop_ms")),
    ("frames", ("start_frame", "frame_start", "first_frame"), ("end_frame", "frame_end", "stop_frame", "last_frame")),
)
"""Unit of time, names of the column of starts, names of the column of ends."""


@dataclass(frozen=True)
class Columns:
    """Which column of a table means what; an empty name is a column that the table does not have."""

    file: tuple[str, ...]
    """The file from the row's columns, as in ``{person}/{video_id}.mp4``; the first that exists counts."""
    start: str = ""
    end: str = ""
    unit: Unit = "seconds"
    """Of start and end. Frames count from 0 and end before ``end``; seconds may be written ``HH:MM:SS.ff``."""
    fps: str = ""
    """Frame rate to which numbers of frames refer; empty: the file's."""
    text: str = ""
    split: str = ""
    group: str = ""
    id: str = ""
    rows: str = ""
    """Key of a JSON object below which its rows are."""
    header: tuple[str, ...] = ()
    """Names of the columns of a text table that has no header line."""


class Row(NamedTuple):
    """A row of a table: a file, or a part of one. A tuple, as there may be hundreds of thousands that travel to tasks."""

    name: str
    """Table and number of the row, from 1."""
    files: tuple[str, ...] = ()
    """Names of the file to look for, in this order."""
    start: float | None = None
    end: float | None = None
    """Seconds from the file's beginning, or frames; none: the file's own beginning and end."""
    in_frames: bool = False
    text: str = ""
    split: Split = ""
    group: str = ""
    id: str = ""
    fault: str = ""
    """Why the row cannot be used."""


def read_table(uri: str, columns: Columns | None, split: Split = "") -> list[Row]:
    """The rows of a table in its order; without ``columns``, by the usual names of columns. ``split`` is for rows that name none.

    Raises UserError where the table cannot be read, is empty, or has no column that names the file.
    """
    table = storage.name(uri)
    cells = _cells(uri, columns or Columns(()))
    if not cells:
        raise UserError(f"{uri}: no rows; give a table with one row per video or part of one")
    found = list(dict.fromkeys(name for row in cells for name in row))
    columns = _guessed(uri, found) if columns is None else _present(uri, found, columns)
    templates = {template: _fields(template) for template in columns.file}
    return [_row(f"{table}#{number}", row, columns, templates, split) for number, row in enumerate(cells, start=1)]


def _cells(uri: str, columns: Columns) -> list[dict[str, Any]]:
    kind = PurePosixPath(storage.name(uri)).suffix.lower()
    data = storage.read_bytes(uri)
    try:
        if kind == ".parquet":
            return list(read_parquet(data, uri).to_pylist())
        text = data.decode("utf-8-sig")
        if kind == ".json":
            return _objects(storage.json_of(text), columns.rows)
        if kind in (".jsonl", ".ndjson"):
            return _objects([storage.json_of(line) for line in text.splitlines() if line.strip()], "")
        return _text_table(text, columns.header)
    except UserError:
        raise
    except (ValueError, csv.Error, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{uri}: not a table of its kind ({reason}); give CSV, JSON, JSON lines or Parquet by these endings") from error


def _objects(value: Any, key: str) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = value.get(key) if key else lists[0] if len(lists) == 1 else None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("no list of objects")
    return value


def _text_table(text: str, header: Sequence[str]) -> list[dict[str, Any]]:
    if len(header) == 1:
        return [{header[0]: line.strip()} for line in text.splitlines() if line.strip()]
    delimiter = max(",;\t|", key=text.lstrip().partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = [row for row in ([cell.strip() for cell in line] for line in lines) if any(row)]
    if not header and rows:
        # Some tables mark their header as a comment.
        header = [name.removeprefix("#").strip() for name in rows.pop(0)]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _guessed(uri: str, found: Sequence[str]) -> Columns:
    by_name = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(found)}

    def first(names: Iterable[str]) -> str:
        return next((by_name[name] for name in names if name in by_name), "")

    file = first(_FILE)
    if not file:
        raise UserError(f"{uri}: no column names the video; its columns are {', '.join(found)}: call one of them file")
    times = [(unit, first(starts), first(ends)) for unit, starts, ends in _TIMES]
    unit, start, end = next((entry for entry in times if entry[1] or entry[2]), times[0])
    return Columns(
        file=(f"{{{file}}}",),
        start=start,
        end=end,
        unit=unit,
        fps=first(("fps", "frame_rate")),
        text=first(_TEXT),
        split=first(("split", "subset", "partition")),
        group=first(_GROUP),
        id=first(_ID),
    )


def _present(uri: str, found: Sequence[str], columns: Columns) -> Columns:
    """The same without names of the file that need columns which the table lacks. Raises UserError where it lacks what it must have."""
    missing = {name for name in (columns.start, columns.end) if name and name not in found}
    needed = {template: _fields(template) for template in columns.file}
    file = tuple(template for template, fields in needed.items() if fields <= set(found))
    if not file:
        missing |= set().union(*needed.values()) - set(found)
    if missing:
        raise UserError(f"{uri}: no column {', '.join(sorted(missing))}; its columns are {', '.join(found)}")
    return replace(columns, file=file)


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field}


def _row(name: str, cells: Mapping[str, Any], columns: Columns, templates: Mapping[str, set[str]], split: Split) -> Row:
    words = {column: word for column, word in ((column, _text(value)) for column, value in cells.items()) if word}
    files = tuple(template.format_map(words) for template, fields in templates.items() if fields <= words.keys())
    start, end = (_number(cells.get(column)) if column else None for column in (columns.start, columns.end))
    fault = "" if files else "row names no file"
    if (columns.start and start is None) != (columns.end and end is None) and columns.start and columns.end:
        fault = fault or "times are no numbers"
    for time in (start, end):
        if time is not None and not 0 <= time < math.inf:
            fault = fault or "times are no numbers"
    if start is not None and end is not None and end <= start:
        fault = fault or "ends before it starts"
    scale = 1000.0 if columns.unit == "milliseconds" else 1.0
    in_frames = columns.unit == "frames"
    rate = _number(cells.get(columns.fps)) if columns.fps else None
    if in_frames and rate is not None and rate > 0:
        scale, in_frames = rate, False
    return Row(
        name=name,
        files=files,
        start=None if start is None else start / scale,
        end=None if end is None else end / scale,
        in_frames=in_frames,
        text=words.get(columns.text, ""),
        split=_SPLITS.get(words.get(columns.split, "").lower(), split),
        group=words.get(columns.group, ""),
        id=words.get(columns.id, ""),
        fault=fault,
    )


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _number(value: Any) -> float | None:
    """A number or a time of day in seconds; none for an empty cell, not a number for anything else."""
    text = _text(value)
    if not text:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        parts = [float(part) for part in text.replace(",", ".").split(":")]
    except ValueError:
        return math.nan
    if len(parts) > 3 or any(not 0 <= part < 60 for part in parts[1:]):
        return math.nan
    return math.fsum(part * 60.0**place for place, part in enumerate(reversed(parts)))

"""Tables and metadata of others: names that climb, templates that do more than name files, tables that unfold, lengths that are claimed."""

from __future__ import annotations

import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_dist.data.sources import Skipped, SourceEpisode, tfrecord
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.lerobot import LeRobotOrigin
from cola_dist.data.sources.rlds import RldsOrigin
from cola_dist.data.sources.tfrecord import read_records
from cola_dist.data.sources.video import VideoOrigin
from cola_dist.errors import UserError
from cola_dist.report.raw import CURVES, SWEEPS, TRIALS
from cola_dist.report.study import read_study
from tests.data.lerobot_files import TOP, mp4, save, write_v2, write_v3
from tests.data.tfrecords import checksum, encode_example, field
from tests.data.videos import encoded, moving_square
from tests.security.limits import bounded
from tests.security.test_shards import bomb

RULES = CutRules(min_seconds=0.4, scene_cut=0, still=0)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_table_takes_files_of_its_folder_alone(tmp_path: Path, kind: str) -> None:
    """Whoever wrote the table did not choose the folder: a row names a file that was found below it, or none."""
    (tmp_path / "input").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "input" / "a.mp4").write_bytes(encoded(moving_square(12), "mp4"))
    (tmp_path / "private" / "b.mp4").write_bytes(encoded(moving_square(12), "mp4"))
    outside = [
        "../private/b.mp4",
        str(tmp_path / "private" / "b.mp4"),
        f"file://{tmp_path}/private/b.mp4",
        "s3://bucket/b.mp4",
        "http://host/b.mp4",
    ]
    table = write_table(tmp_path / f"table.{kind}", [{"file": name} for name in ["a.mp4", *outside]])
    origin = VideoOrigin(str(tmp_path / "input"), "video", "human", 16, RULES, table=str(table))
    found = [one for item in origin.items() for one in origin.episodes(item)]
    assert [one.recording for one in found if isinstance(one, SourceEpisode)] == ["a.mp4#0"]
    assert {one.reason for one in found if isinstance(one, Skipped)} == {"file missing"}
    assert len(found) == 1 + len(outside)


def test_a_table_that_unfolds_or_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded(moving_square(12), "mp4"))
    hostile = {
        "rows.parquet": bomb(12 * 2**20),
        "text.parquet": bomb(2**18, "x" * 100_000),
        "deep.json": b"[" * 10**6,
        "deep.jsonl": b"[" * 10**6,
    }
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
        with bounded(memory=2**30), pytest.raises(UserError, match=r"unfolds to|rows, more than|not a table of its kind"):
            VideoOrigin(str(tmp_path), "video", "human", 16, RULES, table=name)


def changed(root: Path, **fields: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    """A data set, and beside it a video and rows of somebody's own."""
    save(tmp_path, "private/secret.mp4", mp4(moving_square(30)))
    save(tmp_path, "private/secret.parquet", pa.table({"episode_index": [0] * 24, "frame_index": range(24), "action": [[7.0, 7.0]] * 24}))
    return write_v2(tmp_path / "dataset")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"video_path": "../private/secret.mp4"}, "video_path leads out of the dataset"),
        ({"data_path": "videos/../../private/secret.parquet"}, "data_path leads out of the dataset"),
        ({"data_path": "{episode_index:2000000000}"}, "which names no file"),
        ({"data_path": "{episode_index:.2000000000f}"}, "which names no file"),
        ({"data_path": "{episode_index.__class__.__init__.__globals__}"}, "which names no file"),
        ({"video_path": "{video_key[0]}"}, "which names no file"),
        ({"video_path": "{video_key!r:>2000000000}"}, "which names no file"),
        ({"data_path": "{episode_index:{episode_index}}"}, "which names no file"),
    ],
)
def test_templates_name_files_of_the_dataset(lerobot: Path, fields: dict[str, str], complaint: str) -> None:
    changed(lerobot, **fields)
    with bounded(memory=2**28), pytest.raises(UserError, match=rf"info\.json: not usable \(.*{complaint}"):
        LeRobotOrigin(str(lerobot), "arm", 16, RULES)


def test_a_cameras_name_does_not_climb_either(lerobot: Path) -> None:
    about = json.loads((lerobot / "meta" / "info.json").read_text())
    features = {name: value for name, value in about["features"].items() if name != TOP}
    climbing = "../../../private"
    changed(lerobot, features=features | {climbing: about["features"][TOP]}, video_path="videos/chunk-000/{video_key}/secret.mp4")
    assert (lerobot / "videos" / "chunk-000" / climbing / "secret.mp4").exists()
    with pytest.raises(UserError, match="no usable episode"):
        LeRobotOrigin(str(lerobot), "arm", 16, RULES, camera=climbing)


@pytest.mark.parametrize("absolute", ["/etc/passwd", "file:///etc/passwd", "s3://bucket/secret.mp4", "http://host/secret.mp4"])
def test_no_other_place_is_read(lerobot: Path, absolute: str) -> None:
    changed(lerobot, video_path=absolute)
    with bounded(), pytest.raises(UserError, match="no usable episode"):
        LeRobotOrigin(str(lerobot), "arm", 16, RULES)


def test_lengths_and_tables_of_a_dataset_are_bounded(lerobot: Path, tmp_path: Path) -> None:
    rows = [{"episode_index": 0, "tasks": [], "length": 2**60}, {"episode_index": 10**400, "tasks": [], "length": 1}]
    save(lerobot, "meta/episodes.jsonl", rows)
    origin = LeRobotOrigin(str(lerobot), "arm", 16, RULES)
    with bounded(memory=2**28):
        found = list(origin.episodes(origin.items()[0]))
    assert Skipped("episode 0", "damaged video") in found
    newer = write_v3(tmp_path / "v3")
    for path in (newer / "data").rglob("*.parquet"):
        path.write_bytes(bomb(12 * 2**20))
    origin = LeRobotOrigin(str(newer), "arm", 16, RULES)
    with bounded(memory=2**30):
        notes = {one.note for item in origin.items() for one in origin.episodes(item) if isinstance(one, SourceEpisode)}
    assert notes == {"without actions (unreadable rows) and state (unreadable rows)"}
    (newer / "meta" / "tasks.parquet").write_bytes(b"")
    next((newer / "meta" / "episodes").rglob("*.parquet")).write_bytes(bomb(12 * 2**20))
    with bounded(memory=2**30), pytest.raises(UserError, match="rows, more than"):
        LeRobotOrigin(str(newer), "arm", 16, RULES)


def framed(length: int, data: bytes) -> bytes:
    head = struct.pack("<Q", length)
    return head + struct.pack("<I", checksum(head)) + data + struct.pack("<I", checksum(data))


@pytest.mark.parametrize("packed", [False, True])
def test_a_record_of_exabytes(tmp_path: Path, packed: bool) -> None:
    """Its header's checksum is right. What comes after it is still read."""
    sound = encode_example({"a": [b"b"]})
    content = framed(2**60, b"x" * 100) + framed(len(sound), sound) + framed(2**31 - 1, b"the file ends before")
    path = tmp_path / "a.tfrecord"
    path.write_bytes(gzip.compress(content) if packed else content)
    with bounded(memory=2**28):
        records = list(read_records(str(path)))
    assert [bool(record.damage) for record in records] == [True, False, True]
    assert records[1].values == {"a": [b"b"]}


def test_lists_that_grow_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of a record may become an object of Python."""
    monkeypatch.setattr(tfrecord, "_MOST_VALUES", 1000)
    texts = field(1, field(1, b"a") + field(2, field(1, b"\x0a\x00" * 1001)))
    numbers = field(1, field(1, b"a") + field(2, field(3, field(1, bytes(1001)))))
    for record, complaint in ((texts, "too many values in a list"), (numbers, "too many numbers in a list")):
        with pytest.raises(ValueError, match=complaint):
            tfrecord.parse_example(field(1, record))


def test_features_without_end(tmp_path: Path) -> None:
    sound = encode_example({"steps/observation/image": [b"x"]})
    (tmp_path / "a.tfrecord").write_bytes(framed(len(sound), sound))
    (tmp_path / "features.json").write_text("[" * 10**6)
    with bounded(), pytest.raises(UserError, match=r"features\.json is no features\.json of TFDS"):
        RldsOrigin(str(tmp_path), "arm", 16, RULES)


@pytest.mark.parametrize("name", [TRIALS, CURVES])
def test_raw_results_that_unfold(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"trial": ["a"]}), buffer)
    for other in (TRIALS, CURVES):
        (tmp_path / other).write_bytes(bomb(12 * 2**20) if other == name else buffer.getvalue())
    (tmp_path / SWEEPS).write_text("[]")
    with bounded(memory=2**30), pytest.raises(UserError, match=r"rows, more than|damaged raw results"):
        read_study([str(tmp_path)])

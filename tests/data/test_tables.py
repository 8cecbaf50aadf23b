"""Tables of videos and of parts of them, through ``VideoOrigin``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cola_dist.errors import UserError
from tests.data.footage import LONG, noisy, numbers, origin, picture, read, reasons, write_table
from tests.data.videos import encoded, moving_square
from tests.s3 import serve


@pytest.fixture(scope="module")
def long_videos() -> dict[str, bytes]:
    return {f"{container}.{container}": encoded(LONG, container) for container in ("mp4", "mkv", "avi", "webm")}


@pytest.fixture
def long_video(tmp_path: Path, long_videos: dict[str, bytes]) -> Path:
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    for name, data in long_videos.items():
        (tmp_path / "videos" / "sub" / name).write_bytes(data)
    return tmp_path / "videos"


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_table_gives_parts_of_files_in_the_order_of_time(long_video: Path, kind: str) -> None:
    rows = [
        {"path": "sub/mp4.mp4", "start": 24.0, "end": 27.0, "caption": "far", "split": "val", "subject": "anna", "segment_id": "c"},
        {
            "path": "sub/mp4.mp4",
            "start": 1.0,
            "end": 4.0,
            "caption": "first, of two",
            "split": "train",
            "subject": "anna",
            "segment_id": "a",
        },
        {"path": "sub/mp4.mp4", "start": 3.0, "end": 6.5, "caption": "overlaps", "split": "", "subject": "ben", "segment_id": "b"},
        {"path": "sub/mkv.mkv", "start": 30.0, "end": 32.0, "caption": "", "split": "test", "subject": "", "segment_id": "d"},
    ]
    table = write_table(long_video / f"parts.{kind}", rows)
    opened = origin(long_video, table=table)
    assert [item.name for item in opened.items()] == ["sub/mkv.mkv", "sub/mp4.mp4"]
    episodes, skipped = read(opened)
    assert skipped == []
    got = [(e.recording, e.split, e.group, e.meta.get("text"), e.meta["provenance"]["start_s"]) for e in episodes]
    assert got == [
        ("sub/mkv.mkv#d", "heldout", "sub/mkv.mkv", None, 30.0),
        ("sub/mp4.mp4#a", "train", "anna", "first, of two", 1.0),
        ("sub/mp4.mp4#b", "", "ben", "overlaps", 3.0),
        ("sub/mp4.mp4#c", "heldout", "anna", "far", 24.0),
    ]
    spans = [range(300, 320), range(10, 40), range(30, 65), range(240, 270)]
    assert [numbers(episode.video, LONG)[0] % 100 for episode in episodes] == [span[0] % 100 for span in spans]
    for episode, span in zip(episodes, spans, strict=True):
        assert np.abs(episode.video.astype(int) - LONG[span.start : span.stop]).mean() < 6
    assert len({episode.key for episode in episodes}) == 4


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "webm"])
def test_parts_are_those_of_the_whole_in_every_container(long_video: Path, container: str) -> None:
    """Whatever is skipped, sought or read again, a part has the frames that decoding from the beginning gives."""
    starts = [0.0, 0.7, 0.9, 3.0, 17.3, 17.0, 5.1, 29.5]
    write_table(long_video / "t.csv", [{"file": f"{container}.{container}", "start": start, "end": start + 2.2} for start in starts])
    episodes, skipped = read(origin(long_video, table="t.csv"))
    assert skipped == []
    for start, episode in zip(sorted(starts), episodes, strict=True):
        first = round(start * 10)
        assert episode.meta["provenance"]["start_s"] == pytest.approx(start, abs=0.02)
        assert np.abs(episode.video.astype(int) - LONG[first : first + 22]).mean() < 6


@pytest.mark.parametrize(
    ("row", "span"),
    [
        ({"video": "mp4", "start": "00:00:02.5", "end": "0:05.0"}, (25, 50)),
        ({"video_id": "sub/mp4", "start_ms": 2500, "stop_ms": 5000}, (25, 50)),
        ({"filename": "/elsewhere/data/sub/mp4.mp4", "start_frame": 25, "end_frame": 50}, (25, 50)),
        ({"File Path": "./sub/mp4.mp4", "start_frame": 50, "stop_frame": 100, "fps": 20}, (25, 50)),
        ({"path": "sub\\mp4.mp4", "start_time": "29,5"}, (295, 320)),
        ({"path": "sub/mp4.mp4", "end_time": 2.5}, (0, 25)),
        ({"path": "sub/mp4.mp4", "start": "", "end": ""}, (0, 320)),
        ({"path": "sub/mp4.mp4", "label": "whole"}, (0, 320)),
    ],
)
def test_columns_and_times_of_unknown_tables_are_found(long_video: Path, row: dict[str, Any], span: tuple[int, int]) -> None:
    write_table(long_video / "t.csv", [row])
    (episode,), skipped = read(origin(long_video, table="t.csv"))
    assert skipped == []
    assert len(episode.video) == span[1] - span[0]
    assert np.abs(episode.video.astype(int) - LONG[slice(*span)]).mean() < 6


def test_rows_that_cannot_be_used_say_why(long_video: Path) -> None:
    (long_video / "other").mkdir()
    (long_video / "other" / "mkv.mkv").write_bytes(encoded(LONG[:30], "mkv"))
    good = {"file": "mp4.mp4", "start": "1", "end": "4"}
    bad: list[tuple[dict[str, str], str]] = [
        ({"file": "mp4.mp4", "start": "4", "end": "4"}, "ends before it starts"),
        ({"file": "mp4.mp4", "start": "two", "end": "4"}, "times are no numbers"),
        ({"file": "mp4.mp4", "start": "1", "end": ""}, "times are no numbers"),
        ({"file": "mp4.mp4", "start": "-1", "end": "4"}, "times are no numbers"),
        ({"file": "mp4.mp4", "start": "nan", "end": "4"}, "times are no numbers"),
        ({"file": "mp4.mp4", "start": "00:75:00", "end": "01:00:00"}, "times are no numbers"),
        ({"file": "mp4.mp4", "start": "40", "end": "44"}, "times beyond the end of the file"),
        ({"file": "mp4.mp4", "start": "30", "end": "44"}, "times beyond the end of the file"),
        ({"file": "mp4.mp4", "start": "5", "end": "6"}, "shorter than 2 s"),
        ({"file": "gone.mp4", "start": "1", "end": "4"}, "file missing"),
        ({"file": "gone.mp4", "start": "5", "end": "8"}, "file missing"),
        ({"file": "mkv", "start": "0", "end": "3"}, "several files of that name"),
        ({"file": "", "start": "0", "end": "3"}, "row names no file"),
    ]
    write_table(long_video / "t.csv", [good, *(row for row, _ in bad)])
    opened = origin(long_video, table="t.csv")
    assert {item.name: item.size > 0 for item in opened.items()} == {
        "sub/mp4.mp4": True,
        "gone.mp4": False,
        "mkv": False,
        "t.csv#14": False,
    }
    episodes, skipped = read(opened)
    assert len(episodes) == 1
    assert len(reasons(skipped)) == len(bad)
    assert sorted(each.reason for each in skipped) == sorted(reason for _, reason in bad)


def test_parts_of_a_damaged_file_are_used_as_far_as_it_goes(tmp_path: Path) -> None:
    data = bytearray(encoded(noisy(150), "mkv"))
    data[len(data) // 2 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 2)
    (tmp_path / "a.mkv").write_bytes(data)
    write_table(tmp_path / "t.csv", [{"file": "a.mkv", "start": start, "end": start + 3} for start in (0, 1, 6, 8, 11)])
    episodes, skipped = read(origin(tmp_path, table="t.csv"))
    assert [episode.meta["provenance"]["start_s"] for episode in episodes][:2] == [0.0, 1.0]
    assert {each.reason for each in skipped} == {"damaged"}
    assert len(skipped) >= 2


def test_mistakes_are_one_line(long_video: Path, tmp_path: Path) -> None:
    (long_video / "strange.csv").write_text("name of it,when\nmp4.mp4,3\n")
    (long_video / "empty.csv").write_text("file,start\n")
    (long_video / "broken.json").write_text("{")
    (long_video / "foreign.csv").write_text("file\nno/such.mp4\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": str(tmp_path / "nowhere")}, "no such folder"),
        ({"domain": "cat"}, "give robot or human"),
        ({"resolution": 8}, "at least 16"),
        ({"fps": -1.0}, "fps -1"),
        ({"preset": "ego-4d"}, "did you mean ego4d"),
        ({"preset": "ego4d"}, "no file lies there as in Ego4D"),
        ({"table": "no.csv"}, "no such table"),
        ({"table": "strange.csv"}, "its columns are name of it, when"),
        ({"table": "empty.csv"}, "no rows"),
        ({"table": "broken.json"}, "broken.json: not a table"),
        ({"table": "sub/mp4.mp4"}, "not a table"),
        ({"table": "foreign.csv"}, "none of the files that the table lists"),
    ]
    for options, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            origin(long_video, **options)
        assert "\n" not in str(caught.value)


def test_object_storage_gives_the_same(long_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long_video / "empty.mp4").write_bytes(b"")
    write_table(long_video / "t.csv", [{"file": "mp4.mp4", "start": 3, "end": 6}, {"file": "empty.mp4"}, {"file": "gone.mp4"}])
    pictures = tmp_path / "pictures" / "a"
    pictures.mkdir(parents=True)
    for number, pixels in enumerate(moving_square(25)):
        (pictures / f"{number}.png").write_bytes(picture(pixels))
    options: list[tuple[str, dict[str, Any]]] = [
        ("videos", {}),
        ("videos", {"table": "t.csv"}),
        ("videos", {"table": "{}/videos/t.csv"}),
        ("pictures", {"preset": "frames", "fps": 10.0}),
    ]
    with serve(tmp_path) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        for bucket, given in options:
            here, there = (
                read(origin(f"{root}/{bucket}", **given | {key: text.format(root) for key, text in given.items() if key == "table"}))
                for root in (str(tmp_path), "s3:/")
            )
            assert here[1] == there[1]
            assert len(here[0]) == len(there[0]) > 0
            for ours, theirs in zip(*(each[0] for each in (here, there)), strict=True):
                assert (ours.key, ours.meta) == (theirs.key, theirs.meta)
                np.testing.assert_array_equal(ours.video, theirs.video)

"""What a person sees of a shard folder: its pictures, and its figures."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.command import run_command
from cola_dist.data.decode import encode_mp4
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.preview import CELL, COLUMNS, LABEL, preview
from cola_dist.data.shards import PACKING, ShardFolder, open_folder, write_index
from cola_dist.data.sources import SourceEpisode
from cola_dist.data.summary import summarise
from cola_dist.errors import UserError
from jobs import data
from tests.data.clips import VIDEOS, flip, spot, write_clips
from tests.s3 import serve
from tests.toy import write_folder

FRAMES = 10


def frames_of(uri: str) -> NDArray[np.uint8]:
    """All frames of a picture or video, uint8 ``[T, H, W, 3]``."""
    with av.open(io.BytesIO(storage.read_bytes(uri))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_shades(path: Path) -> ShardFolder:
    """Grey videos that grow brighter; "wide" is held out, twice as wide, shorter, and at half the rate."""
    with PartWriter(str(path), "shades", "human", "part", 2**20) as writer:
        for key, frames, fps, shape, split in (("narrow", FRAMES, 4.0, (32, 32), "train"), ("wide", FRAMES // 4, 2.0, (32, 64), "heldout")):
            video = np.empty((frames, *shape, 3), np.uint8)
            video[:] = np.linspace(60, 240, frames).astype(np.uint8)[:, None, None, None]
            writer.add(SourceEpisode(key, video, fps, {}, key, key, split), encode_mp4(video, fps))  # type: ignore[arg-type]
        write_index(str(path), "shades", "human", writer.close())
    return open_folder(str(path))


def test_the_sheet_shows_frames_from_first_to_last(tmp_path: Path) -> None:
    made = preview(write_shades(tmp_path / "shades"), str(tmp_path / "out"))
    assert (made.keys, made.unreadable) == (("narrow", "wide"), ())
    (sheet,) = frames_of(made.sheet)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // COLUMNS
    assert height == CELL + LABEL
    rows = [sheet[row * height + LABEL :][:CELL, column * width :][:, :width] for row in range(2) for column in range(COLUMNS)]
    middle = np.array([cell[CELL // 2, width // 2].mean() for cell in rows]).reshape(2, COLUMNS)
    expected = np.linspace(60, 240, FRAMES)[np.linspace(0, FRAMES - 1, COLUMNS).round().astype(int)]
    np.testing.assert_allclose(middle[0], expected, atol=6)
    assert sorted(set(middle[1].round(-1))) == [60, 240], "the shorter one has two frames"
    assert rows[-1][2, width // 2].max() < 20, "a wider picture has bars above and below"
    assert (sheet[:LABEL] < 128).any(), "there is a label"
    assert (sheet[:LABEL] > 250).mean() > 0.7


def test_the_grid_plays_at_each_ones_rate_and_starts_again(tmp_path: Path) -> None:
    made = preview(write_shades(tmp_path / "shades"), str(tmp_path / "out"))
    grid = frames_of(made.video).astype(int)
    width = grid.shape[2] // 2
    assert grid.shape[:2] == (FRAMES, CELL)
    middle = grid[:, CELL // 2, [width // 2, width + width // 2]].mean(-1)
    np.testing.assert_allclose(middle[:, 0], np.linspace(60, 240, FRAMES), atol=8)
    # At half the rate each frame stands twice; two frames are over after four.
    np.testing.assert_allclose(middle[:, 1], [60, 60, 240, 240] * 2 + [60, 60], atol=8)


def test_a_seed_gives_the_same_bytes_and_both_splits(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", "toy", episodes=12)
    heldout = {episode.key for episode in folder.split("heldout")}
    made = [preview(folder, str(tmp_path / name), 4, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert made[0].keys == made[1].keys != made[2].keys
    for kind in ("sheet", "video"):
        first, again = (Path(getattr(one, kind)).read_bytes() for one in made[:2])
        assert first == again
    for one in made:
        assert [key in heldout for key in one.keys] == [False, False, True, True]
    assert len(preview(folder, str(tmp_path / "all"), 60).keys) == 12


def test_unreadable_episodes_are_named(tmp_path: Path) -> None:
    folder = write_clips(str(tmp_path / "clips"))
    shard, offset = spot(tmp_path / "clips", "clip-2", "mp4")
    flip(shard, offset + 100)
    made = preview(folder, str(tmp_path / "out"))
    assert set(made.keys) == set(VIDEOS) - {"clip-2"}
    assert len(made.unreadable) == 1
    assert f"{shard.name}: clip-2.mp4" in made.unreadable[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="none of 5 episodes can be read"):
        preview(folder, str(tmp_path / "out"))
    for clips in (0, -1, 1000):
        with pytest.raises(UserError, match=f"clips {clips}: give a number from 1 to 64"):
            preview(folder, str(tmp_path / "out"), clips)


def test_to_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(tmp_path / "s3", "bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        write_clips("s3://bucket/clips")
        assert run_command(data.main, ["preview", "s3://bucket/clips", "--output", "s3://bucket/out", "--clips", "3"]) == 0
        lines = capsys.readouterr().out.splitlines()
        (made,) = json.loads(lines[-1])["previews"]
        assert lines[:-1] == [made["sheet"], made["video"]]
        assert made["sheet"].startswith("s3://bucket/out/toy-")
        assert len(made["keys"]) == 3
        assert len(frames_of(made["sheet"])) == 1
        assert len(frames_of(made["video"])) == 12


def test_figures_of_a_folder(tmp_path: Path) -> None:
    folder = write_shades(tmp_path / "shades")
    found = summarise(folder)
    assert (found["source"], found["domain"], found["episodes"], found["train"], found["heldout"]) == ("shades", "human", 2, 1, 1)
    assert found["frames"] == FRAMES + FRAMES // 4
    assert found["hours"] == pytest.approx((FRAMES / 4 + FRAMES // 4 / 2) / 3600)
    assert found["seconds"] == {"shortest": 1.0, "5 %": 1.075, "median": 1.75, "95 %": 2.425, "longest": 2.5}
    assert found["fps"] == {"4": 1, "2": 1}
    assert found["sizes"] == {"32 x 32": 1, "64 x 32": 1}
    assert found["bytes"] == sum(folder.shards.values())
    assert found["bytes_per_frame"] == found["bytes"] / found["frames"]
    assert (found["recordings"], found["segments"], found["left_out"]) == ({}, {}, 0)


def test_info_prints_a_table_and_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clips(str(tmp_path / "clips"))
    record = {"settings": {}, "recordings": {"packed": 5, "damaged": 2}, "segments": {"packed": 5, "static": 1}}
    skipped = [["a.mp4", "damaged", "recording"], ["b.mp4", "damaged", "recording"], ["c.mp4 0 s", "static", "segment"]]
    (tmp_path / "clips" / PACKING).write_text(json.dumps(record | {"skipped": skipped}))
    shutil.copytree(tmp_path / "clips", tmp_path / "again")
    assert run_command(data.main, ["info", str(tmp_path / "clips"), str(tmp_path / "again")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = json.loads(lines[-1])["folders"]
    assert first | {"folder": ""} == second | {"folder": ""}
    assert first["datasets"] == [{"dataset": "drawn", "licence": "none", "episodes": 5, "hours": pytest.approx(12 / 3600)}]
    assert (first["recordings"], first["segments"], first["left_out"]) == (record["recordings"], record["segments"], 3)
    assert first["with_actions"] == 2
    for text in ("damaged: 2", "static: 1", "64 x 48: 5", "dataset drawn"):
        assert sum(text in line for line in lines[:-1]) == 2, text


@pytest.mark.parametrize("action", ["info", "lint", "preview"])
def test_an_unknown_folder_is_one_line(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")] if action == "preview" else []
    assert run_command(data.main, [action, str(tmp_path / "none"), *output]) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message == [
        f"error: {tmp_path}/none/index.parquet: not found; {tmp_path}/none is no finished shard folder (jobs/pack.py makes one)"
    ]
    assert not (tmp_path / "out").exists()

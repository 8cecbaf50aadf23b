"""The pack job as a user runs it: video files of any container, or a simulator, to a shard folder."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cola_dist.data.decode import decode_clip
from cola_dist.data.shards import lint, open_folder, read_member
from cola_dist.data.sources.video import VideoFolder
from cola_dist.errors import UserError
from tests.data.test_lerobot import write_v3
from tests.data.videos import encoded, moving_square, real_videos, rotated
from tests.s3 import serve

ROOT = Path(__file__).parents[2]


def pack(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "pack.py"), *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "videos"
    (path / "deep").mkdir(parents=True)
    for index, container in enumerate(("mp4", "mkv", "mov", "avi", "webm", "gif")):
        (path / f"clip {index}.{container}").write_bytes(encoded(moving_square(25, seed=index), container))
    (path / "deep" / "long.mp4").write_bytes(encoded(moving_square(140), "mp4"))
    (path / "short.mp4").write_bytes(encoded(moving_square(8), "mp4"))
    (path / "broken.mp4").write_bytes(encoded(moving_square(30), "mp4")[:700])
    (path / "empty.avi").write_bytes(b"")
    (path / "notes.txt").write_text("not a video\n" * 50)
    (path / "table.json").write_text("{}")
    return path


def test_video_folder_to_shards(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    answer = last_line(pack("video", str(folder), "--output", str(output), "--source", "toy", "--resolution", "32"))
    assert answer["inputs"] == {"packed": 7, "shorter than 2 s": 1, "damaged": 2, "not a video": 2}
    assert lint(str(output)) == []
    opened = open_folder(str(output))
    assert (opened.source, opened.domain, opened.content_hash) == ("toy", "human", answer["content_hash"])
    lengths = {episode.key: episode.frames for episode in opened.episodes}
    assert lengths == {f"clip-{i}-00000": 25 for i in range(6)} | {"deep-long-00000": 64, "deep-long-00001": 76}
    assert all(episode.fps == pytest.approx(10, rel=0.02) for episode in opened.episodes)
    about = json.loads(read_member(opened, opened.episodes[-1], "json"))
    assert (about["width"], about["height"]) == (42, 32)
    assert about["provenance"] == {"file": "deep/long.mp4", "start_s": 6.4, "end_s": 14.0}
    # Whole files are held out.
    assert len({episode.key[:-6] for episode in opened.split("heldout")}) == 1
    again = last_line(pack("video", str(folder), "--output", str(tmp_path / "again"), "--source", "toy", "--resolution", "32"))
    assert again["content_hash"] == answer["content_hash"]


def test_robot_datasets_to_shards(tmp_path: Path) -> None:
    """The real BridgeData records and a LeRobot dataset, by the same job as videos."""
    dataset = write_v3(tmp_path / "dataset")
    for family, folder in (("rlds", real_videos()), ("lerobot", dataset)):
        answer = last_line(pack(family, str(folder), "--output", str(tmp_path / family), "--source", "arm", "--resolution", "32"))
        opened = open_folder(answer["output"])
        assert (opened.source, opened.domain, len(opened.episodes)) == ("arm", "robot", answer["episodes"])
        assert answer["inputs"]["packed"] >= 3
        assert all("actions.npy" in episode.members for episode in opened.episodes)
        assert lint(answer["output"]) == []
    refused = pack("lerobot", str(dataset), "--output", str(tmp_path / "none"), "--camera", "left")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "no colour camera left" in refused.stderr


def test_segments_are_the_frames_of_the_file(folder: Path, tmp_path: Path) -> None:
    video = moving_square(140)
    segments = [episode.video for episode in VideoFolder(str(folder / "deep"), 64, 0.1).episodes()]
    joined = np.concatenate(segments)
    assert joined.shape == video.shape
    assert np.abs(joined.astype(int) - video).mean() < 6
    shifted = np.abs(joined[1:].astype(int) - video[:-1]).mean()
    assert shifted > 3 * np.abs(joined.astype(int) - video).mean(), "frames must not be shifted in time"


def test_single_file_holds_out_its_end(folder: Path) -> None:
    path = folder / "deep" / "long.mp4"
    for frames, expected in ((84, ["train", "heldout"]), (212, ["train", "train", "train", "heldout"]), (40, ["train"])):
        path.write_bytes(encoded(moving_square(frames), "mp4"))
        videos = VideoFolder(str(folder / "deep"), 64, 0.1)
        episodes = list(videos.episodes())
        assert [episode.split for episode in episodes] == expected
        assert videos.segments == len(episodes)
        assert sum(len(episode.video) for episode in episodes) == frames


def test_rotation_is_applied(tmp_path: Path) -> None:
    upright = encoded(moving_square(25), "mp4")
    for name, data in (("plain", upright), ("turned", rotated(upright))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip.mp4").write_bytes(data)
    plain, turned = (next(VideoFolder(str(tmp_path / name), 64, 0.1).episodes()).video for name in ("plain", "turned"))
    assert turned.shape == (25, 64, 48, 3)
    np.testing.assert_array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))  # clockwise


def test_to_and_from_object_storage(folder: Path, tmp_path: Path) -> None:
    with serve(tmp_path, "bucket") as s3:
        done = last_line(pack("video", str(folder), "--output", "s3://bucket/shards", **s3.environment))
        assert sorted(path.name for path in (s3.root / "bucket" / "shards").iterdir()) == ["index.parquet", "video-00000.tar"]
        assert lint(str(s3.root / "bucket" / "shards")) == []
        local = last_line(pack("video", "s3://videos", "--output", str(tmp_path / "local"), **s3.environment))
        assert local["content_hash"] == done["content_hash"]
        refused = pack("video", str(folder), "--output", "s3://bucket/new", **(s3.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}))
    assert refused.returncode == 2
    assert "AWS_SECRET_ACCESS_KEY" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_mistakes_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    for given, says in (("nowhere", "no such folder"), ("text", "no usable video among 1 files (1 not a video)")):
        done = pack("video", str(tmp_path / given), "--output", str(tmp_path / "out"))
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    shown = pack("video", str(tmp_path / "text"), "--output", str(tmp_path / "out"), "--debug")
    assert shown.returncode != 0
    assert "Traceback" in shown.stderr
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="held-out share"):
            VideoFolder(str(folder), 32, share)


def test_real_recordings(tmp_path: Path) -> None:
    source = real_videos()
    chosen = tmp_path / "real"
    chosen.mkdir()
    for path in source.iterdir():
        if path.stat().st_size < 500_000 or path.suffix in (".md", ".tfrecord"):
            (chosen / path.name).symlink_to(path)
    answer = last_line(pack("video", str(chosen), "--output", str(tmp_path / "out"), "--resolution", "64"))
    opened = open_folder(str(tmp_path / "out"))
    assert lint(opened.uri) == []
    assert answer["heldout"]
    assert len(opened.split("heldout")) >= 1
    assert all(episode.frames / episode.fps >= 2.0 for episode in opened.episodes)
    for episode in opened.episodes:
        assert decode_clip(read_member(opened, episode, "mp4"), episode.frames - 5, 5, 1, 32, None).std() > 5, "pictures, not blanks"


def test_simulated_episodes_are_reproducible(tmp_path: Path) -> None:
    missing = [name for name in ("mujoco", "metaworld", "gymnasium_robotics") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the sim extra ({', '.join(missing)} missing)")
    for domain, actions in (("robot", True), ("hand", False)):
        outputs = [str(tmp_path / f"{domain}-{n}") for n in range(2)]
        answers = [last_line(pack("simulate", "--output", output, "--domain", domain, "--episodes", "2")) for output in outputs]
        assert answers[0]["content_hash"] == answers[1]["content_hash"]
        folder = open_folder(outputs[0])
        assert lint(outputs[0]) == []
        assert len(folder.split("heldout")) == 1
        for episode in folder.episodes:
            assert ("actions.npy" in episode.members) == actions
            if actions:
                moves = np.load(io.BytesIO(read_member(folder, episode, "actions.npy")))[:, :3]
                hand = np.diff(np.load(io.BytesIO(read_member(folder, episode, "state.npy")))[:, :3], axis=0)
                assert np.corrcoef(moves.ravel(), hand.ravel())[0, 1] > 0.8, "a stored action must be what the arm did"


def test_simulator_missing_says_what_to_install(tmp_path: Path) -> None:
    if importlib.util.find_spec("mujoco") is not None:
        pytest.skip("the sim extra is installed here")
    done = pack("simulate", "--output", str(tmp_path / "out"), "--episodes", "1")
    assert done.returncode == 2
    assert "pip install 'cola-dist[sim]'" in done.stderr
    assert "libegl1" in done.stderr
    assert len(done.stderr.splitlines()) == 1

"""The pack job as a user runs it: every family, to and from object storage, stopped and started again, and past what kills its tasks."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import webdataset
from ray import cloudpickle

from cola_dist.command import run_command
from cola_dist.data.decode import decode_clip, decode_episode
from cola_dist.data.lint import lint
from cola_dist.data.pack_tasks import pack_on_ray
from cola_dist.data.packing import Packing, Report
from cola_dist.data.shards import INDEX, PACKING, open_folder, read_member
from cola_dist.data.sources import Item, SourceEpisode
from jobs import pack as pack_job
from tests.data.lerobot_files import write_v3
from tests.data.robot_data import libero
from tests.data.videos import encoded, moving_square, real_videos
from tests.s3 import serve

ROOT = Path(__file__).parents[2]


def command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "pack.py"), *args]


def pack(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command(*args), capture_output=True, text=True, env=env, timeout=300, check=False)


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
    return path


@pytest.mark.ray
def test_a_folder_of_videos_and_what_comes_to_it_later(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("video", "--input", str(folder), "--output", str(output), "--source", "toy", "--resolution", "32")
    done = pack(*options)
    answer = last_line(done)
    assert answer["recordings"]["packed"] == 7
    assert sum(answer["recordings"].values()) == 11
    assert answer["recordings"]["shorter than 2 s"] == 1
    assert answer["items_packed_now"] == 11
    for name, count in answer["recordings"].items():
        assert f"recordings: {name}" in done.stderr
        assert count > 0
    left = {name for name, _, level in json.loads((output / PACKING).read_text())["skipped"] if level == "recording"}
    assert left == {"short.mp4", "broken.mp4", "empty.avi", "notes.txt"}
    assert lint(str(output)) == []
    opened = open_folder(str(output))
    assert (opened.source, opened.domain, opened.content_hash) == ("toy", "human", answer["content_hash"])
    assert sum(episode.frames for episode in opened.episodes) == 6 * 25 + 140
    assert all((episode.width, episode.height) == (42, 32) for episode in opened.episodes)
    samples = {s["__key__"]: s["mp4"] for s in webdataset.WebDataset([f"{output}/{name}" for name in opened.shards], shardshuffle=False)}
    assert samples == {episode.key: read_member(opened, episode, "mp4") for episode in opened.episodes}

    again = last_line(pack(*options))
    assert (again["items_packed_now"], again["content_hash"]) == (0, answer["content_hash"])
    (folder / "new.mp4").write_bytes(encoded(moving_square(30, seed=9), "mp4"))
    more = last_line(pack(*options))
    assert (more["items_packed_now"], more["episodes"]) == (1, answer["episodes"] + 1)


@pytest.mark.ray
def test_robot_families_to_and_from_object_storage(tmp_path: Path) -> None:
    write_v3(tmp_path / "inputs" / "lerobot")
    (tmp_path / "inputs" / "robot-files").mkdir()
    libero(tmp_path / "inputs" / "robot-files" / "open_the_drawer_demo.hdf5")
    with serve(tmp_path, "inputs", "packed") as s3:
        for family, inside in (("lerobot", "s3://inputs/lerobot"), ("robot-files", "s3://inputs/robot-files")):
            options = (family, "--input", inside, "--source", "arm", "--resolution", "32", "--cut.min-seconds", "0.5", "--cut.still", "0")
            answer = last_line(pack(*options, "--output", f"s3://packed/{family}", **s3.environment))
            opened = open_folder(str(s3.root / "packed" / family))
            assert (opened.source, opened.domain, len(opened.episodes)) == ("arm", "robot", answer["episodes"])
            assert answer["recordings"]["packed"] >= 1
            assert all("actions.npy" in episode.members for episode in opened.episodes)
            assert lint(opened.uri) == []
            assert (s3.root / "packed" / family / INDEX).exists()


@pytest.mark.ray
def test_real_recordings(tmp_path: Path) -> None:
    """All the real videos, and the real BridgeData records."""
    for family, options in (("video", ()), ("rlds", ("--source", "bridge"))):
        answer = last_line(pack(family, "--input", str(real_videos()), "--output", str(tmp_path / family), "--resolution", "64", *options))
        opened = open_folder(str(tmp_path / family))
        assert lint(opened.uri) == []
        assert answer["heldout"] >= 1
        assert all(episode.frames / episode.fps >= 2.0 for episode in opened.episodes)
        for episode in opened.episodes:
            clip = decode_clip(read_member(opened, episode, "mp4"), episode.frames - 5, 5, 1, 32, None)
            assert clip.std() > 5, "pictures, not blanks"
    assert answer["recordings"] == {"packed": 25}
    videos = json.loads((tmp_path / "video" / PACKING).read_text())
    assert videos["recordings"]["packed"] >= 7
    assert {name for name, reason, _ in videos["skipped"] if reason == "not a video"} == {
        "MANIFEST.md",
        "bridge_rlds_features.json",
        "bridge_rlds_train.tfrecord",
        "language_table_robot.json",
    }


@pytest.mark.ray
def test_a_job_that_was_killed_goes_on_where_it_stood(tmp_path: Path) -> None:
    source, output = tmp_path / "videos", tmp_path / "out"
    source.mkdir()
    for number in range(24):
        (source / f"{number:02d}.mp4").write_bytes(encoded(moving_square(120, 240, 320, seed=number), "mp4"))
    options = ("video", "--input", str(source), "--output", str(output))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command(*options), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while len(list(output.glob("parts/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(job.pid).children(recursive=True)
    for process in [psutil.Process(job.pid), *children]:
        process.send_signal(signal.SIGKILL)
    job.wait(30)
    psutil.wait_procs(children, 30)
    done = len(list(output.glob("parts/*.parquet")))
    assert 2 <= done < 8, "it was stopped in the middle"
    assert not (output / INDEX).exists()
    answer = last_line(pack(*options))
    assert 0 < answer["items_packed_now"] < 24
    assert answer["recordings"] == {"packed": 24}
    assert lint(str(output)) == []


@dataclass(frozen=True)
class Deadly:
    """Items of which some end the process that reads them."""

    source: str = "toy"
    domain: str = "robot"

    def items(self) -> Sequence[Item]:
        return [Item(f"{number}-deadly" if number in (3, 9) else f"{number}", 1) for number in range(12)]

    def episodes(self, item: Item) -> Iterator[SourceEpisode]:
        if item.name.endswith("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        video = np.random.default_rng(int(item.name)).integers(0, 255, (4, 16, 16, 3), np.uint8)
        yield SourceEpisode(f"key-{item.name}", video, 5.0, {}, item.name, item.name)


@pytest.mark.ray
def test_what_kills_its_process_is_found_and_left_out(tmp_path: Path) -> None:
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        packing, reports = Packing(Deadly(), str(tmp_path), {}), list[Report]()
        items = packing.remaining()
        pack_on_ray(packing, [items[:6], items[6:]], reports.append)
    finally:
        ray.shutdown()
        cloudpickle.unregister_pickle_by_value(here)
    folder = packing.finish()
    assert [episode.key for episode in folder.episodes] == sorted(f"key-{n}" for n in range(12) if n not in (3, 9))
    assert sorted(entry for report in reports for entry in report.skipped) == [
        (f"{number}-deadly", "ends the process", "recording") for number in (3, 9)
    ]
    assert packing.remaining() == []


def test_mistakes_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    for options, says in (
        (("video", "--input", str(tmp_path / "nowhere")), "no such folder"),
        (("video", "--input", str(tmp_path / "nothing")), "nothing in it"),
        (("video", "--input", str(folder), "--preset", "eg4d"), "ego4d"),
        (("video", "--input", str(folder), "--heldout-share", "1"), "held-out share"),
        (("video", "--input", str(folder), "--resolution", "8"), "at least 16"),
        (("video", "--input", str(folder), "--cut.fps", "0"), "give a rate above 0"),
        (("video", "--input", str(folder), "--cut.scene-cut", "101"), "cut.scene_cut is 0 to 100"),
        (("lerobot", "--input", str(folder)), "meta/info.json"),
        (("rlds", "--input", str(folder)), "no TFRecord files"),
    ):
        code = run_command(pack_job.main, [*options, "--output", str(tmp_path / "out")])
        out, err = capsys.readouterr()
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith("error: ")
        assert says in err
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_drawn_episodes_are_reproducible_and_show_what_their_actions_say(tmp_path: Path) -> None:
    outputs = [str(tmp_path / f"square-{n}") for n in range(2)]
    hashes = {last_line(pack("simulate", "--output", o, "--domain", "square", "--episodes", "5"))["content_hash"] for o in outputs}
    assert len(hashes) == 1
    assert lint(outputs[0]) == []
    folder = open_folder(outputs[0])
    for episode in folder.episodes:
        moves = np.load(io.BytesIO(read_member(folder, episode, "actions.npy")))
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in decode_episode(read_member(folder, episode, "mp4"))]
        bright = [np.argwhere((frame - np.median(frames, 0)).sum(2) > 150).mean(0) for frame in frames]
        assert len(moves) == len(frames) - 1
        assert np.corrcoef(np.diff(bright, axis=0).ravel(), moves.ravel())[0, 1] > 0.8


@pytest.mark.ray
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

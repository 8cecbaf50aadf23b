"""Robot episodes in HDF5 and npz files: which picture goes with which action, in every layout, and what a user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from cola_dist.data.sources import Skipped, SourceEpisode, key_of
from cola_dist.data.sources.cut import CutRules
from cola_dist.errors import UserError
from tests.data.robot_data import (
    ENVIRONMENT,
    STEPS,
    aloha,
    demo,
    episodes,
    jpegs,
    libero,
    npz,
    numbered,
    opened,
    read,
    reasons,
    robomimic,
    rows,
    write_hdf5,
)
from tests.data.videos import moving_square
from tests.s3 import serve


def test_robomimic(tmp_path: Path) -> None:
    arrays = {**demo(10), **demo(2), **demo(0), "mask/valid": np.array([b"demo_2"]), "mask/train": [b"demo_0"]}
    write_hdf5(tmp_path / "lift" / "ph.hdf5", arrays, env_args=json.dumps(ENVIRONMENT))
    found = episodes(tmp_path, fps=3.0, licence="MIT")
    assert [(episode.recording, episode.split) for episode in found] == [
        ("lift/ph.hdf5#demo_0", "train"),
        ("lift/ph.hdf5#demo_2", "heldout"),
        ("lift/ph.hdf5#demo_10", ""),
    ]
    assert [episode.key for episode in found] == [f"{key_of('lift/ph.hdf5')}-demo_{number}-00000" for number in (0, 2, 10)]
    assert len({episode.group for episode in found}) == 3
    for number, episode in zip((0, 2, 10), found, strict=True):
        np.testing.assert_array_equal(episode.video, moving_square(STEPS, seed=number))
        actions, state = rows(episode)
        np.testing.assert_array_equal(actions, numbered(STEPS - 1))
        np.testing.assert_array_equal(state, numbered(width=9))
        assert episode.fps == 20, "the file says it"
    assert found[1].meta == {
        "embodiment": "Panda",
        "camera": "agentview_image",
        "task": "Lift",
        "action": "actions",
        "state": "robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos",
        "licence": "MIT",
        "provenance": {"dataset": tmp_path.name, "file": "lift/ph.hdf5", "episode": "demo_2", "start_s": 0.0, "end_s": 0.6},
    }


def test_libero_shows_what_an_action_led_to_bottom_row_first(tmp_path: Path) -> None:
    problem = json.dumps({"language_instruction": '"open the drawer"'})
    libero(tmp_path / "a_demo.hdf5", macros_image_convention="opengl", problem_info=problem, env_args=json.dumps({"env_name": "Libero"}))
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.video, moving_square(STEPS))
    actions, state = rows(episode)
    np.testing.assert_array_equal(actions, numbered()[1:], "row 0 led to frame 0")
    np.testing.assert_array_equal(state, numbered(width=9))
    about = episode.meta["task"], episode.meta["camera"], episode.meta["state"], episode.meta["licence"]
    assert about == ("open the drawer", "agentview_rgb", "joint_states, gripper_states", "as the original dataset")


@pytest.mark.parametrize(("attributes", "turned", "first"), [({"macros_image_convention": "opencv"}, False, 1), ({}, True, 0)])
def test_libero_rendered_otherwise(tmp_path: Path, attributes: dict[str, str], turned: bool, first: int) -> None:
    libero(tmp_path / "a.hdf5", **attributes)
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.video, moving_square(STEPS)[:, :: 1 if turned else -1])
    np.testing.assert_array_equal(rows(episode)[0], numbered()[first : first + STEPS - 1])


def test_pictures_of_other_datasets_stay_as_they_are_unless_noted(tmp_path: Path) -> None:
    robomimic(tmp_path / "upright" / "a.hdf5")
    write_hdf5(tmp_path / "noted" / "a.hdf5", demo(), macros_image_convention="opengl")
    upright, noted = episodes(tmp_path / "upright")[0].video, episodes(tmp_path / "noted")[0].video
    np.testing.assert_array_equal(upright, noted[:, ::-1])


def test_actions_and_state_follow_the_frames_that_are_kept(tmp_path: Path) -> None:
    robomimic(tmp_path / "a.hdf5")
    (episode,) = episodes(tmp_path, rules=CutRules(fps=10.0, min_seconds=0.5, scene_cut=0, still=0))
    actions, state = rows(episode)
    kept = state[:, 0].astype(int)
    assert (episode.fps, len(kept)) == (10, STEPS // 2)
    np.testing.assert_array_equal(episode.video, moving_square(STEPS)[kept])
    np.testing.assert_allclose(actions[:, 0], (kept[:-1] + kept[1:] - 1) / 2)


@pytest.mark.parametrize("form", ["plain", "padded", "bytes", "ragged"])
@pytest.mark.parametrize("compress", [False, True])
def test_aloha(tmp_path: Path, form: str, compress: bool) -> None:
    video = moving_square(STEPS)
    stored = video[..., ::-1] if compress and form != "plain" else video
    pictures: Any = video
    if form != "plain":
        # Bytes as HDF5 has them: rows filled up with zeros, texts of one length, or rows of their own length.
        files = jpegs(stored)
        longest = max(map(len, files))
        padded = np.array([np.frombuffer(file.ljust(longest, b"\0"), np.uint8) for file in files])
        ragged = np.empty(STEPS, h5py.vlen_dtype(np.uint8))
        ragged[:] = [np.frombuffer(file, np.uint8) for file in files]
        pictures = {"padded": padded, "bytes": np.array(files), "ragged": ragged}[form]
    wrist = 255 - video
    aloha(
        tmp_path / "episode_3.hdf5", {"cam_high": pictures, "cam_left_wrist": wrist, "cam_high_depth": video}, sim=False, compress=compress
    )
    (episode,) = episodes(tmp_path, rules=CutRules(fps=50.0, min_seconds=0.2, scene_cut=0, still=0), fps=50.0)
    assert np.abs(episode.video.astype(int) - video).mean() < (4 if form != "plain" else 1e-9), "red is red, the square where it was"
    assert (episode.key, episode.recording) == (f"{key_of('episode_3.hdf5')}-00000", "episode_3.hdf5")
    actions, state = rows(episode)
    np.testing.assert_array_equal(actions, numbered(STEPS - 1, 14))
    np.testing.assert_array_equal(state, numbered(width=14))
    assert (episode.fps, episode.meta["camera"], episode.meta["action"], episode.meta["state"]) == (50, "cam_high", "action", "qpos")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("images", "actions", "state"), ("rgb", "action", "proprio"), ("observations", "actions", "qpos")])
def test_npz(tmp_path: Path, save: Callable[..., None], names: tuple[str, str, str]) -> None:
    images, action, proprio = names
    video = moving_square(STEPS)
    columns_first = np.asfortranarray(numbered(width=2) * [1, 0.5])
    save(tmp_path / "7.npz", **{images: video, action: numbered(STEPS - 1, 3), proprio: columns_first, "goal_image": 0 * video})
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.video, video)
    actions, state = rows(episode)
    np.testing.assert_array_equal(actions, numbered(STEPS - 1, 3), "one row less than frames: all of them")
    np.testing.assert_array_equal(state, columns_first)
    assert (episode.meta["camera"], episode.meta["embodiment"], episode.fps) == (images, "unknown", 20)


@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
def test_channels_first_and_floats(tmp_path: Path, suffix: str) -> None:
    video = moving_square(STEPS)
    floats = np.moveaxis(video, 3, 1).astype(np.float32) / 255
    if suffix == "npz":
        npz(tmp_path / "a.npz", images=floats)
    else:
        robomimic(tmp_path / "a.hdf5", {"obs/agentview_image": floats})
    np.testing.assert_array_equal(episodes(tmp_path)[0].video, video)


def test_pictures_become_small_and_memory_stays_bounded(tmp_path: Path) -> None:
    """More pictures than one read takes, in HDF5 chunks that its reads do not divide, come out whole and in order."""
    video = moving_square(40, 300, 401)
    npz(tmp_path / "npz" / "a.npz", images=video)
    (tmp_path / "hdf5").mkdir()
    with h5py.File(tmp_path / "hdf5" / "a.h5", "w") as file:
        file.create_dataset("observations/images/top", data=video, chunks=(7, 75, 101, 3), compression="gzip")
    found = [episodes(tmp_path / name, resolution=101)[0].video for name in ("npz", "hdf5")]
    assert found[0].shape == (40, 100, 134, 3)
    np.testing.assert_array_equal(found[0], found[1])
    left = [int(np.flatnonzero(frame[0, :, 1] > 150)[0]) for frame in found[0][:8]]
    np.testing.assert_allclose(left, np.arange(8), atol=1.1)


def test_a_camera_on_the_hand_comes_last_and_depth_never(tmp_path: Path) -> None:
    video = moving_square(STEPS)
    for number, names in enumerate((["a_depth", "cam_left_wrist", "top"], ["seg_a", "gripper_camera"], ["front", "image"])):
        aloha(tmp_path / f"{number}.h5", dict.fromkeys(names, video))
    assert [episode.meta["camera"] for episode in episodes(tmp_path)] == ["top", "gripper_camera", "image"]


def test_the_camera_is_chosen_by_name(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a_low_dim.hdf5", demo(0, {"obs/agentview_image": None, "obs/robot0_eye_in_hand_image": None}))
    (tmp_path / "b.hdf5").write_bytes(b"")
    robomimic(tmp_path / "c.hdf5")
    robomimic(tmp_path / "d.hdf5", {"obs/robot0_eye_in_hand_image": None})
    found = read(tmp_path, camera="robot0_eye_in_hand_image")
    assert [skipped.reason for skipped in found if isinstance(skipped, Skipped)] == ["no such camera", "empty file", "no such camera"]
    (episode,) = (episode for episode in found if isinstance(episode, SourceEpisode))
    np.testing.assert_array_equal(episode.video, 255 - moving_square(STEPS))
    with pytest.raises(UserError, match=r"c.hdf5: no camera side; there are agentview_image, robot0_eye_in_hand_image$"):
        opened(tmp_path, camera="side")


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"actions": numbered(STEPS + 1)}, "without actions (mismatched rows)"),
        ({"actions": numbered(STEPS - 2)}, "without actions (mismatched rows)"),
        ({"actions": np.array([b"up"] * STEPS)}, "without actions (mismatched rows)"),
        ({"actions": numbered() * np.nan}, "without actions (not finite)"),
        ({"actions": numbered() + 1e300}, "without actions (not finite)"),
        ({"obs/robot0_eef_pos": numbered(3)}, "without state (mismatched rows)"),
        ({"actions": numbered(3), "obs/robot0_eef_pos": numbered() - np.inf}, "without actions (mismatched rows) and state (not finite)"),
        ({"actions": None}, ""),
    ],
)
def test_video_is_kept_without_rows_that_cannot_be_used(tmp_path: Path, changed: dict[str, Any], note: str) -> None:
    robomimic(tmp_path / "a.hdf5", changed)
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.video, moving_square(STEPS))
    assert episode.note == note
    lost = "actions" in changed, any(name.startswith("obs/") for name in changed)
    assert (episode.actions is None, episode.state is None) == lost == (not episode.meta["action"], not episode.meta["state"])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((STEPS, 48, 64, 3), np.int64), "pictures neither uint8 nor from 0 to 1"),
        (np.full((STEPS, 48, 64, 3), 200.0), "pictures neither uint8 nor from 0 to 1"),
        (np.full((STEPS, 48, 64, 3), np.nan), "pictures neither uint8 nor from 0 to 1"),
        (np.zeros((STEPS, 48, 64), np.uint8), "no colour camera"),
        (np.zeros((STEPS, 48, 64, 4), np.uint8), "no colour camera"),
        (np.zeros((0, 48, 64, 3), np.uint8), "shorter than 0.5 s"),
        (np.zeros((5, 48, 64, 3), np.uint8), "shorter than 0.5 s"),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path: Path, image: NDArray[Any], reason: str) -> None:
    robomimic(tmp_path / "hdf5" / "a.hdf5", {"obs/agentview_image": image, "obs/robot0_eye_in_hand_image": None})
    npz(tmp_path / "npz" / "a.npz", images=image)
    aloha(tmp_path / "aloha" / "a.hdf5", {"top": image})
    assert [reasons(tmp_path / name) for name in ("hdf5", "npz", "aloha")] == [{reason}] * 3


def test_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with serve(tmp_path, "bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        robomimic(tmp_path / "bucket" / "robots" / "a.hdf5")
        npz(tmp_path / "bucket" / "robots" / "b.npz", images=moving_square(STEPS))
        found = episodes("s3://bucket/robots")
        assert [episode.recording for episode in found] == ["a.hdf5#demo_0", "b.npz"]
        for episode in found:
            np.testing.assert_array_equal(episode.video, moving_square(STEPS))
        with pytest.raises(UserError, match="no camera top; there are agentview_image, robot0_eye_in_hand_image"):
            opened("s3://bucket/robots", camera="top")
        origin = opened("s3://bucket/robots")
        next(origin.episodes(origin.items()[0]))
    assert not list(temporary.iterdir()), "downloads are removed, also where only a part of them was read"


def test_what_a_user_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no robot files \(\.hdf5, \.h5, \.npz\); give the folder that holds them"):
        opened(tmp_path)
    robomimic(tmp_path / "a.HDF5")
    assert [item.size for item in opened(tmp_path).items()] == [(tmp_path / "a.HDF5").stat().st_size]
    origin = opened(tmp_path)
    (tmp_path / "a.HDF5").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.HDF5"):
        list(origin.episodes(origin.items()[0]))
    robomimic(tmp_path / "a.HDF5")
    for options in ({"fps": 0.0}, {"fps": float("nan")}, {"resolution": 8}):
        with pytest.raises(UserError, match="give at least 16 pixels, and a rate above 0 and at most 240"):
            opened(tmp_path, **options)

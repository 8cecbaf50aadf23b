"""Small robot data sets as robomimic, LIBERO, ALOHA and numpy write them, drawn here; and reading them through their origin."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
from numpy.typing import NDArray

from cola_dist.data.sources import Skipped, SourceEpisode
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.robot_files import RobotFilesOrigin
from tests.data.videos import moving_square

STEPS = 12
RULES = CutRules(fps=20.0, segment_frames=64, min_seconds=0.5, scene_cut=0, still=0)
ENVIRONMENT = {"env_name": "Lift", "env_kwargs": {"robots": ["Panda"], "control_freq": 20}}


def opened(folder: Path | str, rules: CutRules = RULES, resolution: int = 48, **options: Any) -> RobotFilesOrigin:
    origin: RobotFilesOrigin = pickle.loads(pickle.dumps(RobotFilesOrigin(str(folder), "robots", resolution, rules, **options)))
    return origin


def read(folder: Path | str, **options: Any) -> list[SourceEpisode | Skipped]:
    origin = opened(folder, **options)
    return [found for item in origin.items() for found in origin.episodes(item)]


def episodes(folder: Path | str, **options: Any) -> list[SourceEpisode]:
    found = read(folder, **options)
    assert all(isinstance(episode, SourceEpisode) for episode in found), found
    return [episode for episode in found if isinstance(episode, SourceEpisode)]


def reasons(folder: Path | str, **options: Any) -> set[str]:
    found = read(folder, **options)
    assert all(isinstance(skipped, Skipped) for skipped in found), found
    return {skipped.reason for skipped in found if isinstance(skipped, Skipped)}


def rows(episode: SourceEpisode) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Its actions and its state."""
    assert episode.actions is not None
    assert episode.state is not None
    assert episode.actions.dtype == episode.state.dtype == np.float32
    assert not episode.note
    return episode.actions, episode.state


def numbered(steps: int = STEPS, width: int = 7) -> NDArray[np.float64]:
    """Rows that tell their number in their first value."""
    return np.arange(steps)[:, None] + np.zeros(width)


def jpegs(video: NDArray[np.uint8]) -> list[bytes]:
    found = []
    for pixels in video:
        encoder: Any = av.CodecContext.create("mjpeg", "w")
        encoder.width, encoder.height, encoder.time_base, encoder.pix_fmt = video.shape[2], video.shape[1], Fraction(1, 50), "yuvj444p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format="yuvj444p")
        found.append(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    return found


def write_hdf5(path: Path, arrays: Mapping[str, Any], **attributes: Any) -> None:
    """``attributes`` go to the group "data" where there is one, else to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        for name, value in attributes.items():
            file.get("data", file).attrs[name] = value


def demo(number: int = 0, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A demonstration as robomimic writes it; ``changed`` replaces arrays or, with none, leaves them out."""
    video = moving_square(STEPS, seed=number)
    arrays: dict[str, Any] = {
        "obs/agentview_image": video,
        "obs/agentview_depth": np.zeros((STEPS, 48, 64, 1), np.float32),
        "obs/robot0_eye_in_hand_image": 255 - video,
        "obs/robot0_eef_pos": numbered(width=3),
        "obs/robot0_eef_quat": numbered(width=4),
        "obs/robot0_gripper_qpos": numbered(width=2),
        "obs/object": numbered(width=10),
        "next_obs/agentview_image": 0 * video,
        "states": numbered(width=32) + 100,
        "actions": numbered(),
    } | dict(changed or {})
    return {f"data/demo_{number}/{name}": array for name, array in arrays.items() if array is not None}


def robomimic(path: Path, changed: Mapping[str, Any] | None = None) -> None:
    write_hdf5(path, demo(0, changed), env_args=json.dumps(ENVIRONMENT))


def libero(path: Path, **attributes: str) -> None:
    video = moving_square(STEPS)[:, ::-1]
    arrays = {"agentview_rgb": video, "eye_in_hand_rgb": 255 - video, "joint_states": numbered(), "gripper_states": numbered(width=2)}
    observations = {f"data/demo_0/obs/{name}": array for name, array in arrays.items()}
    write_hdf5(path, {**observations, "data/demo_0/actions": numbered()}, **attributes)


def aloha(path: Path, cameras: Mapping[str, Any], **attributes: Any) -> None:
    images = {f"observations/images/{name}": array for name, array in cameras.items()}
    write_hdf5(path, {**images, "observations/qpos": numbered(width=14), "action": numbered(width=14)}, **attributes)


def npz(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)

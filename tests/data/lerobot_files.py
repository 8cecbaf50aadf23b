"""LeRobot datasets in both formats, written here: every frame tells its episode and number, so that a shift by one shows."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FPS = 10
LENGTHS = (24, 31, 22, 40, 27)
TOP, WRIST, DEPTH = "observation.images.top", "observation.images.a_wrist", "observation.images.a_range"
TASKS = ("pick the cup", "öffne die Tür")
FEATURE = {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"]}


def drawn(episode: int, frames: int, camera: str = TOP) -> NDArray[np.uint8]:
    """The left half's brightness is the frame's number, the right half's the episode's; the wrist camera sees the negative."""
    video = np.zeros((frames, 48, 64, 3), np.uint8)
    video[:, :, :32] = (16 + 5 * np.arange(frames))[:, None, None, None]
    video[:, :, 32:] = 16 + 20 * episode
    return video if camera == TOP else 255 - video


def told(video: NDArray[np.uint8]) -> tuple[list[int], set[int]]:
    """(frame numbers, episode numbers) that the pictures show."""
    half = video.shape[2] // 2
    left, right = (part.mean((1, 2, 3)) for part in (video[:, :, : half - 8], video[:, :, half + 8 :]))
    return [round((value - 16) / 5) for value in left], {round((value - 16) / 20) for value in right}


def mp4(video: NDArray[np.uint8], codec: str = "libx264") -> bytes:
    # As root, SVT-AV1 puts the thread that calls it before all others of the machine (SCHED_FIFO 99), and with it all that this thread starts later.
    with ThreadPoolExecutor(1) as thread_of_its_own:
        return thread_of_its_own.submit(_mp4, video, codec).result()


def _mp4(video: NDArray[np.uint8], codec: str) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # the table of contents cannot come first in memory
        with av.open(file.name, "w", options={"movflags": "faststart"}) as container:
            stream: Any = container.add_stream(codec, rate=FPS)
            stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
            stream.options = {"g": "5"} | ({"preset": "12"} if codec == "libsvtav1" else {})
            for index, pixels in enumerate(video):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return Path(file.name).read_bytes()


def png(pixels: NDArray[np.uint8]) -> bytes:
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = pixels.shape[1], pixels.shape[0], "rgb24", Fraction(1, 1)  # type: ignore[attr-defined]
    return b"".join(bytes(packet) for packet in codec.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))  # type: ignore[attr-defined]


def actions_of(episode: int, frames: int) -> NDArray[np.float32]:
    return np.stack([np.full(frames, episode), np.arange(frames) / 8], 1).astype(np.float32)


def state_of(episode: int, frames: int) -> NDArray[np.float32]:
    return np.stack([np.arange(frames), np.full(frames, -episode), np.ones(frames)], 1).astype(np.float32)


def rows(episodes: Sequence[int], images: bool) -> pa.Table:
    """The data of some episodes; several make a file of version 3. ``action.joint`` is there because a prefix must not bring it in."""
    columns: dict[str, list[Any]] = {"action": [], "action.joint": [], "observation.state": [], "frame_index": [], "episode_index": []}
    columns |= {"task_index": []} | ({TOP: []} if images else {})
    for episode in episodes:
        frames = LENGTHS[episode]
        columns["action"] += [*actions_of(episode, frames)[:-1].tolist(), [math.nan] * 2]  # the last leads nowhere
        columns["action.joint"] += [[99.0]] * frames
        columns["observation.state"] += state_of(episode, frames).tolist()
        columns["frame_index"] += range(frames)
        columns["episode_index"] += [episode] * frames
        columns["task_index"] += [episode % 2] * frames
        if images:
            columns[TOP] += [{"bytes": png(pixels), "path": f"frame-{t:06d}.png"} for t, pixels in enumerate(drawn(episode, frames))]
    return pa.table(columns)


def save(root: Path, name: str, data: bytes | pa.Table | list[dict[str, Any]]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        (root / name).write_bytes(data)
    elif isinstance(data, list):
        (root / name).write_text("".join(json.dumps(item) + "\n" for item in data))
    else:
        pq.write_table(data, root / name, row_group_size=20)


def info(root: Path, version: str, images: bool, data: str, video: str) -> None:
    features: dict[str, Any] = {"action": {"dtype": "float32", "shape": [2]}, "action.joint": {"dtype": "float32", "shape": [1]}}
    features |= {"observation.state": {"dtype": "float32", "shape": [3]}, TOP: FEATURE | {"dtype": "image" if images else "video"}}
    features |= {} if images else {WRIST: FEATURE, DEPTH: FEATURE | {"info": {"is_depth_map": True}}}
    about = {"codebase_version": version, "robot_type": "toy arm", "fps": FPS, "chunks_size": 2, "features": features}
    save(root, "meta/info.json", json.dumps({**about, "data_path": data, "video_path": None if images else video}).encode())


def write_v2(root: Path, images: bool = False, codec: str = "libx264") -> Path:
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info(root, "v2.1", images, data, "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")
    listed = [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": frames} for e, frames in enumerate(LENGTHS)]
    save(root, "meta/episodes.jsonl", listed)
    save(root, "meta/episodes_stats.jsonl", [{"episode_index": e, "stats": {}} for e in range(len(LENGTHS))])
    save(root, "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
    for e, frames in enumerate(LENGTHS):
        save(root, f"data/chunk-{e // 2:03d}/episode_{e:06d}.parquet", rows([e], images))
        for camera in () if images else (TOP, WRIST):
            save(root, f"videos/chunk-{e // 2:03d}/{camera}/episode_{e:06d}.mp4", mp4(drawn(e, frames, camera), codec))
    return root


def write_v3(root: Path, images: bool = False, codec: str = "libx264", late: float = 0.0) -> Path:
    """Two data files (0 to 3, 4) and two videos (0 to 2, 3 and 4): what is one file on one side is two on the other."""
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    info(root, "v3.0", images, data, "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    listed: list[dict[str, Any]] = []
    for e, frames in enumerate(LENGTHS):
        place = {"episode_index": e, "tasks": [TASKS[e % 2]], "length": frames, "data/chunk_index": 0, "data/file_index": int(e == 4)}
        place |= {"dataset_from_index": sum(LENGTHS[:e]), "dataset_to_index": sum(LENGTHS[: e + 1]), "stats/action/mean": [0.0]}
        start = sum(LENGTHS[:e]) - (sum(LENGTHS[:3]) if e > 2 else 0)
        for camera in () if images else (TOP, WRIST):
            numbers = {"chunk_index": 0, "file_index": int(e > 2), "from_timestamp": start / FPS + late, "to_timestamp": -1.0}
            place |= {f"videos/{camera}/{name}": value for name, value in numbers.items()}
        listed.append(place)
    for part, some in enumerate((listed[:2], listed[2:])):
        save(root, f"meta/episodes/chunk-000/file-{part:03d}.parquet", pa.Table.from_pylist(some))
    save(root, "meta/tasks.parquet", pa.table({"task_index": [0, 1], "__index_level_0__": TASKS}))
    for part, some in enumerate(((0, 1, 2, 3), (4,))):
        save(root, f"data/chunk-000/file-{part:03d}.parquet", rows(some, images))
    for part, some in enumerate(((0, 1, 2), (3, 4))):
        for camera in () if images else (TOP, WRIST):
            video = np.concatenate([drawn(e, LENGTHS[e], camera) for e in some])
            save(root, f"videos/{camera}/chunk-000/file-{part:03d}.mp4", mp4(video, codec))
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "2.1": write_v2,
    "2.1 pictures": lambda root: write_v2(root, images=True),
    "3.0": write_v3,
    "3.0 AV1": lambda root: write_v3(root, codec="libsvtav1"),
    "3.0 pictures": lambda root: write_v3(root, images=True),
    "3.0, times late by a third of a frame": lambda root: write_v3(root, late=0.33 / FPS),
    "3.0, times early by a third of a frame": lambda root: write_v3(root, late=-0.33 / FPS),
}

"""LeRobot datasets in both formats, written here: every frame tells its episode and number, so that a shift by one shows."""

from __future__ import annotations

import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from numpy.typing import NDArray

from cola_dist.data.shards import ShardWriter, lint, open_folder
from cola_dist.data.sources import SourceEpisode, lerobot, write_source
from cola_dist.data.sources.lerobot import LeRobotFolder
from cola_dist.errors import UserError
from tests.s3 import serve

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


def check(episode: SourceEpisode, start: int = 0, stop: int | None = None) -> int:
    """That frames, actions, states and task are those of the episode from frame ``start`` on; returns its number."""
    number = episode.meta["provenance"]["episode"]
    stop = LENGTHS[number] if stop is None else stop
    assert told(episode.video) == (list(range(start, stop)), {number})
    np.testing.assert_array_equal(episode.actions, actions_of(number, LENGTHS[number])[start : stop - 1])
    np.testing.assert_array_equal(episode.state, state_of(number, LENGTHS[number])[start:stop])
    assert (episode.actions.dtype, episode.state.dtype, episode.video.dtype, episode.fps) == (np.float32, np.float32, np.uint8, FPS)
    assert episode.meta["task"] == TASKS[number % 2]
    return int(number)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "2.1": write_v2,
    "2.1 pictures": lambda root: write_v2(root, images=True),
    "3.0": write_v3,
    "3.0 AV1": lambda root: write_v3(root, codec="libsvtav1"),
    "3.0 pictures": lambda root: write_v3(root, images=True),
    "3.0, times late by a third of a frame": lambda root: write_v3(root, late=0.33 / FPS),
    "3.0, times early by a third of a frame": lambda root: write_v3(root, late=-0.33 / FPS),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {version: write(tmp_path_factory.mktemp("sound") / "toy") for version, write in (("2.1", write_v2), ("3.0", write_v3))}


@pytest.fixture(params=["2.1", "3.0"])
def dataset(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[request.param], tmp_path / "toy"))


def data_file(root: Path, episode: int) -> Path:
    (path,) = (path for name in (f"episode_{episode:06d}", f"file-{int(episode == 4):03d}") for path in root.glob(f"data/*/{name}.parquet"))
    return path


def packed(folder: LeRobotFolder) -> list[int]:
    return sorted(check(episode) for episode in folder.episodes())


@pytest.mark.parametrize("written", WRITERS)
def test_every_episode_is_right(written: str, tmp_path: Path) -> None:
    folder = LeRobotFolder(str(WRITERS[written](tmp_path / "toy")), 48, 0.2)
    episodes = list(folder.episodes())
    assert sorted(check(episode) for episode in episodes) == [0, 1, 2, 3, 4]
    assert len({episode.key for episode in episodes}) == folder.segments == 5
    assert [episode.split for episode in episodes].count("heldout") == 1
    assert folder.outcomes == {"packed": 5}
    meta, origin = episodes[-1].meta, episodes[-1].meta["provenance"]
    assert (meta["embodiment"], meta["camera"], meta["licence"]) == ("toy arm", TOP, "as the original dataset")
    assert (origin["dataset"], origin["version"], origin["episode"]) == ("toy", f"v{written[:3]}", 4)
    assert (tmp_path / "toy" / origin["file"]).is_file()
    assert origin["end_s"] - origin["start_s"] == pytest.approx(2.7)


class Watched:
    """A container that lists where it seeks to."""

    def __init__(self, container: Any, seeks: list[int]) -> None:
        self._container, self._seeks = container, seeks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def seek(self, offset: int, **options: Any) -> None:
        self._seeks.append(offset)
        self._container.seek(offset, **options)


def test_a_video_of_many_episodes_is_opened_once_and_seeks_only_over_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seeks, real = write_v3(tmp_path / "toy"), list[list[int]](), av.open
    monkeypatch.setattr(lerobot.av, "open", lambda *args: Watched(real(*args), (seeks.append([]), seeks[-1])[1]))
    assert packed(LeRobotFolder(str(root), 48, 0.2)) == [0, 1, 2, 3, 4]
    assert seeks == [[], []]
    listed = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(listed).slice(0, 1), listed)  # without the second of three in one file: 3.1 seconds to skip
    assert packed(LeRobotFolder(str(root), 48, 0.2)) == [0, 2, 3, 4]
    assert [len(some) for some in seeks[2:]] == [1, 0]


def test_frame_half_a_frame_away_is_not_taken(tmp_path: Path) -> None:
    folder = LeRobotFolder(str(write_v3(tmp_path / "toy", late=0.7 / FPS)), 48, 0.2)
    # 0.7 of a frame late is 0.3 early for the next: each but a file's last episode ends in its neighbour, and those have no frame at their end.
    assert [told(episode.video)[0][:2] for episode in folder.episodes()] == [[1, 2]] * 3
    assert folder.outcomes == {"packed": 3, "damaged video": 2}


def test_camera_choice(sound: dict[str, Path]) -> None:
    root = str(sound["3.0"])
    assert LeRobotFolder(root, 48, 0.2).camera == TOP, "the wrist's name comes first, but it is on the wrist; depth is no choice"
    for name in (WRIST, "a_wrist"):
        folder = LeRobotFolder(root, 48, 0.2, name)
        assert folder.camera == WRIST
        for episode in folder.episodes():
            number = episode.meta["provenance"]["episode"]
            assert told(255 - episode.video) == (list(range(LENGTHS[number])), {number})
    for name in ("front", DEPTH):
        with pytest.raises(UserError, match=rf"no colour camera {name}; give one of {WRIST}, {TOP}"):
            LeRobotFolder(root, 48, 0.2, name)


def test_size_and_segments(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot, "SEGMENT_FRAMES", 16)
    folder = LeRobotFolder(str(dataset), 30, 0.2)
    episodes = list(folder.episodes())
    assert folder.segments == len(episodes) == len({episode.key for episode in episodes}) == 2 + 2 + 2 + 3 + 2
    assert all(episode.video.shape[1:3] == (30, 40) for episode in episodes)
    ends = [0] * 5
    for episode in episodes:
        start = ends[episode.meta["provenance"]["episode"]]
        ends[check(episode, start, start + len(episode.video))] = start + len(episode.video)
    assert ends == list(LENGTHS)
    assert len({episode.meta["provenance"]["episode"] for episode in episodes if episode.split == "heldout"}) == 1


def test_missing_and_truncated_videos(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = sorted([*dataset.glob(f"videos/*/{TOP}/*.mp4"), *dataset.glob(f"videos/{TOP}/*/*.mp4")])
    videos[0].write_bytes(videos[0].read_bytes()[:300])
    videos[-1].unlink()
    folder = LeRobotFolder(str(dataset), 48, 0.2)
    # In version 3, three episodes are in the first file and two in the last.
    left, counts = (
        ([], {"missing video": 2, "damaged video": 3}) if len(videos) == 2 else ([1, 2, 3], {"missing video": 1, "damaged video": 1})
    )
    assert packed(folder) == left
    assert folder.outcomes == counts | ({"packed": 3} if left else {})
    assert [sum(name in line for line in caplog.messages) for name in (str(videos[0]), str(videos[-1]))] == [1, 1], "each named once"


def test_episodes_before_the_damage_are_kept(tmp_path: Path) -> None:
    root = write_v3(tmp_path / "toy")
    path = root / f"videos/{TOP}/chunk-000/file-000.mp4"
    with av.open(str(path)) as container:
        ends = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[LENGTHS[0] + 10]])  # inside the second of three episodes
    folder = LeRobotFolder(str(root), 48, 0.2)
    assert packed(folder) == [0, 3, 4]
    assert folder.outcomes == {"packed": 3, "damaged video": 2}


DAMAGES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "actions not finite": lambda mine: mine[7].update(action=[1.0, math.nan]),
    "states not finite": lambda mine: mine[-1].update({"observation.state": [None, 1.0, 1.0]}),
    "mismatched action rows": lambda mine: mine.pop(),
    "mismatched action rows, too many": lambda mine: mine.append(mine[-1]),
    "mismatched action rows of two lengths": lambda mine: mine[3].update(action=[1.0]),
    "mismatched action rows in disorder": lambda mine: mine.insert(3, mine.pop(4)),
    "missing action rows": lambda mine: mine.clear(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_rows(dataset: Path, damage: str) -> None:
    path = data_file(dataset, 1)
    parts: list[list[dict[str, Any]]] = [[], [], []]
    for row in pq.read_table(path).to_pylist():
        parts[min(row["episode_index"], 2)].append(row)
    DAMAGES[damage](parts[1])
    pq.write_table(pa.Table.from_pylist([*parts[0], *parts[1], *parts[2]], schema=pq.read_schema(path)), path)
    folder = LeRobotFolder(str(dataset), 48, 0.2)
    assert packed(folder) == [0, 2, 3, 4]
    assert folder.outcomes["packed"] == 4
    assert all(reason == "packed" or damage.startswith(reason) for reason in folder.outcomes)


def test_unreadable_data_and_short_episodes(dataset: Path) -> None:
    data_file(dataset, 4).write_bytes(b"PAR1 no longer")
    path = dataset / "meta/info.json"
    path.write_text(path.read_text().replace('"fps": 10', '"fps": 11.5'))  # 22 frames are 1.9 seconds now
    folder = LeRobotFolder(str(dataset), 48, 0.2)
    list(folder.episodes())
    assert folder.outcomes["shorter than 2 s"] == 1
    assert folder.outcomes["unreadable action rows"] == 1


def test_actions_by_joint_group_and_tasks_by_number(sound: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound["2.1"], tmp_path / "toy"))
    about = json.loads((root / "meta/info.json").read_text())
    del about["features"]["action"], about["features"]["action.joint"]
    groups = {"actions.joint": "float32", "actions.effector": "float64", "actions.index": "int64"}
    about["features"] |= {name: {"dtype": kind, "shape": [1]} for name, kind in groups.items()}
    (root / "meta/info.json").write_text(json.dumps(about))
    save(root, "meta/episodes.jsonl", [{"episode_index": e, "tasks": [], "length": frames} for e, frames in enumerate(LENGTHS)])
    for e, frames in enumerate(LENGTHS):
        table, wanted = pq.read_table(data_file(root, e)), actions_of(e, frames)
        nested, plain = [[[value]] for value in wanted[:, 1].tolist()], wanted[:, 0].tolist()
        for name, values in (("actions.joint", nested), ("actions.effector", plain), ("actions.index", [7] * frames)):
            table = table.append_column(name, pa.array(values))
        pq.write_table(table.drop_columns(["action", "action.joint"]), data_file(root, e))
    folder = LeRobotFolder(str(root), 48, 0.2)
    assert packed(folder) == [0, 1, 2, 3, 4]
    assert next(folder.episodes()).meta["action"] == "actions.effector, actions.joint"


def test_packing_and_object_storage(sound: dict[str, Path], tmp_path: Path) -> None:
    hashes: dict[str, str] = {}
    with serve(tmp_path / "s3", "bucket") as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        shutil.copytree(sound["3.0"], s3.root / "bucket" / "toy")
        for name, uri in (("local", str(sound["3.0"])), ("s3", "s3://bucket/toy")):
            with ShardWriter(str(tmp_path / name), "toy", "robot") as writer:
                write_source(writer, LeRobotFolder(uri, 32, 0.2).episodes(), crf=23)
                hashes[name] = writer.close().content_hash
        with pytest.raises(UserError, match="not found; give the folder of a LeRobot dataset"):
            LeRobotFolder("s3://bucket/other", 32, 0.2)
    assert hashes["local"] == hashes["s3"]
    opened = open_folder(str(tmp_path / "local"))
    assert lint(opened.uri) == []
    assert len(opened.split("heldout")) == 1
    samples = list(webdataset.WebDataset([f"{opened.uri}/{shard}" for shard in opened.shards], shardshuffle=False))
    assert {sample["__key__"] for sample in samples} == {f"episode-{e:06d}-00000" for e in range(5)}
    for sample in samples:
        about = json.loads(sample["json"])
        frames = LENGTHS[about["provenance"]["episode"]]
        assert (about["frames"], about["fps"]) == (frames, FPS)
        assert np.load(io.BytesIO(sample["actions.npy"])).shape == (frames - 1, 2)
        assert np.load(io.BytesIO(sample["state.npy"])).shape == (frames, 3)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("meta/info.json", '{"codebase_version": "v1.6", "fps": 10, "features": {}}', "dataset version v1.6, this reads 2.0, 2.1 and 3.0"),
        ("meta/info.json", '{"codebase_version": "v2.1"}', "no 'features'"),
        ("meta/info.json", '{"codebase_version": "v2.1", "fps": 10, "features": {}, "data_path": "x"}', "no colour camera"),
        ("meta/info.json", '{"codebase_version": "3.0", "fps": 9, "data_path": "", "features": {"a": {"dtype": "image"}}}', "no feature"),
        ("meta/info.json", "{", "not usable"),
        ("meta/info.json", "[]", "not usable"),
        ("meta/episodes.jsonl", '{"episode_index": 0}', "without number, length or place"),
        ("meta/episodes.jsonl", '{"episode_index": 0,', "episodes.jsonl: unreadable"),
        ("meta/episodes.jsonl", "", "no usable episode .none listed"),
        ("videos", None, "no usable episode .5 missing video, such as videos/chunk-000"),
        ("data", None, "no usable episode .5 missing action rows, such as data/chunk-000"),
        ("meta", None, "not found; give the folder of a LeRobot dataset"),
    ],
)
def test_mistakes_are_one_line(sound: dict[str, Path], tmp_path: Path, name: str, content: str | None, says: str) -> None:
    root = Path(shutil.copytree(sound["2.1"], tmp_path / "toy"))
    if content is None:
        shutil.rmtree(root / name)
    else:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        LeRobotFolder(str(root), 48, 0.2)
    assert [str(root) in line for line in str(caught.value).splitlines()] == [True]

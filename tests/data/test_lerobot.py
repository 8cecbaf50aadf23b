"""LeRobot datasets of both formats: every frame with its own actions, and damage that costs no more than itself."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_dist import storage
from cola_dist.data.sources import Skipped, SourceEpisode, lerobot
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.lerobot import LeRobotOrigin
from cola_dist.errors import UserError
from tests.data.lerobot_files import DEPTH, FPS, LENGTHS, TASKS, TOP, WRIST, WRITERS, actions_of, save, state_of, told, write_v2, write_v3
from tests.s3 import serve

WHOLE = CutRules(scene_cut=0.0)


def check(episode: SourceEpisode, start: int = 0, stop: int | None = None, rows: bool = True) -> int:
    """That frames, actions, states and task are those of the episode from frame ``start`` on; returns its number."""
    number = episode.meta["provenance"]["episode"]
    stop = LENGTHS[number] if stop is None else stop
    assert told(episode.video) == (list(range(start, stop)), {number})
    if rows:
        assert episode.actions is not None
        assert episode.state is not None
        np.testing.assert_array_equal(episode.actions, actions_of(number, LENGTHS[number])[start : stop - 1])
        np.testing.assert_array_equal(episode.state, state_of(number, LENGTHS[number])[start:stop])
        assert (episode.actions.dtype, episode.state.dtype) == (np.float32, np.float32)
    assert (episode.video.dtype, episode.fps, episode.meta["task"]) == (np.uint8, FPS, TASKS[number % 2])
    return int(number)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {version: write(tmp_path_factory.mktemp("sound") / "toy") for version, write in (("2.1", write_v2), ("3.0", write_v3))}


@pytest.fixture(params=["2.1", "3.0"])
def dataset(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[request.param], tmp_path / "toy"))


def data_file(root: Path, episode: int) -> Path:
    (path,) = (path for name in (f"episode_{episode:06d}", f"file-{int(episode == 4):03d}") for path in root.glob(f"data/*/{name}.parquet"))
    return path


def opened(root: Path | str, **options: Any) -> LeRobotOrigin:
    given: dict[str, Any] = {"resolution": 48, "rules": WHOLE} | options
    return LeRobotOrigin(str(root), "toy", **given)


def read(origin: LeRobotOrigin) -> tuple[list[SourceEpisode], list[Skipped]]:
    """Segments and what is left out, each item read by a copy of the origin and of the item, as tasks do."""
    found = [one for item in origin.items() for copy, mine in [pickle.loads(pickle.dumps((origin, item)))] for one in copy.episodes(mine)]
    return [one for one in found if isinstance(one, SourceEpisode)], [one for one in found if isinstance(one, Skipped)]


def packed(root: Path | str) -> tuple[list[int], dict[str, int]]:
    """Numbers of the episodes that are right, and counts of what is left out, by reason."""
    found, skipped = read(opened(root))
    return sorted(check(episode) for episode in found), Counter(one.reason for one in skipped)


@pytest.mark.parametrize("written", WRITERS)
def test_every_episode_is_right(written: str, tmp_path: Path) -> None:
    origin = opened(WRITERS[written](tmp_path / "toy"))
    episodes, skipped = read(origin)
    assert sorted(check(episode) for episode in episodes) == [0, 1, 2, 3, 4]
    assert skipped == []
    assert {episode.key for episode in episodes} == {f"episode-{number:06d}-00000" for number in range(5)}
    assert all(episode.recording == episode.group == f"episode {episode.meta['provenance']['episode']}" for episode in episodes)
    assert {(episode.split, episode.note) for episode in episodes} == {("", "")}
    assert (origin.source, origin.domain, origin.camera) == ("toy", "robot", TOP)
    meta, place = episodes[-1].meta, episodes[-1].meta["provenance"]
    assert (meta["embodiment"], meta["camera"], meta["licence"]) == ("toy arm", TOP, "as the original dataset")
    assert (meta["action"], meta["state"]) == ("action", "observation.state")
    assert (place["dataset"], place["version"], place["episode"]) == ("toy", f"v{written[:3]}", 4)
    assert (tmp_path / "toy" / place["file"]).is_file()
    assert place["end_s"] - place["start_s"] == pytest.approx(2.7)


def test_an_item_is_what_lies_in_the_same_files(sound: dict[str, Path], tmp_path: Path) -> None:
    def groups(root: Path) -> list[list[int]]:
        items = opened(root).items()
        assert len({item.name for item in items}) == len(items)
        assert [item.size for item in items] == [sum((root / file).stat().st_size for file in item.name.split("+")) for item in items]
        return [[episode.index for episode in item.episodes] for item in items]

    assert groups(sound["2.1"]) == [[0], [1], [2], [3], [4]]
    assert groups(sound["3.0"]) == [[0, 1, 2], [3], [4]]
    assert groups(write_v3(tmp_path / "toy", images=True)) == [[0, 1, 2, 3], [4]]


def test_a_copy_carries_no_list_of_episodes_but_lists_them_again(dataset: Path) -> None:
    origin = opened(dataset)
    copy = pickle.dumps(origin)
    assert b"LeRobotItem" in pickle.dumps(origin.items())
    assert b"LeRobotItem" not in copy
    assert pickle.loads(copy).items() == origin.items()


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

    def watched(*args: Any, **options: Any) -> Watched:
        seeks.append([])
        return Watched(real(*args, **options), seeks[-1])

    monkeypatch.setattr(lerobot.av, "open", watched)
    assert packed(root)[0] == [0, 1, 2, 3, 4]
    # Episodes 3 and 4 are in one video and two data files: two tasks, of which the second skips the first's 4 seconds.
    assert [len(some) for some in seeks] == [0, 0, 1]
    listed = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(listed).slice(0, 1), listed)  # without the second of three in one file: 3.1 seconds to skip
    assert packed(root)[0] == [0, 2, 3, 4]
    assert [len(some) for some in seeks[3:]] == [1, 0, 1]


def test_frame_half_a_frame_away_is_not_taken(tmp_path: Path) -> None:
    found, skipped = read(opened(write_v3(tmp_path / "toy", late=0.7 / FPS), rules=CutRules(scene_cut=0.0, min_seconds=0.0)))
    # 0.7 of a frame late is 0.3 early for the next: each but a file's last episode ends in its neighbour, and those have no frame at their end.
    assert [told(episode.video)[0][:2] for episode in found] == [[1, 2]] * 5
    assert [(one.name, one.reason) for one in skipped] == [("episode 2", "damaged video"), ("episode 4", "damaged video")]
    assert {len(episode.video) - LENGTHS[episode.meta["provenance"]["episode"]] for episode in found} == {0, -1}


def test_camera_choice(sound: dict[str, Path]) -> None:
    root = sound["3.0"]
    assert opened(root).camera == TOP, "the wrist's name comes first, but it is on the wrist; depth is no choice"
    for name in (WRIST, "a_wrist"):
        origin = opened(root, camera=name)
        assert origin.camera == WRIST
        for episode in read(origin)[0]:
            number = episode.meta["provenance"]["episode"]
            assert told(255 - episode.video) == (list(range(LENGTHS[number])), {number})
    for name in ("front", DEPTH):
        with pytest.raises(UserError, match=rf"no colour camera {name}; give one of {WRIST}, {TOP}"):
            opened(root, camera=name)


def test_size_and_segments(dataset: Path) -> None:
    found, _ = read(opened(dataset, resolution=30, rules=CutRules(segment_frames=16, min_seconds=0.5, scene_cut=0.0)))
    assert len({episode.key for episode in found}) == len(found) == 2 + 2 + 2 + 3 + 2
    assert all(episode.video.shape[1:3] == (30, 40) for episode in found)
    ends = [0] * 5
    for episode in found:
        start = ends[episode.meta["provenance"]["episode"]]
        ends[check(episode, start, start + len(episode.video))] = start + len(episode.video)
    assert ends == list(LENGTHS)


def test_short_episodes(dataset: Path) -> None:
    found, skipped = read(opened(dataset, rules=CutRules(min_seconds=2.3, scene_cut=0.0)))
    assert sorted(check(episode) for episode in found) == [0, 1, 3, 4]
    assert skipped == [Skipped("episode 2", "shorter than 2.3 s")]


def test_missing_and_truncated_videos(dataset: Path) -> None:
    videos = sorted([*dataset.glob(f"videos/*/{TOP}/*.mp4"), *dataset.glob(f"videos/{TOP}/*/*.mp4")])
    videos[0].write_bytes(videos[0].read_bytes()[:300])
    videos[-1].unlink()
    # In version 3, three episodes are in the first file and two in the last.
    both: tuple[list[int], dict[str, int]] = ([], {"missing video": 2, "damaged video": 3})
    assert packed(dataset) == (both if len(videos) == 2 else ([1, 2, 3], {"missing video": 1, "damaged video": 1}))


def test_what_comes_before_the_damage_is_kept(tmp_path: Path) -> None:
    root = write_v3(tmp_path / "toy")
    path = root / f"videos/{TOP}/chunk-000/file-000.mp4"
    with av.open(str(path)) as container:
        ends = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[LENGTHS[0] + 10]])  # inside the second of three episodes
    assert packed(root) == ([0, 3, 4], {"damaged video": 2})
    found, _ = read(opened(root, rules=CutRules(scene_cut=0.0, min_seconds=0.5)))
    (part,) = [episode for episode in found if episode.recording == "episode 1"]
    assert 5 <= len(part.video) <= 10
    check(part, 0, len(part.video))


DAMAGES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], object]]] = {
    "nan in actions": ("without actions (not finite)", lambda mine: mine[7].update(action=[1.0, math.nan])),
    "null in state": ("without state (not finite)", lambda mine: mine[-1].update({"observation.state": [None, 1.0, 1.0]})),
    "too few": ("(not one row per frame)", lambda mine: mine.pop()),
    "too many": ("(not one row per frame)", lambda mine: mine.append(mine[-1])),
    "two lengths": ("without actions (rows of different lengths)", lambda mine: mine[3].update(action=[1.0])),
    "disorder": ("(not one row per frame)", lambda mine: mine.insert(3, mine.pop(4))),
    "missing": ("(missing rows)", lambda mine: mine.clear()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_rows_leave_the_video(dataset: Path, damage: str) -> None:
    note, change = DAMAGES[damage]
    path = data_file(dataset, 1)
    parts: list[list[dict[str, Any]]] = [[], [], []]
    for row in pq.read_table(path).to_pylist():
        parts[min(row["episode_index"], 2)].append(row)
    change(parts[1])
    pq.write_table(pa.Table.from_pylist([*parts[0], *parts[1], *parts[2]], schema=pq.read_schema(path)), path)
    found, skipped = read(opened(dataset))
    assert skipped == []
    assert sorted(check(episode, rows=not episode.note) for episode in found) == [0, 1, 2, 3, 4]
    (one,) = [episode for episode in found if episode.note]
    assert one.note == (note if note.startswith("without") else f"without actions {note} and state {note}")
    assert ("actions" in one.note, "state" in one.note) == (one.actions is None, one.state is None)
    assert (not one.meta["action"], not one.meta["state"]) == (one.actions is None, one.state is None)


def test_files_of_rows_that_are_damaged_or_missing(dataset: Path) -> None:
    data_file(dataset, 4).write_bytes(b"PAR1 no longer")
    data_file(dataset, 0).unlink()
    found, skipped = read(opened(dataset))
    assert skipped == []
    assert sorted(check(episode, rows=not episode.note) for episode in found) == [0, 1, 2, 3, 4]
    notes = {episode.meta["provenance"]["episode"]: episode.note for episode in found}
    assert notes[0] == "without actions (missing rows) and state (missing rows)"
    assert notes[4] == "without actions (unreadable rows) and state (unreadable rows)"


def test_pictures_in_missing_rows(tmp_path: Path) -> None:
    root = write_v3(tmp_path / "toy", images=True)
    path = data_file(root, 0)
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.array([number != 1 for number in table["episode_index"].to_pylist()])), path)
    assert packed(root) == ([0, 2, 3, 4], {"missing rows": 1})
    path.unlink()
    assert packed(root) == ([4], {"missing rows": 4})


def test_a_dataset_without_actions(sound: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound["3.0"], tmp_path / "toy"))
    about = json.loads((root / "meta/info.json").read_text())
    about["features"] = {name: feature for name, feature in about["features"].items() if feature["dtype"] == "video"}
    (root / "meta/info.json").write_text(json.dumps(about))
    shutil.rmtree(root / "data")
    found, skipped = read(opened(root))
    assert skipped == []
    assert sorted(check(episode, rows=False) for episode in found) == [0, 1, 2, 3, 4]
    assert {(one.actions is None, one.state is None, one.note, one.meta["action"]) for one in found} == {(True, True, "", "")}


def test_licence_and_splits_as_the_dataset_says(sound: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound["2.1"], tmp_path / "toy"))
    assert {episode.meta["licence"] for episode in read(opened(root, licence="mit"))[0]} == {"mit"}
    about = json.loads((root / "meta/info.json").read_text())
    splits = {"train": "0:3", "test": "3:4", "odd": "none"}
    (root / "meta/info.json").write_text(json.dumps(about | {"license": "apache-2.0", "splits": splits}))
    found, _ = read(opened(root))
    assert {episode.meta["licence"] for episode in found} == {"apache-2.0"}
    assert {episode.meta["licence"] for episode in read(opened(root, licence="mit"))[0]} == {"mit"}
    assert [episode.split for episode in sorted(found, key=lambda one: one.key)] == ["train", "train", "train", "heldout", ""]


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
    assert packed(root) == ([0, 1, 2, 3, 4], {})
    assert read(opened(root))[0][0].meta["action"] == "actions.effector, actions.joint"


def test_object_storage_gives_the_same(sound: dict[str, Path], tmp_path: Path) -> None:
    def contents(uri: Path | str) -> list[Any]:
        found, skipped = read(opened(uri))
        rows = [(one.video, one.actions, one.state) for one in found]
        return [skipped, *((one.key, one.meta, [part.tobytes() for part in parts]) for one, parts in zip(found, rows, strict=True))]  # type: ignore[union-attr]

    with serve(tmp_path / "s3", "bucket") as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        shutil.copytree(sound["3.0"], s3.root / "bucket" / "toy")
        assert contents("s3://bucket/toy") == contents(sound["3.0"])
        origin = opened("s3://bucket/toy")
        storage.delete("s3://bucket/toy/videos")
        assert [one.reason for one in read(origin)[1]] == ["missing video"] * 5, "gone since it was listed"
        with pytest.raises(UserError, match="no usable episode"):
            opened("s3://bucket/toy")
        with pytest.raises(UserError, match="not found; give the folder of a LeRobot dataset"):
            opened("s3://bucket/other")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("meta/info.json", '{"codebase_version": "v1.6", "fps": 10, "features": {}}', "dataset version v1.6, this reads 2.0, 2.1 and 3.0"),
        ("meta/info.json", '{"codebase_version": "v2.1"}', "no 'features'"),
        ("meta/info.json", '{"codebase_version": "v2.1", "fps": 10, "features": {}, "data_path": "x"}', "no colour camera"),
        ("meta/info.json", '{"codebase_version": "3.0", "fps": 9, "data_path": "", "features": {"a": {"dtype": "image"}}}', "none listed"),
        ("meta/info.json", "{", "not usable"),
        ("meta/info.json", "[]", "not usable"),
        ("meta/episodes.jsonl", '{"episode_index": 0}', "without number, length or place"),
        ("meta/episodes.jsonl", '{"episode_index": 0,', "episodes.jsonl: unreadable"),
        ("meta/episodes.jsonl", "", "no usable episode .none listed"),
        ("videos", None, "no usable episode .5 missing video, such as videos/chunk-000"),
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
        opened(root)
    assert [str(root) in line for line in str(caught.value).splitlines()] == [True]

"""Real actions and states beside the frames: which rows belong to a clip, which episodes may be used, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from cola_dist.config import DataConfig
from cola_dist.data.decode import CorruptClip, encode_mp4
from cola_dist.data.labels import Labels, action_scale, chosen, labels_of, read_rows
from cola_dist.data.reader import ClipReader, open_reader
from cola_dist.data.shards import ShardFolder, open_folder
from cola_dist.errors import UserError
from cola_dist.recipes import tiny, tiny_adapt
from tests.toy import FolderWriter, write_folder

FRAMES = 5
ACTIONS = Labels()


def write_numbered(path: Path, source: str, dim: int = 3, fps: float = 5.0, state: int = 2, bad: bool = False) -> ShardFolder:
    """Episodes whose action t is 100 * episode + t, in ``dim`` columns, and whose state t is minus that; the last one has no actions."""
    writer = FolderWriter(str(path), source, "robot")
    for number in range(6):
        frames = 12 + number
        rows = 100.0 * number + np.arange(frames, dtype=np.float32)
        actions = np.tile(rows[:-1, None], (1, dim))
        if bad and number == 1:
            actions = np.tile(rows[:-1, None], (1, dim + 1))
        video = np.full((frames, 16, 16, 3), 40 * number, np.uint8)
        writer.add(
            f"{source}-{number}",
            "heldout" if number == 3 else "train",
            encode_mp4(video, fps),
            {},
            frames,
            fps,
            actions=actions if number < 5 else None,
            state=np.tile(-rows[:, None], (1, state)) if number < 5 and state else None,
        )
    return writer.close()


def reader_of(*folders: ShardFolder, labels: Labels | None = ACTIONS, split: str = "train", **changes: Any) -> ClipReader:
    mixture = {folder.uri: 1.0 for folder in folders}
    return open_reader(DataConfig(mixture=mixture, frames=FRAMES, resolution=16, mixture_block=8, **changes), 0, split, labels=labels)


def test_the_rows_are_those_that_lead_from_frame_to_frame(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "robot", "robot")
    for split, episodes in (("train", {0, 1, 2, 4}), ("heldout", {3})):
        batch = reader_of(folder, labels=Labels(state=True), split=split).read_many(range(64))
        assert batch.actions is not None
        assert batch.state is not None
        assert batch.actions.dtype == batch.state.dtype == np.float32
        assert batch.actions.shape == (64, FRAMES - 1, 3)
        assert batch.state.shape == (64, FRAMES, 2)
        seen = set()
        for sample, actions, state in zip(batch.sample, batch.actions, batch.state, strict=True):
            key, start = sample.removeprefix("robot/robot-").split("@")
            seen.add(int(key))
            first = 100 * int(key) + int(start)
            assert actions[:, 0].tolist() == [first + t for t in range(FRAMES - 1)]
            assert state[:, 1].tolist() == [-(first + t) for t in range(FRAMES)]
        assert seen == episodes, "episodes without actions are not drawn"


def test_without_labels_nothing_more_is_read(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "robot", "robot")
    plain = reader_of(folder, labels=None)
    batch = plain.read_many(range(4))
    assert batch.actions is None
    assert batch.state is None
    assert plain.label_bytes == 0
    assert {sample.split("@")[0] for sample in plain.read_many(range(64)).sample} >= {"robot/robot-5"}
    assert labels_of(tiny()) is None
    assert labels_of(tiny_adapt()) == Labels(seed=0)


def test_labels_survive_the_way_to_another_process_and_stand_in_for_unread_clips(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "robot", "robot")
    reader = reader_of(folder, labels=Labels(state=True))
    batch = reader.read_many(range(8))
    copy = cloudpickle.loads(cloudpickle.dumps(reader)).read_many(range(8))
    np.testing.assert_array_equal(batch.actions, copy.actions)
    missing = reader.unread(range(8), "away")
    assert missing.actions is not None
    assert batch.actions is not None
    assert missing.actions.shape == batch.actions.shape
    assert reader.label_bytes == 4 * (4 * 3 + 5 * 2)


def test_smaller_shares_are_part_of_larger_ones(tmp_path: Path) -> None:
    episodes = write_folder(tmp_path / "robot", "robot", episodes=60).split("train")
    for seed in range(3):
        before: set[str] = set()
        for share, count in ((0.01, 1), (0.05, 2), (0.2, 8), (0.21, 9), (1.0, 40)):
            kept = chosen(episodes, "robot", Labels(share=share, seed=seed))
            keys = {episode.key for episode in kept}
            assert len(keys) == count
            assert before <= keys
            assert list(kept) == [episode for episode in episodes if episode.key in keys], "in their order"
            before = keys
    first = [chosen(episodes, "robot", Labels(share=0.2, seed=seed)) for seed in range(2)]
    assert first[0] != first[1]


def test_a_share_is_of_training_alone_and_gives_another_sequence(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "robot", "robot")
    few, every = (reader_of(folder, labels=Labels(share=share)) for share in (0.3, 1.0))
    assert len(few.episodes[0]) == 2
    assert few.order.hash_until(8) != every.order.hash_until(8)
    assert reader_of(folder, labels=Labels(share=0.3), split="heldout").episodes[0] == folder.split("heldout")


def test_the_scale_is_that_of_all_rows_that_may_be_used(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "robot", "robot")
    for share in (0.3, 1.0):
        reader = reader_of(folder, labels=Labels(state=True, share=share))
        rows = np.concatenate([read_rows(folder, episode, "actions.npy") for episode in reader.episodes[0]])
        scale = action_scale(reader.folders, reader.episodes, reader.label_dims)
        np.testing.assert_allclose(scale["action_mean"], rows.mean(0, np.float64), rtol=1e-6)
        np.testing.assert_allclose(scale["action_std"], rows.std(0, dtype=np.float64), rtol=1e-6)
        assert scale["state_mean"].shape == (2,)
    still = write_folder(tmp_path / "still", "still")
    rows = np.zeros((19, 2), np.float32)
    writer = FolderWriter(str(tmp_path / "constant"), "constant", "robot")
    writer.add("a", "train", encode_mp4(np.zeros((20, 16, 16, 3), np.uint8), 5.0), {}, 20, 5.0, actions=rows)
    constant = writer.close()
    assert action_scale([constant], [constant.episodes], (2, 0))["action_std"].tolist() == [1, 1]
    assert action_scale([still], [still.split("train")], (2, 0))["state_mean"].shape == (0,)


def test_what_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    robot, hand = write_numbered(tmp_path / "robot", "robot"), write_folder(tmp_path / "hand", "hand", actions=False)
    with pytest.raises(UserError, match=r"source 'hand' \(.*hand\) has no actions in its train split: leave it out of data.mixture"):
        reader_of(robot, hand)
    plain = write_numbered(tmp_path / "plain", "plain", state=0)
    with pytest.raises(UserError, match=r"source 'plain' .* has no state in its train split: set --adapt.use-state False"):
        reader_of(plain, labels=Labels(state=True))
    wide = write_numbered(tmp_path / "wide", "wide", dim=7)
    with pytest.raises(UserError, match=r"actions of source 'wide' have 7 numbers, those of source 'robot' have 3: adapt to one kind"):
        reader_of(robot, wide)
    with pytest.raises(UserError, match=r"actions of source 'robot' have 3 numbers, the adapter takes 7 \(adapt.action_dim\)"):
        reader_of(robot, labels=Labels(action_dim=7))
    fast = write_numbered(tmp_path / "fast", "fast", fps=10.0)
    with pytest.raises(
        UserError, match=r"data.rate_hz is 5 but episode .* 10 frames and actions per second: pack it again with --cut.fps 5"
    ):
        reader_of(fast)
    assert reader_of(fast, rate_hz=10.0).read_many([0]).actions is not None
    bad = write_numbered(tmp_path / "bad", "bad", bad=True)
    with pytest.raises(
        UserError, match=r"source 'bad': bad-1.actions.npy has shape \[12, 4\] where \[12, 3\] belongs: find the damage with"
    ):
        action_scale([bad], [[e for e in bad.split("train") if e.key == "bad-1"]], (3, 0))


def test_a_clip_whose_actions_are_damaged_is_replaced_like_any_other(tmp_path: Path) -> None:
    write_numbered(tmp_path / "bad", "bad", bad=True)
    batch = reader_of(open_folder(str(tmp_path / "bad"))).read_many(range(64))
    assert batch.actions is not None
    assert batch.actions.shape[2] == 3
    assert any(line.startswith("undecodable: bad/") and "bad-1.actions.npy has shape [12, 4]" in line for line in batch.skipped)
    assert not any(sample.startswith("bad/bad-1@") for sample in batch.sample)


@pytest.mark.parametrize(("ext", "dim"), [("actions.npy", 2), ("state.npy", 3)])
def test_rows_of_another_length_are_no_labels(tmp_path: Path, ext: str, dim: int) -> None:
    folder = write_numbered(tmp_path / "robot", "robot")
    with pytest.raises(CorruptClip, match=r"has shape .* where .* belongs"):
        read_rows(folder, folder.episodes[0], ext, dim)

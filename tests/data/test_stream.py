"""From shard folders to batches: what a reader gives, how it replaces damage, and that Ray Data deals every rank its own clips."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle

from cola_dist.config import DataConfig
from cola_dist.data.order import rank_positions
from cola_dist.data.shards import Episode, ShardFolder, read_member
from cola_dist.data.stream import Batch, Clip, ClipReader, StreamPlan, batches, dataset, open_reader
from cola_dist.errors import UserError
from tests.toy import write_folder

FRAMES = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardFolder]:
    path = tmp_path_factory.mktemp("folders")
    return {name: write_folder(path / name, name, seed=seed) for name, seed in (("robot", 0), ("hand", 1))}


@pytest.fixture(scope="module")
def config(folders: dict[str, ShardFolder]) -> DataConfig:
    return DataConfig(mixture={folder.uri: 0.5 for folder in folders.values()}, frames=FRAMES, resolution=16, mixture_block=8)


def damage(folder: ShardFolder, episodes: Iterable[Episode]) -> None:
    """Turn over one byte in the middle of each episode's video."""
    for episode in episodes:
        member = episode.members["mp4"]
        with (Path(folder.uri) / episode.shard).open("r+b") as shard:
            shard.seek(member.offset + member.size // 2)
            byte = shard.read(1)[0]
            shard.seek(-1, 1)
            shard.write(bytes([byte ^ 0xFF]))


def test_batches_have_the_promised_shapes_and_names(config: DataConfig) -> None:
    batch = open_reader(config, seed=0).read_many([3, 10**12, 5])
    assert batch.video.shape == (3, FRAMES, 3, 16, 16)
    assert batch.video.dtype == np.uint8
    assert batch.position.tolist() == [3, 10**12, 5]
    assert batch.position.dtype == batch.source.dtype == np.int64
    assert batch.skipped.tolist() == ["", "", ""]
    for source, sample in zip(batch.source, batch.sample, strict=True):
        name, rest = sample.split("/")
        key, start = rest.split("@")
        assert name == ("robot", "hand")[source]
        assert key.startswith(f"{name}-000")
        assert 0 <= int(start) <= 20 - FRAMES
    assert batch.video.max() > 80, "the moving square is seen"


def test_the_clip_is_the_one_that_its_sample_id_names(config: DataConfig, folders: dict[str, ShardFolder]) -> None:
    from cola_dist.data.decode import decode_clip

    plain = replace(config, random_crop=False)
    for cached in (0, 2**28):
        reader = open_reader(replace(plain, decoded_cache_bytes=cached), seed=0)
        for position in range(6):
            batch = reader.read_many([position])
            name, rest = batch.sample[0].split("/")
            key, start = rest.split("@")
            (episode,) = [e for e in folders[name].episodes if e.key == key]
            mp4 = read_member(folders[name], episode, "mp4")
            np.testing.assert_array_equal(batch.video[0], decode_clip(mp4, int(start), FRAMES, 1, 16, None))


def test_the_same_position_gives_the_same_bits_whatever_was_read_before(config: DataConfig) -> None:
    first, second = open_reader(config, seed=0), open_reader(config, seed=0)
    forward = first.read_many(range(12))
    backward = second.read_many(reversed(range(12)))
    np.testing.assert_array_equal(forward.video, backward.video[::-1])
    assert forward.sample.tolist() == backward.sample.tolist()[::-1]
    assert open_reader(config, seed=1).read_many(range(12)).sample.tolist() != forward.sample.tolist()


def test_a_batch_that_is_held_stays_as_it_is(config: DataConfig) -> None:
    reader = open_reader(config, seed=0)
    held = [reader.read_many(range(4 * step, 4 * step + 4)).video[step % 4] for step in range(6)]
    for step, clip in enumerate(held):
        np.testing.assert_array_equal(clip, open_reader(config, seed=0).read_many([4 * step + step % 4]).video[0])


def test_crops_are_random_in_training_and_fixed_on_heldout(config: DataConfig) -> None:
    def clip(**changes: Any) -> np.ndarray:
        return open_reader(replace(config, crop_scale=0.5, **changes), seed=0).read_many(range(4)).video

    assert not np.array_equal(clip(random_crop=True), clip(random_crop=False))
    for setting in (True, False):
        heldout = open_reader(replace(config, random_crop=setting), seed=0, split="heldout").read_many(range(4)).video
        np.testing.assert_array_equal(heldout, open_reader(config, seed=0, split="heldout").read_many(range(4)).video)


def test_training_and_heldout_share_no_episode(config: DataConfig) -> None:
    keys = {}
    for split in ("train", "heldout"):
        batch = open_reader(config, seed=0, split=split).read_many(range(200))
        keys[split] = {sample.split("@")[0] for sample in batch.sample}
    assert keys["train"] | keys["heldout"] == {f"{name}/{name}-000{i}" for name in ("robot", "hand") for i in range(6)}
    assert not keys["train"] & keys["heldout"]


def test_damage_is_replaced_by_the_same_source_and_reported(tmp_path: Path, config: DataConfig) -> None:
    hurt = write_folder(tmp_path / "robot", "robot")
    whole = write_folder(tmp_path / "whole", "robot")
    other = write_folder(tmp_path / "hand", "hand", seed=1)
    victim = hurt.split("train")[1]
    damage(hurt, [victim])
    readers = {folder.uri: open_reader(replace(config, mixture={folder.uri: 0.5, other.uri: 0.5}), seed=0) for folder in (hurt, whole)}
    batch, sound = (readers[folder.uri].read_many(range(64)) for folder in (hurt, whole))
    affected = [i for i, sample in enumerate(sound.sample) if sample.startswith(f"robot/{victim.key}@")]
    assert affected
    for i in range(64):
        if i in affected:
            first = batch.skipped[i].splitlines()[0]
            assert victim.shard in first
            assert f"{victim.key}.mp4" in first
            assert first.startswith("checksum: robot/")
            assert batch.sample[i].startswith("robot/")
            assert not batch.sample[i].startswith(f"robot/{victim.key}@")
        else:
            assert batch.skipped[i] == ""
            assert batch.sample[i] == sound.sample[i]
            np.testing.assert_array_equal(batch.video[i], sound.video[i])
    np.testing.assert_array_equal(batch.source, sound.source)
    again = open_reader(readers[hurt.uri].config, seed=0).read_many(reversed(range(64)))
    assert again.sample.tolist()[::-1] == batch.sample.tolist()
    np.testing.assert_array_equal(again.video[::-1], batch.video)


def test_a_source_without_any_readable_clip_ends_the_run(tmp_path: Path, config: DataConfig) -> None:
    hurt = write_folder(tmp_path / "robot", "robot")
    damage(hurt, hurt.split("train"))
    reader = open_reader(replace(config, mixture={hurt.uri: 1.0}), seed=0)
    with pytest.raises(
        UserError, match=rf"clips in a row could not be read for position 7.*robot-0.*jobs/data.py lint {hurt.uri}"
    ) as refusal:
        reader.read_many([7])
    assert "\n" not in str(refusal.value)


def test_too_slow_video_is_refused_and_fast_video_is_strided(tmp_path: Path, config: DataConfig) -> None:
    slow = write_folder(tmp_path / "slow", "slow", fps=5.0)
    with pytest.raises(
        UserError, match=r"data\.rate_hz is 10 but episode 'slow-0000' .* has 5 frames per second: lower data\.rate_hz to 5"
    ):
        open_reader(replace(config, mixture={slow.uri: 1.0}, rate_hz=10.0), seed=0)
    fast = write_folder(tmp_path / "fast", "fast", fps=15.0)
    reader = open_reader(replace(config, mixture={fast.uri: 1.0}), seed=0)
    assert {reader.order.clip(position).stride for position in range(20)} == {3}
    assert reader.read_many([0]).video.shape[1] == FRAMES


def test_two_folders_of_one_name_are_refused(tmp_path: Path, config: DataConfig) -> None:
    pair = [write_folder(tmp_path / name, "robot", seed=seed) for seed, name in enumerate("ab")]
    with pytest.raises(UserError, match=r"two shard folders are both named 'robot'.*--source"):
        open_reader(replace(config, mixture={folder.uri: 1.0 for folder in pair}), seed=0)


def test_a_source_too_short_or_without_the_split_is_refused(tmp_path: Path, config: DataConfig) -> None:
    folder = write_folder(tmp_path / "few", "few", episodes=1)
    mine = replace(config, mixture={folder.uri: 1.0})
    assert open_reader(mine, seed=0).order.windows(0) == 4
    with pytest.raises(UserError, match=r"data \(heldout split\): source 'few'"):
        open_reader(mine, seed=0, split="heldout")
    with pytest.raises(UserError, match=r"data \(train split\): source 'few' has no episode of at least 21 frames"):
        open_reader(replace(mine, frames=21), seed=0)


class UnevenReader(ClipReader):
    """Takes a random time for each clip and decodes none: this is about who gets what."""

    def read(self, position: int, into: np.ndarray) -> Clip:
        time.sleep(random.random() * 0.003)
        into[:] = position % 251
        return Clip(self.order.clip(position).source, f"clip@{position}", "", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # Ray's workers have no way to import a test module.
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    yield
    cloudpickle.unregister_pickle_by_value(here)
    ray.shutdown()


class Thirds:
    """An encoder whose latents are larger than the clips that it is given."""

    hash = "thirds"

    def __init__(self, gpus: int = 0) -> None:
        assert len(ray.get_gpu_ids()) == gpus, "GPUs of the actor that encodes"

    def encode(self, video: np.ndarray) -> np.ndarray:
        assert len(video) == 12 // 3 or len(video) == 12 // 2, "one rank's clips of one step"
        return np.repeat(video[:, ::2] / np.float32(3), 3, axis=2)


class Pace:
    """Where training stands, for readers that wait for it: the slowest consumer's step."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}

    def at(self, rank: int, step: int) -> None:
        self._steps[rank] = step

    def reached(self) -> int:
        return min(self._steps.values(), default=0)


def consume(iterator: Any, plan: StreamPlan, rank: int, got: dict[int, list[Batch]], errors: list[BaseException], pace: Any) -> None:
    try:
        for step, batch in enumerate(batches(iterator, plan, rank, prefetch=2), plan.first_step):
            ray.get(pace.at.remote(rank, step))
            time.sleep(random.random() * 0.01)
            got[rank].append(batch)
    except BaseException as error:
        errors.append(error)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("world", "first_step", "last_step", "encoders", "gpus", "readers"),
    [(2, 0, 43, 0, False, 1), (3, 5, 40, 0, False, 3), (4, 17, 18, 0, False, 2), (2, 0, 23, 1, False, 1), (3, 5, 43, 2, True, 2)],
)
def test_ray_data_deals_every_rank_exactly_its_own_clips(
    config: DataConfig, world: int, first_step: int, last_step: int, encoders: int, gpus: bool, readers: int
) -> None:
    settings = replace(config, steps_per_read=4, reader_cpus=0.5, latents=encoders > 0, latent_workers=max(1, encoders))
    reader = UnevenReader(tuple(open_reader(config, 0).folders), settings, 0, "train")
    plan = StreamPlan(first_step, last_step, global_batch=12, world=world)
    pace = ray.remote(num_cpus=0)(Pace).remote()

    def wait_for(step: int) -> None:
        while ray.get(pace.reached.remote()) < step:
            time.sleep(0.01)

    iterators = dataset(reader, plan, wait_for, partial(Thirds, int(gpus)), gpus, readers).streaming_split(world, equal=True)
    got: dict[int, list[Batch]] = {rank: [] for rank in range(world)}
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=consume, args=(iterator, plan, rank, got, errors, pace), daemon=True)
        for rank, iterator in enumerate(iterators)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 180
    for thread in threads:
        thread.join(deadline - time.monotonic())
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    for rank in range(world):
        steps = [batch.position.tolist() for batch in got[rank]]
        assert steps == [list(rank_positions(step, 12, rank, world)) for step in range(first_step, last_step)]
        for batch in got[rank]:
            assert batch.sample.tolist() == [f"clip@{position}" for position in batch.position]
            assert (batch.video[:, 0, 0, 0, 0] == batch.position % 251).all()
            assert (batch.latents is None) == (encoders == 0)
            if batch.latents is not None:
                assert batch.latents.dtype == np.float32
                np.testing.assert_array_equal(batch.latents, Thirds().encode(batch.video))


class Delivers:
    """Stands where Ray Data's iterator does, and gives the batches that it was told to."""

    def __init__(self, positions: Iterable[list[int]]) -> None:
        self._positions = positions

    def iter_batches(self, **_: Any) -> Iterator[dict[str, np.ndarray]]:
        for positions in self._positions:
            column = np.array(positions)
            names = np.array([""] * len(positions), dtype=object)
            yield dict.fromkeys(("video", "position", "source", "sample", "skipped", "cost"), column) | {"failed": names}


@pytest.mark.parametrize("second", [[6, 7], [4, 6], [5, 4], [4]])
def test_a_wrong_delivery_is_never_trained_on(second: list[int]) -> None:
    stream = batches(Delivers([[0, 1], second]), StreamPlan(0, 2, global_batch=4, world=2), rank=0, prefetch=1)  # type: ignore[arg-type]
    assert next(stream).position.tolist() == [0, 1]
    with pytest.raises(RuntimeError, match=r"step 1, rank 0: expected positions 4…5, Ray Data delivered"):
        next(stream)


def test_reads_cover_the_plan_once_in_delivery_order() -> None:
    plan = StreamPlan(5, 16, global_batch=12, world=3)
    reads = plan.reads(4)
    assert [rank for _, _, rank in reads] == [0, 1, 2] * 3
    assert [read[:2] for read in reads[::3]] == [(5, 9), (9, 13), (13, 16)]

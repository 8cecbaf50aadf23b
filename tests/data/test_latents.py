"""Latents in the stream: which clips are encoded and which come from the cache, what damage and a failing cache do, and the settings."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_dist import storage
from cola_dist.checks import check
from cola_dist.data.latents import EncodeLatents
from cola_dist.errors import UserError
from cola_dist.models.autoencoder import PixelAutoencoder
from cola_dist.recipes import build_recipe, tiny
from cola_dist.settings import differences
from cola_dist.train.encoding import EncoderFactory
from cola_dist.train.launch import launch
from tests.s3 import serve
from tests.test_settings import changed
from tests.train.harness import toy_config


class Thirds:
    """An encoder that counts: a third of each clip's pixels, every other frame, smaller than the video in every way."""

    def __init__(self, name: str = "thirds") -> None:
        self.hash = name
        self.calls: list[int] = []

    def encode(self, video: np.ndarray) -> np.ndarray:
        self.calls.append(len(video))
        return latents_of(video)


def latents_of(video: np.ndarray) -> np.ndarray:
    return video[:, ::2, :2, ::4, ::4].astype(np.float32) / 3


def batch(*numbers: int, failed: tuple[int, ...] = (), frames: int = 5, size: int = 8) -> dict[str, np.ndarray]:
    """One clip per number, which decides its pixels; rows in ``failed`` could not be read."""
    clips = [np.random.default_rng(number).integers(0, 256, (frames, 3, size, size), np.uint8) for number in numbers]
    for row in failed:
        clips[row][:] = 0
    video = np.stack(clips)
    video.flags.writeable = False  # as it comes from the object store
    reasons = np.array(["gone" if row in failed else "" for row in range(len(numbers))], dtype=object)
    return {"video": video, "position": np.array(numbers), "failed": reasons}


def encode(encoder: Thirds, cache: str, given: dict[str, np.ndarray]) -> list[int]:
    """Encode in an actor of its own; returns how many clips each call of the encoder was given. The latents are always the right ones."""
    encoder.calls.clear()
    made = EncodeLatents(lambda: encoder, cache)(given)
    assert set(made) == {*given, "latents"}
    assert all(made[name] is given[name] for name in given)
    assert made["latents"].dtype == np.float32
    np.testing.assert_array_equal(made["latents"], latents_of(given["video"]))
    return list(encoder.calls)


def test_without_a_cache_a_batch_is_encoded_in_one_call() -> None:
    encoder = Thirds()
    stage = EncodeLatents(lambda: encoder, "")
    for _ in range(2):
        np.testing.assert_array_equal(stage(batch(1, 2, 3))["latents"], latents_of(batch(1, 2, 3)["video"]))
    assert encoder.calls == [3, 3]


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_what_is_kept_is_not_encoded_again_by_anyone(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path / "server", "bucket") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        cache = {"folder": str(tmp_path / "deep" / "cache"), "s3": "s3://bucket/cache"}[place]
        encoder = Thirds()
        assert encode(encoder, cache, batch(1, 2, 3)) == [3]
        assert encode(encoder, cache, batch(3, 4, 1, 5)) == [2], "only the new ones, in one call"
        assert encode(encoder, cache, batch(5, 4, 3, 2, 1)) == []
        names = list(storage.list_files(cache))
        assert len(names) == 5
        for name in names:
            folder, file = name.split("/")
            assert file.startswith(folder)
            assert len(file) == 64 + len(".npy")


def test_a_clip_that_comes_twice_in_a_batch_is_encoded_once(tmp_path: Path) -> None:
    assert encode(Thirds(), str(tmp_path), batch(1, 2, 1, 1)) == [2]


def test_a_file_of_the_cache_is_an_array_that_numpy_reads(tmp_path: Path) -> None:
    encode(Thirds(), str(tmp_path), batch(1))
    (path,) = tmp_path.glob("??/*.npy")
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), latents_of(batch(1)["video"])[0])


def test_other_weights_and_other_clips_share_nothing(tmp_path: Path) -> None:
    assert encode(Thirds("one"), str(tmp_path), batch(1, 2)) == [2]
    assert encode(Thirds("two"), str(tmp_path), batch(1, 2)) == [2]
    black = [np.zeros((1, *shape), np.uint8) for shape in ((4, 3, 8, 8), (8, 3, 4, 8), (8, 3, 8, 4))]
    reasons = np.array([""], dtype=object)
    for video in black:  # the same bytes in another shape
        assert encode(Thirds("one"), str(tmp_path), {"video": video, "failed": reasons}) == [1]
    assert len(list(tmp_path.glob("??/*.npy"))) == 7


def flip(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], flip, lambda data: b"", lambda data: data[:10], lambda data: data + b"x"])
def test_a_damaged_file_is_encoded_anew_and_mended(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    encoder = Thirds()
    encode(encoder, str(tmp_path), batch(1, 2))
    path = min(tmp_path.glob("??/*.npy"))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert encode(encoder, str(tmp_path), batch(1, 2)) == [1]
    assert path.read_bytes() == whole
    assert encode(encoder, str(tmp_path), batch(1, 2)) == []


def test_a_file_under_another_name_is_no_hit(tmp_path: Path) -> None:
    encoder = Thirds()
    encode(encoder, str(tmp_path), batch(1, 2))
    one, two = tmp_path.glob("??/*.npy")
    one.write_bytes(two.read_bytes())
    assert encode(encoder, str(tmp_path), batch(1, 2)) == [1]


def test_rows_that_failed_are_zero_and_neither_encoded_nor_kept(tmp_path: Path) -> None:
    for cache in ("", str(tmp_path)):
        encoder = Thirds()
        assert encode(encoder, cache, batch(1, 2, 3, failed=(1,)))[-1] == 2
    assert len(list(tmp_path.glob("??/*.npy"))) == 2
    assert encode(Thirds(), "", batch(1, 2, failed=(0, 1))) == [1], "one black clip tells the shape"


def test_a_cache_that_cannot_be_used_is_told_once_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    encoder = Thirds()
    stage = EncodeLatents(lambda: encoder, str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            np.testing.assert_array_equal(stage(batch(1, 2))["latents"], latents_of(batch(1, 2)["video"]))
    assert encoder.calls == [2, 2, 2]
    (record,) = caplog.records
    assert "data.latents_cache" in record.getMessage()


def test_a_cache_that_cannot_be_written_is_still_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(Thirds(), str(tmp_path), batch(1, 2))

    def full(uri: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    encoder = Thirds()
    stage = EncodeLatents(lambda: encoder, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for numbers in ((1, 3, 4), (2, 5, 1)):
            np.testing.assert_array_equal(stage(batch(*numbers))["latents"], latents_of(batch(*numbers)["video"]))
    assert encoder.calls == [2, 1]
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()


def test_the_methods_autoencoder_gives_the_latents_that_methods_make() -> None:
    encoder = pickle.loads(pickle.dumps(EncoderFactory(build_recipe("tiny"))))()
    video = batch(1, 2)["video"]
    made = encoder.encode(video)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, PixelAutoencoder().encode(torch.tensor(video)).numpy())
    assert encoder.hash == f"{PixelAutoencoder.hash} on cpu"


# Settings.


def test_settings_of_the_stage_are_checked_and_free_on_resume() -> None:
    whole = {"latents": True, "latents_cache": "s3://bucket/latents", "latent_workers": 4}
    check(changed(tiny(), data=whole))
    assert differences(tiny(), changed(tiny(), data=whole), step=100) == []
    with pytest.raises(UserError, match=r"data\.latent_workers is 0: it must be at least 1"):
        check(changed(tiny(), data={"latents": True, "latent_workers": 0}))
    with pytest.raises(UserError, match=r"data\.latents_cache is /kept: nothing is kept there without --data\.latents True"):
        check(changed(tiny(), data={"latents_cache": "/kept"}))


ONE_CPU_EACH = ("--train.cpus-per-worker", "1", "--data.reader-cpus", "1")


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, have: dict[str, float], *options: str) -> str:
    """What a run is refused with on a cluster that has no more than ``have``."""

    def train(workers: int) -> None:
        raise AssertionError("the run is not refused")

    monkeypatch.setattr("cola_dist.runtime.connect", lambda cpus, debug: None)
    monkeypatch.setattr("cola_dist.train.launch.create_board", train)
    monkeypatch.setattr("ray.cluster_resources", lambda: have)
    with pytest.raises(UserError) as refusal:
        launch(toy_config(folder, *ONE_CPU_EACH, "--data.latents", "True", *options), str(folder / "run"))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_cluster_without_room_for_the_encoders_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(tmp_path, monkeypatch, {"CPU": 3}, "--data.latent-workers", "2")
    assert "has 3 CPUs, this run needs 3.4 (2 workers of 1, a reader of 1 and 2 encoders of 0.2 each)" in said
    assert "data.latent_workers" in said
    said = refused(tmp_path, monkeypatch, {"CPU": 16, "GPU": 2}, "--train.gpus", "True")
    assert "has 2 GPUs, this run needs 3 (2 workers and 1 encoders)" in said


def test_a_cache_at_an_unknown_address_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown scheme" in refused(tmp_path, monkeypatch, {}, "--data.latents-cache", "ftp://host/latents")

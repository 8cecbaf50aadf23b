"""Clips come out frame-exact, cropped as asked, or as CorruptClip."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cola_dist.data.decode import GOP, CorruptClip, decode_clip, encode_mp4, probe_video
from tests.data.videos import encoded, moving_square, real_videos

FRAMES = 41
VIDEO = moving_square(FRAMES)
MP4 = encode_mp4(VIDEO, 5.0)


def _all_frames(mp4: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(mp4), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


WHOLE = decode_clip(MP4, 0, FRAMES, 1, 48, None)


def test_full_decode_matches_the_drawn_video() -> None:
    reference = _all_frames(MP4)
    assert reference.shape == VIDEO.shape
    # Same size, full short side: no scaling, so only the codec's loss and rounding in the colour conversion remain.
    assert np.abs(WHOLE.transpose(0, 2, 3, 1).astype(int) - reference[:, :, 8:56]).max() <= 8
    assert np.abs(reference.astype(int) - VIDEO).mean() < 6


def test_every_start_and_stride_is_frame_exact() -> None:
    for stride in (1, 2, 3, 7):
        for start in range(FRAMES - 4 * stride):
            clip = decode_clip(MP4, start, 5, stride, 48, None)
            np.testing.assert_array_equal(clip, WHOLE[start : start + 4 * stride + 1 : stride], err_msg=f"start {start}, stride {stride}")


@settings(max_examples=20, deadline=None)
@given(data=st.data(), fps=st.sampled_from([3.0, 4.0, 12.5, 23.976, 29.97, 30.0, 59.94]), frames=st.integers(2, 40))
def test_any_rate_and_length_is_frame_exact(data: st.DataObject, fps: float, frames: int) -> None:
    mp4 = encode_mp4(moving_square(frames, 32, 32), fps)
    whole = decode_clip(mp4, 0, frames, 1, 32, None)
    start = data.draw(st.integers(0, frames - 1))
    stride = data.draw(st.integers(1, frames))
    count = data.draw(st.integers(1, (frames - 1 - start) // stride + 1))
    np.testing.assert_array_equal(decode_clip(mp4, start, count, stride, 32, None), whole[start::stride][:count])
    counted, rate, width, height = probe_video(mp4)
    assert (counted, width, height) == (frames, 32, 32)
    assert rate == pytest.approx(fps, rel=1e-3)


@pytest.mark.parametrize("resolution", [16, 32, 48, 96])
@pytest.mark.parametrize("crop", [None, (1.0, 0.0, 0.0), (0.5, 1.0, 1.0), (0.83, 0.3, 0.7), (0.05, 0.0, 1.0)])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (50, 50)])
def test_crop_gives_the_asked_shape(resolution: int, crop: tuple[float, float, float] | None, shape: tuple[int, int]) -> None:
    clip = decode_clip(encode_mp4(moving_square(6, *shape), 5.0), 1, 3, 2, resolution, crop)
    assert clip.shape == (3, 3, resolution, resolution)
    assert clip.dtype == np.uint8


def test_crop_shows_the_asked_place() -> None:
    quarters = np.zeros((4, 64, 64, 3), np.uint8)
    quarters[:, :32, 32:] = 255  # top right is white
    mp4 = encode_mp4(quarters, 5.0, crf=10)
    means = {(x, y): float(decode_clip(mp4, 0, 1, 1, 16, (0.4, x, y)).mean()) for x in (0.0, 1.0) for y in (0.0, 1.0)}
    assert means[1.0, 0.0] > 245
    assert max(value for place, value in means.items() if place != (1.0, 0.0)) < 10


def test_same_frames_give_the_same_bytes() -> None:
    assert encode_mp4(VIDEO, 5.0) == MP4
    assert encode_mp4(VIDEO[::-1], 5.0) != MP4


def test_groups_are_short() -> None:
    with av.open(io.BytesIO(MP4), "r") as container:
        keyframes = [index for index, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and packet.size]
    assert keyframes == list(range(0, FRAMES, GOP))


@pytest.mark.parametrize(
    "damage",
    [lambda mp4: b"", lambda mp4: b"no video at all", lambda mp4: mp4[: len(mp4) // 2], lambda mp4: bytes(len(mp4)), lambda mp4: mp4[:40]],
    ids=["empty", "text", "truncated", "zeros", "header"],
)
def test_broken_bytes_are_a_corrupt_clip(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(CorruptClip):
        decode_clip(damage(MP4), 30, 5, 1, 32, None)
    with pytest.raises(CorruptClip):
        probe_video(damage(MP4))


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, len(MP4) - 1), junk=st.binary(min_size=1, max_size=64))
def test_any_damage_gives_a_clip_or_corrupt_clip(at: int, junk: bytes) -> None:
    damaged = MP4[:at] + junk + MP4[at + len(junk) :]
    with contextlib.suppress(CorruptClip):
        assert decode_clip(damaged, 10, 5, 2, 32, None).shape == (5, 3, 32, 32)
    with contextlib.suppress(CorruptClip):
        probe_video(damaged)


def test_reading_past_the_end_is_a_corrupt_clip() -> None:
    with pytest.raises(CorruptClip, match="frame 41"):
        decode_clip(MP4, FRAMES - 2, 3, 1, 32, None)


@pytest.mark.parametrize("container", ["mp4", "mkv", "mov", "avi", "webm", "gif"])
def test_probe_knows_common_containers(container: str) -> None:
    frames, fps, width, height = probe_video(encoded(moving_square(23), container))
    assert (frames, width, height) == (23, 64, 48)
    assert fps == pytest.approx(10, rel=0.02)


def test_probe_of_real_recordings() -> None:
    folder = real_videos()
    expected = {"human_dough.gif": (50, 10, 320, 180), "human_makeup.avi": (164, 25, 320, 240), "human_pancake.mkv": (310, 30, 426, 240)}
    found = {name: folder / name for name in expected if (folder / name).is_file()}
    if not found:
        pytest.skip(f"{folder} holds none of {', '.join(expected)}")
    for name, path in found.items():
        frames, fps, width, height = probe_video(path.read_bytes())
        assert (frames, round(fps), width, height) == expected[name]

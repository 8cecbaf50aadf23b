"""Cutting: common frame rate, scene changes, lengths, standstill, and the rows of actions and state that go with the frames."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cola_dist.data.decode import decode_episode, encode_mp4, small_picture
from cola_dist.data.sources import Skipped, SourceEpisode, Unusable
from cola_dist.data.sources.cut import CutRules, Recording, cut, motion
from tests.data.videos import moving_square, real_videos

PLAIN = CutRules(scene_cut=0, still=0)
Frame = tuple[float, NDArray[np.uint8]]


def numbered(number: int, height: int = 4, width: int = 6) -> NDArray[np.uint8]:
    """A picture that says its number."""
    return np.broadcast_to(np.array([number % 256, number // 256, 7], np.uint8), (height, width, 3)).copy()


def numbers(video: NDArray[np.uint8]) -> list[int]:
    return [int(n) for n in video[:, 0, 0, 0].astype(int) + 256 * video[:, 0, 0, 1].astype(int)]


def recording(frames: Iterable[Frame], fps: float, **more: Any) -> Recording:
    return Recording("a video", "key", "file", fps, iter(frames), {"licence": "CC0", "provenance": {"file": "a.mp4"}}, **more)


def constant(count: int, fps: float, **more: Any) -> Recording:
    return recording(((n / fps, numbered(n)) for n in range(count)), fps, **more)


def filmed(video: NDArray[np.uint8], fps: float = 10.0) -> Recording:
    return recording(((n / fps, pixels) for n, pixels in enumerate(video)), fps)


def split(outcomes: Iterable[SourceEpisode | Skipped]) -> tuple[list[SourceEpisode], list[Skipped]]:
    found = list(outcomes)
    return [o for o in found if isinstance(o, SourceEpisode)], [o for o in found if isinstance(o, Skipped)]


def starts(episodes: list[SourceEpisode], fps: float = 10.0) -> list[int]:
    """Frames at which segments begin."""
    return [round(e.meta["provenance"]["start_s"] * fps) for e in episodes]


def texture(seed: int, height: int = 96, width: int = 128) -> NDArray[np.uint8]:
    """Large blots of random colours."""
    coarse = np.random.default_rng(seed).integers(20, 235, (height // 16, width // 16, 3), dtype=np.uint8)
    return coarse.repeat(16, axis=0).repeat(16, axis=1)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 400), fps=st.sampled_from([0.4, 4.0, 5.0, 9.97, 10.0]), longest=st.integers(8, 70))
def test_at_an_equal_or_lower_rate_every_frame_comes_once_and_lengths_are_bounded(count: int, fps: float, longest: int) -> None:
    rules = replace(PLAIN, segment_frames=longest)
    shortest = max(2, math.ceil(2.0 * fps))
    episodes, skipped = split(cut(constant(count, fps), rules))
    if count < shortest:
        assert not episodes
        assert skipped == [Skipped("a video", "shorter than 2 s", "recording")]
        return
    assert not skipped
    assert [n for e in episodes for n in numbers(e.video)] == list(range(count))
    assert all(shortest <= len(e.video) < max(longest, shortest) + shortest and e.fps == fps for e in episodes)
    assert all(len(e.video) == max(longest, shortest) for e in episodes[:-1])
    assert [e.key for e in episodes] == [f"key-{n:05d}" for n in range(len(episodes))]


@pytest.mark.parametrize(
    ("fps", "given_fps", "shown"),
    [
        (30, 10, [0, 3, 6, 9, 12, 15, 18, 21]),
        (25, 10, [0, 2, 5, 7, 10, 12, 15, 17]),
        (12, 10, [0, 1, 2, 4, 5, 6, 7, 8, 10]),
        (5, 5, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (30000 / 1001, 10, [0, 3, 6, 9, 12, 15, 18, 21]),
    ],
)
def test_frames_are_the_nearest_in_time_and_rows_the_mean_between_them(fps: float, given_fps: float, shown: list[int]) -> None:
    rng = np.random.default_rng(0)
    actions, state = rng.normal(size=(119, 3)).astype(np.float32), rng.normal(size=(120, 2)).astype(np.float32)
    episodes, skipped = split(cut(constant(120, fps, actions=actions, state=state), PLAIN))
    assert not skipped
    assert numbers(episodes[0].video)[: len(shown)] == shown
    assert sum(len(e.video) for e in episodes) == math.floor(120 / fps * given_fps + 0.5)
    for episode in episodes:
        kept = numbers(episode.video)
        assert episode.fps == given_fps
        assert episode.actions is not None
        assert episode.actions.dtype == np.float32
        assert len(episode.actions) == len(kept) - 1
        assert episode.state is not None
        assert np.array_equal(episode.state, state[kept])
        for row, (first, last) in zip(episode.actions, itertools.pairwise(kept), strict=True):
            np.testing.assert_allclose(row, actions[first:last].mean(axis=0), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.004, 1.9), min_size=2, max_size=60))
def test_a_variable_rate_shows_at_each_tenth_of_a_second_the_nearest_frame(steps: list[float]) -> None:
    times = [0.0, *itertools.accumulate(steps)]
    rate = max(10.0, len(times) / times[-1])
    frames = ((time, numbered(n)) for n, time in enumerate(times))
    episodes, _ = split(cut(recording(frames, rate), replace(PLAIN, min_seconds=0.2)))
    shown = [n for e in episodes for n in numbers(e.video)]
    ticks = math.ceil((times[-1] + 0.5 / rate) * 10 - 1e-5)
    assert len(shown) == (ticks if ticks >= 2 else 0)
    for tick, number in enumerate(shown):
        nearest = min(abs(time - tick / 10) for time in times)
        assert abs(times[number] - tick / 10) <= nearest + 1e-5


def test_a_frame_is_held_over_a_short_gap_with_its_row_and_a_long_gap_cuts() -> None:
    times = [n / 10 for n in range(30)] + [4.0 + n / 10 for n in range(30)] + [1e9 + n / 10 for n in range(30)]
    actions = np.arange(89, dtype=np.float32)[:, None]
    episodes, skipped = split(cut(recording(((t, numbered(n)) for n, t in enumerate(times)), 10.0, actions=actions), PLAIN))
    assert not skipped
    first, second = episodes
    assert numbers(first.video) == [*range(30), *[29] * 5, *[30] * 5, *range(30, 60)][:70]
    assert first.actions is not None
    assert first.actions[:, 0].tolist() == [*range(29), *[28] * 5, 29, *[29] * 5, *range(30, 59)]
    assert numbers(second.video) == list(range(60, 90))
    assert second.meta["provenance"] == {"file": "a.mp4", "start_s": 1e9, "end_s": 1e9 + 3}


def test_segments_say_where_in_the_original_they_are() -> None:
    more: dict[str, Any] = {"start_s": 100.25, "split": "heldout", "note": "without actions (not finite)"}
    episodes, _ = split(cut(constant(200, 30.0, **more), PLAIN))
    (episode, *rest) = episodes
    assert not rest
    assert episode.meta == {"licence": "CC0", "provenance": {"file": "a.mp4", "start_s": 100.25, "end_s": 106.95}}
    assert (episode.recording, episode.group, episode.split, episode.note) == ("a video", "file", "heldout", more["note"])
    assert episode.actions is None
    assert episode.state is None


def test_rows_missing_for_a_frame_are_an_error() -> None:
    with pytest.raises(ValueError, match="frame 29 came, with 28 rows of actions"):
        list(cut(constant(30, 10.0, actions=np.zeros((28, 2), np.float32)), PLAIN))
    with pytest.raises(ValueError, match="frame 29 came, with 29 rows of state"):
        list(cut(constant(30, 10.0, state=np.zeros((29, 2), np.float32)), PLAIN))


def broken(count: int, fps: float) -> Iterator[Frame]:
    yield from ((n / fps, numbered(n)) for n in range(count))
    raise Unusable("video is damaged")


@pytest.mark.parametrize(("count", "lengths"), [(0, []), (12, []), (30, [30]), (75, [75]), (100, [64, 36])])
def test_what_comes_before_damage_is_packed(count: int, lengths: list[int]) -> None:
    episodes, skipped = split(cut(recording(broken(count, 10.0), 10.0), PLAIN))
    assert [len(e.video) for e in episodes] == lengths
    assert [n for e in episodes for n in numbers(e.video)] == list(range(sum(lengths)))
    assert skipped == [Skipped("a video", "video is damaged", "recording")]


def test_a_change_of_size_cuts() -> None:
    frames = ((n / 10, numbered(n, 4 if n < 30 else 8)) for n in range(45))
    episodes, skipped = split(cut(recording(frames, 10.0), PLAIN))
    assert [e.video.shape for e in episodes] == [(30, 4, 6, 3)]
    assert skipped == [Skipped("a video at 3 s", "shorter than 2 s", "segment")]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(0, 1000))
def test_hard_cuts_are_found_at_their_frame(lengths: list[int], seed: int) -> None:
    scenes = [np.repeat(texture(seed + n)[None], length, axis=0) for n, length in enumerate(lengths)]
    edges = [0, *itertools.accumulate(len(scene) for scene in scenes)]
    episodes, skipped = split(cut(filmed(np.concatenate(scenes)), replace(CutRules(), still=0, min_seconds=0.2)))
    assert not skipped
    assert starts(episodes) == edges[:-1]


def test_pans_fast_things_and_slow_light_do_not_cut() -> None:
    wide = np.concatenate([texture(1), texture(2)], axis=1)
    pan = np.stack([wide[:, x : x + 128] for x in [0] * 10 + list(range(0, 128, 6)) + [127] * 10])
    thing = np.repeat(texture(3)[None], 40, axis=0)
    for t in range(10, 20):
        thing[t, 30:58, 10 * (t - 10) : 10 * (t - 10) + 28] = 240
    light = (np.repeat(texture(4)[None], 40, axis=0) * np.linspace(1, 0.5, 40)[:, None, None, None]).astype(np.uint8)
    for video in (pan, thing, light):
        episodes, skipped = split(cut(filmed(video), CutRules()))
        assert len(episodes) == 1
        assert len(episodes[0].video) == len(video)
        assert not skipped


def test_a_still_picture_is_static_even_with_noise_and_compression() -> None:
    rng = np.random.default_rng(0)
    still = np.clip(texture(5)[None] + rng.normal(0, 5, (64, 96, 128, 3)), 0, 255).astype(np.uint8)
    shown: NDArray[np.uint8] = np.stack([f.to_ndarray(format="rgb24") for f in decode_episode(encode_mp4(still, 10.0, crf=28))])
    for video in (np.stack([texture(5)] * 64), still, shown):
        assert split(cut(filmed(video), CutRules())) == ([], [Skipped("a video at 0 s", "static", "segment")])
    episodes, skipped = split(cut(filmed(still), replace(CutRules(), still=0)))
    assert len(episodes) == 1
    assert not skipped


@pytest.mark.parametrize("contrast", [30, 60])
def test_a_small_slow_thing_is_motion(contrast: int) -> None:
    rng = np.random.default_rng(0)
    video = np.clip(rng.normal(110, 5, (64, 128, 170, 3)), 0, 255)
    for t in range(64):
        left = 40 + t // 5  # 12 pixels, a tenth of the short side, in 6.4 s
        video[t, 61:67, left : left + 6] += contrast
    episodes, skipped = split(cut(filmed(np.clip(video, 0, 255).astype(np.uint8)), CutRules()))
    assert len(episodes) == 1
    assert not skipped


def test_only_the_segments_that_stand_still_are_dropped() -> None:
    still = np.repeat(moving_square(1), 64, axis=0)
    video = np.concatenate([moving_square(64), still, moving_square(64)])
    episodes, skipped = split(cut(filmed(video), CutRules()))
    assert starts(episodes) == [0, 128]
    assert [e.key for e in episodes] == ["key-00000", "key-00001"]
    assert [(s.reason, s.level) for s in skipped] == [("static", "segment")]


def test_frames_are_read_no_further_than_a_segment_and_its_tail_ahead() -> None:
    read = 0

    def frames() -> Iterator[Frame]:
        nonlocal read
        for read in range(1000):
            yield read / 30, numbered(read)

    segments = cut(recording(frames(), 30.0), PLAIN)
    for index in range(3):
        next(segments)
        assert read <= 3 * (64 * (index + 1) + 20) + 2


def real(name: str) -> Recording:
    with av.open(str(real_videos() / name)) as container:
        reformatter = VideoReformatter()
        frames = [(frame.time or 0.0, small_picture(frame, 128, reformatter)) for frame in container.decode(video=0)]
        return recording(frames, float(container.streams.video[0].average_rate or 0))


def test_real_takes_stay_whole_and_none_is_static() -> None:
    lengths = {
        "bridge_robot_1.mp4": [37],
        "language_table_robot.mp4": [18],
        "human_hand.mp4": [64, 64, 79],
        "human_dough.gif": [50],
        "human_pancake.mkv": [64, 40],
        "human_makeup.avi": [66],
    }
    for name, expected in lengths.items():
        episodes, skipped = split(cut(real(name), CutRules()))
        assert ([len(e.video) for e in episodes], skipped) == (expected, []), name
        assert all(motion(e.video) > 10 * CutRules().still for e in episodes), name


def test_real_scenes_are_parted_and_repeat_to_the_byte() -> None:
    """Two real takes after one another; and one with a damaged picture that ends at 9.6 s."""
    sides = [list(real(name).frames) for name in ("human_pancake.mkv", "human_makeup.avi")]
    shapes = [np.stack([pixels[:, :170] for _, pixels in frames[:120:3]]) for frames in sides]
    runs = [split(cut(filmed(np.concatenate(shapes)), CutRules()))[0] for _ in range(2)]
    assert starts(runs[0]) == [0, 40]
    assert [e.video.tobytes() for e in runs[0]] == [e.video.tobytes() for e in runs[1]]
    outcomes = list(cut(real("human_armwrestle.mp4"), CutRules()))
    assert outcomes[-1] == Skipped("a video at 9.6 s", "shorter than 2 s", "segment")

"""Video files of any kind and state, and folders of pictures, through ``VideoOrigin``."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray

from cola_dist.data.sources import Skipped, key_of
from cola_dist.data.sources.cut import CutRules
from tests.data.footage import LONG, noisy, numbers, origin, picture, read, reasons, write_table
from tests.data.videos import CODECS, encoded, moving_square, real_videos, rotated


def stamped(video: NDArray[np.uint8], seconds: Sequence[float], container: str = "mp4") -> bytes:
    """Frames at times of one's own, in milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(container, container)) as output:
        stream: Any = output.add_stream(CODECS.get(container, "libx264"), rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time in zip(video, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(8000)
        output.writeframes(bytes(16000))
    return buffer.getvalue()


def song_with_cover() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as output:
        tune: Any = output.add_stream("mp3", rate=44100)
        cover: Any = output.add_stream("png")
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "rgb24", Disposition.attached_pic
        output.mux(cover.encode(av.VideoFrame.from_ndarray(moving_square(1)[0], format="rgb24")))
        for number in range(80):
            frame = av.AudioFrame(format="s16p", layout="stereo", samples=1152)
            frame.rate, frame.pts = 44100, 1152 * number
            output.mux(tune.encode(frame))
        output.mux(tune.encode())
    return buffer.getvalue()


def test_every_container_is_packed_whole_and_by_content_not_by_name(tmp_path: Path) -> None:
    names = ["a b.mp4", "c.mkv", "d.mov", "deep/e.avi", "deep/e.webm", "f.gif", "mp4 in.txt", "2:30 %03d ü.mp4", "no ending"]
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = Path(name).suffix[1:]
        (tmp_path / name).write_bytes(encoded(moving_square(25, seed=seed), kind if kind in CODECS else "mp4"))
    opened = origin(tmp_path)
    assert [(item.name, item.size) for item in opened.items()] == [(name, (tmp_path / name).stat().st_size) for name in sorted(names)]
    episodes, skipped = read(opened)
    assert skipped == []
    by_name = {episode.recording: episode for episode in episodes}
    assert sorted(by_name) == sorted(names)
    for seed, name in enumerate(names):
        episode = by_name[name]
        assert (episode.key, episode.group, episode.split, episode.fps) == (f"{key_of(name)}-00000", name, "", pytest.approx(10, rel=0.02))
        assert numbers(episode.video, moving_square(25, seed=seed)) == list(range(25)), name
        provenance = {"dataset": "toy", "file": name, "start_s": 0.0, "end_s": pytest.approx(2.5, rel=0.02)}
        assert episode.meta == {"licence": "as the original file", "provenance": provenance}


def test_what_is_no_usable_video_says_why(tmp_path: Path) -> None:
    good = encoded(moving_square(30), "mp4")
    (tmp_path / "good.mp4").write_bytes(good)
    files = {
        "notes.txt": (b"not a video\n" * 50, "not a video"),
        "table.json": (b"{}", "not a video"),
        "noise.bin": (np.random.default_rng(0).bytes(5000), "not a video"),
        "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\ngood.mp4\n#EXT-X-ENDLIST\n", "not a video"),
        "empty.avi": (b"", "empty file"),
        "cut off.mp4": (good[:700], "damaged"),
        "noise.mkv": (np.random.default_rng(1).bytes(5000), "damaged"),
        "sound.wav": (sound(), "sound without pictures"),
        "sound.mp4": (sound(), "sound without pictures"),
        "song.mp3": (song_with_cover(), "sound without pictures"),
        "picture.png": (picture(moving_square(1)[0]), "single picture"),
        "picture.jpg": (picture(moving_square(1)[0], "mjpeg"), "single picture"),
        "one.mp4": (encoded(moving_square(1), "mp4"), "single picture"),
        "none.y4m": (b"YUV4MPEG2 W64 H48 F10:1 C420jpeg\n", "no frames"),
        "fast.mp4": (encoded(moving_square(30), "mp4", fps=1000), "no usable frame rate"),
        "short.mp4": (encoded(moving_square(19), "mp4"), "shorter than 2 s"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    episodes, skipped = read(origin(tmp_path))
    assert [episode.recording for episode in episodes] == ["good.mp4"]
    assert reasons(skipped) == {name: reason for name, (_, reason) in files.items()}


def test_a_file_that_vanishes_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded(moving_square(30), "mp4"))
    opened = origin(tmp_path)
    (tmp_path / "a.mp4").unlink()
    assert read(opened) == ([], [Skipped("a.mp4", "file missing")])


@pytest.mark.parametrize(("container", "begin", "end"), [("mp4", 0.5, 0.65), ("mkv", 0.5, 0.65), ("avi", 0.75, 0.875)])
def test_damage_in_the_middle_keeps_what_came_before(tmp_path: Path, container: str, begin: float, end: float) -> None:
    data = bytearray(encoded(noisy(90), container))
    hole = slice(int(len(data) * begin), int(len(data) * end))
    data[hole] = bytes(hole.stop - hole.start)
    (tmp_path / f"a.{container}").write_bytes(data)
    episodes, skipped = read(origin(tmp_path))
    # AVI has no time stamps: FFmpeg goes on behind the damage, and the end comes too early.
    assert skipped == [Skipped(f"a.{container}", "ends before its header says" if container == "avi" else "damaged")]
    assert len(episodes) == 1
    assert numbers(episodes[0].video[:25], noisy(90)) == list(range(25))


@pytest.mark.parametrize("container", ["mkv", "webm"])
def test_a_file_that_is_cut_off_keeps_what_there_is(tmp_path: Path, container: str) -> None:
    data = encoded(noisy(90), container)
    (tmp_path / f"a.{container}").write_bytes(data[: len(data) * 6 // 10])
    (episode,), skipped = read(origin(tmp_path))
    assert skipped == [Skipped(f"a.{container}", "ends before its header says")]
    assert 45 < len(episode.video) < 60


def test_frames_stand_where_their_time_stamps_say(tmp_path: Path) -> None:
    slow, fast = [0.2 * n for n in range(15)], [3.0 + 0.05 * n for n in range(60)]
    video = moving_square(75)
    (tmp_path / "a.mp4").write_bytes(stamped(video, [*slow, *fast]))
    (episode,), skipped = read(origin(tmp_path))
    assert skipped == []
    shown = numbers(episode.video, video)
    # Two frames out of three lie nearest to a tick of 0.1 s in the slow part, every second one in the fast part.
    assert shown[:6] == [0, 0, 1, 1, 2, 2] or shown[:6] == [0, 1, 1, 2, 2, 3]
    assert shown[32:50] == list(range(19, 55, 2))
    assert len(shown) == 60


def test_a_pause_in_the_time_stamps_and_stamps_that_begin_again_are_cuts(tmp_path: Path) -> None:
    video = moving_square(60)
    times = [0.1 * n for n in range(60)]
    (tmp_path / "pause.mkv").write_bytes(stamped(video, [time + 100 * (time > 2.95) for time in times], "mkv"))
    part = [stamped(moving_square(30, seed=seed), times[:30], "ts") for seed in (0, 1)]
    (tmp_path / "twice.ts").write_bytes(b"".join(part))
    episodes, skipped = read(origin(tmp_path))
    assert skipped == []
    assert [(episode.recording, len(episode.video)) for episode in episodes] == [
        (name, 30) for name in 2 * ["pause.mkv"] + 2 * ["twice.ts"]
    ]
    assert episodes[1].meta["provenance"]["start_s"] == pytest.approx(103, abs=0.2)


def test_missing_time_stamps_are_made_up_for_by_the_rate(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as output:
        stream: Any = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in moving_square(75):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    (tmp_path / "raw.h264").write_bytes(buffer.getvalue())
    (episode,), skipped = read(origin(tmp_path))
    assert (skipped, len(episode.video)) == ([], 30)
    shown = numbers(episode.video, moving_square(75))
    assert all(abs(number - 2.5 * tick) <= 1 for tick, number in enumerate(shown))


def test_rotation_is_applied_and_odd_sides_become_even(tmp_path: Path) -> None:
    upright = encoded(moving_square(25), "mp4")
    (tmp_path / "plain.mp4").write_bytes(upright)
    (tmp_path / "turned.mp4").write_bytes(rotated(upright))
    (tmp_path / "odd.gif").write_bytes(encoded(moving_square(25, 49, 65), "gif"))
    (tmp_path / "odd small.gif").write_bytes(encoded(moving_square(25, 101, 333), "gif"))
    episodes, skipped = read(origin(tmp_path))
    assert skipped == []
    video = {episode.recording: episode.video for episode in episodes}
    np.testing.assert_array_equal(video["turned.mp4"], np.rot90(video["plain.mp4"], -1, axes=(1, 2)))  # clockwise
    assert (video["odd.gif"].shape, video["odd small.gif"].shape) == ((25, 48, 64, 3), (25, 64, 210, 3))


def test_real_videos_are_packed() -> None:
    rules = CutRules()
    folder = real_videos()
    episodes, skipped = read(origin(folder, rules=rules, resolution=128))
    by_file: dict[str, int] = {}
    for episode in episodes:
        by_file[episode.group] = by_file.get(episode.group, 0) + len(episode.video)
        assert episode.video.std() > 5
        assert min(episode.video.shape[1:3]) <= 128
    assert by_file["human_hand.mp4"] == 207  # 621 frames at 30 per second
    assert by_file["human_armwrestle.mp4"] <= 100
    assert by_file["human_dough.gif"] == 50
    assert {"bridge_robot_1.mp4", "language_table_robot.mp4", "human_makeup.avi", "human_pancake.mkv"} <= set(by_file)
    whole = {each.name: each.reason for each in skipped if each.level == "recording"}
    assert whole.pop("human_pool.mp4") == "shorter than 2 s"  # 32 frames at 30 per second
    assert set(whole.values()) <= {"not a video"}


def test_folders_of_numbered_pictures_are_recordings(tmp_path: Path) -> None:
    drawn = moving_square(30)
    for folder in ("one/left", "one/right", "two"):
        (tmp_path / folder).mkdir(parents=True)
    for number, pixels in enumerate(drawn):
        (tmp_path / "one/left" / f"{number}.png").write_bytes(picture(pixels))  # 9 comes before 10
        (tmp_path / "one/right" / f"frame_{number:05d}.jpg").write_bytes(b"no picture" if number == 25 else picture(pixels, "mjpeg"))
        (tmp_path / "two" / f"rgb_{number:03d}.png").write_bytes(picture(pixels))
        (tmp_path / "two" / f"depth_{number:03d}.png").write_bytes(picture(pixels[:, ::-1].copy()))
    (tmp_path / "two" / "notes.txt").write_text("text")
    (tmp_path / "cover_01.png").write_bytes(picture(drawn[0]))
    opened = origin(tmp_path, preset="frames", fps=10.0)
    assert [item.name for item in opened.items()] == ["cover_01.png"[:5], "one/left", "one/right", "two/depth", "two/rgb"]
    episodes, skipped = read(opened)
    assert reasons(skipped) == {"cover": "single picture", "one/right": "damaged"}
    assert {episode.recording: len(episode.video) for episode in episodes} == {
        "one/left": 30,
        "one/right": 25,
        "two/depth": 30,
        "two/rgb": 30,
    }
    assert numbers(episodes[0].video, drawn) == list(range(30))
    assert {episode.fps for episode in read(origin(tmp_path, preset="frames", rules=CutRules(60, 64, 0.5, 0, 0)))[0]} == {30.0}
    write_table(tmp_path / "t.csv", [{"folder": "one/left", "start_frame": 5, "end_frame": 27, "text": "move"}])
    (episode,), _ = read(origin(tmp_path, preset="frames", table="t.csv", fps=10.0))
    assert (numbers(episode.video, drawn), episode.meta["text"]) == (list(range(5, 27)), "move")


def test_fps_overrules_time_stamps(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded(LONG, "mp4", fps=100))
    assert len(read(origin(tmp_path))[0][0].video) == 32
    (episode,), _ = read(origin(tmp_path, fps=20.0))
    assert numbers(episode.video[:20], LONG[:60]) == list(range(0, 40, 2))
    write_table(tmp_path / "t.csv", [{"file": "a.mp4", "start": 13.0, "end": 16.0}, {"file": "a.mp4", "start": 12.0, "end": 14.0}])
    episodes, _ = read(origin(tmp_path, fps=20.0, table="t.csv"))
    assert [np.abs(e.video.astype(int) - LONG[n : n + 2 * len(e.video) : 2]).mean() < 6 for n, e in zip((240, 260), episodes, strict=True)]

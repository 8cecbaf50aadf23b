"""Videos, pictures and arrays of others: what they declare is not what they get, and none has another file read."""

from __future__ import annotations

import http.server
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest

from cola_dist.data import decode
from cola_dist.data.decode import CorruptClip, decode_clip, decode_episode, encode_mp4, probe_video
from cola_dist.data.sources import Skipped, SourceEpisode, Unusable
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.footage import VideoFile
from cola_dist.data.sources.lerobot import LeRobotOrigin
from cola_dist.data.sources.robot_files import RobotFilesOrigin
from cola_dist.data.sources.video import VideoOrigin
from cola_dist.evaluation.films import last_frame
from cola_dist.report.film import Shelf
from tests.data.lerobot_files import TOP, write_v2
from tests.data.robot_data import numbered, write_hdf5
from tests.data.videos import moving_square
from tests.security.limits import bounded

RULES = CutRules(min_seconds=0.4, scene_cut=0, still=0)


def blank(width: int, height: int, frames: int = 2, codec: str = "libx264", container: str = "mp4") -> bytes:
    """A video of one colour: large frames cost next to no bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.thread_type = width, height, "yuv420p", "NONE"
        stream.options = {"preset": "ultrafast", "threads": "1"} if codec == "libx264" else {}
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for index in range(frames):
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A picture of so many black pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    lines = b"".join(squeeze.compress(bytes(1 + width * 3)) for _ in range(min(height, 100))) + squeeze.flush()
    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def everywhere(folder: Path, name: str, data: bytes) -> Iterator[tuple[str, Callable[[], object]]]:
    """All that opens a video: from a shard, from a data set, for a page."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    yield "clip", lambda: decode_clip(data, 0, 2, 1, 16, None)
    yield "episode", lambda: decode_episode(data)
    yield "probe", lambda: probe_video(data)
    yield "last frame", lambda: last_frame(data)
    yield "file", lambda: list(VideoFile(folder / name, name, 16, 0.0).between(0, 1))


@pytest.fixture(scope="module")
def large() -> bytes:
    return blank(8192, 8208)


def test_frames_beyond_reason_are_not_decoded(tmp_path: Path, large: bytes) -> None:
    assert len(large) < 2**19
    for name, read in everywhere(tmp_path, "large.mp4", large):
        with bounded(memory=2**28), pytest.raises(Exception, match=r"pixels|damaged") as refused:
            read()
        assert not isinstance(refused.value, MemoryError), name
    origin = VideoOrigin(str(tmp_path), "video", "human", 16, RULES)
    with bounded(memory=2**28):
        assert list(origin.episodes(origin.items()[0])) == [Skipped("large.mp4", "damaged")]


def test_frames_that_grow_on_the_way_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header may promise small frames, and the stream bring others."""
    small, wide = blank(64, 64, 4), blank(1024, 1024, 2)
    assert decode_clip(small, 0, 2, 1, 16, None).shape == (2, 3, 16, 16)
    monkeypatch.setattr(decode, "MOST_PIXELS", 512 * 512)
    lying = wide.replace(struct.pack(">HH", 1024, 1024), struct.pack(">HH", 64, 64))
    assert lying != wide
    with pytest.raises(CorruptClip):
        decode_clip(lying, 0, 2, 1, 16, None)


@pytest.mark.parametrize(("width", "height"), [(16, 8192), (8192, 16)])
def test_a_frame_that_is_all_length_is_not_scaled_up(tmp_path: Path, width: int, height: int) -> None:
    """Scaled by its shorter side from 16 to 256 pixels it would have 130,000 in the other, 64 of which make a segment."""
    data = blank(width, height)
    with bounded(memory=2**28), pytest.raises(CorruptClip, match=f"{width} x {height}"):
        decode_clip(data, 0, 2, 1, 256, None)
    (tmp_path / "long.mp4").write_bytes(data)
    origin = VideoOrigin(str(tmp_path), "video", "human", 256, RULES)
    with bounded(memory=2**28):
        assert list(origin.episodes(origin.items()[0])) == [Skipped("long.mp4", "damaged")]


@pytest.fixture(scope="module")
def endless() -> bytes:
    """20,000 frames of 16 pixels, each after the first a few bytes."""
    return blank(16, 16, 20_000, "mpeg4")


def test_many_small_frames_cost_what_they_are(tmp_path: Path, endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(endless) < 4 * 2**20
    with bounded(cpu_s=2):
        assert decode_clip(endless, 0, 4, 1, 16, None).shape[0] == 4
        assert probe_video(endless)[0] == 20_000
    # As if no frame were the one that the index promises: all the same time stamp would do it.
    monkeypatch.setattr(decode, "_frames_from", lambda mp4, start: ((0, None) for _ in range(10**9)))
    with bounded(cpu_s=2), pytest.raises(CorruptClip, match="does not come within"):
        decode_clip(b"", 1, 4, 1, 16, None)


def test_an_episode_is_not_kept_whole_beyond_a_limit(endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGEST_EPISODE", 2**22)
    with bounded(cpu_s=5, memory=2**27), pytest.raises(CorruptClip, match="bytes of frames"):
        decode_episode(endless)


def test_pictures_beyond_reason(tmp_path: Path) -> None:
    """Numbered pictures, pictures inside a data set, and the frames of an npz that are one."""
    for name, (width, height) in {"large": (2**16, 2**15), "long": (16, 2**15)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            (folder / f"{number}.png").write_bytes(png(width, height))
        origin = VideoOrigin(str(folder), "video", "human", 16, RULES, preset="frames")
        with bounded(memory=2**28):
            assert {type(found) for found in origin.episodes(origin.items()[0])} == {Skipped}
    rows = np.full((4, 4000), 0, np.uint8)
    rows[:, :200] = np.frombuffer(png(2**16, 2**15)[:200], np.uint8)
    write_hdf5(tmp_path / "h5" / "a.h5", {"observations/images/top": rows, "action": numbered(4)}, compress=True)
    robots = RobotFilesOrigin(str(tmp_path / "h5"), "robots", 16, RULES)
    with bounded(memory=2**28):
        assert {found.reason for found in robots.episodes(robots.items()[0]) if isinstance(found, Skipped)} == {"damaged pictures"}


def test_actions_that_hdf5_makes_up_are_not_filled_in(tmp_path: Path) -> None:
    """What was never written HDF5 gives as zeros: a small file may declare a hundred gigabytes of them."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("observations/images/top", (10**6, 16, 16, 3), np.uint8, chunks=(1024, 16, 16, 3))
        file.create_dataset("action", (10**6, 4096), np.float32, chunks=(1024, 4096))
    origin = RobotFilesOrigin(str(tmp_path), "robots", 16, RULES)
    with bounded(memory=2**29):
        found = next(iter(origin.episodes(origin.items()[0])))
    assert isinstance(found, SourceEpisode)
    assert found.note == "without actions (declared size beyond reason)"
    assert (tmp_path / "a.h5").stat().st_size < 2**20


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server, and what it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def playlists(address: str) -> dict[str, tuple[str, str]]:
    """Name and text of lists that FFmpeg follows: some by their ending, some by what they begin with."""
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n"
    dash = '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    dash += f"<BaseURL>{address}/dash.mp4</BaseURL></Representation></AdaptationSet>"
    return {
        "asks a server": (".m3u8", f"{head}#EXTINF:10,\n{address}/hls.ts\n#EXT-X-ENDLIST\n"),
        "reads a file": (".m3u8", f"{head}#EXTINF:10,\nprivate.ts\n#EXT-X-ENDLIST\n"),
        "names files": (".mp4", "ffconcat version 1.0\nfile private.ts\n"),
        "dash": (".mpd", f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>{dash}</Period></MPD>'),
        "sdp": (".sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"),
    }


def test_a_list_of_videos_is_no_video(tmp_path: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg knows playlists, which have it read other files of this machine and ask servers."""
    address, asked = server
    private = blank(64, 64, 40, "mpeg4", "mpegts")
    (tmp_path / "private.ts").write_bytes(private)
    monkeypatch.chdir(tmp_path)
    with av.open("private.ts") as container:
        assert sum(1 for _ in container.decode(video=0)) == 40
    for number, (name, (ending, text)) in enumerate(playlists(address).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "private.ts").write_bytes(private)
        for where, read in everywhere(folder, f"video{ending}", text.encode()):
            with bounded(), pytest.raises((CorruptClip, Unusable, av.FFmpegError)):
                pytest.fail(f"{name} is read as a {where}: {read()}")
        root = write_v2(tmp_path / f"lerobot-{number}")
        for path in root.glob("videos/*/*/*.mp4"):
            path.with_suffix(ending).write_text(text)
            (path.parent / "private.ts").write_bytes(private)
        info = root / "meta" / "info.json"
        info.write_text(info.read_text().replace(".mp4", ending))
        origin = LeRobotOrigin(str(root), "arm", 16, RULES, camera=TOP)
        assert {type(found) for item in origin.items() for found in origin.episodes(item)} == {Skipped}, name
    time.sleep(0.1)
    assert asked == []


def test_a_video_for_a_page_is_measured_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.mp4").open("wb") as file:
        file.truncate(2**40)
    with bounded(cpu_s=1, memory=2**26):
        assert Shelf(2**20).take([str(tmp_path / "a.mp4")]) == "the page would be too large"


def test_sound_videos_are_read_as_before() -> None:
    video = encode_mp4(moving_square(12), 5.0)
    reads: Sequence[Callable[[bytes], object]] = (probe_video, decode_episode, last_frame)
    assert [bool(np.any(read(video) is not None)) for read in reads] == [True] * 3  # type: ignore[arg-type]

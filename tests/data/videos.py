"""Small videos in several containers, drawn here so that the tests need no file from elsewhere."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

CODECS = {"mp4": "libx264", "mkv": "libx264", "mov": "mpeg4", "avi": "mpeg4", "webm": "libvpx", "gif": "gif"}


def moving_square(frames: int, height: int = 48, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """A bright square whose place tells the frame's number: uint8 ``[frames, height, width, 3]``."""
    video = np.full((frames, height, width, 3), 40, np.uint8)
    video[..., seed % 3] = 90
    for t in range(frames):
        x, y = (3 * t + 5 * seed) % (width - 12), (7 * (t // 8)) % (height - 12)
        video[t, y : y + 12, x : x + 12] = 230
    return video


def encoded(video: NDArray[np.uint8], container: str, fps: int = 10) -> bytes:
    """The frames in a container of its usual codec, with that codec's own (long) groups of pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(container, container)) as output:
        stream: Any = output.add_stream(CODECS[container], rate=Fraction(fps))
        stream.width, stream.height = video.shape[2], video.shape[1]
        stream.pix_fmt = "rgb8" if container == "gif" else "yuv420p"
        for index, pixels in enumerate(video):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def rotated(mp4: bytes) -> bytes:
    """The same MP4 with a display matrix that turns it by 90 degrees clockwise."""
    at = mp4.index(b"tkhd") + 44
    matrix = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return mp4[:at] + matrix + mp4[at + len(matrix) :]


def real_videos() -> Path:
    """The folder of real recordings; skips the test where there is none."""
    folder = Path(os.environ.get("COLA_REAL_VIDEOS", Path(__file__).parents[2].parent / "shared" / "data" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real videos at {folder}: set COLA_REAL_VIDEOS to a folder that holds some")
    return folder

"""Bytes of a short-GOP video to a uint8 clip, and back: the only place that touches a codec (PyAV)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

GOP = 16
"""Frames between keyframes: a clip then decodes at most 15 frames too many. Measured by tests/bench/bench_gop.py."""
MOST_PIXELS = 2**26
"""Of a frame, 8192 x 8192: a header or a stream that claims more is damaged or hostile. A decoder holds up to some twenty frames."""
LONGEST_SIDE = 32
"""The longer side of a picture in shorter sides, at most: pictures are scaled by their shorter side, and what is longer would fill the memory."""
LARGEST_EPISODE = 2 * 1024**3
"""Bytes of frames that are held when a whole episode is decoded at once."""
_FRAME_BYTES = 1024
"""What a frame takes besides its pixels."""
MOST_BEFORE = 4096
"""Frames that may be decoded before the first that is wanted: more than any group of frames has."""
_UNPROBED = {"codec_whitelist": "none"}
"""Options that open a container without decoding frames of it to find out what they are: an MP4's header says all that is needed. A decoder that is
not on FFmpeg's list for probing is still used for decoding. Saves 0.3 ms a clip, a tenth of a short one (tests/bench/bench_decode.py)."""


class CorruptClip(ValueError):
    """The bytes are no video, or fewer frames come out of them than were asked for."""


def opened(source: bytes | Path, format: str | None = None, options: Mapping[str, str] = MappingProxyType({})) -> InputContainer:
    """The container in some bytes or a file of this machine. Raises what PyAV raises, and CorruptClip for frames above ``MOST_PIXELS``.

    A playlist among the formats that FFmpeg knows cannot have it read other files or ask servers: of bytes nothing else may be opened at all, of a
    file only files (which `is_playlist` is there to refuse).
    """
    # The first limit is for the frames that are decoded to find out what they are; decoders take theirs from their own options.
    common = {"max_pixels": str(MOST_PIXELS), "protocol_whitelist": "file" if isinstance(source, Path) else "none", **options}
    # The prefix keeps FFmpeg from taking a colon in a path for a protocol.
    container = av.open(f"file:{source}" if isinstance(source, Path) else io.BytesIO(source), "r", format=format, options=common)
    for stream in container.streams.video:
        if stream.codec_context is None:
            continue
        if stream.width * stream.height > MOST_PIXELS:
            container.close()
            raise CorruptClip(f"frames of {stream.width} x {stream.height} pixels, more than {MOST_PIXELS}")
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    return container


def is_playlist(container: InputContainer) -> bool:
    """Whether what was opened reads other files than its own, or makes pictures of text."""
    return bool(set(container.format.name.split(",")) & _NOT_VIDEO)


_NOT_VIDEO = {"tty", "bin", "xbin", "adf", "idf", "hls", "concat", "dash", "sdp", "imf", "webm_dash_manifest"}
"""Demuxers that make video of text, or read other files than the one that they are given."""

Crop = tuple[float, float, float] | None
"""Side of a square as a share of the short side, in (0, 1]; its x and its y as a share of the free room, in [0, 1]. None: the short side, centred."""


def decode_clip(
    mp4: bytes, start: int, frames: int, stride: int, resolution: int, crop: Crop, into: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Frames ``start, start + stride, …`` as uint8 ``[frames, 3, resolution, resolution]``, written to ``into`` where it is given.

    The whole clip has one crop. Raises CorruptClip; ``into`` then holds some of the frames.
    """
    wanted = range(start, start + frames * stride, stride)
    reformatter, found = VideoReformatter(), 0
    clip = np.empty((frames, 3, resolution, resolution), np.uint8) if into is None else into
    for seen, (index, frame) in enumerate(_frames_from(mp4, start)):
        if index > wanted[found]:
            raise CorruptClip(f"frame {wanted[found]} is missing")
        if seen > MOST_BEFORE + len(wanted) * stride:
            raise CorruptClip(f"frame {wanted[found]} does not come within {seen} frames")
        if index == wanted[found]:
            # At once: the decoder gets the frame's memory back, and the pixels are still in the processor's cache.
            clip[found] = _resized(reformatter, frame, resolution, crop)
            found += 1
            if found == frames:
                return clip
    raise CorruptClip(f"video ends before frame {wanted[found]}")


def decode_episode(mp4: bytes) -> list[av.VideoFrame]:
    """Every frame of a video, in the codec's own pixel format. Raises CorruptClip."""
    frames: list[av.VideoFrame] = []
    held = 0
    for index, frame in _frames_from(mp4, 0):
        if index != len(frames):
            raise CorruptClip(f"frame {len(frames)} is missing")
        held += sum(plane.buffer_size for plane in frame.planes) + _FRAME_BYTES
        if held > LARGEST_EPISODE:
            raise CorruptClip(f"more than {LARGEST_EPISODE} bytes of frames")
        frames.append(frame)
    return frames


def to_clip(frames: Sequence[av.VideoFrame], resolution: int, crop: Crop, into: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decoded frames resized and cropped as ``decode_clip`` does, uint8 ``[len(frames), 3, resolution, resolution]``."""
    reformatter = VideoReformatter()
    clip = np.empty((len(frames), 3, resolution, resolution), np.uint8) if into is None else into
    for place, frame in zip(clip, frames, strict=True):
        place[:] = _resized(reformatter, frame, resolution, crop)
    return clip


def _frames_from(mp4: bytes, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their numbers, from the keyframe at or before ``start`` on. Raises CorruptClip."""
    try:
        with opened(mp4, "mp4", _UNPROBED) as container:
            stream = _video_stream(container)
            stream.thread_type = "NONE"
            rate = stream.average_rate
            if rate is None or stream.time_base is None:
                raise CorruptClip("video without frame rate")
            ticks = float(1 / (rate * stream.time_base))
            origin = stream.start_time or 0
            if start:
                container.seek(origin + int(start * ticks), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise CorruptClip("frame without time stamp")
                yield round((frame.pts - origin) / ticks), frame
    except (av.FFmpegError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise CorruptClip(f"video does not decode: {type(error).__name__}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise CorruptClip("unknown codec")
    return stream


def _resized(reformatter: VideoReformatter, frame: av.VideoFrame, resolution: int, crop: Crop) -> NDArray[np.uint8]:
    """One frame scaled so that the crop's side becomes ``resolution``, cropped, channels first: uint8 ``[3, resolution, resolution]``."""
    _check_sides(frame)
    share, x, y = crop if crop is not None else (1.0, 0.5, 0.5)
    factor = resolution / (share * min(frame.width, frame.height))
    width = max(resolution, round(frame.width * factor))
    height = max(resolution, round(frame.height * factor))
    # One thread and one reused context: the figures in the README's table depend on it.
    small = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA", threads=1)
    left, top = round(x * (width - resolution)), round(y * (height - resolution))
    pixels = small.to_ndarray()[top : top + resolution, left : left + resolution]
    return np.asarray(pixels.transpose(2, 0, 1), np.uint8)


def _check_sides(frame: av.VideoFrame) -> None:
    if max(frame.width, frame.height) > LONGEST_SIDE * min(frame.width, frame.height):
        raise CorruptClip(f"a frame of {frame.width} x {frame.height} pixels")


def probe_video(data: bytes) -> tuple[int, float, int, int]:
    """(frames, frames per second, width, height) of a video of any container, by reading packets without decoding them.

    Raises CorruptClip.
    """
    try:
        with opened(data) as container:
            stream = _video_stream(container)
            rate = stream.average_rate or stream.guessed_rate
            frames = sum(packet.size > 0 for packet in container.demux(stream))
            if not frames or not rate or not stream.width:
                raise CorruptClip("no video frames")
            return frames, float(rate), stream.width, stream.height
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise CorruptClip(f"no video: {type(error).__name__}") from error


def small_picture(frame: av.VideoFrame, resolution: int, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    """A frame as uint8 ``[H, W, 3]``, its short side scaled down to ``resolution`` pixels where it is longer.

    Both sides are even, as H.264 with subsampled colour needs them. One ``reformatter`` serves all frames of a video. Raises CorruptClip for a frame
    whose sides are not those of a picture.
    """
    _check_sides(frame)
    short = min(frame.width, frame.height)
    width, height = (2 * max(1, side * min(short, resolution) // (2 * short)) for side in (frame.width, frame.height))
    small = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA", threads=1)
    return np.asarray(small.to_ndarray(), np.uint8)


def encode_mp4(frames: NDArray[np.uint8], fps: float, gop: int = GOP, crf: int = 23, preset: str = "slow") -> bytes:
    """Frames uint8 ``[T, H, W, 3]``, H and W even, to H.264 in MP4 without B-frames; the same frames give the same bytes.

    Not below 64 pixels: x264's macroblock tree then reads memory that nobody wrote (seen at 32 pixels, about one encoding in twenty).
    """
    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One thread: more would make the bytes depend on the machine.
        stream.thread_type = "NONE"
        stream.options = {
            "crf": str(crf),
            "preset": preset,
            "threads": "1",
            "flags": "+bitexact",
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:threads=1",
        }
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()

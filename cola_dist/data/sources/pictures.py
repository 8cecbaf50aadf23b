"""Compressed pictures inside data sets: which format they have, and how they become small frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist.data.decode import MOST_PIXELS, small_picture
from cola_dist.data.sources import Unusable

_DECODERS = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG\r\n\x1a\n": "png"}


def picture_format(image: bytes) -> str:
    """FFmpeg's name of the picture's format; empty for others than JPEG and PNG."""
    return next((name for magic, name in _DECODERS.items() if image.startswith(magic)), "")


def decode_pictures(images: Iterable[bytes], resolution: int) -> Iterator[NDArray[np.uint8]]:
    """JPEG or PNG pictures, each as uint8 ``[H, W, 3]``, decoded as they are asked for.

    Their short side is scaled down to ``resolution`` pixels where it is longer; both sides are even, as H.264 with subsampled colour needs.
    Raises Unusable for one that does not decode.
    """
    reformatter = VideoReformatter()
    for image in images:
        try:
            # A new decoder for each: a used one takes a PNG for the difference to the one before.
            codec: Any = av.CodecContext.create(picture_format(image), "r")
            codec.options = {"max_pixels": str(MOST_PIXELS)}
            codec.thread_count = 1  # with more, the picture comes out only with the next
            (frame,) = codec.decode(av.Packet(image))
            picture = small_picture(frame, resolution, reformatter)
        except (av.FFmpegError, ValueError) as error:
            raise Unusable("damaged pictures") from error
        yield picture

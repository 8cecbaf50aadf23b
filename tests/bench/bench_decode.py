"""Which decoder: PyAV as `cola_dist.data.decode` uses it, against torchcodec. Prints one JSON line last.

    python tests/bench/bench_decode.py [--rounds 12] [--clips 60]

Segments as in bench_gop.py, encoded as the packer does. A clip is 9 or 17 frames at stride 2 from a random start; all decoders read the same clips
from bytes in memory, in alternation, on one thread, and give uint8 frames, channels first, whose short side has the wanted length:

- ``pyav``: ``decode_clip``;
- ``pyav_probed``: the same, but the container is opened with FFmpeg's probing, as is usual;
- ``torchcodec``, ``torchcodec_exact``: ``VideoDecoder.get_frames_at`` with both of its seek modes, resized by FFmpeg while it decodes.

torchcodec is no dependency and is skipped where it is missing: pip install --no-deps torchcodec==0.13.0, and Debian's ffmpeg. Milliseconds are
processor time, each clip's least over the rounds, then the mean; ``pyav_over_X`` is how many times as fast PyAV is. ``pixels_apart`` is the mean
difference of torchcodec's pixels from PyAV's, of 255.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from numpy.typing import NDArray

from cola_dist.data import decode
from cola_dist.data.decode import decode_clip, encode_mp4
from tests.bench.bench_gop import FPS, FRAMES, STRIDE, drawn_segments, real_segments

SETTINGS = ((9, 128, 64), (17, 128, 128), (17, 256, 256))
"""Frames, stored short side, wanted short side."""

Decoder = Callable[[bytes, int, int, int], NDArray[np.uint8]]


def pyav(mp4: bytes, start: int, frames: int, resolution: int) -> NDArray[np.uint8]:
    return decode_clip(mp4, start, frames, STRIDE, resolution, None)


def pyav_probed(mp4: bytes, start: int, frames: int, resolution: int) -> NDArray[np.uint8]:
    with mock.patch.object(decode, "_UNPROBED", {}):
        return pyav(mp4, start, frames, resolution)


def torchcodec_decoders(shape: tuple[int, int]) -> dict[str, Decoder]:
    """For videos of this height and width."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def with_mode(mode: str) -> Decoder:
        def clip(mp4: bytes, start: int, frames: int, resolution: int) -> NDArray[np.uint8]:
            size = [max(resolution, round(side * resolution / min(shape))) for side in shape]
            transforms = [] if tuple(size) == shape else [Resize(size)]
            decoder = VideoDecoder(mp4, num_ffmpeg_threads=1, seek_mode=mode, transforms=transforms)
            found = decoder.get_frames_at(list(range(start, start + frames * STRIDE, STRIDE))).data.numpy()
            top, left = ((side - resolution) // 2 for side in size)
            return np.ascontiguousarray(found[:, :, top : top + resolution, left : left + resolution])

        return clip

    return {"torchcodec": with_mode("approximate"), "torchcodec_exact": with_mode("exact")}


def has_torchcodec() -> bool:
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        print(f"torchcodec does not load here and is skipped: {str(error).splitlines()[0]}", flush=True)
        return False
    return bool(torchcodec.decoders)


def timed(
    decoders: list[dict[str, Decoder]], mp4s: list[bytes], reads: list[tuple[int, int]], frames: int, resolution: int, rounds: int
) -> tuple[dict[str, float], list[float]]:
    """Milliseconds per clip of each decoder, and how far torchcodec's pixels are from PyAV's. ``reads`` are (segment, start)."""
    seconds = {name: np.empty((rounds, len(reads))) for name in decoders[0]}
    apart: list[float] = []
    draw = random.Random(0)
    for number in range(rounds):
        for index, (segment, start) in enumerate(reads):
            clips = {}
            # Shuffled: who comes after its like finds the video and FFmpeg's code in the caches.
            for name in draw.sample(list(seconds), len(seconds)):
                began = time.process_time()
                clips[name] = decoders[segment][name](mp4s[segment], start, frames, resolution)
                seconds[name][number, index] = time.process_time() - began
            apart += [float(np.abs(clips["pyav"].astype(int) - clips[name]).mean()) for name in clips if name.startswith("torchcodec")]
    return {name: float(1000 * times.min(axis=0).mean()) for name, times in seconds.items()}, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clips", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    line: dict[str, Any] = {"bench": "decode", "rounds": args.rounds, "clips": args.clips}
    others = torchcodec_decoders if has_torchcodec() else lambda shape: {}
    for frames, side, resolution in SETTINGS:
        segments = real_segments(side)
        line["segments"] = f"{len(segments)} real" if segments else "drawn"
        segments = segments or drawn_segments(side)
        draw = np.random.default_rng(frames)
        reads = [(int(draw.integers(len(segments))), int(draw.integers(FRAMES - STRIDE * (frames - 1)))) for _ in range(args.clips)]
        decoders: list[dict[str, Decoder]] = [
            {"pyav": pyav, "pyav_probed": pyav_probed, **others(segment.shape[1:3])} for segment in segments
        ]
        ms, apart = timed(decoders, [encode_mp4(segment, FPS) for segment in segments], reads, frames, resolution, args.rounds)
        label = f"{frames}_frames_{side}_to_{resolution}"
        print(f"{label}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()), flush=True)
        line[label] = {f"pyav_over_{name}": round(value / ms["pyav"], 3) for name, value in ms.items() if name != "pyav"}
        if apart:
            line[label] |= {"pixels_apart": round(float(np.mean(apart)), 2)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()

"""What the distance of keyframes costs in bytes and saves in decoding. Prints one JSON line last.

    python tests/bench/bench_gop.py [--rounds 5] [--clips 60]

Segments of 64 frames at 10 frames per second, short side 128 and 256, from the real recordings where they are present (COLA_REAL_VIDEOS) and else
drawn; the repository's encoder and decoder, one thread. A clip is 5 or 17 frames at stride 2 from a random start; all distances read the same
clips, in alternation. Milliseconds are each clip's least over the rounds, as other work on the machine only ever adds to them, then the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist.data.decode import GOP, decode_clip, encode_mp4, small_picture
from cola_dist.data.sources import SourceEpisode
from cola_dist.data.sources.cut import CutRules, Recording, cut
from tests.data.videos import moving_square, real_videos

GOPS = (1, 4, 8, 16, 32, 64, 250)
SIDES = (128, 256)
CLIPS = (5, 17)
STRIDE = 2
FRAMES = 64
FPS = 10.0
VIDEOS = {".mp4", ".mkv", ".avi", ".gif", ".mov", ".webm"}


def frames_of(path: Path, side: int) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Seconds and pictures of a video."""
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.time or 0.0, small_picture(frame, side, reformatter)


def real_segments(side: int) -> list[NDArray[np.uint8]]:
    """Every segment of 64 frames in the folder of real recordings, none where it is absent."""
    segments = []
    try:
        folder = real_videos()
    except pytest.skip.Exception:
        return []
    for path in sorted(p for p in folder.iterdir() if p.suffix in VIDEOS):
        with av.open(str(path)) as container:
            fps = float(container.streams.video[0].average_rate or FPS)
        whole = Recording(path.name, path.stem, path.name, fps, frames_of(path, side), {"provenance": {}})
        pieces = cut(whole, CutRules(fps=FPS, segment_frames=FRAMES, scene_cut=0, still=0))
        segments += [p.video[:FRAMES] for p in pieces if isinstance(p, SourceEpisode) and len(p.video) >= FRAMES]
    return segments


def drawn_segments(side: int) -> list[NDArray[np.uint8]]:
    """A bright square over a picture with noise."""
    draw = np.random.default_rng(0)
    squares = [moving_square(FRAMES, side, side * 2 // 3 * 2, seed).astype(np.int16) for seed in range(3)]
    return [np.clip(s + draw.normal(0, 4, s.shape), 0, 255).astype(np.uint8) for s in squares]


def decode_ms(encoded: dict[int, list[bytes]], frames: int, side: int, clips: int, rounds: int) -> dict[int, float]:
    """Milliseconds per clip at each distance of keyframes."""
    draw = np.random.default_rng(frames)
    reads = [(int(draw.integers(len(encoded[GOP]))), int(draw.integers(FRAMES - STRIDE * (frames - 1)))) for _ in range(clips)]
    seconds = {gop: np.empty((rounds, clips)) for gop in encoded}
    for number in range(rounds):
        for index, (segment, start) in enumerate(reads):
            for gop, segments in encoded.items():
                began = time.perf_counter()
                decode_clip(segments[segment], start, frames, STRIDE, side, None)
                seconds[gop][number, index] = time.perf_counter() - began
    return {gop: float(1000 * times.min(axis=0).mean()) for gop, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=60, help="clips in a round")
    args = parser.parse_args()
    line: dict[str, Any] = {"bench": "gop", "rounds": args.rounds, "clips": args.clips, "gop": GOP}
    for side in SIDES:
        segments = real_segments(side)
        line["segments"] = f"{len(segments)} real" if segments else "drawn"
        encoded = {gop: [encode_mp4(s, FPS, gop) for s in segments or drawn_segments(side)] for gop in GOPS}
        table = {"bytes_per_frame": {g: sum(map(len, mp4s)) / len(mp4s) / FRAMES for g, mp4s in encoded.items()}}
        for frames in CLIPS:
            table[f"ms_per_clip_of_{frames}"] = decode_ms(encoded, frames, side, args.clips, args.rounds)
        print(f"short side {side}: {line['segments']} segments\n  gop  {'  '.join(table)}")
        for gop in GOPS:
            print(f"  {gop:3d}  " + "  ".join(f"{table[name][gop]:{len(name)}.2f}" for name in table), flush=True)
        line |= {f"{name}_{side}_to_gop_{GOP}": {g: round(v / values[GOP], 3) for g, v in values.items()} for name, values in table.items()}
    print(json.dumps(line))


if __name__ == "__main__":
    main()

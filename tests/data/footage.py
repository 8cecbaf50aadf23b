"""What tests of ``VideoOrigin`` share: opening one, reading all of it, and files for it to read."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cola_dist.data.sources import Skipped, SourceEpisode
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.video import VideoOrigin
from tests.data.videos import moving_square

RULES = CutRules(fps=10.0, segment_frames=400, scene_cut=0.0, still=0.0)
LONG = moving_square(320)


def origin(folder: Path | str, **options: Any) -> VideoOrigin:
    return VideoOrigin(**{"input": str(folder), "source": "toy", "domain": "human", "resolution": 64, "rules": RULES} | options)


def read(opened: VideoOrigin) -> tuple[list[SourceEpisode], list[Skipped]]:
    """Everything, item by item, each by a copy as a task gets it."""
    packed = pickle.dumps(opened)
    found = [each for item in opened.items() for each in pickle.loads(packed).episodes(item)]
    return [each for each in found if isinstance(each, SourceEpisode)], [each for each in found if isinstance(each, Skipped)]


def reasons(skipped: Sequence[Skipped]) -> dict[str, str]:
    assert len({each.name for each in skipped}) == len(skipped)
    return {each.name: each.reason for each in skipped}


def numbers(video: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> list[int]:
    """Which drawn frame each frame of a packed video is."""
    return [int(np.abs(drawn.astype(np.int32) - frame).mean(axis=(1, 2, 3)).argmin()) for frame in video]


def noisy(frames: int) -> NDArray[np.uint8]:
    """Frames of which the bytes of a video take their even share."""
    noise = np.random.default_rng(0).integers(0, 60, (frames, 48, 64, 3), np.uint8)
    return np.clip(moving_square(frames).astype(int) + noise, 0, 255).astype(np.uint8)


def picture(pixels: NDArray[np.uint8], codec: str = "png") -> bytes:
    context: Any = av.CodecContext.create(codec, "w")
    context.width, context.height, context.time_base = pixels.shape[1], pixels.shape[0], Fraction(1, 25)
    context.pix_fmt = "rgb24" if codec == "png" else "yuvj420p"
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=context.pix_fmt)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode()])


def write_table(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "rows": rows}))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path.name

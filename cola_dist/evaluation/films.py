"""Rollouts as files to look at: side by side as MP4, an atlas of codes as PNG."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola_dist.data.decode import CorruptClip, encode_mp4, opened

GAP = 2
"""Width in pixels of the white lines between cells."""
CELL = 96
"""Least side in pixels of a cell; smaller clips are enlarged by a whole factor."""
_DPI = 100
_PER_ROW = 8
"""Codes in a row of an atlas that plays."""


def tile(cells: Tensor) -> Tensor:
    """Clips uint8 ``[rows, columns, T, 3, H, W]`` as one video ``[T, H', W', 3]``, enlarged to `CELL`, its sides even."""
    scale = max(1, -(-CELL // min(cells.shape[-2:])))
    cells = cells.cpu().repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    padded = torch.nn.functional.pad(cells, (0, GAP, 0, GAP), value=255)
    video = padded.permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2)
    return video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]


def side_by_side(columns: list[Tensor], fps: float) -> bytes:
    """MP4 of clips uint8 ``[B, T, 3, H, W]`` each: a row per clip, ``columns`` from left to right."""
    return _mp4(torch.stack(columns, 1), fps)


def atlas_film(rollouts: Tensor, fps: float) -> bytes:
    """MP4 of rollouts uint8 ``[K, T, 3, H, W]``, by rows from the top left: code 0, 1, 2 …"""
    columns = min(_PER_ROW, len(rollouts))
    empty = -len(rollouts) % columns
    cells = torch.cat([rollouts, torch.full_like(rollouts[:1], 255).expand(empty, *rollouts.shape[1:])])
    return _mp4(cells.unflatten(0, (-1, columns)), fps)


def atlas_sheet(rollouts: Tensor, fps: float) -> bytes:
    """PNG of rollouts uint8 ``[K, T, 3, H, W]``: a row per code, its frames from left to right."""
    from matplotlib.figure import Figure

    picture = tile(rollouts.unsqueeze(2)).numpy()[0]
    codes, times = len(rollouts), rollouts.shape[1]
    high, wide = picture.shape[0] / codes, picture.shape[1] / times
    figure = Figure(figsize=((picture.shape[1] + 80) / _DPI, (picture.shape[0] + 60) / _DPI), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest")
    axes.set_yticks([(code + 0.5) * high for code in range(codes)], [str(code) for code in range(codes)])
    axes.set_xticks([(time + 0.5) * wide for time in range(times)], [f"{time / fps:.1f}" for time in range(times)])
    axes.set_ylabel("code")
    axes.set_xlabel("seconds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def last_frame(video: bytes) -> NDArray[np.uint8]:
    """The last frame of a video of any container, uint8 ``[H, W, 3]``. Raises what PyAV raises, and CorruptClip where there is none."""
    last = None
    with opened(video) as container:
        for frame in container.decode(video=0):
            last = frame
    if last is None:
        raise CorruptClip("it holds no frame")
    return last.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def _mp4(cells: Tensor, fps: float) -> bytes:
    return encode_mp4(np.ascontiguousarray(tile(cells).numpy()), fps)

"""Pictures of a shard folder to look at: a contact sheet of some of its episodes, and the same playing side by side."""

from __future__ import annotations

import io
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.decode import CorruptClip, decode_episode, encode_mp4
from cola_dist.data.shards import SPLITS, CorruptMember, Episode, ShardFolder, read_member
from cola_dist.errors import UserError

MOST_CLIPS = 64
COLUMNS = 8
"""Frames of an episode on the contact sheet, from its first to its last."""
CELL = 128
"""Height of a cell in pixels; its width follows from the pictures' usual shape."""
LABEL = 32
"""Height in pixels of the two lines above each row of the sheet."""
GRID_FRAMES = 128
"""Longest video of the grid."""
_DPI = 100


@dataclass(frozen=True)
class Preview:
    """Where the pictures are, the keys of the episodes in them from first to last, and a line for each episode that could not be read."""

    sheet: str
    video: str
    keys: tuple[str, ...]
    unreadable: tuple[str, ...]


def preview(folder: ShardFolder, output: str, clips: int = 12, seed: int = 0) -> Preview:
    """Write ``SOURCE-HASH.png``, the contact sheet, and ``SOURCE-HASH.mp4``, the grid, below ``output``; the same ``seed`` gives the same bytes.

    Raises UserError for an unfit number of clips, and when none of the drawn episodes can be read.
    """
    if not 1 <= clips <= MOST_CLIPS:
        raise UserError(f"clips {clips}: give a number from 1 to {MOST_CLIPS}")
    chosen = _chosen(folder, clips, seed)
    aspect = statistics.median(episode.width / episode.height for episode in chosen)
    width = 2 * round(CELL * min(max(aspect, 0.75), 2.0) / 2)
    shown: list[tuple[Episode, NDArray[np.uint8]]] = []
    unreadable: list[str] = []
    for episode in chosen:
        try:
            shown.append((episode, _cells(decode_episode(read_member(folder, episode, "mp4")), width)))
        except (CorruptMember, CorruptClip) as error:
            unreadable.append(f"{episode.shard}: {episode.key}.mp4: {error}")
    if not shown:
        raise UserError(f"{folder.uri}: none of {len(chosen)} episodes can be read, the first: {unreadable[0]}; find the damage with lint")
    name = storage.join(output, f"{folder.source}-{folder.content_hash[:8]}")
    fps = max(episode.fps for episode, _ in shown)
    storage.write_bytes(f"{name}.png", _sheet(shown))
    storage.write_bytes(f"{name}.mp4", encode_mp4(_grid(shown, fps), fps))
    return Preview(f"{name}.png", f"{name}.mp4", tuple(episode.key for episode, _ in shown), tuple(unreadable))


def _chosen(folder: ShardFolder, clips: int, seed: int) -> list[Episode]:
    """Random episodes, half of them held out as far as there are so many."""
    drawn = {split: random.Random(f"{seed} {split}").sample(folder.split(split), len(folder.split(split))) for split in SPLITS}
    heldout = max(min(len(drawn["heldout"]), clips // 2), clips - len(drawn["train"]))
    return [*drawn["train"][: clips - heldout], *drawn["heldout"][:heldout]]


def _cells(frames: Sequence[av.VideoFrame], width: int) -> NDArray[np.uint8]:
    """Frames fitted into cells, black where their shape differs: uint8 ``[len(frames), CELL, width, 3]``."""
    cells = np.zeros((len(frames), CELL, width, 3), np.uint8)
    reformatter = VideoReformatter()
    for cell, frame in zip(cells, frames, strict=True):
        factor = min(width / frame.width, CELL / frame.height)
        wide, high = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
        small = reformatter.reformat(frame, width=wide, height=high, format="rgb24", interpolation="AREA", threads=1)
        left, top = (width - wide) // 2, (CELL - high) // 2
        cell[top : top + high, left : left + wide] = small.to_ndarray()
    return cells


def _sheet(shown: Sequence[tuple[Episode, NDArray[np.uint8]]]) -> bytes:
    """A row per episode, frames from left to right, as PNG."""
    width = shown[0][1].shape[2]
    picture = np.full((len(shown) * (LABEL + CELL), COLUMNS * width, 3), 255, np.uint8)
    figure = Figure(figsize=(picture.shape[1] / _DPI, picture.shape[0] / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for row, (episode, cells) in enumerate(shown):
        top = row * (LABEL + CELL)
        label = f"{episode.key}   {episode.split}   {episode.frames} frames at {episode.fps:g}/s   {episode.width} x {episode.height}"
        axes.text(4, top + LABEL / 4, label, fontsize=8, verticalalignment="center")
        for column, at in enumerate(np.linspace(0, len(cells) - 1, COLUMNS).round().astype(int)):
            left = column * width
            picture[top + LABEL : top + LABEL + CELL, left : left + width] = cells[at]
            axes.text(left + 4, top + 3 * LABEL / 4, f"{at / episode.fps:.1f} s", fontsize=8, verticalalignment="center")
    axes.imshow(picture, interpolation="nearest", extent=(0, picture.shape[1], picture.shape[0], 0), aspect="auto")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _grid(shown: Sequence[tuple[Episode, NDArray[np.uint8]]], fps: float) -> NDArray[np.uint8]:
    """The episodes side by side, each at its own rate and from the start again when it ends: uint8 ``[frames, H, W, 3]`` at ``fps``."""
    length = min(GRID_FRAMES, max(math.ceil(len(cells) / episode.fps * fps) for episode, cells in shown))
    columns = math.ceil(math.sqrt(len(shown)))
    width = shown[0][1].shape[2]
    video = np.zeros((length, math.ceil(len(shown) / columns) * CELL, columns * width, 3), np.uint8)
    for place, (episode, cells) in enumerate(shown):
        row, column = divmod(place, columns)
        # Half a thousandth of a frame: without it, rounding errors show some frames twice.
        at = (np.arange(length) * (episode.fps / fps) + 5e-4).astype(int) % len(cells)
        video[:, row * CELL : (row + 1) * CELL, column * width : (column + 1) * width] = cells[at]
    return video

"""Recordings to segments: a common frame rate, cuts at scene changes, bounded lengths, nothing that stands still.

Everything is streamed: at most one segment and its possible tail are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from cola_dist.data.sources import Skipped, SourceEpisode, Unusable

_LONGEST_HOLD_S = 2.0
"""A frame is not held over a longer gap, unless the frame rate itself is as slow: broken time stamps could otherwise fill the memory and disk."""
_CELLS = 16
"""Cells along the short side, over which ``motion`` takes means."""
_ROUNDING_S = 1e-6
"""Times closer than this are the same: they come from divisions."""


@dataclass(frozen=True)
class CutRules:
    """What recordings have in common once they are packed."""

    fps: float = 10.0
    """Common frame rate; a slower recording keeps its own."""
    segment_frames: int = 64
    """Frames of the longest segment, before a tail shorter than ``min_seconds`` joins it."""
    min_seconds: float = 2.0
    """Shorter segments are dropped."""
    scene_cut: float = 12.0
    """Score of a scene change by FFmpeg's ``scdet``, 0 to 100; 0 looks for none. Of 336 hard cuts between real videos at 10 fps all but two score
    more than 12; the only real takes that do are shaken by hand. A pan over less than 10 % of the width a frame does not; a dissolve never."""
    still: float = 1.7
    """Grey levels: a segment with less ``motion`` is dropped as static; 0 keeps all. Over 2 s, real videos have 17 and more, faint objects of 5 % of
    the side that move by 2 % of it have 2 and more, still pictures with noise, compressed at CRF 28, up to about 1.5."""

    def shortest(self, fps: float) -> int:
        """Frames in ``min_seconds``, at least the two that make a transition."""
        return max(2, math.ceil(self.min_seconds * fps - _ROUNDING_S))


@dataclass(frozen=True)
class Recording:
    """A video or robot episode as it is read, before it is cut.

    ``actions`` is float32 ``[frames - 1, A]`` with row t moving frame t to t + 1, ``state`` float32 ``[frames, S]``, both by number of frame.
    """

    name: str
    """As a person would look it up: a file, ``file#record``, ``episode 12``."""
    key: str
    """Unique in the source; segments are ``KEY-00000`` and so on."""
    group: str
    """What is never torn between splits."""
    fps: float
    """Nominal rate of frames, actions and state."""
    frames: Iterator[tuple[float, NDArray[np.uint8]]]
    """Seconds since the first frame, ascending, and the picture, uint8 ``[H, W, 3]`` with even sides; may raise Unusable."""
    meta: Mapping[str, Any]
    """As in ``SourceEpisode``; segments add ``start_s`` and ``end_s`` to its "provenance"."""
    start_s: float = 0.0
    """Where in the original the first frame stands."""
    split: Literal["", "train", "heldout"] = ""
    actions: NDArray[np.float32] | None = None
    state: NDArray[np.float32] | None = None
    note: str = ""


def cut(recording: Recording, rules: CutRules) -> Iterator[SourceEpisode | Skipped]:
    """Segments of a recording, and what of it is not packed; the same recording gives the same bytes.

    Frames are those nearest in time at the lower of the two rates. The action between two kept frames is the mean of the rows between them (their
    sum over their number), the state that of the kept frame; a frame shown again repeats the row before. A change of the picture's size and
    a gap of more than two seconds cut like a scene change. Where ``frames`` raises Unusable, what came before is packed. Raises ValueError for a
    frame without its actions or state.
    """
    fps = min(rules.fps, recording.fps)
    shortest = rules.shortest(fps)
    frames = packed = 0
    waiting: list[SourceEpisode | Skipped] = []
    try:
        for piece in _pieces(recording, rules, fps):
            frames += len(piece)
            waiting.append(_segment(recording, rules, fps, piece, packed))
            packed += isinstance(waiting[-1], SourceEpisode)
            if frames >= shortest:
                yield from waiting
                waiting.clear()
    except Unusable as error:
        yield Skipped(recording.name, str(error))
        return
    if frames < shortest:
        yield Skipped(recording.name, _too_short(rules))


class _Kept(NamedTuple):
    """A frame at the common rate: its place there, its number in the recording, and whether a gap is before it."""

    tick: int
    number: int
    pixels: NDArray[np.uint8]
    after_gap: bool


def _resampled(recording: Recording, fps: float) -> Iterator[_Kept]:
    """The frame nearest to each tick, the earlier of two as near."""
    period = 1 / recording.fps
    tick = 0
    after_gap = False
    for number, time, following, pixels in _with_next_time(recording):
        gap = following - time > max(_LONGEST_HOLD_S, 2 * period)
        until = time + period / 2 - _ROUNDING_S if gap else (time + following) / 2 + _ROUNDING_S
        while tick / fps <= until:
            yield _Kept(tick, number, pixels, after_gap)
            tick += 1
            after_gap = False
        if gap and following < math.inf:
            tick = max(tick, math.ceil((following - period / 2) * fps))
            after_gap = True


def _with_next_time(recording: Recording) -> Iterator[tuple[int, float, float, NDArray[np.uint8]]]:
    """(number, its time, time of the one after, picture) of each frame; infinity after the last, even where that is damage."""
    last: tuple[float, NDArray[np.uint8]] | None = None
    number = -1
    damage: Unusable | None = None
    try:
        for number, (time, pixels) in enumerate(recording.frames):
            _check_rows(recording, number)
            if last is not None:
                yield number - 1, last[0], time, last[1]
            last = time, pixels
    except Unusable as error:
        damage = error
    if last is not None:
        yield number, last[0], math.inf, last[1]
    if damage is not None:
        raise damage


def _check_rows(recording: Recording, number: int) -> None:
    for what, rows, needed in (("actions", recording.actions, number), ("state", recording.state, number + 1)):
        if rows is not None and len(rows) < needed:
            raise ValueError(f"{recording.name}: frame {number} came, with {len(rows)} rows of {what}")


def _pieces(recording: Recording, rules: CutRules, fps: float) -> Iterator[list[_Kept]]:
    """Frames between cuts, in pieces of the longest segment; what would be shorter than the shortest joins the piece before."""
    shortest = rules.shortest(fps)
    longest = max(rules.segment_frames, shortest)
    held: list[_Kept] = []
    detector = _SceneCuts(rules.scene_cut)
    damage: Unusable | None = None
    try:
        for frame in _resampled(recording, fps):
            jump = frame.after_gap or (bool(held) and frame.pixels.shape != held[-1].pixels.shape)
            if jump:
                detector = _SceneCuts(rules.scene_cut)
            if detector.begins_at(frame.pixels) or jump:
                yield held
                held = []
            held.append(frame)
            if len(held) == longest + shortest:
                yield held[:longest]
                del held[:longest]
    except Unusable as error:
        damage = error
    if held:
        yield held
    if damage is not None:
        raise damage


class _SceneCuts:
    """FFmpeg's ``scdet`` over frames of one size."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._graph: Graph | None = None
        self._frames = 0

    def begins_at(self, pixels: NDArray[np.uint8]) -> bool:
        """Whether the frame is the first of a scene; never the first frame of all."""
        if not self._threshold:
            return False
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = self._frames, Fraction(1)
        self._frames += 1
        if self._graph is None:
            self._graph = _detector(frame, self._threshold)
        self._graph.push(frame)
        try:
            self._graph.pull()
        except av.BlockingIOError:
            return False
        return True


def _detector(frame: av.VideoFrame, threshold: float) -> Graph:
    """A graph that lets the first frames of scenes through at once, and no other frame."""
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("scdet", f"threshold={threshold}:sc_pass=1"), graph.add("buffersink")).configure()
    return graph


def _segment(recording: Recording, rules: CutRules, fps: float, piece: list[_Kept], index: int) -> SourceEpisode | Skipped:
    start, end = (round(recording.start_s + tick / fps, 3) for tick in (piece[0].tick, piece[-1].tick + 1))
    place = f"{recording.name} at {start:g} s"
    if len(piece) < rules.shortest(fps):
        return Skipped(place, _too_short(rules), "segment")
    video = np.stack([frame.pixels for frame in piece])
    if rules.still and motion(video) < rules.still:
        return Skipped(place, "static", "segment")
    numbers = [frame.number for frame in piece]
    return SourceEpisode(
        key=f"{recording.key}-{index:05d}",
        video=video,
        fps=fps,
        meta={**recording.meta, "provenance": {**recording.meta["provenance"], "start_s": start, "end_s": end}},
        recording=recording.name,
        group=recording.group,
        split=recording.split,
        actions=None if recording.actions is None else _between(recording.actions, numbers),
        state=None if recording.state is None else recording.state[numbers],
        note=recording.note,
    )


def _too_short(rules: CutRules) -> str:
    return f"shorter than {rules.min_seconds:g} s"


def _between(actions: NDArray[np.float32], numbers: list[int]) -> NDArray[np.float32]:
    """Means of the rows between frames of these numbers: float32 ``[len(numbers) - 1, A]``."""
    rows = np.empty((len(numbers) - 1, actions.shape[1]), np.float32)
    for row, first, last in zip(rows, numbers[:-1], numbers[1:], strict=True):
        # A frame that is shown again has no row of its own.
        row[:] = actions[max(0, min(first, last - 1)) : max(1, last)].mean(axis=0, dtype=np.float64)
    return rows


def motion(video: NDArray[np.uint8]) -> float:
    """How much the part of a picture that changes most does, in grey levels, from uint8 ``[T, H, W, 3]``.

    It is the largest standard deviation over time among means of square cells, of which noise and compression leave little.
    """
    height, width = video.shape[1:3]
    side = max(1, min(height, width) // _CELLS)
    grey = video[:, : height // side * side, : width // side * side].mean(axis=3, dtype=np.float32)
    cells = grey.reshape(len(video), height // side, side, width // side, side).mean(axis=(2, 4))
    return float(cells.std(axis=0).max())

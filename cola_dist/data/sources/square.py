"""A drawn domain that needs no simulator: a square moved by a known random action, beside a disc that drifts by itself.

What the actions explain and what they do not are both known exactly, so it is the domain in which a study's figures can be judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cola_dist.data.sources import SourceEpisode

SIZE = 64
"""Height and width of a frame in pixels."""
FPS = 5.0
REACH = 10.0
"""Largest displacement of the square per frame and axis, in pixels."""
_HALF = 8
_RADIUS = 6.0
LOW, HIGH = np.full(2, _HALF), np.full(2, SIZE - _HALF)
"""Where the middle of the square may be, in pixels from the top left corner."""

SCENES = ("square-0", "square-1", "square-2", "square-3")


@dataclass(frozen=True)
class SquareState:
    """All that changes in a scene; pairs are (vertical, horizontal) in pixels."""

    place: NDArray[np.float64]
    """Middle of the square."""
    disc: NDArray[np.float64]
    """Middle of the disc."""
    drift: NDArray[np.float64]
    """By how much the disc moves in a frame."""


class SquareScene:
    """A square and a disc on one background; ``name`` seeds the colours."""

    def __init__(self, name: str) -> None:
        self.name = name
        rng = np.random.default_rng([*name.encode()])
        coarse = rng.uniform(20, 110, (5, 5, 3))
        self._ground = np.kron(coarse, np.ones((13, 13, 1)))[:SIZE, :SIZE].astype(np.uint8)
        self._square, self._disc = rng.integers(170, 255, 3), rng.integers(120, 200, 3)

    def record(self, key: str, split: Literal["train", "heldout"], rng: np.random.Generator) -> SourceEpisode:
        """40 to 60 frames; actions uniform in [-1, 1] per axis (vertical, horizontal), as `moved` takes them."""
        frames = int(rng.integers(40, 61))
        state = self.start(rng)
        video, actions = [self.picture(state)], []
        for _ in range(frames - 1):
            state, action = self.moved(state, rng.uniform(-1, 1, 2))
            actions.append(action.astype(np.float32))
            video.append(self.picture(state))
        return SourceEpisode(key, np.stack(video), FPS, self._meta(), key, key, split, np.stack(actions))

    def start(self, rng: np.random.Generator) -> SquareState:
        """Square and disc anywhere."""
        place, disc = rng.uniform(LOW, HIGH), rng.uniform(LOW, HIGH)
        return SquareState(place, disc, rng.normal(0, 3, 2))

    def moved(self, state: SquareState, action: NDArray[np.float64]) -> tuple[SquareState, NDArray[np.float64]]:
        """The next state under ``action [2]`` in units of `REACH`, and the action that was taken: turned round where it would leave the picture."""
        leaves = (state.place + REACH * action < LOW) | (state.place + REACH * action > HIGH)
        action = np.where(leaves, -action, action)
        drift = np.where((state.disc + state.drift < LOW) | (state.disc + state.drift > HIGH), -state.drift, state.drift)
        return SquareState(state.place + REACH * action, state.disc + drift, drift), action

    def close(self) -> None:
        """Nothing is held open."""

    def picture(self, state: SquareState) -> NDArray[np.uint8]:
        """uint8 ``[SIZE, SIZE, 3]``; edges are drawn to a fraction of a pixel, so that small actions show too."""
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        square = np.prod([np.clip(_HALF + 0.5 - np.abs(axis - centre), 0, 1) for axis, centre in zip((y, x), state.place, strict=True)], 0)
        round_ = np.clip(_RADIUS + 0.5 - np.hypot(y - state.disc[0], x - state.disc[1]), 0, 1)
        picture = self._ground + round_[..., None] * (self._disc - self._ground.astype(float))
        return np.asarray(picture + square[..., None] * (self._square - picture), np.uint8)

    def _meta(self) -> dict[str, Any]:
        return {
            "embodiment": "drawn square",
            "camera": "fixed",
            "task": "none: random displacements",
            "licence": "generated",
            "provenance": {
                "dataset": "drawn by cola-dist",
                "behaviour": "uniform random displacements, turned round at the border; a disc drifts at constant speed",
                "action": f"vertical and horizontal displacement of the square in units of {REACH:g} pixels",
                "fps": "nominal: one frame per action",
            },
        }

"""A drawn domain that needs no simulator: a square moved by a known random action, beside a disc that drifts by itself.

What the actions explain and what they do not are both known exactly, so it is the domain in which a study's figures can be judged.
"""

from __future__ import annotations

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


class SquareScene:
    """Episodes of 40 to 60 frames on one background; ``name`` seeds its colours."""

    def __init__(self, name: str) -> None:
        self.name = name
        rng = np.random.default_rng([*name.encode()])
        coarse = rng.uniform(20, 110, (5, 5, 3))
        self._ground = np.kron(coarse, np.ones((13, 13, 1)))[:SIZE, :SIZE].astype(np.uint8)
        self._square, self._disc = rng.integers(170, 255, 3), rng.integers(120, 200, 3)

    def record(self, key: str, split: Literal["train", "heldout"], rng: np.random.Generator) -> SourceEpisode:
        """Actions uniform in [-1, 1] per axis (vertical, horizontal), kept where they would leave the picture by turning them round."""
        frames = int(rng.integers(40, 61))
        low, high = np.full(2, _HALF), np.full(2, SIZE - _HALF)
        place, disc = rng.uniform(low, high), rng.uniform(low, high)
        drift = rng.normal(0, 3, 2)
        video, actions = [self._picture(place, disc)], []
        for _ in range(frames - 1):
            action = rng.uniform(-1, 1, 2)
            leaves = (place + REACH * action < low) | (place + REACH * action > high)
            action = np.where(leaves, -action, action)
            place = place + REACH * action
            drift = np.where((disc + drift < low) | (disc + drift > high), -drift, drift)
            disc = disc + drift
            actions.append(action.astype(np.float32))
            video.append(self._picture(place, disc))
        return SourceEpisode(key, np.stack(video), FPS, self._meta(), key, key, split, np.stack(actions))

    def close(self) -> None:
        """Nothing is held open."""

    def _picture(self, place: NDArray[np.float64], disc: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Edges are drawn to a fraction of a pixel, so that small actions show too."""
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        square = np.prod([np.clip(_HALF + 0.5 - np.abs(axis - centre), 0, 1) for axis, centre in zip((y, x), place, strict=True)], 0)
        round_ = np.clip(_RADIUS + 0.5 - np.hypot(y - disc[0], x - disc[1]), 0, 1)
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

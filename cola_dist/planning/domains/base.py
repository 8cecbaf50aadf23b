"""What a domain must offer in which plans are made and judged."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cola_dist.planning.planner import ActionSpace

Frame = NDArray[np.uint8]
"""``[H, W, 3]``, H = W."""


class Domain(Protocol):
    """One environment with one task. All of an episode follows from its seed and the actions that are taken."""

    name: str
    task: str
    space: ActionSpace
    steps: int
    """Actions of an episode."""
    samples: int
    """Action sequences that a planner tries per step."""
    unit: str
    """Of `distance`."""

    def reset(self, seed: int) -> Frame:
        """Begin an episode: its first frame. The goal changes with it."""

    def step(self, action: NDArray[np.float64]) -> Frame:
        """Take ``action [A]``, cut to the bounds: the next frame."""

    def get_state(self) -> Any:
        """All that moves; with `set_state`, also in another instance that was reset with the same seed, the same actions give the same frames."""

    def set_state(self, state: Any) -> None:
        """Go back to what `get_state` gave."""

    def goal(self) -> Frame:
        """A picture of the task done, for this episode."""

    def success(self) -> bool:
        """Whether the present state is the task done."""

    def distance(self) -> float:
        """How far the present state is from that, in `unit`; 0 is near enough or nearer than that."""

    def labelled(self, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Frames ``[count, H, W, 3]`` of many episodes and whether each shows the task done, half of them so. Ends the episode.

        Raises `UserError` where a single frame does not tell.
        """

    def close(self) -> None:
        """Let go of what the simulator holds."""

"""The drawn square as a domain: bring it to the place that the goal picture shows. No simulator, and a thousand frames a second."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cola_dist.data.sources.square import HIGH, LOW, SCENES, SquareScene, SquareState
from cola_dist.errors import UserError
from cola_dist.planning.domains.base import Frame
from cola_dist.planning.planner import ActionSpace

TASKS = ("reach", "corner")
"""reach: a place that each episode draws. corner: the top left corner."""
NEAR = 3.0
"""Distance in pixels from which on the task is done."""
FAR = 16.0
"""Least distance in pixels between start and goal."""


class SquareDomain:
    """`SquareScene` driven by actions. The disc drifts on; in the goal picture it is where the episode begins."""

    name = "square"
    unit = "pixels"
    steps = 15
    samples = 200
    space = ActionSpace(np.full(2, -1.0), np.full(2, 1.0), np.full(2, 0.5))

    def __init__(self, task: str) -> None:
        self.task = task
        self.reset(0)

    def reset(self, seed: int) -> Frame:
        rng = np.random.default_rng(seed)
        self._scene = SquareScene(SCENES[int(rng.integers(len(SCENES)))])
        self._goal = LOW.astype(float) if self.task == "corner" else rng.uniform(LOW, HIGH)
        self._state = self._scene.start(rng)
        while np.linalg.norm(self._state.place - self._goal) < FAR:
            self._state = self._scene.start(rng)
        self._goal_picture = self._scene.picture(replace(self._state, place=self._goal))
        return self._scene.picture(self._state)

    def step(self, action: NDArray[np.float64]) -> Frame:
        self._state, _ = self._scene.moved(self._state, self.space.clipped(action))
        return self._scene.picture(self._state)

    def get_state(self) -> SquareState:
        return self._state

    def set_state(self, state: SquareState) -> None:
        self._state = state

    def goal(self) -> Frame:
        return self._goal_picture

    def success(self) -> bool:
        return self.distance() == 0

    def distance(self) -> float:
        return max(0.0, float(np.linalg.norm(self._state.place - self._goal)) - NEAR)

    def labelled(self, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        if self.task != "corner":
            remedy = "choose corner, or no classifier"
            raise UserError(f"task {self.task} of {self.name} has another goal in each episode, which no single frame tells: {remedy}")
        rng = np.random.default_rng(seed)
        frames, labels = [], np.arange(count) % 2 == 0
        for done in labels:
            self.reset(int(rng.integers(2**62)))
            if done:
                self._state = replace(self._state, place=self._goal + rng.uniform(0, NEAR / 2**0.5, 2))
            frames.append(self._scene.picture(self._state))
        return np.stack(frames), labels

    def close(self) -> None:
        """Nothing is held open."""

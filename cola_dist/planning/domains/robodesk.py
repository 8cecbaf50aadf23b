"""RoboDesk (Kannan et al. 2021) with VP2's seven tasks: a simulated arm at a desk, 64 x 64 pixels, actions held for 50 control steps.

Needs ``pip install 'cola-dist[robodesk]'`` and an OpenGL library. Shadows, reflections and multisampling are off: in software they cost a factor of
twenty. VP2's goal pictures and classifiers are not to be had; goals are made here, from the episode's own start: see `RoboDeskDomain.goal`.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_dist.errors import UserError
from cola_dist.planning.domains.base import Frame
from cola_dist.planning.planner import ActionSpace

TASKS = (
    "push_red",
    "push_green",
    "push_blue",
    "open_slide",
    "open_drawer",
    "flat_block_off_table",
    "upright_block_off_table",
)
SIZE = 64
"""Height and width of a frame in pixels."""
_REPEAT = 50
_JOINTS = 7
"""Joints of the arm without its fingers."""
_PRESSED, _SLID, _DRAWN = -0.005, 0.6, -0.3
"""Where a button, the slide and the drawer are when the task is done, in metres."""
_FALLEN = np.array([2.0, 0.5, 0.05])
"""A block off the table, outside the picture."""
_SYSTEM = "apt-get install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"


@dataclass(frozen=True)
class RoboDeskState:
    """All that moves; the solver's last accelerations too, without which a restored state would go on a little differently."""

    qpos: NDArray[np.float64]
    qvel: NDArray[np.float64]
    act: NDArray[np.float64]
    warmstart: NDArray[np.float64]
    time: float


class RoboDeskDomain:
    """Actions are x, y, z of the hand, turn of the wrist, and fingers. A task counts as done if it was so at any control step of the last action."""

    name = "robodesk"
    unit = "1 - dense reward"
    steps = 15
    space = ActionSpace(np.full(5, -1.0), np.full(5, 1.0), np.array([0.5, 0.5, 0.5, 0.1, 0.1]))

    def __init__(self, task: str) -> None:
        """Raises `UserError` if the simulator is not installed or OpenGL does not start."""
        self.task = task
        self.samples = 800 if task.startswith("open_") else 200
        self._env = _open(task)

    def reset(self, seed: int) -> Frame:
        """A start as the simulator draws it, and the goal picture of the same start with the task done."""
        # The simulator draws from numpy's global state alone.
        before = np.random.get_state()
        np.random.seed(seed % 2**32)
        try:
            self._env.reset()
        finally:
            np.random.set_state(before)
        # Kept by the simulator as views of where things are now, which would make every block stay put for ever.
        self._env.original_pos = {name: np.array(place) for name, place in self._env.original_pos.items()}
        start = self.get_state()
        self._finish()
        self._goal = self._picture()
        self.set_state(start)
        return self._picture()

    def step(self, action: NDArray[np.float64]) -> Frame:
        self._env.success = False
        observation, _, _, _ = self._env.step(self.space.clipped(action))
        return np.asarray(observation["image"], np.uint8)

    def get_state(self) -> RoboDeskState:
        data = self._env.physics.data
        return RoboDeskState(data.qpos.copy(), data.qvel.copy(), data.act.copy(), data.qacc_warmstart.copy(), float(data.time))

    def set_state(self, state: RoboDeskState) -> None:
        data = self._env.physics.data
        data.qpos[:], data.qvel[:], data.act[:], data.time = state.qpos, state.qvel, state.act, state.time
        self._env.physics.forward()
        data.qacc_warmstart[:] = state.warmstart
        self._env.physics_copy.data.qpos[:] = state.qpos
        self._env.success = False

    def goal(self) -> Frame:
        """The episode's start with the task done: button, slide, drawer or block put where it then is, the hand where it was done."""
        return self._goal

    def success(self) -> bool:
        return bool(self._env.success)

    def distance(self) -> float:
        return 0.0 if self.success() else 1.0 - float(self._env._get_task_reward(self.task, "dense_reward"))

    def labelled(self, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The task done; and as often not, half of that with the hand where it would be done."""
        rng = np.random.default_rng(seed)
        frames, labels = [], np.arange(count) % 2 == 0
        for number, done in enumerate(labels):
            frame = self.reset(int(rng.integers(2**32)))
            if not done and number % 4 == 1:
                self._reach(self._target())
                frame = self._picture()
            frames.append(self._goal if done else frame)
        return np.stack(frames), labels

    def close(self) -> None:
        for physics in (self._env.physics, self._env.physics_copy):
            physics.free()

    def _picture(self) -> Frame:
        return np.asarray(self._env.render(), np.uint8)

    def _target(self) -> NDArray[np.float64]:
        """Where the hand does the task."""
        named = self._env.physics.named.data
        if self.task == "open_slide":
            return np.array(named.site_xpos["slide_handle"])
        if self.task == "open_drawer":
            return np.array(named.geom_xpos["drawer_handle"])
        thing = self.task.removesuffix("_off_table")
        return np.array(named.xpos[thing.removeprefix("push_") + "_button" if thing.startswith("push_") else thing])

    def _reach(self, place: NDArray[np.float64]) -> None:
        """Put the hand there at once, as near as inverse kinematics gets."""
        env = self._env
        env.physics_copy.data.qpos[:] = env.physics.data.qpos
        env.physics.data.qpos[:_JOINTS] = env._ik(place)[:_JOINTS]
        env.physics.forward()

    def _finish(self) -> None:
        """Put everything where it is when the task is done."""
        named = self._env.physics.named.data
        place = self._target()
        if self.task.startswith("push_"):
            colour = self.task.removeprefix("push_")
            named.qpos[f"{colour}_button"] = named.qpos[f"{colour}_light"] = _PRESSED
        elif self.task.startswith("open_"):
            joint, end = ("slide_joint", _SLID) if self.task == "open_slide" else ("drawer_joint", _DRAWN)
            named.qpos[joint] = end
            self._env.physics.forward()
            place = self._target()
        else:
            named.qpos[self.task.removesuffix("_off_table")][:3] = _FALLEN
        self._reach(place)


def _open(task: str) -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")
    backend = os.environ["MUJOCO_GL"]
    # Inverse kinematics warns at every place that it cannot reach exactly.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        import gymnasium
        import PIL.Image

        # It was written for names that both libraries have given up since.
        sys.modules.setdefault("gym", gymnasium)
        pictures: Any = PIL.Image
        pictures.ANTIALIAS = pictures.LANCZOS
        import robodesk

        env = robodesk.RoboDesk(task=task, reward="success", action_repeat=_REPEAT, episode_length=0, image_size=SIZE)
        model = env.physics.model
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        env.render()
    except ModuleNotFoundError as error:
        raise UserError(f"the simulator of robodesk is missing ({error.name}): pip install 'cola-dist[robodesk]' and {_SYSTEM}") from error
    except Exception as error:  # each of OpenGL's platforms raises classes of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"OpenGL does not start with MUJOCO_GL={backend} ({reason}): {_SYSTEM}, and set MUJOCO_GL=egl (or osmesa, with libosmesa6)"
        ) from error
    return env

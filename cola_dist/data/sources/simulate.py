"""Simulated episodes: a Sawyer arm with true actions (Meta-World), a dexterous hand that stands in for human hands (Adroit), a drawn square.

All but the square need ``pip install 'cola-dist[sim]'`` and an OpenGL library; rendering in software costs about 10 ms a frame and dominates.
Shadows, reflections and multisampling are off: they cost a factor of ten, and frames are averaged down from twice the size instead.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cola_dist.data.sources import Item, SourceEpisode
from cola_dist.data.sources.square import SCENES as SQUARE_SCENES
from cola_dist.data.sources.square import SquareScene
from cola_dist.errors import UserError

SIZE = 64
"""Height and width of a recorded frame in pixels; frames are rendered at twice this."""
FPS = 5.0
"""Nominal: one frame per recorded action, whatever time the simulator took for it."""
ROBOT_TASKS = (
    "button-press-topdown-v3",
    "coffee-push-v3",
    "door-open-v3",
    "drawer-open-v3",
    "faucet-open-v3",
    "handle-press-v3",
    "plate-slide-v3",
    "push-v3",
    "soccer-v3",
    "window-open-v3",
)
HAND_SCENES = ("AdroitHandDoor-v1", "AdroitHandHammer-v1", "AdroitHandPen-v1", "AdroitHandRelocate-v1")
ROBOT_STEPS = 8
"""Control steps per recorded frame over which the action is held constant."""
REST_STEPS = 4
"""Control steps after them without displacement: the arm lags behind its target, and would show the action in the next frame too."""
HAND_STEPS = 6
HAND_JOINTS = 24
EXPERT_SHARE = 0.35
"""Share of transitions that follow the task's scripted expert (scaled and with noise); the others go in a random direction."""
STAY_INSIDE = np.array([[-0.26, 0.46, 0.08], [0.26, 0.80, 0.30]])
"""Random directions are redrawn until the hand's target stays in this box (metres), well inside the arm's own limits."""

Domain = Literal["robot", "hand", "square"]
Split = Literal["train", "heldout"]
SOURCES: Mapping[Domain, tuple[str, str]] = {
    "robot": ("metaworld-sawyer", "robot"),
    "hand": ("adroit-hand", "human"),
    "square": ("moving-square", "robot"),
}
"""Source name and shard domain of each."""
_GL_PACKAGES = "apt-get install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"


def episode_keys(domain: Domain, episodes: int) -> list[tuple[str, str]]:
    """Scene and key of each episode; scenes take turns, so that every count holds them in equal parts."""
    scenes = {"robot": ROBOT_TASKS, "hand": HAND_SCENES, "square": SQUARE_SCENES}[domain]
    chosen = [(scenes[i % len(scenes)], i // len(scenes)) for i in range(episodes)]
    return [(scene, f"{scene.lower()}-{turn:04d}") for scene, turn in sorted(chosen)]


class SimulateOrigin:
    """Episodes of 40 to 60 frames, a pure function of the arguments on one machine; an item is a scene.

    Raises UserError when the simulator or OpenGL is missing.
    """

    def __init__(self, domain: Domain, episodes: int, seed: int, heldout_share: float) -> None:
        if episodes < 1:
            raise UserError(f"episodes {episodes}: give at least 1")
        self.kind, self.seed = domain, seed
        self.source, self.domain = SOURCES[domain]
        self.keys = episode_keys(domain, episodes)
        self.heldout = held_out([key for _, key in self.keys], heldout_share, salt=str(seed))
        _require(domain)

    def items(self) -> list[Item]:
        """The scenes, in order of name; their size is their number of episodes."""
        return [Item(scene, count) for scene, count in Counter(scene for scene, _ in self.keys).items()]

    def episodes(self, item: Item) -> Iterator[SourceEpisode]:
        """Record all episodes of a scene."""
        _require(self.kind)
        scene = self._scene(item.name)
        try:
            for key in (key for name, key in self.keys if name == item.name):
                # The key's own generator: an episode does not depend on how many others are made.
                rng = np.random.default_rng([self.seed, *key.encode()])
                yield scene.record(key, "heldout" if key in self.heldout else "train", rng)
        finally:
            scene.close()

    def _scene(self, name: str) -> _Scene | SquareScene:
        if self.kind == "square":
            return SquareScene(name)
        return _RobotScene(name, self.seed) if self.kind == "robot" else _HandScene(name, self.seed)


def held_out(names: Collection[str], share: float, salt: str = "") -> frozenset[str]:
    """The names set aside for evaluation: ``share`` of them, at least one of two or more, chosen by hash.

    The choice depends on the names and the salt alone, not on their order.
    """
    if len(names) < 2:
        return frozenset()
    count = min(max(1, round(share * len(names))), len(names) - 1)
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).hexdigest())
    return frozenset(ranked[:count])


def _require(domain: Domain) -> None:
    if domain == "square":
        return
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco  # noqa: F401

        if domain == "robot":
            import metaworld  # noqa: F401
        else:
            import gymnasium_robotics  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"simulator missing ({error.name}): pip install 'cola-dist[sim]' and {_GL_PACKAGES}") from error
    except (ImportError, AttributeError, RuntimeError) as error:  # what MuJoCo's loaders raise without a GL library
        raise UserError(f"OpenGL not found ({error}): {_GL_PACKAGES}") from error


class _Scene:
    """One environment with its renderer, reused for all episodes of a scene."""

    def __init__(self, name: str, model: Any, data: Any, camera: tuple[float, float, float], lookat: tuple[float, float, float]) -> None:
        import mujoco

        self.name = name
        self.data = data
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        try:
            self._renderer = mujoco.Renderer(model, 2 * SIZE, 2 * SIZE)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise UserError(f"OpenGL does not start ({error}): {_GL_PACKAGES}, and set MUJOCO_GL=egl") from error
        self._camera = mujoco.MjvCamera()
        self._camera.distance, self._camera.azimuth, self._camera.elevation = camera
        self._camera.lookat[:] = lookat
        self._option = mujoco.MjvOption()
        # Sites are goal markers: they float in the picture and never move.
        self._option.sitegroup[:] = 0

    def picture(self) -> NDArray[np.uint8]:
        self._renderer.update_scene(self.data, self._camera, scene_option=self._option)
        large = self._renderer.render().reshape(SIZE, 2, SIZE, 2, 3)
        return np.asarray((large.astype(np.uint16).sum((1, 3)) + 2) // 4, np.uint8)

    def close(self) -> None:
        self._renderer.close()

    def record(self, key: str, split: Split, rng: np.random.Generator) -> SourceEpisode:
        raise NotImplementedError


class _RobotScene(_Scene):
    def __init__(self, task: str, seed: int) -> None:
        import metaworld
        from metaworld.policies import ENV_POLICY_MAP

        benchmark = metaworld.MT1(task, seed=seed)
        self._tasks = benchmark.train_tasks
        self._env: Any = benchmark.train_classes[task]()
        self._env.max_path_length = 10_000  # the benchmark's own limit would end an episode after 41 frames
        self._env.set_task(self._tasks[0])
        self._expert: Any = ENV_POLICY_MAP[task]()
        # The experts warn at each step that their answers get clipped; here they are clipped before use.
        warnings.filterwarnings("ignore", message="Constant.s. may be too high", category=UserWarning)
        self._env.reset()
        super().__init__(task, self._env.model, self._env.data, (1.0, 155.0, -35.0), (0.02, 0.64, 0.16))

    def record(self, key: str, split: Split, rng: np.random.Generator) -> SourceEpisode:
        """40 to 60 frames of held actions, some runs by the task's expert, with the actions and the arm's states."""
        frames = int(rng.integers(40, 61))
        self._env.set_task(self._tasks[int(rng.integers(len(self._tasks)))])
        observation, _ = self._env.reset()
        gripper = -1.0
        for _ in range(3):  # away from the one start position before anything is recorded
            observation = self._hold(np.append(self._direction(rng), gripper))
        video, states, actions = [self.picture()], [observation[:4]], []
        expert = False
        for t in range(frames - 1):
            if t % 5 == 0:  # runs of five, so that the expert gets somewhere
                expert = rng.random() < EXPERT_SHARE
            if expert:
                wish = np.clip(self._expert.get_action(observation), -1, 1)
                action = np.append(wish[:3] * rng.uniform(0.3, 0.8) + rng.normal(0, 0.15, 3), wish[3])
                action[:3] *= min(1.0, 1.0 / float(np.linalg.norm(action[:3])))
            else:
                gripper = -gripper if rng.random() < 0.15 else gripper
                action = np.append(self._direction(rng), gripper)
            action = np.clip(action, -1, 1).astype(np.float32)
            observation = self._hold(action)
            actions.append(action)
            states.append(observation[:4])
            video.append(self.picture())
        moved, seen = np.stack(actions), np.stack(states).astype(np.float32)
        return SourceEpisode(key, np.stack(video), FPS, self._meta(), key, key, split, moved, seen)

    def _hold(self, action: NDArray[Any]) -> NDArray[np.float64]:
        for _ in range(ROBOT_STEPS):
            self._env.step(action)
        rest = np.array([0.0, 0.0, 0.0, action[3]])
        for _ in range(REST_STEPS):
            observation = self._env.step(rest)[0]
        return np.asarray(observation, np.float64)

    def _direction(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """A vector in the unit ball whose target stays inside the box; towards its middle when sixteen draws all leave it."""
        target = self.data.mocap_pos[0]
        reach = ROBOT_STEPS * self._env.action_scale
        for _ in range(16):
            direction = rng.normal(size=3)
            direction *= rng.uniform(0.1, 0.9) / np.linalg.norm(direction)
            end = target + reach * direction
            if np.all(end >= STAY_INSIDE[0]) and np.all(end <= STAY_INSIDE[1]):
                return np.asarray(direction)
        middle = STAY_INSIDE.mean(0) - target
        return np.asarray(middle * rng.uniform(0.1, 0.9) / np.linalg.norm(middle))

    def _meta(self) -> dict[str, Any]:
        return {
            "embodiment": "Sawyer arm with two-finger gripper, simulated",
            "camera": "fixed: azimuth 155, elevation -35 degrees, distance 1 m",
            "task": self.name,
            "licence": "generated; Meta-World is MIT",
            "provenance": {
                "dataset": "Meta-World 3.1.1, MuJoCo 3.3.0",
                "behaviour": f"runs of 5 actions: {EXPERT_SHARE:.0%} scripted expert scaled by U(0.3, 0.8) plus N(0, 0.15), others random "
                "directions of random magnitude that stay inside the workspace, gripper toggled with probability 0.15",
                "action": f"end-effector displacement in units of {ROBOT_STEPS} cm per axis, over {ROBOT_STEPS} control "
                f"steps, then {REST_STEPS} steps of rest; and gripper, held over all of them",
                "fps": "nominal: one frame per action",
            },
            "state": "hand x, y, z in metres, gripper opening",
        }


class _HandScene(_Scene):
    def __init__(self, scene: str, seed: int) -> None:
        import gymnasium
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        self._env: Any = gymnasium.make(scene).unwrapped
        self._env.reset(seed=seed)
        super().__init__(scene, self._env.model, self._env.data, (0.55, 90.0, -60.0), (0.0, -0.19, 0.2))

    def record(self, key: str, split: Split, rng: np.random.Generator) -> SourceEpisode:
        """40 to 60 frames of a smooth random walk of the joint targets, without actions."""
        frames = int(rng.integers(40, 61))
        self._env.reset(seed=int(rng.integers(2**31)))
        size = self._env.action_space.shape[0]
        # The arm's joints come before the hand's; they stay near where the scene starts, or the hand leaves the picture.
        arm = size - HAND_JOINTS
        rest, reach = np.zeros(size), np.ones(size)
        rest[:arm] = -(self._env.act_mean / self._env.act_rng)[:arm]
        reach[:arm] = 0.08
        # A slow walk that returns to the middle: neighbouring actions agree, and joints neither freeze nor sit at their limits.
        pull, spread = 0.25, 0.8
        action = rng.normal(0, spread, size)
        video = []
        for t in range(frames + 3):
            action = (1 - pull) * action + spread * np.sqrt(1 - (1 - pull) ** 2) * rng.normal(size=size)
            for _ in range(HAND_STEPS):
                self._env.step(np.clip(rest + reach * action, -1, 1))
            if t >= 3:
                video.append(self.picture())
        return SourceEpisode(key, np.stack(video), FPS, self._meta(), key, key, split)

    def _meta(self) -> dict[str, Any]:
        return {
            "embodiment": "adroit hand, simulated; stands in for human hands",
            "camera": "fixed: azimuth 90, elevation -60 degrees, distance 0.55 m",
            "task": self.name,
            "licence": "generated; Gymnasium-Robotics is MIT",
            "provenance": {
                "dataset": "Gymnasium-Robotics 1.4.2, MuJoCo 3.3.0",
                "behaviour": f"smooth random joint targets, one every {HAND_STEPS} control steps; no expert, actions not kept",
                "fps": "nominal: one frame per drawn action",
            },
        }

"""One episode: plan, take the first action, look, plan again (VP2's protocol)."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from cola_dist.planning.domains import Domain, Frame
from cola_dist.planning.models import Imagination, Moment
from cola_dist.planning.objective import Objective, SuccessClassifier
from cola_dist.planning.planner import Floats, Planner, shifted
from cola_dist.planning.watch import Watch


@dataclass(frozen=True)
class Episode:
    """What came of it."""

    model: str
    seed: int
    number: int
    success: bool
    """Whether a state after an action was the task done; the episode then ends."""
    steps: int
    """Actions that were taken."""
    first_distance: float
    """In the domain's unit, at the start, at best, and in the end."""
    best_distance: float
    last_distance: float
    seconds: float
    parts: dict[str, float]
    """Seconds by `cola_dist.planning.watch.Part`."""
    frames: list[Frame] = field(repr=False)
    goal: Frame = field(repr=False)
    actions: list[Floats] = field(repr=False)


@dataclass(frozen=True)
class Planning:
    """How actions are chosen with a model's help."""

    planner: Planner
    imagination: Imagination
    horizon: int
    classifier: SuccessClassifier | None = None


def episode_seed(seed: int, number: int) -> int:
    """What an episode's start, goal and planner are drawn from, alike for all models."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little") >> 2


def run_episode(domain: Domain, planning: Planning | None, model: str, seed: int, number: int, device: torch.device) -> Episode:
    """Until the task is done or the domain's steps are over. Without ``planning`` actions are uniform within bounds, the lower bound."""
    watch, began = Watch(device), time.perf_counter()
    key = episode_seed(seed, number)
    frames, actions = [domain.reset(key)], list[Floats]()
    goal = domain.goal()
    distances, success = [domain.distance()], False
    mean = np.zeros((planning.horizon if planning else 1, domain.space.size))
    while not success and len(actions) < domain.steps:
        rng = np.random.default_rng([key, len(actions)])
        if planning is None:
            action = rng.uniform(domain.space.low, domain.space.high)
        else:
            moment = Moment(frames, actions, domain.get_state(), key)
            plan = _plan(
                planning, moment, mean, Objective(torch.from_numpy(goal.copy()).permute(2, 0, 1), planning.classifier), domain, rng, watch
            )
            action, mean = plan[0], shifted(plan)
        with watch.part("simulator"):
            frames.append(domain.step(action))
        actions.append(action)
        distances.append(domain.distance())
        success = domain.success()
    took = time.perf_counter() - began
    reached = (distances[0], min(distances[1:]), distances[-1])
    return Episode(model, seed, number, success, len(actions), *reached, took, watch.seconds, frames, goal, actions)


def _plan(
    planning: Planning, moment: Moment, mean: Floats, objective: Objective, domain: Domain, rng: np.random.Generator, watch: Watch
) -> Floats:
    """Actions ``[H, A]`` from this moment on."""
    planning.imagination.observe(moment, watch)

    def score(tried: Floats) -> Floats:
        frames = planning.imagination.rollout(tried, watch)
        with watch.part("objective"):
            return objective(frames).double().cpu().numpy()

    return planning.planner.plan(score, mean, domain.space, rng).actions

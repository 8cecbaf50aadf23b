"""Which actions to take: MPPI and CEM over any score of action sequences, with the defaults of VP2 (Tian et al., arXiv 2304.13723).

S sequences of H actions with A dimensions each; scores are rewards, higher is better. All chance comes from the generator that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Callable[[Floats], Floats]
"""Reward ``[S]`` of action sequences ``[S, H, A]``."""


@dataclass(frozen=True)
class ActionSpace:
    """What a domain takes."""

    low: Floats
    """Smallest value of each dimension, ``[A]``."""
    high: Floats
    spread: Floats
    """Standard deviation ``[A]`` with which planners begin to look around."""

    @property
    def size(self) -> int:
        """A."""
        return len(self.low)

    def clipped(self, actions: Floats) -> Floats:
        """``actions [..., A]`` within bounds."""
        return np.clip(actions, self.low, self.high)


@dataclass(frozen=True)
class Plan:
    """What a planner settled on."""

    actions: Floats
    """``[H, A]``, the first to be taken now."""
    best: float
    """Highest score among all sequences that were tried; that of ``actions`` itself is not asked for."""


class Planner(Protocol):
    """Finds actions of high score."""

    def plan(self, score: Score, start: Floats, space: ActionSpace, rng: np.random.Generator) -> Plan:
        """Look around ``start [H, A]``. Raises `ValueError` if a score is not finite."""


@dataclass(frozen=True)
class Mppi:
    """Model predictive path integral control (Williams et al. 2017), as VP2 runs it: one round, correlated noise, a softmax over rewards."""

    samples: int = 200
    gamma: float = 0.05
    """By how much one unit of reward raises the logarithm of a sequence's weight."""
    correlation: float = 0.5

    def plan(self, score: Score, start: Floats, space: ActionSpace, rng: np.random.Generator) -> Plan:
        """The mean of all sequences, weighed by `mppi_weights`."""
        tried = space.clipped(start + correlated_noise(rng, self.samples, len(start), space.spread, self.correlation))
        scores = _scores(score, tried)
        return Plan(np.einsum("s,sha->ha", mppi_weights(scores, self.gamma), tried), float(scores.max()))


@dataclass(frozen=True)
class Cem:
    """Cross-entropy method (Rubinstein 1999): sequences of highest score give mean and spread of the next round; every action is drawn by itself."""

    samples: int = 200
    iterations: int = 3
    elites: float = 0.05
    """Share of the sequences that counts, at least one of them."""

    def plan(self, score: Score, start: Floats, space: ActionSpace, rng: np.random.Generator) -> Plan:
        """The mean of the last round's elites."""
        mean, spread, best = start, np.broadcast_to(space.spread, start.shape), -np.inf
        count = max(1, round(self.elites * self.samples))
        for _ in range(self.iterations):
            tried = space.clipped(mean + spread * rng.standard_normal((self.samples, *start.shape)))
            scores = _scores(score, tried)
            chosen = tried[np.argsort(-scores, kind="stable")[:count]]
            mean, spread, best = chosen.mean(0), chosen.std(0), max(best, float(scores.max()))
        return Plan(mean, best)


PlannerName = Literal["mppi", "cem"]


def make_planner(name: PlannerName, samples: int) -> Planner:
    """The planner of that name with VP2's values and so many sequences."""
    return Mppi(samples) if name == "mppi" else Cem(samples)


def mppi_weights(scores: Floats, gamma: float) -> Floats:
    """exp(gamma * score), made to sum to 1: ``[S]``."""
    weights = np.exp(gamma * (scores - scores.max()))
    return np.asarray(weights / weights.sum())


def correlated_noise(rng: np.random.Generator, samples: int, horizon: int, spread: Floats, correlation: float) -> Floats:
    """e_t = b e_{t-1} + (1 - b) n_t with n_t ~ N(0, spread²), ``[samples, horizon, A]``; e_0 = n_0, which VP2's text leaves open."""
    noise = spread * rng.standard_normal((samples, horizon, len(spread)))
    for t in range(1, horizon):
        noise[:, t] = correlation * noise[:, t - 1] + (1 - correlation) * noise[:, t]
    return noise


def shifted(plan: Floats) -> Floats:
    """Where the next step begins to look: ``plan [H, A]`` without its first action, which has been taken, and no motion at the end."""
    return np.concatenate([plan[1:], np.zeros_like(plan[:1])])


def _scores(score: Score, tried: Floats) -> Floats:
    found = np.asarray(score(tried), np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{int((~np.isfinite(found)).sum())} of {len(found)} action sequences have a score that is not finite")
    return found

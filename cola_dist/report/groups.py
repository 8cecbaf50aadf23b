"""Which trials are seeds of one thing: an arm, or a point of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cola_dist.report.trials import Trial

MOST_POINTS = 12
"""Of an arm that was swept, up to so many points are compared as arms of their own; more would leave no test any power."""


@dataclass(frozen=True)
class Group:
    """Trials of an arm with the same settings."""

    arm: str
    settings: tuple[tuple[str, str], ...]

    def holds(self, trial: Trial) -> bool:
        """Whether ``trial`` is one of them."""
        return trial.arm == self.arm and trial.settings == self.settings


def groups_of(trials: Sequence[Trial]) -> dict[str, Group]:
    """What is compared, by the names that pages use, in order of appearance.

    The trials of an arm that have no settings of their own stand for it. An arm that has none of these was swept: each of its points is then a
    group, if they are few and have two seeds or more each; otherwise the point with the most trials stands for the arm.
    """
    found: dict[str, Group] = {}
    for arm in dict.fromkeys(trial.arm for trial in trials):
        seeds: dict[tuple[tuple[str, str], ...], set[int]] = {}
        for trial in trials:
            if trial.arm == arm:
                seeds.setdefault(trial.settings, set()).add(trial.seed)
        if () in seeds:
            found[arm] = Group(arm, ())
        elif 1 < len(seeds) <= MOST_POINTS and min(len(one) for one in seeds.values()) > 1:
            found |= {f"{arm} {_words(settings)}": Group(arm, settings) for settings in seeds}
        else:
            found[arm] = Group(arm, max(seeds, key=lambda settings: len(seeds[settings])))
    return found


def _words(settings: tuple[tuple[str, str], ...]) -> str:
    values = ((name, json.loads(value)) for name, value in settings)
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in values)

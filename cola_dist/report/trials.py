"""What a study consists of: sweeps and their trials, each with what was looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_OWN_FIELDS = frozenset({"train.seed", "data.mixture", "train.budget_seconds", "output"})
"""Parameters that say which seed, domain, budget or place a trial has, and so do not make it another setting of its arm."""


@dataclass(frozen=True)
class Look:
    """One evaluation on held-out clips, as ``RUN/looks`` has it."""

    step: int
    phase: str
    name: str
    """``start``, ``PHASE_end``, or empty."""
    spent_seconds: float
    verdict: str
    indicators: Mapping[str, float]
    code_counts: Sequence[Sequence[float]]
    """``[slots][codes]``; empty where there are no codes."""


@dataclass(frozen=True)
class Span:
    """A phase as it was run: steps ``[first, end)``, and what ended it where that was not its plan."""

    phase: str
    first: int
    end: int
    why: str = ""


@dataclass(frozen=True)
class Ruling:
    """What a rule did at a step of a run."""

    step: int
    rule: str
    act: str
    why: str


@dataclass(frozen=True)
class Trial:
    """One run of a study. Looks stand in order of their steps."""

    id: str
    arm: str
    domain: str
    seed: int
    params: Mapping[str, Any]
    status: str
    why: str
    run: str
    spent_seconds: float
    steps: int
    sweep: str
    looks: tuple[Look, ...] = ()
    spans: tuple[Span, ...] = ()
    rulings: tuple[Ruling, ...] = ()
    videos: tuple[str, ...] = ()
    """URIs of the rollout videos, oldest first."""

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """What sets this trial apart from others of its arm, seed and domain: parameters with their values as JSON, sorted."""
        return tuple(sorted((name, json.dumps(value, default=str)) for name, value in self.params.items() if name not in _OWN_FIELDS))

    @property
    def final(self) -> Look | None:
        """The newest look at a phase's end."""
        return next((look for look in reversed(self.looks) if look.name.endswith("_end")), None)

    def moment(self, name: str) -> Look | None:
        """The look at the ``start``, after ``warm-up`` (or the LAM's own first stage), or at the ``end``; none where the run had no such moment."""
        if name == "end":
            return self.final
        names = {"start": ("start",), "warm-up": ("warmup_end", "lam_end")}[name]
        return next((look for look in self.looks if look.name in names), None)

    def value(self, indicator: str) -> float:
        """An indicator of the final look; NaN where there is none."""
        return self.final.indicators.get(indicator, math.nan) if self.final else math.nan

    @property
    def verdict(self) -> str:
        """The last one of a run that finished or was stopped; empty where there is none."""
        return self.looks[-1].verdict if self.looks else ""

    @property
    def warmup_steps(self) -> int:
        """Steps that the first warm-up really took; 0 for a run without one."""
        return next((span.end - span.first for span in self.spans if span.phase == "warmup"), 0)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its ``sweep.json``."""

    uri: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """All that was read. A trial stands in one of ``trials``, ``damaged`` and ``superseded``."""

    sweeps: tuple[Sweep, ...]
    trials: tuple[Trial, ...]
    damaged: tuple[tuple[Trial, str], ...] = field(default=())
    """Trials whose runs cannot be read, each with the reason."""
    superseded: tuple[Trial, ...] = field(default=())
    """Trials that a newer one of the same arm, domain, seed and settings replaces."""

    @property
    def finished(self) -> list[Trial]:
        """Trials that came to their end and were read; the others say nothing about quality at the whole budget."""
        return [trial for trial in self.trials if trial.status == "finished"]


def spans_of(looks: Sequence[Look]) -> tuple[Span, ...]:
    """Phases as far as looks tell of them."""
    ends = [look for look in looks if look.name.endswith("_end")]
    firsts = [0, *(look.step for look in ends)]
    return tuple(Span(look.phase, first, look.step) for look, first in zip(ends, firsts, strict=False))

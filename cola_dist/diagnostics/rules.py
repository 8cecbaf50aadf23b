"""Decisions on a run's course, from its evaluations: may warm-up end, and is joint training in danger. Numbers in, a reason out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cola_dist.config import JointConfig, WarmupConfig

WATCHED = ("perplexity", "sensitivity_gap", "alignment/cosine", "effective_rank", "flow_loss")
"""Indicators that decisions may need; kept for every evaluation of a run."""
_SETTLING = ("perplexity", "sensitivity_gap", "alignment/cosine")


@dataclass(frozen=True)
class Look:
    """What one evaluation saw, of what decisions need."""

    step: int
    phase: str
    verdict: str
    indicators: Mapping[str, float]


@dataclass(frozen=True)
class Decision:
    """Whether to act, and why or why not, in one line for people."""

    act: bool
    why: str


def rise(steps: Sequence[int], values: Sequence[float]) -> float:
    """By how much a least-squares line through the values rises from the first step to the last, as a share of their mean size.

    0 for values that are all 0.
    """
    middle, mean = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((step - middle) ** 2 for step in steps)
    slope = sum((step - middle) * (value - mean) for step, value in zip(steps, values, strict=True)) / spread
    size = sum(abs(value) for value in values) / len(values)
    return slope * (steps[-1] - steps[0]) / size if size else 0.0


def warmup_exit(looks: Sequence[Look], first: int, config: WarmupConfig) -> Decision:
    """Whether the warm-up that began at step ``first`` may end after the last of ``looks``, which are those of its own.

    It may once it is ``min_steps`` old, the verdict is healthy, and none of perplexity, sensitivity gap and alignment (where measured) still rises
    by ``settled`` of its mean or more over the last ``window`` looks. What falls has settled: waiting does not help it, and its level is the
    verdict's matter.
    """
    last = looks[-1]
    age = last.step - first
    if age < config.min_steps:
        return Decision(False, f"{age} steps old, at least {config.min_steps} are asked for")
    if last.verdict != "healthy":
        return Decision(False, f"verdict {last.verdict}")
    window = looks[-config.window :]
    if len(window) < config.window:
        return Decision(False, f"{len(window)} looks so far, a slope is taken over {config.window}")
    steps = [look.step for look in window]
    rises = {
        name: rise(steps, [look.indicators[name] for look in window])
        for name in _SETTLING
        if all(name in look.indicators for look in window)
    }
    shown = ", ".join(f"{name} {last.indicators[name]:.4g} ({value:+.1%})" for name, value in rises.items())
    moving = [name for name, value in rises.items() if value >= config.settled]
    if moving:
        return Decision(False, f"still rising: {', '.join(moving)}; {shown} over the last {config.window} looks")
    return Decision(True, f"healthy and settled: {shown} over the last {config.window} looks")


def guard(looks: Sequence[Look], config: JointConfig) -> Decision:
    """Whether joint training needs help after the last of ``looks``, which are those of its present phase; one without a verdict says nothing."""
    recent = [look for look in looks if look.verdict][-config.guard_after :]
    if len(recent) < config.guard_after or any(look.verdict == "healthy" for look in recent):
        return Decision(False, "")
    verdicts = ", ".join(f"{look.verdict} at {look.step}" for look in recent)
    return Decision(True, f"verdict not healthy at {len(recent)} evaluations in a row: {verdicts}")

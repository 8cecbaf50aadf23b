"""Decisions from evaluations: when warm-up may end, when joint training needs help."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.config import JointConfig, WarmupConfig
from cola_dist.diagnostics.rules import Look, guard, rise, warmup_exit

RULE = WarmupConfig(steps=1000, exit="adaptive", min_steps=100, window=3, settled=0.1)


def looks(*perplexity: float, verdict: str = "healthy", first: int = 0, every: int = 50) -> list[Look]:
    return [
        Look(first + every * (i + 1), "warmup", verdict, {"perplexity": value, "sensitivity_gap": 0.01})
        for i, value in enumerate(perplexity)
    ]


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(1, 10), st.integers(2, 8))
def test_rise_of_a_line(slope: float, level: float, count: int) -> None:
    steps = [10 * i for i in range(count)]
    values = [level + slope * step / steps[-1] for step in steps]
    size = sum(map(abs, values)) / count
    assert rise(steps, values) == pytest.approx(slope / size, abs=1e-9)


def test_rise_of_nothing_is_nothing() -> None:
    assert rise([0, 1, 2], [0.0, 0.0, 0.0]) == 0.0


def test_warm_up_ends_when_healthy_and_settled() -> None:
    decision = warmup_exit(looks(5, 20, 20.5, 20.4), 0, RULE)
    assert decision.act
    assert "healthy and settled" in decision.why
    assert "perplexity 20.4 (+2.0%)" in decision.why


@pytest.mark.parametrize(
    ("seen", "first", "why"),
    [
        (looks(20.0), 0, "50 steps old, at least 100"),
        (looks(20, 20, 20, first=400), 480, "70 steps old"),
        (looks(20, 20, 20, verdict="at risk"), 0, "verdict at risk"),
        (looks(20, 20), 0, "2 looks so far"),
        (looks(10, 15, 20), 0, "still rising: perplexity"),
    ],
)
def test_warm_up_goes_on_and_says_why(seen: list[Look], first: int, why: str) -> None:
    decision = warmup_exit(seen, first, RULE)
    assert not decision.act
    assert why in decision.why


def test_a_late_take_off_is_not_missed() -> None:
    quiet = looks(1.1, 1.1, 1.1, 1.1, verdict="collapsed")
    assert not warmup_exit(quiet, 0, RULE).act, "settled, but not at a healthy level"


def test_indicators_that_are_not_measured_do_not_count() -> None:
    continuous = [Look(step, "warmup", "healthy", {"sensitivity_gap": 0.02}) for step in (100, 150, 200)]
    assert warmup_exit(continuous, 0, RULE).act


def test_the_guard_waits_for_several_bad_looks_in_a_row() -> None:
    rule = JointConfig(steps=100, guard_after=2)
    bad, good, untrained = (looks(1, verdict=verdict)[0] for verdict in ("at risk", "healthy", ""))
    assert not guard([bad], rule).act
    assert not guard([untrained, bad], rule).act
    assert not guard([bad, good, bad], rule).act
    decision = guard([good, bad, bad], rule)
    assert decision.act
    assert "at risk at 50, at risk at 50" in decision.why

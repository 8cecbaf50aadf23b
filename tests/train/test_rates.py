"""Learning rates over the phases of a run."""

from __future__ import annotations

import itertools

import pytest

from cola_dist.config import OptimConfig
from cola_dist.methods.schedule import Course, Phase
from cola_dist.train.rates import learning_rates

WARMUP = Phase("warmup", ("lam",), {"lam": 1e-3}, 30)
JOINT = Phase("joint", ("lam", "world"), {"lam": 5e-4, "world": 1e-4}, 70)
SPANS = Course((WARMUP, JOINT)).spans


def course(role: str, optim: OptimConfig) -> list[float]:
    """The role's rate at each step, 0 where it is frozen."""
    return [learning_rates(step, SPANS, optim).get(role, 0.0) for step in range(100)]


def test_each_role_rises_once_from_the_step_at_which_it_first_trains() -> None:
    optim = OptimConfig(lr_warmup_steps=10)
    lam, world = course("lam", optim), course("world", optim)
    assert lam[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert lam[10:30] == [1e-3] * 20
    assert lam[30:] == [5e-4] * 70, "the phase change does not start the LAM's rise again"
    assert world[:30] == [0.0] * 30
    assert world[30:40] == pytest.approx([1e-5 * (step + 1) for step in range(10)])
    assert world[40:] == [1e-4] * 60


def test_frozen_roles_have_no_rate() -> None:
    assert set(learning_rates(29, SPANS, OptimConfig())) == {"lam"}
    assert set(learning_rates(30, SPANS, OptimConfig())) == {"lam", "world"}


def test_a_rise_may_outlast_its_phase() -> None:
    lam = course("lam", OptimConfig(lr_warmup_steps=60))
    assert lam[29] == pytest.approx(1e-3 * 30 / 60)
    assert lam[30] == pytest.approx(5e-4 * 31 / 60)
    assert lam[59] == pytest.approx(5e-4)


def test_no_rise_starts_at_the_peak() -> None:
    assert course("lam", OptimConfig(lr_warmup_steps=0))[0] == 1e-3


def test_cosine_falls_to_a_tenth_at_the_end_of_the_last_phase() -> None:
    lam = course("lam", OptimConfig(lr_warmup_steps=0, decay="cosine"))
    assert lam[0] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(lam))
    assert lam[50] == pytest.approx(5e-4 * 0.55)
    assert lam[99] == pytest.approx(5e-5, rel=0.01)


def test_a_step_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="after the last phase's end 100"):
        learning_rates(100, SPANS, OptimConfig())

from __future__ import annotations

import math

import numpy as np
import pytest

from cola_dist.planning.planner import ActionSpace, Cem, Floats, Mppi, Planner, correlated_noise, make_planner, mppi_weights, shifted

SPACE = ActionSpace(np.full(2, -1.0), np.full(2, 1.0), np.array([0.5, 0.25]))
BEST = np.array([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.0]])


def quadratic(actions: Floats) -> Floats:
    return np.asarray(-100 * ((actions - BEST) ** 2).sum((1, 2)))


@pytest.mark.parametrize("planner", [Mppi(samples=400, gamma=1.0), Cem()])
def test_the_top_of_a_quadratic_is_found(planner: Planner) -> None:
    mean = np.zeros((3, 2))
    for step in range(8):
        mean = planner.plan(quadratic, mean, SPACE, np.random.default_rng(step)).actions
    assert np.abs(mean - BEST).max() < 0.1


@pytest.mark.parametrize("name", ["mppi", "cem"])
def test_the_same_seed_gives_the_same_plan(name: str) -> None:
    planner = make_planner(name, 50)  # type: ignore[arg-type]
    plans = [planner.plan(quadratic, np.zeros((3, 2)), SPACE, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(plans[0].actions, plans[1].actions)
    assert plans[0].best == plans[1].best
    assert not np.array_equal(plans[0].actions, plans[2].actions)


def test_weights_by_hand() -> None:
    weights = mppi_weights(np.array([0.0, 20.0, -1e9]), gamma=0.05)
    assert weights == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0.0])


def test_mppi_is_the_weighted_mean_of_what_it_tried() -> None:
    seen: list[Floats] = []

    def score(actions: Floats) -> Floats:
        seen.append(actions)
        return quadratic(actions)

    plan = Mppi(samples=7).plan(score, np.full((3, 2), 0.1), SPACE, np.random.default_rng(0))
    (tried,) = seen
    values = np.exp(0.05 * quadratic(tried))
    assert plan.actions == pytest.approx((values[:, None, None] * tried).sum(0) / values.sum())
    assert plan.best == quadratic(tried).max()
    assert (np.abs(tried) <= 1).all()


def test_noise_is_correlated_along_time_and_as_wide_as_asked() -> None:
    noise = correlated_noise(np.random.default_rng(0), 20_000, 3, SPACE.spread, 0.5)
    assert noise[:, 0].std(0) == pytest.approx([0.5, 0.25], rel=0.03)
    # e_1 = (e_0 + n_1) / 2: half the variance, and half of e_0 in it.
    assert noise[:, 1].std(0) == pytest.approx(np.array([0.5, 0.25]) / math.sqrt(2), rel=0.03)
    assert (noise[:, 0] * noise[:, 1]).mean(0) == pytest.approx([0.125, 0.03125], rel=0.06)


def test_cem_keeps_the_best_twentieth() -> None:
    plan = Cem(samples=40, iterations=1).plan(quadratic, np.zeros((3, 2)), SPACE, np.random.default_rng(0))
    tried = SPACE.clipped(SPACE.spread * np.random.default_rng(0).standard_normal((40, 3, 2)))
    assert plan.actions == pytest.approx(tried[np.argsort(-quadratic(tried))[:2]].mean(0))


def test_the_next_step_begins_with_the_rest_of_the_plan() -> None:
    assert np.array_equal(shifted(BEST), [[0.5, 0.1], [-0.4, 0.0], [0.0, 0.0]])


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 action sequences"):
        Mppi(samples=3).plan(lambda _: np.array([0.0, np.nan, 1.0]), np.zeros((1, 2)), SPACE, np.random.default_rng(0))

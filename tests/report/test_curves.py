"""Curves on one axis of time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cola_dist.report.curves import band, budget_grid, in_view, on_grid
from cola_dist.report.trials import Look, Trial


def trial(seed: int, *points: tuple[float, float], before: tuple[float, ...] = ()) -> Trial:
    """A run whose flow loss is ``(seconds, value)``; looks at ``before`` measured nothing."""
    looks = [Look(number, "joint", "", at, "healthy", {}, []) for number, at in enumerate(before)]
    looks += [Look(10 + number, "joint", "", at, "healthy", {"flow_loss": value}, []) for number, (at, value) in enumerate(points)]
    return Trial(f"t{seed}", "cola", "robot", seed, {}, "finished", "", "", points[-1][0], 0, "", tuple(looks))


def test_seeds_of_unlike_looks_meet_on_the_grid_of_the_budget() -> None:
    slow, fast = trial(0, (0, 4.0), (10, 2.0)), trial(1, (0, 4.0), (5, 1.0), (20, 0.0))
    grid = budget_grid([slow, fast], 5)
    np.testing.assert_allclose(grid, [0, 5, 10, 15, 20])
    np.testing.assert_allclose(on_grid(slow, "flow_loss", grid), [4, 3, 2, 2, 2], err_msg="a run that has ended keeps its last value")
    np.testing.assert_allclose(on_grid(fast, "flow_loss", grid), [4, 1, 2 / 3, 1 / 3, 0])
    found = band([slow, fast], "flow_loss", grid)
    assert found is not None
    np.testing.assert_allclose(found.mean, [4, 2, 4 / 3, 7 / 6, 1])
    assert found.extent == (0, 4)


def test_the_band_is_students_interval_at_each_point() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    trials = [trial(seed, (0, value), (10, 2 * value)) for seed, value in enumerate(values)]
    found = band(trials, "flow_loss", np.array([0.0, 5.0, 10.0]))
    assert found is not None
    for place, factor in enumerate((1.0, 1.5, 2.0)):
        x = factor * np.array(values)
        low, high = stats.t.interval(0.95, 3, x.mean(), stats.sem(x))
        assert (found.low[place], found.high[place]) == pytest.approx((low, high))


def test_an_arm_that_starts_from_nothing_does_not_press_the_others_flat() -> None:
    grid = np.linspace(0.0, 20.0, 5)
    near = band([trial(seed, (0, 1.2), (20, 1.0 + seed)) for seed in range(2)], "flow_loss", grid)
    far = band([trial(seed, (0, 50.0), (10, 2.0), (20, 2.0)) for seed in range(2)], "flow_loss", grid)
    assert near is not None
    assert far is not None
    low, high = in_view([near, far])
    assert low < 1.0
    assert 2.0 < high < 5.0
    assert in_view([near])[1] > 2.0


def test_nothing_is_invented_before_the_first_value() -> None:
    late = trial(0, (10, 1.0), (20, 3.0), before=(0.0, 5.0))
    grid = np.array([0.0, 5.0, 10.0, 15.0])
    np.testing.assert_allclose(on_grid(late, "flow_loss", grid), [math.nan, math.nan, 1, 2])
    found = band([late, trial(1, (0, 1.0), (20, 1.0))], "flow_loss", grid)
    assert found is not None
    np.testing.assert_array_equal(np.isfinite(found.mean), [False, False, True, True], "a mean is of all seeds or of none")


def test_one_seed_has_a_mean_and_no_band() -> None:
    found = band([trial(0, (0, 1.0), (1, 2.0))], "flow_loss", np.array([0.0, 1.0]))
    assert found is not None
    np.testing.assert_allclose(found.mean, [1, 2])
    assert np.isnan(found.low).all()


def test_values_that_are_not_finite_are_passed_over() -> None:
    broken = trial(0, (0, 1.0), (5, math.inf), (10, 3.0))
    np.testing.assert_allclose(on_grid(broken, "flow_loss", np.array([0.0, 5.0, 10.0])), [1, 2, 3])
    assert band([broken], "perplexity", np.array([0.0])) is None

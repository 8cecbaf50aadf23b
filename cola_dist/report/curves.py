"""Curves of several seeds on one axis of accelerator time, and the band around their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from cola_dist.report.trials import Trial

Floats = NDArray[np.float64]
POINTS = 61
"""Points of a grid."""


@dataclass(frozen=True)
class Band:
    """Mean over seeds and its pointwise interval, each ``[points]``. NaN where a seed has no value yet; the interval is NaN for one seed."""

    seconds: Floats
    mean: Floats
    low: Floats
    high: Floats
    extent: tuple[float, float]
    """Least and greatest value of any seed."""
    late: tuple[float, float]
    """The same from the middle of the grid on."""


def budget_grid(trials: Sequence[Trial], points: int = POINTS) -> Floats:
    """Accelerator seconds from 0 to where the longest of ``trials`` ended, in equal steps: all curves of a domain stand on one grid."""
    return np.linspace(0.0, max(look.spent_seconds for trial in trials for look in trial.looks), points)


def on_grid(trial: Trial, indicator: str, grid: Floats) -> Floats:
    """An indicator at the seconds of ``grid [points]``, linear between looks; NaN before the first look that has it.

    A run that has ended keeps its last value: that is what its arm has to offer for the rest of the budget.
    """
    seen = [
        (look.spent_seconds, look.indicators[indicator]) for look in trial.looks if math.isfinite(look.indicators.get(indicator, math.nan))
    ]
    if not seen:
        return np.full(len(grid), np.nan)
    seconds, values = zip(*seen, strict=True)
    curve: Floats = np.interp(grid, seconds, values, left=np.nan)
    return curve


def band(trials: Sequence[Trial], indicator: str, grid: Floats, level: float = 0.95) -> Band | None:
    """The mean of ``trials``, one per seed, on ``grid``, with Student's interval at each point; none where no trial has the indicator."""
    curves = np.stack([on_grid(trial, indicator, grid) for trial in trials]) if trials else np.empty((0, len(grid)))
    curves = curves[np.isfinite(curves).any(1)]
    count = len(curves)
    if not count:
        return None
    mean = curves.mean(0)
    reach = np.full(len(grid), np.nan)
    if count > 1:
        reach = -float(stdtrit(count - 1, (1 - level) / 2)) * curves.std(0, ddof=1) / math.sqrt(count)
    return Band(grid, mean, mean - reach, mean + reach, _extent(curves), _extent(curves[:, len(grid) // 2 :]))


def in_view(bands: Sequence[Band]) -> tuple[float, float]:
    """From where to where an axis should reach: all that any seed had in the second half, and of the first half what lies no further off than that is
    wide. An arm that starts from nothing would otherwise press all else flat."""
    low, high = min(band.late[0] for band in bands), max(band.late[1] for band in bands)
    reach = high - low
    low = max(min(band.extent[0] for band in bands), low - reach)
    high = min(max(band.extent[1] for band in bands), high + reach)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _extent(values: Floats) -> tuple[float, float]:
    return float(np.nanmin(values)), float(np.nanmax(values))

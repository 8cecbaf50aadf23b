"""Shares of a count, with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import ndtri

LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """So many of so many, with a confidence interval of the share."""

    hits: int
    of: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.hits} of {self.of} ({100 * self.low:.0f}–{100 * self.high:.0f} %)" if self.of else "0 of 0"


def wilson(hits: int, of: int, level: float = LEVEL) -> Share:
    """Wilson's score interval (1927), which stays within 0 to 1 and is of use for a handful of seeds, also where none or all are hit."""
    if not of:
        return Share(hits, of, math.nan, math.nan)
    z = float(ndtri((1 + level) / 2))
    share, scale = hits / of, 1 + z**2 / of
    middle = (share + z**2 / (2 * of)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return Share(hits, of, max(0.0, middle - reach), min(1.0, middle + reach))

"""Numbers and lists as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cola_dist.evaluation.statistics import Interval

NOTHING = "–"


def number(value: float, digits: int = 3) -> str:
    """A value with so many significant digits; a dash for one that is not there."""
    if not math.isfinite(value):
        return NOTHING if math.isnan(value) else f"{'-' if value < 0 else ''}∞"
    value += 0.0  # no minus before a zero
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def interval(value: Interval) -> str:
    """A mean with its interval, or alone where one value allows none."""
    return number(value.mean) if math.isnan(value.low) else f"{number(value.mean)} [{number(value.low)}, {number(value.high)}]"


def probability(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def seconds(value: float) -> str:
    """A span of accelerator time."""
    if value < 120:
        return f"{number(value)} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def listing(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def count(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def runs_of(numbers: Sequence[int]) -> str:
    """Whole numbers in order, neighbours joined: ``0–3, 7``."""
    parts: list[list[int]] = []
    for one in sorted(numbers):
        if parts and one == parts[-1][-1] + 1:
            parts[-1].append(one)
        else:
            parts.append([one])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)

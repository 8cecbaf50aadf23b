"""Section 3: the arms' indicators against accelerator time."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Figures, Section, Text
from cola_dist.report.curves import Band, band, budget_grid, in_view
from cola_dist.report.drawing import Key, Panel, Plate, key_of, slug
from cola_dist.report.metrics import CURVES, FLOW_LOSS, Metric
from cola_dist.report.words import listing, number, seconds

_EQUAL = 0.95
"""Runs of at least this share of the longest one's accelerator time had the same budget: a budget ends a run after the step that exceeds it."""
_READING = (
    "Mean over seeds and, shaded, Student's 95 % interval at each point, cut off outside what any seed reached, in the first half also far outside "
    "of what the second spans; x is accelerator time of all workers together, without evaluations and checkpoints. A run that has ended keeps its "
    "last value. Dotted: the permuted control of the same arm, where a curve has one. Bands are of each arm alone and not corrected: whether arms "
    "differ is for the paired tests below to say."
)


def budget(analysis: Analysis) -> Section:
    """Small multiples for each domain."""
    blocks: list[Block] = [Figures(plate) for domain in analysis.domains if (plate := _plate(analysis, domain))]
    if not blocks:
        return Section("budget", "Curves at an equal budget", "No finished run has curves to draw.", [])
    blocks += [Text(line) for domain in analysis.domains if (line := _uneven(analysis, domain))]
    return Section("budget", "Curves at an equal budget", _conclusion(analysis), [*blocks, Text(_READING, small=True)])


def _uneven(analysis: Analysis, domain: str) -> str:
    """Which arms have runs that ended well before others, so that their last values rest on less compute."""
    ends = {arm: [trial.looks[-1].spent_seconds for trial in analysis.trials(domain, arm)] for arm in analysis.arms_in(domain)}
    longest = max((end for group in ends.values() for end in group), default=0.0)
    short = [f"{arm} (from {seconds(min(group))})" for arm, group in ends.items() if min(group) < _EQUAL * longest]
    return f"In {domain} compute was not equal: runs ended before the longest, at {seconds(longest)}, of {listing(short)}." if short else ""


def _bands(analysis: Analysis, domain: str, indicator: str) -> dict[str, Band]:
    trials = {arm: analysis.trials(domain, arm) for arm in analysis.arms_in(domain)}
    grid = budget_grid([trial for group in trials.values() for trial in group])
    return {arm: found for arm, group in trials.items() if (found := band(group, indicator, grid))}


def _plate(analysis: Analysis, domain: str) -> Plate | None:
    panels = []
    for metric in CURVES if analysis.arms_in(domain) else ():
        bands = _bands(analysis, domain, metric.name)
        controls = _bands(analysis, domain, metric.control) if metric.control else {}
        if bands:
            draw = partial(_draw, arms=analysis.arms, metric=metric, bands=bands, controls=controls)
            panels.append(Panel(draw, _alt(domain, metric, bands)))
    if not panels:
        return None
    legend = [key_of(analysis.arms, arm) for arm in analysis.arms_in(domain)]
    return Plate(slug("curves", domain), f"Domain {domain}: held-out indicators at an equal budget", panels, legend)


def _draw(axis: Axes, arms: list[str], metric: Metric, bands: dict[str, Band], controls: dict[str, Band]) -> None:
    for arm, one in bands.items():
        key: Key = key_of(arms, arm)
        axis.plot(one.seconds, one.mean, color=key.colour, linestyle=key.dashes)
        axis.fill_between(one.seconds, one.low, one.high, color=key.colour, alpha=0.15, linewidth=0)
    for arm, one in controls.items():
        axis.plot(one.seconds, one.mean, color=key_of(arms, arm).colour, linestyle=":", linewidth=1.0)
    axis.set_ylim(*in_view([*bands.values(), *controls.values()]))
    axis.set_title(metric.label)
    axis.set_xlabel("accelerator seconds")


def _alt(domain: str, metric: Metric, bands: dict[str, Band]) -> str:
    ends = ", ".join(f"{arm} {number(one.mean[-1])}" for arm, one in bands.items())
    return f"{metric.label} in {domain} against accelerator seconds; means at the end: {ends}."


def _conclusion(analysis: Analysis) -> str:
    return " ".join(_lead(analysis, domain) for domain in analysis.domains if analysis.arms_in(domain))


def _lead(analysis: Analysis, domain: str) -> str:
    """Which arm's mean flow loss is lowest at the end of the budget, since when, and whether its band lies apart."""
    bands = _bands(analysis, domain, FLOW_LOSS.name)
    if len(bands) < 2:
        return f"In {domain} there is one arm alone to draw." if bands else f"In {domain} no flow loss was measured."
    best = min(bands, key=lambda arm: bands[arm].mean[-1])
    others = [one for arm, one in bands.items() if arm != best]
    ahead = np.all([bands[best].mean <= one.mean for one in others], axis=0)
    behind = np.flatnonzero(~ahead)
    since = bands[best].seconds[behind[-1] + 1] if len(behind) else 0.0
    highs = bands[best].high[-1]
    apart = math.isfinite(highs) and all(highs < one.low[-1] for one in others)
    overlap = "its band lies below all others" if apart else "its band overlaps others"
    lead = f"is lowest from {seconds(since)} on" if since else "is lowest throughout"
    return f"In {domain} the mean flow loss of {best} {lead} and ends at {number(bands[best].mean[-1])}; {overlap} there."

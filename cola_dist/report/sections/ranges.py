"""Section 10: which values of the indicators healthy and collapsed runs had."""

from __future__ import annotations

import math

import numpy as np

from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Section, Table, Text
from cola_dist.report.metrics import RANGES
from cola_dist.report.trials import Look
from cola_dist.report.words import NOTHING, listing, number

_PERPLEXITY, _GAP = "perplexity by action perplexity", "sensitivity gap by flow loss"
_JUDGED = {"perplexity", "max_usage", "effective_rank", "sensitivity_gap", "flow_loss", _PERPLEXITY, _GAP}
"""What the verdict itself looks at, and what follows from it."""
_GROUPS = ("healthy", "collapsed")
_READING = (
    "5th to 95th percentile over the last looks of all runs that finished, of any arm and settings, and of those that were stopped as collapsed "
    "(of a few runs: nearly their least and greatest), their number in brackets. The verdict is itself made from the marked (*) indicators, which "
    "are apart for that reason; others were not asked. Perplexity as a share of the true actions' perplexity (their dimensions binned) allows for "
    "actions that are themselves unbalanced."
)


def ranges(analysis: Analysis) -> Section:
    """A table for each domain."""
    blocks: list[Block] = []
    apart: dict[str, list[str]] = {}
    for domain in analysis.domains:
        looks = _ends(analysis, domain)
        rows = []
        for name, label in _indicators().items():
            values = {group: _values(looks[group], name) for group in _GROUPS}
            if any(values.values()):
                marked = label + (" *" if name in _JUDGED else "")
                rows.append([marked, *(_range(values[group]) for group in _GROUPS)])
                if name not in _JUDGED and _disjoint(values["healthy"], values["collapsed"]):
                    apart.setdefault(domain, []).append(label)
        if rows:
            counts = ", ".join(f"{len(looks[name])} {name}" for name in looks)
            blocks.append(Table(["indicator", *(f"{group} runs" for group in _GROUPS)], rows, f"Domain {domain}: {counts}"))
    if not blocks:
        return Section("ranges", "Reference ranges of the indicators", "No finished run has a verdict of healthy or collapsed.", [])
    return Section("ranges", "Reference ranges of the indicators", _conclusion(analysis, apart), [*blocks, Text(_READING, small=True)])


def _indicators() -> dict[str, str]:
    """`RANGES` with the two ratios behind what they are ratios of."""
    ratios = {"perplexity": _PERPLEXITY, "sensitivity_gap": _GAP}
    names = [name for one in RANGES for name in (one, *([ratios[one]] if one in ratios else []))]
    return {name: RANGES.get(name, name) for name in names}


def _ends(analysis: Analysis, domain: str) -> dict[str, list[Look]]:
    """Last looks by verdict; of runs that were stopped early, those that were dead then."""
    found: dict[str, list[Look]] = {"healthy": [], "at risk": [], "collapsed": []}
    for trial in analysis.study.trials:
        if trial.domain == domain and trial.verdict in found and (trial.status == "finished" or trial.verdict == "collapsed"):
            found[trial.verdict].append(trial.looks[-1])
    return found


def _values(looks: list[Look], name: str) -> list[float]:
    ratios = {_PERPLEXITY: ("perplexity", "action_perplexity"), _GAP: ("sensitivity_gap", "flow_loss")}
    over, under = ratios.get(name, (name, ""))
    values = [look.indicators.get(over, math.nan) / (look.indicators.get(under, math.nan) if under else 1.0) for look in looks]
    return [value for value in values if math.isfinite(value)]


def _range(values: list[float]) -> str:
    if not values:
        return NOTHING
    low, high = np.quantile(values, [0.05, 0.95])
    return f"{number(float(low))} to {number(float(high))} ({len(values)})"


def _disjoint(a: list[float], b: list[float]) -> bool:
    """Whether no value of one group lies within those of the other; of two runs or more each."""
    return min(len(a), len(b)) > 1 and (max(a) < min(b) or max(b) < min(a))


def _conclusion(analysis: Analysis, apart: dict[str, list[str]]) -> str:
    said = []
    for domain in analysis.domains:
        looks = _ends(analysis, domain)
        healthy, dead = len(looks["healthy"]), len(looks["collapsed"])
        if healthy and dead:
            found = apart.get(domain)
            unclear = "overlap in every indicator that the verdict leaves out"
            tail = f"are told apart, without a single overlap, by {listing(found)}" if found else unclear
            said.append(f"In {domain} {healthy} healthy and {dead} collapsed runs {tail}.")
        else:
            said.append(f"In {domain} {healthy} runs are healthy and {dead} collapsed, so there is no second group to tell them from.")
    return " ".join(said)

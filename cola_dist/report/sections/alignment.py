"""Section 6: whether the latent actions agree with the pretrained generator, before and after; gradients and modulation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from cola_dist.evaluation.statistics import bootstrap_interval
from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Fold, Section, Table, Text
from cola_dist.report.metrics import ALIGNMENT, CKA, COSINE, Metric
from cola_dist.report.trials import Trial
from cola_dist.report.words import NOTHING, interval, number

_MOMENTS = {"start": "before", "warm-up": "after warm-up", "end": "at the end"}
_READING = (
    "Agreement of z with the feature changes of the pretrained generator on held-out transitions: mean over seeds and its 95 % bootstrap interval, "
    "then the mean of the control with the targets of other episodes. Read a figure by its distance from its control."
)
_GRADIENTS = (
    "Cosine of the LAM's gradients from the flow loss and from the bottleneck's terms (left out where the bottleneck has no gradient), and the "
    "action's part of the mean squared modulation of each block of the generator; means over seeds."
)


def alignment(analysis: Analysis) -> Section:
    """A table of alignment with its controls, and one of gradients and modulation."""
    rows = [
        row
        for domain in analysis.domains
        for arm in analysis.arms_in(domain)
        for metric in ALIGNMENT
        if (row := _row(domain, arm, metric, analysis.trials(domain, arm)))
    ]
    blocks: list[Block] = []
    if rows:
        blocks += [Table(["arm", "domain", "measure", *_MOMENTS.values()], rows), Text(_READING, small=True)]
    if flows := _gradients(analysis):
        blocks.append(Fold("Gradients and modulation", [flows, Text(_GRADIENTS, small=True)]))
    conclusion = _conclusion(analysis) if rows else "Alignment was not measured (too few held-out episodes, or switched off)."
    return Section("alignment", "Alignment with the pretrained generator", conclusion, blocks)


def _seen(trials: Sequence[Trial], moment: str, indicator: str) -> list[float]:
    looks = [trial.moment(moment) for trial in trials]
    return [value for look in looks if look and math.isfinite(value := look.indicators.get(indicator, math.nan))]


def _mean(values: Sequence[float]) -> str:
    return number(sum(values) / len(values)) if values else NOTHING


def _row(domain: str, arm: str, metric: Metric, trials: Sequence[Trial]) -> list[str]:
    cells = []
    for moment in _MOMENTS:
        values = _seen(trials, moment, metric.name)
        control = _mean(_seen(trials, moment, metric.control))
        cells.append(f"{interval(bootstrap_interval(values))}; control {control}" if values else NOTHING)
    return [arm, domain, metric.short, *cells] if set(cells) != {NOTHING} else []


def _gradients(analysis: Analysis) -> Table | None:
    """Arms by moment, a column for each block; the start is left out, where modulation is 0 by construction."""
    looks = [look for trial in analysis.study.finished for look in trial.looks]
    blocks = sorted({name for look in looks for name in look.indicators if re.fullmatch(r"modulation_share/block\d+", name)}, key=_place)
    names = [name for name in ("gradient_cosine", "modulation_share") if any(name in look.indicators for look in looks)]
    rows = []
    for domain in analysis.domains:
        for arm in analysis.arms_in(domain):
            for moment in ("warm-up", "end"):
                cells = [_mean(_seen(analysis.trials(domain, arm), moment, name)) for name in [*names, *blocks]]
                if set(cells) - {NOTHING}:
                    rows.append([arm, domain, _MOMENTS[moment], *cells])
    titles = {"gradient_cosine": "cosine of gradients", "modulation_share": "modulation, mean"}
    heads = [*(titles[name] for name in names), *(f"block {_place(name)}" for name in blocks)]
    return Table(["arm", "domain", "when", *heads], rows) if rows else None


def _place(name: str) -> int:
    return int(name.rpartition("block")[2])


def _conclusion(analysis: Analysis) -> str:
    said = []
    for domain in analysis.domains:
        trials = analysis.trials(domain, analysis.reference)
        metric = next((one for one in (COSINE, CKA) if _seen(trials, "end", one.name)), None)
        if metric is None:
            continue
        moments = [moment for moment in _MOMENTS if _seen(trials, moment, metric.name)]
        levels = [
            f"{_mean(_seen(trials, moment, metric.name))} {_MOMENTS[moment]} (control {_mean(_seen(trials, moment, metric.control))})"
            for moment in moments
        ]
        words = metric.short
        said.append(f"In {domain} the {words} of {analysis.reference} is {', '.join(levels)}{_rises(trials, metric)}.")
    return " ".join(said) or f"The alignment of {analysis.reference} was not measured; that of other arms stands below."


def _rises(trials: Sequence[Trial], metric: Metric) -> str:
    """In how many seeds warm-up raised the measure further above its control."""
    changes = []
    for trial in trials:
        ends = [trial.moment("start"), trial.moment("warm-up")]
        gaps = [
            look.indicators[metric.name] - look.indicators[metric.control] for look in ends if look and metric.control in look.indicators
        ]
        if len(gaps) == 2:
            changes.append(gaps[1] > gaps[0])
    return f"; warm-up widened its distance from the control in {sum(changes)} of {len(changes)} seeds" if changes else ""

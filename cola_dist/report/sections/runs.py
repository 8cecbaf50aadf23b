"""Section 4: single runs through their phases, with boundaries and what rules did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Figures, Fold, Points, Section, Text
from cola_dist.report.drawing import Panel, Plate, key_of, slug
from cola_dist.report.metrics import CURVES, PERPLEXITY, Metric
from cola_dist.report.trials import Trial
from cola_dist.report.words import count, number

_MOST_RULINGS = 12
_READING = (
    "Each line is one seed; the thick one is the median seed by final flow loss, the only one whose permuted control (dotted), phase boundaries "
    "(dashed) and rulings (triangles, numbered as below the figure) are drawn in full. Thin dashed lines: boundaries of the other seeds."
)


def runs(analysis: Analysis) -> Section:
    """A fold for each arm and domain; the reference's is open."""
    blocks: list[Block] = []
    for domain in analysis.domains:
        for arm in analysis.arms_in(domain):
            if middle := analysis.median(domain, arm):
                inner = [Figures(_plate(analysis, domain, arm, middle)), *_rulings(analysis.trials(domain, arm), middle)]
                blocks.append(Fold(f"{arm}, {domain}", inner, opened=arm == analysis.reference))
    if not blocks:
        return Section("runs", "Single runs through the phases", "No finished run has indicators to draw.", [])
    return Section("runs", "Single runs through the phases", _conclusion(analysis), [Text(_READING, small=True), *blocks])


def _plate(analysis: Analysis, domain: str, arm: str, middle: Trial) -> Plate:
    trials = analysis.trials(domain, arm)
    metrics = [metric for metric in CURVES if any(_steps(trial, metric.name)[0] for trial in trials)]
    colour = key_of(analysis.arms, arm).colour
    panels = [
        Panel(partial(_draw, metric=metric, trials=trials, middle=middle, colour=colour), _alt(arm, domain, metric, middle))
        for metric in metrics
    ]
    title = f"{arm} in {domain}: each seed; thick: seed {middle.seed}"
    return Plate(slug("run", domain, arm), title, panels, height=2.2)


def _steps(trial: Trial, indicator: str) -> tuple[list[int], list[float]]:
    seen = [(look.step, look.indicators[indicator]) for look in trial.looks if math.isfinite(look.indicators.get(indicator, math.nan))]
    return [step for step, _ in seen], [value for _, value in seen]


def _draw(axis: Axes, metric: Metric, trials: Sequence[Trial], middle: Trial, colour: str) -> None:
    for trial in trials:
        if trial is not middle:
            axis.plot(*_steps(trial, metric.name), color=colour, linewidth=0.8, alpha=0.45)
            for span in trial.spans[1:]:
                axis.axvline(span.first, color="#7d7f88", linewidth=0.5, linestyle="--", alpha=0.5)
    axis.plot(*_steps(middle, metric.name), color=colour, linewidth=2.0)
    if metric.control:
        axis.plot(*_steps(middle, metric.control), color=colour, linewidth=1.0, linestyle=":")
    for span in middle.spans[1:]:
        axis.axvline(span.first, color="#7d7f88", linewidth=1.2, linestyle="--")
    for place, ruling in enumerate(middle.rulings[:_MOST_RULINGS], 1):
        axis.plot([ruling.step], [0.04], "^", color="#d55e00", markersize=5, transform=axis.get_xaxis_transform(), clip_on=False)
        axis.annotate(f" {place}", (ruling.step, 0.06), xycoords=axis.get_xaxis_transform(), fontsize=8)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.12 * (high - low))  # where the phases' names stand
    for span in middle.spans:
        axis.annotate(span.phase, ((span.first + span.end) / 2, 0.93), xycoords=axis.get_xaxis_transform(), ha="center", fontsize=8)
    axis.set_title(metric.label)
    axis.set_xlabel("steps")


def _alt(arm: str, domain: str, metric: Metric, middle: Trial) -> str:
    steps, values = _steps(middle, metric.name)
    ends = f" from {number(values[0])} to {number(values[-1])} over {steps[-1]} steps" if steps else ""
    return f"{metric.label} of {arm} in {domain}, seed {middle.seed}{ends}."


def _rulings(trials: Sequence[Trial], middle: Trial) -> list[Block]:
    """What rules did in these runs, the drawn run's first; the same words of several seeds stand once."""
    lines = [f"{place}. seed {middle.seed}, {_said(middle, place - 1)}" for place in range(1, min(len(middle.rulings), _MOST_RULINGS) + 1)]
    others = [f"seed {t.seed}, {_said(t, place)}" for t in trials if t is not middle for place in range(len(t.rulings))]
    left = len(lines) + len(others) - _MOST_RULINGS
    lines = [*lines, *others][:_MOST_RULINGS]
    if left > 0:
        lines.append(f"and {left} more, in the runs' result.json")
    ends = [f"seed {t.seed}: {span.phase} ended at step {span.end}: {span.why}" for t in trials for span in t.spans if span.why]
    blocks: list[Block] = []
    if lines:
        blocks.append(
            Fold(f"What rules did ({count(sum(len(t.rulings) for t in trials), 'ruling')})", [Points(lines)], opened=len(lines) < 4)
        )
    if ends:
        blocks.append(Fold("What ended phases before their plan", [Points(ends[:_MOST_RULINGS])]))
    return blocks


def _said(trial: Trial, place: int) -> str:
    ruling = trial.rulings[place]
    return f"step {ruling.step}, {ruling.rule}: {ruling.act}: {ruling.why}"


def _conclusion(analysis: Analysis) -> str:
    said = []
    for domain in analysis.domains:
        trial = analysis.median(domain, analysis.reference)
        if trial is None:
            continue
        start, warm, end = (trial.moment(name) for name in ("start", "warm-up", "end"))
        levels = [(words, look) for words, look in (("at the start", start), ("after warm-up", warm), ("at the end", end)) if look]
        told = [f"{number(look.indicators[PERPLEXITY.name])} {words}" for words, look in levels if PERPLEXITY.name in look.indicators]
        if told:
            said.append(f"In {domain} the median run of {analysis.reference} has a perplexity of {', '.join(told)}")
    trials = [trial for domain in analysis.domains for arm in analysis.arms for trial in analysis.trials(domain, arm)]
    ruled = sum(bool(trial.rulings) for trial in trials)
    said.append(f"Rules changed or remarked on {ruled} of {count(len(trials), 'run')}")
    return ". ".join(said) + "."

"""Section 9: final quality against the length of warm-up."""

from __future__ import annotations

import math
from functools import partial

from matplotlib.axes import Axes

from cola_dist.evaluation.statistics import bootstrap_interval
from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Figures, Section, Table, Text
from cola_dist.report.drawing import Key, Panel, Plate, slug
from cola_dist.report.metrics import FLOW_LOSS, HEADLINE, PERPLEXITY, Metric
from cola_dist.report.trials import Trial
from cola_dist.report.words import interval, listing, number, runs_of

_FAMILY = ("cola", "no-warmup", "warmup-only")
"""The method at any length of warm-up, and at the two ends of the scale: none, and nothing else."""
_LENGTH = {"warmup_length", "warmup.steps", "warmup.exit", "warmup.min_steps"}
"""Parameters of a sweep that set the length of warm-up."""
_FIXED, _CHOSEN = Key("fixed length", "#0072b2", marker="o"), Key("length chosen by the adaptive rule", "#d55e00", "", marker="D")
_METRICS = (*HEADLINE, PERPLEXITY)
_READING = (
    "A dot is a run, at the warm-up steps that it really took; the line joins means, with 95 % bootstrap intervals where a length has two runs. "
    "These means are not tested against each other."
)


def response(analysis: Analysis) -> Section:
    """A panel for each metric in each domain with at least two lengths."""
    blocks: list[Block] = []
    said = []
    for domain in analysis.domains:
        fixed, chosen = _family(analysis, domain)
        lengths = sorted({trial.warmup_steps for trial in fixed})
        if len(lengths) > 1:
            blocks += [Figures(_plate(domain, fixed, chosen)), _table(domain, fixed, chosen)]
            said.append(_said(domain, fixed, chosen))
    if not blocks:
        return Section("response", "How long should warm-up be?", "The study has no two lengths of warm-up to compare.", [])
    others = sorted({name for domain in analysis.domains for trial in _family(analysis, domain)[0] for name, _ in trial.settings} - _LENGTH)
    if others:
        blocks.append(Text(f"These runs differ in other fields too, which the figure mixes: {listing(others)}."))
    return Section("response", "How long should warm-up be?", " ".join(said), [*blocks, Text(_READING, small=True)])


def _family(analysis: Analysis, domain: str) -> tuple[list[Trial], list[Trial]]:
    """Finished runs with warm-up of a fixed length, at any settings, and those of the adaptive rule. Of runs that two sweeps made alike, one."""
    fixed: dict[object, Trial] = {}
    chosen: dict[object, Trial] = {}
    for trial in analysis.study.finished:
        rest = tuple(setting for setting in trial.settings if setting[0] not in _LENGTH)
        if trial.domain == domain and (trial.arm == "adaptive" or "adaptive" in {trial.params.get(name) for name in _LENGTH}):
            chosen[trial.seed, rest] = trial
        elif trial.domain == domain and trial.arm in _FAMILY:
            fixed[trial.warmup_steps, trial.seed, rest] = trial
    return list(fixed.values()), list(chosen.values())


def _values(trials: list[Trial], metric: Metric) -> dict[int, list[float]]:
    """Finite final values by the length of warm-up."""
    found: dict[int, list[float]] = {}
    for trial in sorted(trials, key=lambda trial: trial.warmup_steps):
        value = trial.value(metric.name)
        if math.isfinite(value):
            found.setdefault(trial.warmup_steps, []).append(value)
    return found


def _plate(domain: str, fixed: list[Trial], chosen: list[Trial]) -> Plate:
    panels = []
    for metric in _METRICS:
        by_length, adaptive = _values(fixed, metric), _values(chosen, metric)
        if by_length:
            means = ", ".join(f"{number(sum(values) / len(values))} at {steps}" for steps, values in by_length.items())
            alt = f"{metric.label} in {domain} by steps of warm-up: {means}."
            panels.append(Panel(partial(_draw, metric=metric, fixed=by_length, chosen=adaptive), alt))
    legend = [_FIXED, _CHOSEN] if chosen else [_FIXED]
    return Plate(slug("response", domain), f"Domain {domain}: end of the run by length of warm-up", panels, legend)


def _draw(axis: Axes, metric: Metric, fixed: dict[int, list[float]], chosen: dict[int, list[float]]) -> None:
    for values, key in ((fixed, _FIXED), (chosen, _CHOSEN)):
        places = [steps for steps, group in values.items() for _ in group]
        heights = [value for group in values.values() for value in group]
        axis.scatter(places, heights, s=12, alpha=0.5, color=key.colour, marker=key.marker)
    intervals = {steps: bootstrap_interval(values) for steps, values in fixed.items()}
    axis.plot(list(intervals), [one.mean for one in intervals.values()], color=_FIXED.colour)
    for steps, one in intervals.items():
        axis.plot([steps, steps], [one.low, one.high], color=_FIXED.colour, linewidth=1.2)
    axis.set_title(metric.label)
    axis.set_xlabel("steps of warm-up")


def _table(domain: str, fixed: list[Trial], chosen: list[Trial]) -> Table:
    found = {metric: _values(fixed, metric) for metric in _METRICS}
    rows = []
    for steps in sorted({trial.warmup_steps for trial in fixed}):
        group = [trial for trial in fixed if trial.warmup_steps == steps]
        cells = [interval(bootstrap_interval(found[m][steps])) if steps in found[m] else "–" for m in _METRICS]
        rows.append([str(steps), listing(list(dict.fromkeys(trial.arm for trial in group))), str(len(group)), *cells])
    if chosen:
        lengths = sorted(trial.warmup_steps for trial in chosen)
        every = [[value for values in _values(chosen, m).values() for value in values] for m in _METRICS]
        cells = [interval(bootstrap_interval(values)) if values else "–" for values in every]
        rows.append([f"chosen: {runs_of(sorted(set(lengths)))}", "adaptive", str(len(chosen)), *cells])
    return Table(["steps of warm-up", "arms", "runs", *(m.label for m in _METRICS)], rows, f"Domain {domain}")


def _said(domain: str, fixed: list[Trial], chosen: list[Trial]) -> str:
    means = {steps: sum(values) / len(values) for steps, values in _values(fixed, FLOW_LOSS).items()}
    if not means:
        return f"In {domain} no run of this family has a finite flow loss."
    best = min(means, key=lambda steps: means[steps])
    line = f"In {domain} the mean flow loss is lowest after {best} steps of warm-up ({number(means[best], 4)})"
    if best and 0 in means:
        line += f", against {number(means[0], 4)} without"
    if chosen:
        lengths = sorted(trial.warmup_steps for trial in chosen)
        line += f"; the adaptive rule chose {lengths[0]}" + (f" to {lengths[-1]}" if lengths[-1] != lengths[0] else "") + " steps"
    return line + "."

"""Section 1: the question, and its answer in numbers."""

from __future__ import annotations

from statistics import fmean

from cola_dist.report.analysis import Analysis, Comparison
from cola_dist.report.blocks import Block, Cell, Fold, Points, Section, Table, Text
from cola_dist.report.metrics import FLOW_LOSS, HEADLINE
from cola_dist.report.words import NOTHING, interval, listing, number

_QUESTION = (
    "Does training a latent action model through the frozen generator first (warm-up), then both jointly, give a better and more reliable world "
    "model than the other arms at an equal budget of accelerator time? A better one predicts held-out clips with a lower flow loss when it is given "
    "the clip's own latent actions, predicts worse with another clip's (sensitivity gap, delta-PSNR), and has codes from which true "
    "actions can be read (probe R2)."
)
_READING = (
    "Mean over seeds and its 95 % bootstrap interval at the end of each run. A name is bold where paired tests over the seeds, "
    "Holm-corrected over all pairs of arms, put it before every other arm of the column; without a bold name no winner is supported. The correction "
    "does not reach over metrics and domains: one of many columns may name a winner by chance."
)


def question(analysis: Analysis) -> Section:
    """The winners by domain, as far as tests support any."""
    blocks: list[Block] = [Text(_QUESTION), *(_table(analysis, domain) for domain in analysis.domains), Text(_READING, small=True)]
    blocks += [Text(said) for domain in analysis.domains if (said := _generator(analysis, domain))]
    lines = [
        f"{domain}, {metric.label}: {analysis.comparison(domain, metric).verdict}." for domain in analysis.domains for metric in HEADLINE
    ]
    blocks.append(Fold("The verdicts in words", [Points(lines)], opened=len(analysis.domains) == 1))
    return Section("question", "The question and the answer", _conclusion(analysis), blocks)


def value_cell(comparison: Comparison, arm: str) -> Cell:
    """An arm's mean and interval under a metric, strong for a winner."""
    known = {one.name: one.interval for one in comparison.table.arms} if comparison.table else {}
    value = known.get(arm) or comparison.outside.get(arm)
    return Cell(interval(value) if value else NOTHING, comparison.winner == arm)


def _table(analysis: Analysis, domain: str) -> Table:
    compared = [analysis.comparison(domain, metric) for metric in HEADLINE]
    rows: list[list[str | Cell]] = [[arm, *(value_cell(one, arm) for one in compared)] for arm in analysis.arms_in(domain)]
    arrows = {"lower": "↓", "higher": "↑"}
    return Table(["arm", *(f"{m.label} {arrows[m.better]}" for m in HEADLINE)], rows, f"Domain {domain}")


def _generator(analysis: Analysis, domain: str) -> str:
    """What the generator could do before it was told of actions; empty where that was not measured."""
    for arm in analysis.arms_in(domain):
        starts = [look.indicators for trial in analysis.trials(domain, arm) if (look := trial.moment("start"))]
        known = [one for one in starts if "copy_loss" in one]
        if known:
            noisiest = max((name for name in known[0] if name.startswith("copy_loss/")), default="copy_loss").removeprefix("copy_loss")
            overall, near = (
                f"{number(fmean(one[f'flow_loss{part}'] for one in known))} (repeating the context frame: "
                f"{number(fmean(one[f'copy_loss{part}'] for one in known))})"
                for part in ("", noisiest)
            )
            return (
                f"In {domain} the generator of {arm} had, before any training, a flow loss of {overall}; nearest to pure noise of {near}."
            )
    return ""


def _conclusion(analysis: Analysis) -> str:
    """By domain the verdict on flow loss, then who wins under the other metrics."""
    said = []
    for domain in analysis.domains:
        others = {metric: analysis.comparison(domain, metric) for metric in HEADLINE if metric != FLOW_LOSS}
        won = [f"{metric.short}: {one.winner}" for metric, one in others.items() if one.winner]
        open_ = [metric.short for metric, one in others.items() if one.table and not one.winner]
        parts = [f"In {domain}, by flow loss, {analysis.comparison(domain, FLOW_LOSS).verdict}"]
        parts += [f"winners by {listing(won)}"] if won else []
        parts += [f"no winner by {listing(open_, 'or')}"] if open_ else []
        said.append("; ".join(parts) + ".")
    return " ".join(said)

"""Section 8: every arm under every metric, tested against the reference."""

from __future__ import annotations

from cola_dist.evaluation.statistics import ArmTable
from cola_dist.report.analysis import Analysis, Comparison
from cola_dist.report.blocks import Block, Cell, Fold, Section, Table, Text
from cola_dist.report.metrics import TABLE
from cola_dist.report.words import NOTHING, interval, listing, number, probability, runs_of

_READING = (
    "↓ lower, ↑ higher is better. Mean over the seeds that all arms of a table share, with its 95 % bootstrap interval. Difference: to the "
    "reference on the same seeds, with the interval of its own test, not corrected. Effect: Cohen's d_z with Hedges' correction. Higher: share of "
    "seeds on which the arm has the higher value. p: paired test, Holm-corrected over all pairs of arms of the table. The sign-flip test is taken "
    "where it can reach significance with so many seeds and pairs, else Student's t, which takes differences for normal."
)


def tests_table(analysis: Analysis) -> Section:
    """A table for each domain and metric."""
    blocks: list[Block] = [Text(_READING, small=True)]
    for domain in analysis.domains:
        compared = [analysis.comparison(domain, metric) for metric in TABLE]
        measured = [one for one in compared if one.table or one.outside]
        blocks += [_table(analysis, one) for one in measured]
        absent = [one.metric.label for one in compared if not (one.table or one.outside)]
        if absent:
            blocks.append(Text(f"Not measured in {domain}: {listing(absent)}."))
    return Section("tests", f"Every arm against {analysis.reference}", _conclusion(analysis), blocks)


def _table(analysis: Analysis, comparison: Comparison) -> Block:
    columns = ["arm", "mean", f"difference to {analysis.reference}", "effect", "higher", "p", "seeds", "missing seeds"]
    table = comparison.table
    rows = _tested(analysis, comparison, table) if table else []
    rows += [
        [arm, interval(value), *[NOTHING] * 4, str(value.n), _missing(analysis, comparison, arm)]
        for arm, value in comparison.outside.items()
    ]
    arrow = {"lower": "↓", "higher": "↑"}[comparison.metric.better]
    notes = [f"{comparison.verdict}."]
    if table:
        notes.append(f"Tests: {listing(sorted({test.method for test in table.tests.values()}))}.")
        if comparison.outside:
            notes.append(f"Outside the tests, with too few seeds in common with {analysis.reference}: {listing(list(comparison.outside))}.")
    if comparison.diverged:
        notes.append(f"Left out, as the value is not finite: {listing(list(comparison.diverged))}.")
    title = f"{comparison.domain}: {comparison.metric.label} {arrow}"
    return Fold(title, [Table(columns, rows), Text(" ".join(notes), small=True)], opened=comparison.metric == TABLE[0])


def _tested(analysis: Analysis, comparison: Comparison, table: ArmTable) -> list[list[str | Cell]]:
    rows: list[list[str | Cell]] = []
    for arm in table.arms:
        strong = arm.name == comparison.winner
        cells = [NOTHING] * 4
        if arm.name != table.reference:
            test = table.tests[arm.name, table.reference]
            cells = [interval(test.interval), number(test.effect), f"{100 * test.superiority:.0f} %", probability(test.adjusted)]
        missing = _missing(analysis, comparison, arm.name)
        rows.append([Cell(arm.name, strong), Cell(interval(arm.interval), strong), *cells, str(len(table.seeds)), missing])
    return rows


def _missing(analysis: Analysis, comparison: Comparison, arm: str) -> str:
    """Seeds that this arm was given, or another arm has a value for, and this one has none."""
    domain, metric = comparison.domain, comparison.metric.name
    planned = {trial.seed for trial in analysis.all_trials(domain, arm)}
    planned |= {trial.seed for trial, _ in analysis.study.damaged if trial.domain == domain and analysis.groups[arm].holds(trial)}
    planned |= {seed for other in analysis.arms for seed in analysis.values(domain, other, metric)}
    return runs_of(sorted(planned - set(analysis.values(domain, arm, metric)))) or NOTHING


def _conclusion(analysis: Analysis) -> str:
    made, found = 0, []
    for domain in analysis.domains:
        for metric in TABLE:
            table = analysis.comparison(domain, metric).table
            for arm in table.arms if table else ():
                if table and arm.name != table.reference:
                    test = table.tests[arm.name, table.reference]
                    made += 1
                    if test.adjusted < table.alpha:
                        better = (test.difference > 0) == (table.better == "higher")
                        found.append(f"{arm.name} {'better' if better else 'worse'} in {metric.short} ({domain})")
    if not made:
        return "No arm could be tested: that takes two arms with two finished seeds in common."
    shown = listing(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    return f"{len(found)} of {made} comparisons with {analysis.reference} are significant after correction" + (
        f": {shown}." if found else "."
    )

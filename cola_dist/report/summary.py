"""The main result for a terminal and for scripts."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from cola_dist.report.analysis import Analysis
from cola_dist.report.metrics import HEADLINE
from cola_dist.report.sections.question import value_cell


def result_table(analysis: Analysis, domain: str) -> Table:
    """Arms by headline metrics; bold for a winner that tests support."""
    compared = [analysis.comparison(domain, metric) for metric in HEADLINE]
    table = Table(title=Text(f"{domain}: end of the run, mean [95 % interval] over seeds; bold: supported winner"))
    table.caption = Text(f"{compared[0].metric.short}: {compared[0].verdict}")
    table.add_column("arm")
    for metric in HEADLINE:
        table.add_column(Text(metric.label))
    table.add_column("collapsed")
    for arm in analysis.arms_in(domain):
        cells = [value_cell(comparison, arm) for comparison in compared]
        # As Text, because names come from files and rich would read [brackets] as markup.
        words = [Text(cell.text, style="bold" if cell.strong else "") for cell in cells]
        table.add_row(Text(arm), *words, Text(str(analysis.collapsed(domain, arm))))
    return table


def winners(analysis: Analysis) -> dict[str, dict[str, dict[str, str | None]]]:
    """By domain and headline metric, the winner (null where tests support none) and the verdict in words."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for domain in analysis.domains:
        compared = {metric.name: analysis.comparison(domain, metric) for metric in HEADLINE}
        found[domain] = {name: {"winner": one.winner, "verdict": one.verdict} for name, one in compared.items()}
    return found

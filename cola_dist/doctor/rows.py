"""What checks say: a row each, and those of many nodes that say the same as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warn", "fail"]
_NAMED = 3
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Row:
    """One check in one place."""

    check: str
    where: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    """What to do; empty where nothing is to be done."""
    measure: float = 0.0
    """Of rows that differ in numbers alone, the one with the least is shown."""


def together(rows: Sequence[Row], nodes: int) -> list[Row]:
    """Rows in their order, those of several of ``nodes`` that agree in check, verdict and remedy as one, with the worst that was found."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.check, row.verdict, row.remedy), []).append(row)
    merged = []
    for group in groups.values():
        worst = min(group, key=lambda row: row.measure)
        where = list(dict.fromkeys(row.where for row in group))
        named = f"all {nodes} nodes" if len(where) == nodes > 1 else ", ".join(where[:_NAMED])
        named += f" and {len(where) - _NAMED} more" if len(where) > _NAMED and len(where) != nodes else ""
        found = worst.found + (" at worst" if len({row.found for row in group}) > 1 else "")
        merged.append(Row(worst.check, named, found, worst.verdict, worst.remedy))
    return merged


def table_of(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    table = Table()
    for name in ("check", "where", "found", "", "what to do"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            *(Text(cell) for cell in (row.check, row.where, row.found)), Text(row.verdict, _COLOURS[row.verdict]), Text(row.remedy)
        )
    return table

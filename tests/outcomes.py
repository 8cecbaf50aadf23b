"""The table of faults and what came of them, which a run of the fault suite prints at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

RECOVERED = "recovered: same clips, same losses"
ONE_ERROR = "one error, loadable checkpoint; resumed to the same losses"


@dataclass
class Outcomes:
    """Rows of the table, in the order in which the faults were injected."""

    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def add(self, fault: str, when: str, outcome: str, lost: int | None, seconds: float | None) -> None:
        """``lost``: steps that were made once more. ``seconds``: from the fault to the next checkpoint, or to the job's end; none = not measured."""
        told = ("" if lost is None else str(lost), "" if seconds is None else f"{seconds:.0f}")
        self.rows.append((fault, when, outcome, *told))

    def table(self) -> str:
        """In Markdown."""
        head = ("fault", "when", "outcome", "steps lost", "s until going on, or ended")
        lines = [head, ("---",) * len(head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Look at the checkpoints of a run and look after them.

    python jobs/checkpoints.py list RUN
    python jobs/checkpoints.py verify RUN
    python jobs/checkpoints.py export RUN [STEP] [--output DIR]
    python jobs/checkpoints.py gc RUN [--keep N] [--damaged] [--yes]

RUN is the folder of a run: a path or s3:// URI. Exit codes: 0 done (the last line of stdout is one JSON object), 1 failure, or ``verify`` found
damage, 2 something given is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console

from cola_dist import storage
from cola_dist.command import run_command
from cola_dist.train import shelf, upkeep


@dataclass(frozen=True)
class Job:
    run: tyro.conf.Positional[str]
    debug: bool = False


@dataclass(frozen=True)
class List(Job):
    """Show a row per checkpoint: step, phase, files, bytes, when it was written, and whether it is whole as far as is known."""

    def work(self) -> dict[str, Any]:
        rows = upkeep.rows_of(upkeep.entries_of(self.run))
        Console(width=150).print(upkeep.table_of(self.run, rows))
        return {"run": self.run, "latest": shelf.latest(self.run), "checkpoints": rows}


@dataclass(frozen=True)
class Verify(Job):
    """Read every file and compare it with its manifest; what is found is written down, so that resuming heeds it."""

    def work(self) -> dict[str, Any]:
        found = []
        for examined in upkeep.verify(self.run):
            found.append(examined)
            for file, fault in examined.faults.items():
                print(f"{examined.name}/{file}: {fault or 'whole'}", flush=True)
        return upkeep.summary(self.run, found)


@dataclass(frozen=True)
class Export(Job):
    """Write the models of the newest whole checkpoint, or of the one at STEP, as a finished run does at its end."""

    step: tyro.conf.Positional[int | None] = None
    output: str = ""
    """Folder; empty = RUN/export."""

    def work(self) -> dict[str, Any]:
        return upkeep.export_run(self.run, self.step, self.output or storage.join(self.run, "export"))


@dataclass(frozen=True)
class Gc(Job):
    """Show what could go: all that is older than the newest whole ones, and writes that were interrupted."""

    keep: int = 2
    """Newest whole checkpoints that stay; they are read to know it."""
    damaged: bool = False
    """Damaged ones too."""
    yes: bool = False
    """Remove what is shown."""

    def work(self) -> dict[str, Any]:
        rows, gone = upkeep.clear(self.run, self.keep, self.damaged, self.yes)
        Console(width=150).print(upkeep.table_of(self.run, rows))
        figures = {"gone": [entry.name for entry in gone], "bytes": sum(sum(entry.files.values()) for entry in gone)}
        return {"status": "removed" if self.yes else "dry run", "run": self.run, **figures}


def main(argv: Sequence[str]) -> dict[str, Any]:
    job: List | Verify | Export | Gc = tyro.cli(List | Verify | Export | Gc, args=argv, description=__doc__)
    return job.work()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

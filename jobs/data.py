"""Look at shard folders and look after them.

    python jobs/data.py lint FOLDER [FOLDER ...]
    python jobs/data.py info FOLDER [FOLDER ...]
    python jobs/data.py preview FOLDER [FOLDER ...] --output DIR
Exit codes: 0 done (the last line of stdout is one JSON object), 1 failure, 2 something given is wrong, or ``lint`` found something.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cola_dist.command import run_command
from cola_dist.data.lint import left_out, lint
from cola_dist.data.preview import preview
from cola_dist.data.shards import open_folder
from cola_dist.data.summary import summarise, table_of
from cola_dist.errors import UserError


@dataclass(frozen=True)
class Lint:
    """Read every byte and decode every video; print a line for each damaged file and each disagreement between shards and index."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    debug: bool = False

    def run(self) -> dict[str, Any]:
        problems: list[str] = []
        skipped: list[str] = []
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for folder in self.folders:
                checked = partial(_show, progress, progress.add_task(folder, total=None))
                problems += [f"{folder}: {problem}" for problem in lint(folder, checked)]
                skipped += [f"{folder}: {line}" for line in left_out(folder)]
        for line in problems + skipped:
            print(line)
        if problems:
            raise UserError(f"{len(problems)} problem(s) in {len(self.folders)} folder(s), listed above: pack what they name again")
        return {"status": "clean", "folders": self.folders, "left_out": len(skipped)}


@dataclass(frozen=True)
class Info:
    """Print what folders hold: episodes, hours, sizes, rates, data sets and licences, and what became of the input."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    debug: bool = False

    def run(self) -> dict[str, Any]:
        found = [summarise(open_folder(folder)) for folder in self.folders]
        for figures in found:
            Console().print(table_of(figures))
        return {"folders": found}


@dataclass(frozen=True)
class Preview:
    """Draw random episodes of each folder: a contact sheet (PNG) and a grid in which they play side by side (MP4)."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    output: str
    clips: int = 12
    seed: int = 0
    debug: bool = False

    def run(self) -> dict[str, Any]:
        made = [preview(open_folder(folder), self.output, self.clips, self.seed) for folder in self.folders]
        for one in made:
            print(one.sheet, one.video, *(f"not shown: {line}" for line in one.unreadable), sep="\n")
        return {"previews": [vars(one) for one in made]}


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def main(argv: Sequence[str]) -> dict[str, Any]:
    job: Lint | Info | Preview = tyro.cli(Lint | Info | Preview, args=argv, description=__doc__)
    if not job.folders:
        raise UserError("no folder given: name one or more shard folders")
    return job.run()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

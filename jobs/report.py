"""Make a page of sweeps and of what single runs were judged by: curves, rollouts, tests, and where all of it comes from. It needs no other file.

    python jobs/report.py FOLDER [FOLDER ...] [--output report.html] [--figures DIR] [--data DIR] [--reference ARM] [--tracking.uri URI]

FOLDER is one that jobs/sweep.py, evaluate.py, adapt.py (--shares) or plan.py wrote, or raw results that this job wrote (--data): a path or s3:// URI,
as may be outputs. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console

from cola_dist import storage, tracking
from cola_dist.command import run_command
from cola_dist.report.analysis import Analysis
from cola_dist.report.files import write_figures
from cola_dist.report.judged import read_judgement
from cola_dist.report.origin import origin
from cola_dist.report.page import build, render, sheets
from cola_dist.report.raw import write_raw
from cola_dist.report.study import read_study
from cola_dist.report.summary import result_table, winners
from cola_dist.report.trials import Study


@dataclass(frozen=True)
class Tracking:
    uri: str = ""
    """MLflow's tracking URI; empty = that of the newest sweep. Without a sweep the page is not kept there."""


@dataclass(frozen=True)
class Report:
    folders: tyro.conf.Positional[tuple[str, ...]]
    """What jobs wrote; of trials of the same arm, domain, seed and settings the newest counts, and raw results count as oldest."""
    output: str = "report.html"
    figures: str = ""
    """Folder for the figures as PNG; empty = none are written."""
    data: str = ""
    """Folder for raw results (trials.parquet, curves.parquet, sweeps.json), from which a page can be made again; empty = none are written."""
    reference: str = "cola"
    """The arm that all others are tested against."""
    tracking: Tracking = field(default_factory=Tracking)
    debug: bool = False


def main(argv: Sequence[str]) -> dict[str, Any]:
    job = tyro.cli(Report, args=argv, description=__doc__)
    read = {folder: read_judgement(folder) for folder in job.folders}
    judged = [found for found in read.values() if found]
    sweeps = [folder for folder, found in read.items() if not found]
    # With nothing at all, the study says what is missing.
    study = read_study(sweeps) if sweeps or not judged else None
    analysis = Analysis(study, job.reference) if study else None
    sections = build(analysis, origin(["python", "jobs/report.py", *argv]), judged)
    page = render(analysis, sections)
    storage.write_bytes(job.output, page.encode())
    figures = write_figures(job.figures, sheets(sections)) if job.figures else []
    line = {"output": job.output, "bytes": len(page.encode()), "figures": figures, "judged": {one.uri: one.kind for one in judged}}
    if study is None or analysis is None:
        return line
    for domain in analysis.domains:
        Console(width=120).print(result_table(analysis, domain))
    return line | {
        "data": write_raw(job.data, study) if job.data else [],
        "arms": analysis.arms,
        "trials": len(study.trials),
        "finished": len(study.finished),
        "damaged": [trial.id for trial, _ in study.damaged],
        "winners": winners(analysis),
        "tracked": _track(study, job.tracking.uri, page),
    }


def _track(study: Study, uri: str, page: str) -> bool:
    """Add the page to the newest sweep's parent run in MLflow; says in a line on stderr why it did not."""
    sweep = study.sweeps[-1]
    parent = str(sweep.about.get("mlflow_parent") or "")
    uri = uri or str(sweep.about.get("tracking_uri") or "")
    reason = "" if parent else f"{sweep.uri}/sweep.json names no run there"
    reason = reason or ("" if uri else "no --tracking.uri given, and none in sweep.json")
    reason = reason or tracking.attach(uri, parent, {"report/report.html": page.encode()})
    if reason:
        print(f"not in MLflow: {reason}", file=sys.stderr)
    return not reason


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

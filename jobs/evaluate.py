"""Measure a finished run on held-out clips: video metrics, what its latent actions are worth, films.

    python jobs/evaluate.py RUN [--output DIR] [--clips N] [--mixture FOLDER WEIGHT ...] [--fvd.weights FILE] [--lpips.weights FILE] [--workers N]

RUN is the folder of a finished run of jobs/cotrain.py, or its export: a path or s3:// URI, as may be all folders. Stopped, the same command goes on
where it stood. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console

from cola_dist import runtime, storage
from cola_dist.command import run_command
from cola_dist.errors import UserError
from cola_dist.evaluation.evaluate import Request, evaluate, plan
from cola_dist.evaluation.measure import Task
from cola_dist.evaluation.protocol import protocol_table
from cola_dist.evaluation.results import ALL, figures_table, flat, probe_table


@dataclass(frozen=True)
class Tracking:
    uri: str = ""
    """MLflow's tracking URI; empty = the run's own."""


@dataclass(frozen=True)
class Evaluate(Request):
    run: tyro.conf.Positional[str]
    output: str = ""
    """Folder; each protocol gets a folder of its own in it. Empty = RUN/evaluation."""
    workers: int = 1
    """Processes that measure; figures do not depend on their number."""
    batch: int = 8
    """Clips at once in one of them; figures do not depend on it either."""
    probe_clips: int = 128
    """Clips with known actions of each source and split for the probe; 0 = no probe."""
    tracking: Tracking = field(default_factory=Tracking)
    debug: bool = False


def main(argv: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    job = tyro.cli(Evaluate, args=argv, description=__doc__)
    if min(job.workers, job.batch, job.probe_clips + 1) < 1:
        raise UserError("--workers and --batch must be at least 1, --probe-clips at least 0")
    task = plan(job)
    folder = storage.join(job.output or storage.join(job.run, "evaluation"), task.protocol.key)
    console = Console(width=160)
    console.print(protocol_table(task.protocol))
    runtime.connect(job.workers, job.debug)
    result = evaluate(task, folder, job.workers, job.batch, job.probe_clips)
    console.print(figures_table(result["figures"]))
    console.print(probe_table(result["probe"]) if result["probe"] else "")
    for note in result["notes"]:
        print(note, file=sys.stderr)
    line = {"run": job.run, "output": folder, "protocol": task.protocol.key, "clips": job.clips, "figures": result["figures"][ALL]}
    line |= {"probe": result["probe"], "notes": result["notes"], "files": result["files"]}
    return line | {"tracked": _track(job, task, folder, result), "wall_seconds": round(time.monotonic() - began, 1)}


def _track(job: Evaluate, task: Task, folder: str, result: Mapping[str, Any]) -> bool:
    """Add files and figures to the run in MLflow that was evaluated."""
    from cola_dist.train.session import add_results

    files = {f"evaluation/{result['protocol']['key']}/{name}": storage.read_bytes(storage.join(folder, name)) for name in result["files"]}
    return add_results(job.run, task.config, job.tracking.uri, files, flat(result["figures"]))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

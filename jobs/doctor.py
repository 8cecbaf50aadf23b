"""Check a machine or cluster before a long run, and say what to mend.

    python jobs/doctor.py [--output URI] [--data FOLDER ...] [--tracking.uri URI] [--gpus] [--workers N]

The same on a cluster: ``ray job submit --working-dir . -- python jobs/doctor.py``. A row per check: where, what was found, and what to do. What is
written to --output is removed. Exit codes: 0 no check failed (the last line of stdout is one JSON object), 1 one did, 2 something given is wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console

from cola_dist.command import run_command
from cola_dist.doctor.examination import Request, examine
from cola_dist.doctor.rows import table_of
from cola_dist.errors import UserError


@dataclass(frozen=True)
class Tracking:
    uri: str = ""
    """MLflow's tracking URI; empty = a run's own database file, which is not looked at."""


@dataclass(frozen=True)
class Doctor:
    output: str = "runs"
    """Where runs will go; every node writes and reads there."""
    data: tuple[str, ...] = ()
    """Shard folders that every node should be able to read."""
    tracking: Tracking = field(default_factory=Tracking)
    gpus: bool = False
    """The run will use GPUs: there must be some, and they are what adds up."""
    workers: int = 0
    """Workers that add up among each other; a cluster that grows makes room for them. 0 = all GPUs, or two CPUs, on larger clusters one per node."""
    debug: bool = False


def main(argv: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    job = tyro.cli(Doctor, args=argv, description=__doc__)
    if job.workers < 0:
        raise UserError(f"--workers is {job.workers}: give how many workers the run will have, or 0 for all")
    rows = examine(Request(job.output, job.data, job.tracking.uri, job.gpus, job.workers), job.debug)
    Console(width=170).print(table_of(rows))
    found = {verdict: [row.check for row in rows if row.verdict == verdict] for verdict in ("ok", "warn", "fail")}
    checks = [{name: value for name, value in asdict(row).items() if name != "measure"} for row in rows]
    line = {"checks": checks, "ok": len(found["ok"]), "warn": found["warn"], "fail": found["fail"]}
    line["wall_seconds"] = round(time.monotonic() - began, 1)
    if found["fail"]:
        return {"status": "failed", "error": f"{len(found['fail'])} of {len(rows)} checks failed: {', '.join(found['fail'])}", **line}
    return {"status": "ready", **line}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""Co-train a latent action model and a world model: warm-up, then jointly.

    python jobs/cotrain.py [recipe] [--section.field VALUE ...] [--config FILE.yaml] [--resume RUN] [--dry-run] [--debug]

The same on a cluster: ``ray job submit --working-dir . -- python jobs/cotrain.py``. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from cola_dist.checks import check
from cola_dist.command import run_command
from cola_dist.settings import parse_job


def main(argv: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    job = parse_job(argv, default_recipe="tiny", prog="jobs/cotrain.py", method="cotrain")
    if job.resume is None:
        check(job.config)

    from cola_dist.train.job import new_run_id, preflight, resolve, summary
    from cola_dist.train.progress import files_table, indicator_table, show_plan

    config, run_uri = resolve(job, new_run_id(job.config.recipe))
    check(config)
    plan = show_plan(config) if job.dry_run else {}
    report = preflight(config, run_uri)
    if job.dry_run:
        Console(width=150).print(files_table(report["files"]))
        return {"status": "dry run", "run": run_uri, **report, "plan": plan}

    from cola_dist.train.launch import launch

    result = launch(config, run_uri, job.debug)
    Console(width=120).print(indicator_table(result["record"]))
    return summary(result, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""Drive a co-trained world model by a robot's real actions: train an adapter from them to latent actions, and the generator with it, briefly.

    python jobs/adapt.py RUN [recipe] [--shares S S ...] [--section.field VALUE ...] [--config FILE.yaml] [--dry-run] [--debug]
    python jobs/adapt.py --resume ADAPTATION [--section.field VALUE ...]

RUN is a finished run of jobs/cotrain.py: its folder, its id below --output, or its export. ``--shares 0.01 0.05 0.2 1`` trains with each of these
shares of the episodes in turn and draws the curve. The last line on stdout is a JSON object.
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


def main(argv: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    if {"--help", "-h"} & set(argv):
        print(__doc__)

    from cola_dist.train.adaptation import parse_adapt, sized, started
    from cola_dist.train.job import new_run_id, preflight, resolve, summary
    from cola_dist.train.progress import files_table, indicator_table, show_plan

    job, shares = parse_adapt(argv, prog="jobs/adapt.py")
    if job.resume is None:
        job = started(job)
        check(job.config)
    config, run_uri = resolve(job, new_run_id(job.config.recipe))
    config = sized(config)
    check(config)
    plan = show_plan(config) if job.dry_run else {}
    report = preflight(config, run_uri)
    if job.dry_run:
        Console(width=150).print(files_table(report["files"]))
        return {"status": "dry run", "run": run_uri, **report, "plan": plan}

    from cola_dist.train.launch import launch
    from cola_dist.train.series import adapt_series, series_table

    if shares:
        series = adapt_series(config, run_uri, shares, job.debug)
        Console(width=150).print(series_table(series["points"]))
        return series | {"wall_seconds": round(time.monotonic() - began, 1)}
    result = launch(config, run_uri, job.debug)
    Console(width=120).print(indicator_table(result["record"]))
    return summary(result, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""Run many trials of a space of configurations, several at once, and say which came out best.

    python jobs/sweep.py [SPACE] [--output DIR] [--budget SECONDS] [--seeds N] [--concurrent N] [--dry-run] [--debug] [--section.field VALUE ...]
    python jobs/sweep.py --resume SWEEP [--output DIR] [--concurrent N] [--debug]

SPACE is a name (``--help`` lists them) or a YAML file, as `cola_dist.train.sweep.space` describes. ``--budget`` is accelerator-seconds per
trial: seconds inside training steps of all its workers together, on CPU of processor time. Options of a run go into every trial.
The last line on stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from cola_dist.command import run_command
from cola_dist.errors import UserError
from cola_dist.settings import split_options
from cola_dist.train.sweep.space import load_space, read_seeds
from cola_dist.train.sweep.spaces import SPACES

_VALUES = {"--budget", "--seeds", "--concurrent", "--resume"}
_FLAGS = {"--dry-run", "--debug", "--help", "-h"}


def main(argv: Sequence[str]) -> dict[str, Any]:
    asked, overrides = parse(argv)

    from cola_dist.train.sweep.folder import new_sweep, open_sweep
    from cola_dist.train.sweep.run import run, trials_table, try_out

    if asked.resume is not None:
        sweep = open_sweep(asked.resume, overrides[-1] if overrides else "runs")
    else:
        space = load_space(asked.space)
        space = space if asked.seeds is None else replace(space, seeds=read_seeds(asked.seeds, "--seeds"))
        sweep = new_sweep(space, overrides, asked.budget)
    trials, base = try_out(sweep.plan)
    if asked.dry_run:
        Console(width=160).print(trials_table(sweep, trials))
        return {"status": "dry run", "sweep": sweep.uri, "trials": sweep.plan.total}
    return run(sweep, base, asked.concurrent, asked.debug)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The job's own options, and those for every trial's base. Raises ``UserError`` for what does not go together."""
    parser = argparse.ArgumentParser(prog="jobs/sweep.py", allow_abbrev=False, epilog=f"spaces: {', '.join(SPACES)}")
    parser.add_argument("space", nargs="?", metavar="SPACE")
    parser.add_argument(
        "--budget", type=float, default=0.0, metavar="SECONDS", help="accelerator-seconds of each trial; none = its steps decide"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds, instead of the space's own")
    parser.add_argument("--concurrent", type=int, metavar="N", help="trials at once; none = as many as the cluster has room for")
    parser.add_argument("--resume", metavar="SWEEP", help="go on with a sweep: its id below --output, or its folder")
    parser.add_argument("--dry-run", action="store_true", help="check every trial and show the list")
    parser.add_argument("--debug", action="store_true")
    own, overrides = split_options(argv, _VALUES, _FLAGS)
    asked = parser.parse_args(own)
    if not 0 <= asked.budget < math.inf:
        raise UserError(f"--budget is {asked.budget:g}: it must be positive, or 0 for none")
    if asked.concurrent is not None and asked.concurrent < 1:
        raise UserError(f"--concurrent is {asked.concurrent}: it must be at least 1")
    if asked.resume is not None:
        kept = [name for name, given in (("SPACE", asked.space), ("--budget", asked.budget), ("--seeds", asked.seeds)) if given]
        kept += [word for word in overrides if word.startswith("--") and word.partition("=")[0] != "--output"]
        if kept:
            raise UserError(f"a resumed sweep keeps its space and settings: leave out {', '.join(kept)}, or start a new sweep")
        overrides = [word.removeprefix("--output=") for word in overrides if word != "--output"]
    elif asked.space is None:
        raise UserError(f"give a space: {', '.join(SPACES)}, or a YAML file")
    return asked, overrides


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

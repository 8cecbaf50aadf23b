"""Look after shard folders.

    python jobs/data.py lint FOLDER [FOLDER ...]

``lint`` reads every byte, prints a line for each damaged file or disagreement between shards and index, and exits 2 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cola_dist.command import run_command
from cola_dist.data.shards import lint
from cola_dist.errors import UserError


def main(argv: Sequence[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser(prog="jobs/data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["lint"])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    problems = [f"{folder}: {problem}" for folder in args.folders for problem in lint(folder)]
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} problem(s) in {len(args.folders)} folder(s), listed above: pack what they name again")
    return {"status": "clean", "folders": args.folders}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""Did a change of the code leave the loss as it was? Compares two runs step by step: the clips that they saw, and the loss.

    python tests/bench/loss_compare.py RUN_A RUN_B [--tolerance 0]

Make one run with each version, with the same options and seed. Prints one JSON line last; exit code 1 where clips differ or losses by more than the
tolerance, relative to run A's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cola_dist.train.trace import read_trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, metavar="RUN")
    parser.add_argument("--tolerance", type=float, default=0.0)
    asked = parser.parse_args()
    before, after = ({line.step: line for line in read_trace(run)} for run in asked.runs)
    steps = sorted(before.keys() & after.keys())
    if not steps:
        parser.error(f"the runs have no step in common: {asked.runs[0]} has {len(before)} steps, {asked.runs[1]} has {len(after)}")
    clips = [step for step in steps if before[step].ids != after[step].ids]
    off = {step: abs(after[step].loss - before[step].loss) / max(abs(before[step].loss), 1e-12) for step in steps}
    apart = [step for step in steps if not off[step] <= asked.tolerance]
    found = {"steps": len(steps), "only_in_one": len(before.keys() ^ after.keys()), "other_clips_from": min(clips, default=None)}
    found |= {
        "other_loss_from": min(apart, default=None),
        "largest_relative_difference": max(off.values()),
        "same": not clips and not apart,
    }
    print(json.dumps(found))
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())

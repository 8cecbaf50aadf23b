"""Every point of the study beside one of them: means over seeds of the raw results, and paired t-tests on common seeds, not corrected: leads.

    python tests/bench/study/points.py [FOLDER ...] [--domain square] [--against cola]

FOLDER is a sweep, or raw results (those beside this file by default). A point is an arm with its settings. The tests that count,
corrected over all pairs, are in tables.md. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from rich.console import Console
from rich.table import Table

from cola_dist.evaluation.statistics import bootstrap_interval, paired_test
from cola_dist.report.study import read_study
from cola_dist.report.trials import Trial

METRICS = ("flow_loss", "sensitivity_gap", "perplexity", "delta_psnr", "probe_r2")


def point(trial: Trial) -> str:
    """An arm with its settings."""
    return " ".join([trial.arm, *(f"{name}={value}" for name, value in trial.settings)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=[str(Path(__file__).parent)])
    parser.add_argument("--domain", default="square")
    parser.add_argument("--against", default="cola")
    asked = parser.parse_args()
    points: dict[str, dict[int, Trial]] = {}
    for trial in read_study(asked.folders).finished:
        if trial.domain == asked.domain:
            points.setdefault(point(trial), {})[trial.seed] = trial
    if asked.against not in points:
        parser.error(f"no point {asked.against!r} in {asked.domain}; there are: {', '.join(points) or 'none'}")
    table = Table("point", "seeds", "collapsed", *METRICS, title=f"{asked.domain}: mean [95 %], p against {asked.against}")
    found: dict[str, dict[str, object]] = {}
    for name, trials in points.items():
        found[name] = {"seeds": len(trials), "collapsed": sum(trial.verdict == "collapsed" for trial in trials.values())}
        cells = [name, *map(str, found[name].values())]
        for metric in METRICS:
            values = {seed: trial.value(metric) for seed, trial in trials.items() if math.isfinite(trial.value(metric))}
            base = {seed: trial.value(metric) for seed, trial in points[asked.against].items()}
            common = sorted(seed for seed in values.keys() & base.keys() if math.isfinite(base[seed]))
            mean = bootstrap_interval(list(values.values())) if values else None
            test = name != asked.against and len(common) > 1
            p = paired_test({s: values[s] for s in common}, {s: base[s] for s in common}, "t").p if test else None
            found[name][metric] = {"mean": mean.mean if mean else None, "p": p}
            cells.append((f"{mean.mean:.4g} [{mean.low:.3g}, {mean.high:.3g}]" if mean else "–") + (f" p={p:.2g}" if p is not None else ""))
        table.add_row(*cells)
    Console(width=190, stderr=True).print(table)
    print(json.dumps({"domain": asked.domain, "against": asked.against, "points": found}))


if __name__ == "__main__":
    main()

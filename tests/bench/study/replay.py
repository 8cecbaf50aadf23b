"""What ending trials early would have saved, and whether it would have found the same: a grid that was run whole is run again from its records.

    python tests/bench/study/replay.py SWEEP [--metric flow_loss --mode min] [--orders 200] [--slots 2] [--reduction 3]

Each replay lets the trials begin in another order, as many at once as there are slots; evaluations come in when the records say they did, and the
sweep's own rules (`cola_dist.train.sweep.rules`) end trials. Compute is accelerator-seconds of all trials. What is found is the arm, or point, of
the best trial that was left to finish; "as good" means that a paired t-test over the grid's seeds does not put the grid's best before it (p < 0.05).
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from cola_dist.evaluation.statistics import paired_test
from cola_dist.report.study import read_study
from cola_dist.report.trials import Trial
from cola_dist.train.sweep.drive import seen
from cola_dist.train.sweep.folder import open_sweep
from cola_dist.train.sweep.rules import Judge
from cola_dist.train.sweep.space import Asha, Collapse, Space


def replay(trials: list[Trial], space: Space, budget: float, slots: int) -> tuple[float, list[Trial]]:
    """(accelerator-seconds, trials left to finish) of the trials in this order under the space's rules."""
    ended: set[str] = set()
    judge = Judge(space, budget, lambda id, why: ended.add(id))
    waiting, spent, finished, turn = iter(trials), 0.0, [], itertools.count()
    events: list[tuple[float, int, float, int, Trial]] = []

    def begin(now: float) -> None:
        if (trial := next(waiting, None)) is not None:
            judge.on_trial_add(None, SimpleNamespace(trial_id=trial.id))
            heapq.heappush(events, (now + trial.looks[0].spent_seconds, next(turn), now, 0, trial))

    for _ in range(slots):
        begin(0.0)
    while events:
        now, _, began, index, trial = heapq.heappop(events)
        look, tune_trial = trial.looks[index], SimpleNamespace(trial_id=trial.id)
        result = seen(trial.id, asdict(look))
        judge.on_trial_result(None, tune_trial, result)
        if trial.id not in ended and index + 1 < len(trial.looks):
            heapq.heappush(events, (began + trial.looks[index + 1].spent_seconds, next(turn), began, index + 1, trial))
            continue
        spent += look.spent_seconds
        if trial.id not in ended:
            finished.append(trial)
            judge.on_trial_complete(None, tune_trial, result)
        begin(now)
    return spent, finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("--metric", default="flow_loss")
    parser.add_argument("--mode", choices=("min", "max"), default="min")
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--reduction", type=float, default=3.0)
    asked = parser.parse_args()
    plan = open_sweep(asked.sweep, "").plan
    space = replace(plan.space, metric=asked.metric, mode=asked.mode)
    trials = read_study([asked.sweep]).finished
    better = 1 if space.mode == "min" else -1
    points: dict[str, dict[int, float]] = {}
    for trial in trials:
        points.setdefault(_point(trial), {})[trial.seed] = better * trial.value(space.metric)
    means = {point: statistics.fmean(values.values()) for point, values in points.items()}
    best = min(means, key=lambda point: means[point])
    as_good = {point for point in points if point == best or paired_test(points[point], points[best], "t").p >= 0.05}
    whole = sum(trial.looks[-1].spent_seconds for trial in trials)
    found: dict[str, Any] = {
        "metric": space.metric,
        "trials": len(trials),
        "means": {point: better * mean for point, mean in means.items()},
        "best": best,
        "as_good": sorted(as_good),
    }
    rules = {
        "asha": (Asha(reduction=asked.reduction), None),
        "collapse": (None, Collapse()),
        "both": (Asha(reduction=asked.reduction), Collapse()),
    }
    for name, (asha, collapse) in rules.items():
        found[name] = _many(trials, replace(space, asha=asha, collapse=collapse), plan.budget_seconds, asked, whole, best, as_good)
    print(json.dumps(found))


def _many(
    trials: list[Trial], space: Space, budget: float, asked: argparse.Namespace, whole: float, best: str, as_good: set[str]
) -> dict[str, Any]:
    shares, hits, good = [], 0, 0
    for number in range(asked.orders):
        order = random.Random(number).sample(trials, len(trials))
        spent, finished = replay(order, space, budget, asked.slots)
        pick = min if space.mode == "min" else max
        chosen = _point(pick(finished, key=lambda trial: trial.value(space.metric))) if finished else ""
        shares.append(spent / whole)
        hits += chosen == best
        good += chosen in as_good
    low, high = sorted(shares)[int(0.025 * len(shares))], sorted(shares)[int(0.975 * len(shares)) - 1]
    return {
        "compute_share": round(statistics.fmean(shares), 3),
        "compute_share_95": [round(low, 3), round(high, 3)],
        "found_best": round(hits / asked.orders, 3),
        "found_as_good": round(good / asked.orders, 3),
    }


def _point(trial: Trial) -> str:
    return ", ".join([trial.arm, *(f"{name} {value}" for name, value in trial.settings)])


if __name__ == "__main__":
    main()

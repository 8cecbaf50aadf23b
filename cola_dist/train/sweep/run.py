"""A sweep from its plan to its end: cluster, trials, MLflow's parent run, figures, summary."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from cola_dist import storage, tracking
from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.methods import build_method
from cola_dist.train.job import preflight
from cola_dist.train.launch import connect, demand
from cola_dist.train.observer import to_clips
from cola_dist.train.session import open_tracker, spool_folder
from cola_dist.train.sweep.desk import Desk
from cola_dist.train.sweep.figures import heat_maps, parallel_coordinates
from cola_dist.train.sweep.folder import Sweep
from cola_dist.train.sweep.ledger import FAILED, Ledger, read_ledger
from cola_dist.train.sweep.plan import Plan, Trial

_DELIVERY_S = 30.0
_PARENT_S = 15.0
_PASSES, _LONGEST_S = 8, 10.0
_OVERRATED = 4.0
"""A pass over a few clips here may take so many times what a step takes for them in training."""


def try_out(plan: Plan) -> tuple[list[Trial], RunConfig]:
    """Check every trial, and open data and models of each domain. Returns the trials (of an Optuna search examples), and the
    configuration that takes the most of a cluster. Raises ``UserError``."""
    trials = plan.check()
    firsts = {trial.domain: trial for trial in reversed(trials)}
    configs = [plan.config(trial) for trial in firsts.values()]
    for trial, config in zip(firsts.values(), configs, strict=True):
        preflight(config, storage.join(plan.output, trial.id))
        _check_budget(config)
    return trials, max(configs, key=lambda config: demand(config)[::-1])


def _check_budget(config: RunConfig) -> None:
    """Raises ``UserError`` if the budget cannot last to the first evaluation, as far as this machine's processors can tell."""
    if not config.train.budget_seconds or config.train.gpus:
        return
    reader = open_reader(config.data, config.train.seed, "train", config.optim.global_batch)
    method, count = build_method(config, bf16=False), min(8, config.optim.global_batch)
    clips = to_clips(reader.read_many(range(count)))
    took, began = math.inf, time.monotonic()
    for _ in range(_PASSES):  # the first ones also set things up, each a little
        before = time.process_time()
        method(clips, 0).loss.backward()
        took = min(took, time.process_time() - before)
        if time.monotonic() - began > _LONGEST_S:
            break
    # Larger batches take less per clip, and warm-up trains only a part.
    least = config.diagnostics.every * took * config.optim.global_batch / count / _OVERRATED
    if config.train.budget_seconds < least:
        raise UserError(
            f"a budget of {config.train.budget_seconds:g} s is too small for one evaluation: {config.diagnostics.every} steps to the first take "
            f"{least:.2g} s or more: raise --budget, or lower diagnostics.every"
        )


def run(sweep: Sweep, base: RunConfig, concurrent: int | None, debug: bool) -> dict[str, Any]:
    """Run the trials that have not ended yet, at most ``concurrent`` at once, by default as many as the cluster has room for. Returns a summary.

    ``base`` is the configuration that takes the most of the cluster. Raises ``UserError`` for what the user must mend.
    """
    with sweep.held():
        ledger = read_ledger(sweep.path("trials.json"))
        sweep.write()
        tracker = open_tracker(base, sweep.uri)
        tracker.log_params({key: str(value) for key, value in sweep.about.items() if key != "mlflow_parent"})
        tracker.set_tags({"git.commit": str(sweep.about["commit"])})
        tracker.log_text(storage.read_bytes(sweep.path("space.yaml")).decode(), "space.yaml")
        try:
            desk = Desk(sweep, ledger, tracker)
            if desk.left:
                # A trial has a dozen processes of which most wait; Ray warns, on stdout, of more than four times this number.
                os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(os.cpu_count() or 1, 4 * (concurrent or 1))))
                connect(base, debug, concurrent or 1)
                _find_parent(sweep, base, _PARENT_S)
                desk.run(concurrent or _room(base), base.train.max_restarts)
                ray.shutdown()  # what it still says must not come after the result
            return _close(sweep, base, desk)
        except BaseException:
            tracker.finish("FAILED", wait=5.0)
            raise


def _room(config: RunConfig) -> int:
    """How many runs such as ``config`` the cluster has room for: with more, each might hold what another waits for."""
    have, (cpus, gpus) = ray.cluster_resources(), demand(config)
    by_cpus = int(have.get("CPU", 0) / cpus + 1e-6)
    return max(1, min(by_cpus, int(have.get("GPU", 0) // gpus)) if gpus else by_cpus)


def _find_parent(sweep: Sweep, base: RunConfig, wait: float) -> None:
    """Write down MLflow's id of the sweep's run, once that is there."""
    deadline = time.monotonic() + wait
    while (found := tracking.run_id(spool_folder(base, sweep.uri))) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    sweep.about["mlflow_parent"] = found
    sweep.write()


def _close(sweep: Sweep, base: RunConfig, desk: Desk) -> dict[str, Any]:
    ledger, tracker, space = desk.ledger, desk.tracker, sweep.plan.space
    ledger.write()
    entries = list(ledger.entries.values())
    status = "interrupted" if desk.interrupted else FAILED if entries and len(ledger.of(FAILED)) == len(entries) else "finished"
    tracker.log_text(storage.read_bytes(sweep.path("trials.json")).decode(), "trials.json")
    figures = []
    for name, figure in (("parallel-coordinates.png", parallel_coordinates(space, entries)), ("heat-maps.png", heat_maps(space, entries))):
        if figure is not None:
            tracker.log_file(figure, name)
            storage.write_bytes(sweep.path(name), figure)
            figures.append(name)
    ended = {"finished": "FINISHED", "interrupted": "KILLED", FAILED: "FAILED"}[status]
    tracked = tracker.finish(ended, _DELIVERY_S)  # type: ignore[arg-type]
    below = storage.local_path(sweep.plan.output)
    # Where one cannot be delivered MLflow is away, and the others would wait as long.
    tracked = tracked and all(tracking.deliver(spool, _DELIVERY_S) for spool in (tracking.waiting(below) if below is not None else []))
    _find_parent(sweep, base, 0.0)
    Console(width=160).print(_entries_table(sweep, ledger))
    return _summary(sweep, ledger, status) | {"figures": figures, "tracked": tracked}


def trials_table(sweep: Sweep, trials: Sequence[Trial]) -> Table:
    """The trials that a sweep would run."""
    space = sweep.plan.space
    titles = ["trial", "arm", "domain", "seed", *space.fields]
    return _table(
        f"{sweep.plan.total} trials of {space.name}", titles, [[t.id, t.arm, t.domain, t.seed, *t.params.values()] for t in trials]
    )


def _entries_table(sweep: Sweep, ledger: Ledger) -> Table:
    space = sweep.plan.space
    rows = [
        [e.id, e.arm, e.domain, e.seed, *e.params.values(), e.status, e.value, e.steps, round(e.spent_seconds, 1), e.why]
        for e in ledger.entries.values()
    ]
    titles = ["trial", "arm", "domain", "seed", *space.fields, "status", space.metric, "steps", "seconds", "why"]
    return _table(f"trials of {space.name}", titles, rows)


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title)
    for name in titles:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str("" if cell is None else cell) for cell in row))
    return table


def _summary(sweep: Sweep, ledger: Ledger, status: str) -> dict[str, Any]:
    best, failed = ledger.best(sweep.plan.space.mode), ledger.of(FAILED)
    summary: dict[str, Any] = {
        "status": status,
        "sweep": sweep.uri,
        "trials": ledger.count(),
        "metric": sweep.plan.space.metric,
        "best": None if best is None else {name: value for name, value in asdict(best).items() if name not in ("status", "why", "number")},
        "failed": [{"id": entry.id, "why": entry.why} for entry in failed],
        "spent_seconds": round(sum(entry.spent_seconds for entry in ledger.entries.values()), 2),
        "mlflow_parent": sweep.about["mlflow_parent"],
    }
    if status == FAILED:
        reasons = "; ".join(f"{entry.id}: {entry.why}" for entry in failed)
        summary["error"] = f"all {len(failed)} trials failed: {reasons}"
    return summary

"""One trial: a driver function under Ray Tune that launches a run of Ray Train and passes on what it sees at each evaluation."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from ray import tune

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.errors import UserError
from cola_dist.settings import nearest
from cola_dist.train.launch import Place, Training, prepare
from cola_dist.train.sweep.ledger import FAILED, FINISHED
from cola_dist.train.sweep.plan import Plan, Trial

_POLL_S = 2.0


def drive(suggested: Mapping[str, Any], plan: Plan, cpus: float) -> None:
    """Train the trial that is in ``suggested["trial"]`` as JSON, or go on with it, on at most ``cpus`` CPUs.

    Reports to Tune where the run hears that it should end (``board``), then each evaluation (``id``, ``step``, ``spent_seconds``, ``verdict``, its
    indicators), those of before a restart first, and at last the outcome (``status``, ``why``). What goes wrong with the run is an outcome too;
    what is raised here is for Tune to try again.
    """
    trial = Trial(**json.loads(suggested["trial"]))
    try:
        outcome = _train(plan, trial, cpus)
    except UserError as error:
        outcome = {"status": FAILED, "why": str(error)}
    except Exception as error:  # whatever ended this run leaves the other trials alone
        outcome = {"status": FAILED, "why": _last_line(error)}
    tune.report({"id": trial.id, **outcome})


def read_looks(run: str, heard: set[str]) -> Iterator[dict[str, Any]]:
    """The evaluations of a run whose files are not in ``heard`` yet, oldest first; adds them there."""
    folder = storage.join(run, "looks")
    for name in storage.list_files(folder):
        if name.endswith(".json") and name not in heard:
            heard.add(name)
            yield storage.read_json(storage.join(folder, name))


def seen(id: str, look: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune hears of an evaluation of the trial ``id``."""
    return {**look["indicators"], "id": id, **{name: look[name] for name in ("step", "spent_seconds", "verdict")}}


def _train(plan: Plan, trial: Trial, cpus: float) -> dict[str, Any]:
    config, run = plan.config(trial), storage.join(plan.output, trial.id)
    heard: set[str] = set()
    result = _ended(run)
    if result is None:
        # A driver that is begun again must not meet the board of the one that was lost.
        board = f"{trial.id}-{secrets.token_hex(3)}"
        training = Training(config, run, prepare(config, run), Place(cpus, board, plan.sweep))
        tune.report({"id": trial.id, "board": board})
        try:
            while training.running(_POLL_S):
                _pass_on(trial, run, plan.space.metric, heard)
        except UserError:
            training.ask_to_stop()
            while training.running(_POLL_S):
                pass
            raise
        result = training.result()
    _pass_on(trial, run, plan.space.metric, heard)
    return _outcome(config, result)


def _ended(run: str) -> dict[str, Any] | None:
    """The result of a run that had come to its end before the sweep could write that down."""
    try:
        result: dict[str, Any] = storage.read_json(storage.join(run, "result.json"))
    except FileNotFoundError:
        return None
    return result if result["status"] == FINISHED else None


def _pass_on(trial: Trial, run: str, metric: str, heard: set[str]) -> None:
    """Raises ``UserError`` where an evaluation with a name, which measures everything, has no such metric."""
    for look in read_looks(run, heard):
        tune.report(seen(trial.id, look))
        if look["name"] and metric not in look["indicators"]:
            names = ", ".join(sorted(look["indicators"]))
            raise UserError(f"no evaluation logs the metric {metric!r}{nearest(metric, look['indicators'])}; there are: {names}")


def _outcome(config: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    status, why, steps = result["status"], result["error"], result["steps"]
    steering = result["record"]["steering"]
    spent, budget = steering["spent_seconds"], config.train.budget_seconds
    if status == FINISHED and budget and steps < config.diagnostics.every:
        status = FAILED
        why = (
            f"the budget of {budget:g} s was spent after {steps} steps, before the first evaluation at step {config.diagnostics.every}: "
            "raise --budget, or lower diagnostics.every"
        )
    elif status == FINISHED:
        why = steering["course"][-1]["why"]
        if budget and spent < budget and not why:
            why = f"all {steps} steps are done after {spent:.1f} of {budget:g} s: for equal compute raise joint.steps"
    return {"status": status, "why": why, "step": steps, "spent_seconds": spent}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"

"""The driver's side of a sweep's trials under Ray Tune: hands them out, hears of them, has them end, and writes down how they went."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from cola_dist import storage
from cola_dist.tracking import Tracker
from cola_dist.train.launch import Interrupt
from cola_dist.train.sweep.drive import drive, read_looks, seen
from cola_dist.train.sweep.folder import Sweep
from cola_dist.train.sweep.ledger import FAILED, FINISHED, STOPPED, Entry, Ledger
from cola_dist.train.sweep.plan import Trial
from cola_dist.train.sweep.rules import Judge
from cola_dist.train.sweep.search import Queue

_ASK_EVERY_S = 1.0
# A trial's driver waits for its run, whose workers and readers take their own. Tune wants it to take something; of CPUs none may go missing.
_DRIVER = {"cpu": 0, "memory": 1_000_000}
_TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Evaluations between phases' ends lack some metrics; a trial that never logs the one that is asked for fails by itself.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


class Desk:
    """Everything that happens in the driver while trials run."""

    def __init__(self, sweep: Sweep, ledger: Ledger, tracker: Tracker) -> None:
        """``ledger`` may hold trials of before the sweep was resumed."""
        self.interrupted = False
        self.sweep, self.ledger, self.tracker = sweep, ledger, tracker
        self.queue = Queue(sweep.plan, list(ledger.entries.values()))
        self._judge = Judge(sweep.plan.space, sweep.plan.budget_seconds, self._end)
        self._ending: dict[str, str] = {}
        self._boards: dict[str, str] = {}
        self._asked_at = 0.0
        for entry in ledger.entries.values():
            if entry.ended:
                self._judge.recall(entry.id, [seen(entry.id, look) for look in read_looks(entry.run, set())])

    @property
    def left(self) -> int:
        """How many trials have not ended."""
        return self.sweep.plan.total - sum(entry.ended for entry in self.ledger.entries.values())

    def run(self, concurrent: int, retries: int) -> None:
        """Run the trials that are left, of which there are some, ``concurrent`` at once.

        A trial whose driver is lost is begun again up to ``retries`` times. SIGTERM and Ctrl-C have the running ones write a checkpoint; they stay
        ``running``.
        """
        for name, value in _TUNE_SETTINGS.items():
            os.environ.setdefault(name, value)
        share = ray.cluster_resources().get("CPU", 0) / concurrent
        with Interrupt(self._interrupt):
            tune.run(
                tune.with_resources(tune.with_parameters(drive, plan=self.sweep.plan, cpus=share), _DRIVER),
                name=self.sweep.plan.sweep,
                # Tune keeps only its own bookkeeping there: a sweep is resumed from its own folder.
                storage_path=str(Path(tempfile.gettempdir()) / "cola-dist" / "ray-tune"),
                num_samples=self.left,
                search_alg=_Supply(self),
                scheduler=self._judge,
                callbacks=[_Clerk(self)],
                max_concurrent_trials=concurrent,
                max_failures=retries,
                trial_dirname_creator=lambda trial: trial.trial_id,
                raise_on_failed_trial=False,
                verbose=0,
            )

    def next(self) -> Trial | None:
        """The next trial to run, which is written down as running; none when there is none or the sweep is to end."""
        trial = None if self.interrupted else self.queue.next()
        if trial is not None:
            self.ledger.begin(trial, storage.join(self.sweep.plan.output, trial.id))
            _say(f"{trial.id} begins ({trial.number + 1} of {self.sweep.plan.total}): {_shown(trial.params)}")
        return trial

    def hear(self, result: Mapping[str, Any]) -> None:
        """What the driver of a trial reports."""
        id, metric = result["id"], self.sweep.plan.space.metric
        if "board" in result:
            self._boards[id] = result["board"]
        if "step" in result:
            self.ledger.hear(id, result["step"], result["spent_seconds"], result.get(metric))
        if "status" not in result:
            return
        status, why = result["status"], result["why"]
        if status not in (FINISHED, FAILED):  # it was asked to end
            if id not in self._ending:
                return  # the whole sweep was
            status, why = STOPPED, self._ending[id]
        self.close(id, status, why)

    def close(self, id: str, status: str, why: str) -> None:
        """A trial has come to its end."""
        if self.ledger.entries[id].ended:
            return
        entry = self.ledger.end(id, status, why)
        self.queue.tell(entry)
        ended = self.sweep.plan.total - self.left
        counted = {f"trials/{name}": float(count) for name, count in self.ledger.count().items()}
        best = self.ledger.best(self.sweep.plan.space.mode)
        found = {f"best/{self.sweep.plan.space.metric}": best.value} if best is not None and best.value is not None else {}
        self.tracker.log_metrics(counted | found, ended)
        _say(f"{id} {status}: {_went(entry, self.sweep.plan.space.metric)}")

    def ask(self) -> None:
        """Ask the trials that are to end, through their boards: each writes a checkpoint and its result first. Cheap enough for every moment."""
        if time.monotonic() - self._asked_at < _ASK_EVERY_S:
            return
        self._asked_at = time.monotonic()
        for id, board in self._boards.items():
            if not self.ledger.entries[id].ended and (self.interrupted or id in self._ending):
                with contextlib.suppress(ValueError):  # there is no such actor any more
                    ray.get_actor(board).ask_to_stop.remote()

    def _end(self, id: str, why: str) -> None:
        self._ending.setdefault(id, why)

    def _interrupt(self) -> None:
        self.interrupted = True


class _Supply(Searcher):  # type: ignore[misc]
    """Tune's view of the trials that are handed out."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def suggest(self, trial_id: str) -> Any:
        trial = self._desk.next()
        return Searcher.FINISHED if trial is None else {"trial": json.dumps(asdict(trial))}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """What is to be kept is in the ledger."""


class _Clerk(tune.Callback):  # type: ignore[misc]
    """What Tune says of trials."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        self._desk.hear(result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        self._desk.close(json.loads(trial.config["trial"])["id"], FAILED, f"its driver was lost: {reason}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._desk.ask()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(params: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()) or "as it is"
    )


def _went(entry: Entry, metric: str) -> str:
    value = "" if entry.value is None else f"{metric} {entry.value:.4g}, "
    return f"{value}{entry.steps} steps, {entry.spent_seconds:.1f} s" + (f"; {entry.why}" if entry.why else "")

"""What ends a trial early: it is dead, or at equal compute it is not among the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.stopper import Stopper

from cola_dist.train.sweep.space import Asha, Collapse, Space

COLLAPSE_SHARE = 0.4
"""Share of the budget that a trial gets before it may be called dead."""
_UNBOUNDED_RUNGS = 12


def collapsed(looks: Sequence[Mapping[str, Any]], after_looks: int, from_seconds: float) -> str:
    """Why a trial with these evaluations (``step``, ``spent_seconds``, ``verdict``, oldest first) is dead; empty while it is not."""
    newest = list(looks)[-after_looks:]
    if len(newest) < after_looks or newest[-1]["spent_seconds"] < from_seconds:
        return ""
    if any(look["verdict"] != "collapsed" for look in newest):
        return ""
    return f"collapsed at {after_looks} evaluations in a row, last at step {newest[-1]['step']} after {newest[-1]['spent_seconds']:.1f} s"


class CollapseStopper(Stopper):  # type: ignore[misc]
    """Ends trials that are dead. ``why`` has the reason of each, by Tune's trial id."""

    def __init__(self, rule: Collapse, budget_seconds: float) -> None:
        self.after_looks = rule.after_looks
        self.from_seconds = COLLAPSE_SHARE * budget_seconds if rule.from_seconds is None else rule.from_seconds
        self.why: dict[str, str] = {}
        self._looks: dict[str, list[Mapping[str, Any]]] = {}

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Hear an evaluation; whether the trial is dead."""
        if "verdict" not in result:
            return False
        self._looks.setdefault(trial_id, []).append(result)
        self.why[trial_id] = collapsed(self._looks[trial_id], self.after_looks, self.from_seconds)
        return bool(self.why[trial_id])

    def stop_all(self) -> bool:
        """Never: the other trials go on."""
        return False


def halving(rule: Asha, space: Space, budget_seconds: float) -> ASHAScheduler:
    """Asynchronous successive halving on accelerator-seconds."""
    grace = budget_seconds / rule.reduction**2 if rule.grace_seconds is None else rule.grace_seconds
    longest = budget_seconds or grace * rule.reduction**_UNBOUNDED_RUNGS
    return ASHAScheduler("spent_seconds", space.metric, space.mode, longest, grace, rule.reduction, stop_last_trials=False)


class Judge(FIFOScheduler):  # type: ignore[misc]
    """Hears every evaluation of every trial and has those that should go no further end.

    Tune itself would kill such a trial's processes. Asked instead, its run writes a checkpoint and its result, and then its driver returns.
    """

    def __init__(self, space: Space, budget_seconds: float, end: Callable[[str, str], None]) -> None:
        """``end(trial's id, why)`` asks a trial to end; it may be called more than once for one."""
        super().__init__()
        self._space, self._end = space, end
        self._stopper = CollapseStopper(space.collapse, budget_seconds) if space.collapse else None
        self._halving = halving(space.asha, space, budget_seconds) if space.asha else None

    def recall(self, id: str, looks: Sequence[Mapping[str, Any]]) -> None:
        """Hear the evaluations of a trial that ended before the sweep was resumed, so that others are compared with it."""
        if self._halving is not None:
            trial = SimpleNamespace(trial_id=id)
            self._halving.on_trial_add(None, trial)
            for look in looks:
                self._halving.on_trial_result(None, trial, dict(look))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins."""
        if self._halving is not None:
            self._halving.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """An evaluation, or the outcome of a trial."""
        if "status" in result:
            return str(TrialScheduler.CONTINUE)
        why = ""
        if self._halving is not None and self._halving.on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            reached = f"{self._space.metric} {result[self._space.metric]:.4g} after {result['spent_seconds']:.1f} s"
            why = f"halved at step {result['step']}: {reached} is not among the best at equal compute"
        if self._stopper is not None and self._stopper(trial.trial_id, result):
            why = self._stopper.why[trial.trial_id]
        if why:
            self._end(result["id"], why)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """A trial's driver has returned."""
        if self._halving is not None:
            self._halving.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """A trial is taken back before it began."""
        if self._halving is not None:
            self._halving.on_trial_remove(tune_controller, trial)

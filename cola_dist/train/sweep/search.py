"""Which trial comes next: the next of a list, or what Optuna suggests after those that have ended."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import optuna

from cola_dist.train.sweep.ledger import FINISHED, STOPPED, Entry
from cola_dist.train.sweep.plan import Plan, Point, Trial
from cola_dist.train.sweep.space import OPTUNA, Range, Scalar, Space

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Queue:
    """The trials of a sweep that are still to be run, in order of their numbers; after a resume those that were running come first."""

    def __init__(self, plan: Plan, entries: Sequence[Entry]) -> None:
        known = {entry.number: entry for entry in entries}
        ended = {number for number, entry in known.items() if entry.ended}
        self._suggestions = Suggestions(plan, known) if plan.space.search == OPTUNA else None
        trials = iter(plan.trials()) if self._suggestions is None else self._suggestions.trials()
        self._trials = (trial for trial in trials if trial.number not in ended)

    def next(self) -> Trial | None:
        """The next trial to run; none when all have been handed out."""
        return next(self._trials, None)

    def tell(self, entry: Entry) -> None:
        """How a trial has ended, for what is suggested from now on."""
        if self._suggestions is not None:
            self._suggestions.tell(entry)


class Suggestions:
    """A tree-structured Parzen estimator (Optuna's TPE) for each arm and domain. A point is told the mean of its seeds, once all have ended."""

    def __init__(self, plan: Plan, known: Mapping[int, Entry]) -> None:
        """``known``: trials of before, by number; their points are suggested again, and those that have ended are told at once."""
        self._plan, self._slots = plan, list(plan.slots(plan.space.samples))
        self._studies: dict[tuple[str, str], optuna.Study] = {}
        self._points: dict[tuple[str, str, int], tuple[optuna.Trial, Point]] = {}
        self._ended: dict[tuple[str, str, int], list[Entry]] = {}
        restored = {self._place(number): entry.params for number, entry in known.items()}
        for arm, domain in {place[:2]: None for place in map(self._place, range(len(self._slots)))}:
            # Else the draws that come next would repeat the first ones.
            seed = sum(place[:2] == (arm, domain) for place in restored)
            self._studies[arm, domain] = _study(plan.space, seed)
        for place, point in restored.items():
            self._studies[place[:2]].enqueue_trial(dict(point))
            self._ask(place)
        for entry in known.values():
            if entry.ended:
                self.tell(entry)

    def trials(self) -> Iterator[Trial]:
        """Every trial by number; a point is asked for when its first trial is."""
        for number, (arm, domain, seed, _) in enumerate(self._slots):
            place = self._place(number)
            point = self._points[place][1] if place in self._points else self._ask(place)
            yield self._plan.trial(number, arm, domain, seed, point)

    def tell(self, entry: Entry) -> None:
        """How a trial has ended."""
        place = self._place(entry.number)
        ended = self._ended.setdefault(place, [])
        ended.append(entry)
        if len(ended) < len(self._plan.space.seeds):
            return
        study, asked = self._studies[place[:2]], self._points[place][0]
        for status, state in ((FINISHED, None), (STOPPED, optuna.trial.TrialState.PRUNED)):
            values = [one.value for one in ended if one.status == status and one.value is not None]
            if values:
                mean = sum(values) / len(values)
                asked.report(mean, max(one.steps for one in ended))
                study.tell(asked, None if state else mean, state)
                return
        study.tell(asked, state=optuna.trial.TrialState.FAIL)

    def _place(self, number: int) -> tuple[str, str, int]:
        arm, domain, _, index = self._slots[number]
        return arm, domain, index

    def _ask(self, place: tuple[str, str, int]) -> Point:
        asked = self._studies[place[:2]].ask(_distributions(self._plan.space))
        self._points[place] = asked, dict(asked.params)
        return asked.params


def _study(space: Space, seed: int) -> optuna.Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Points that still run count as bad ones, so that several at once do not all try the same place.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, min(10, space.samples // 3)), constant_liar=True)
    return optuna.create_study(direction="minimize" if space.mode == "min" else "maximize", sampler=sampler)


def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    return {name: _distribution(values) for name, values in space.fields.items()}


def _distribution(values: tuple[Scalar, ...] | Range) -> optuna.distributions.BaseDistribution:
    if not isinstance(values, Range):
        return optuna.distributions.CategoricalDistribution(values)
    if values.kind == "int_uniform":
        return optuna.distributions.IntDistribution(int(values.low), int(values.high))
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.kind == "log_uniform")

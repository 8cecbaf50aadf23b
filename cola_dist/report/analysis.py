"""A study seen as arms: which trials stand for an arm, how arms compare, how many of their seeds collapsed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from cola_dist.errors import UserError
from cola_dist.evaluation.shares import Share, wilson
from cola_dist.evaluation.statistics import ArmTable, Interval, bootstrap_interval, compare_arms, verdict_line, winner
from cola_dist.report.groups import groups_of
from cola_dist.report.metrics import Metric
from cola_dist.report.trials import Study, Trial


@dataclass(frozen=True)
class Comparison:
    """The arms of one domain under one metric."""

    domain: str
    metric: Metric
    table: ArmTable | None
    """None where the arms cannot be compared."""
    reason: str
    """Why there is no table; empty where there is one."""
    outside: Mapping[str, Interval]
    """Arms that no test could include, with what is known of them."""
    diverged: tuple[str, ...]
    """``ARM seed N`` of finished runs whose value is not finite. No arm is judged on them."""

    @property
    def winner(self) -> str | None:
        """The arm that the tests support as best, if any."""
        return winner(self.table) if self.table else None

    @property
    def verdict(self) -> str:
        """One sentence: who wins, which arms cannot be told apart, or why nothing was compared."""
        return verdict_line(self.table) if self.table else self.reason


class Analysis:
    """What the sections of a page ask of a study. Domains and arms (of `groups_of`) stand in order of appearance, the reference first."""

    def __init__(self, study: Study, reference: str) -> None:
        """Raises ``UserError`` where ``reference`` is no arm of the study."""
        self.study = study
        known = [*study.trials, *(trial for trial, _ in study.damaged)]
        self.groups = groups_of(known)
        # An arm that was swept is named by its points; its own name means the first of them.
        points = {group.arm: name for name, group in reversed(self.groups.items())}
        if reference not in {*self.groups, *points}:
            near = difflib.get_close_matches(reference, [*self.groups, *points], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"give --reference one of {', '.join(self.groups)}"
            raise UserError(f"no arm {reference!r} in this study: {hint}")
        self.reference = reference if reference in self.groups else points[reference]
        self.arms = sorted(self.groups, key=lambda arm: arm != self.reference)
        self.domains = list(dict.fromkeys(trial.domain for trial in known))
        self._compared: dict[tuple[str, str], Comparison] = {}

    def all_trials(self, domain: str, arm: str) -> list[Trial]:
        """Trials that stand for an arm in a domain, whatever became of them, by seed."""
        trials = (trial for trial in self.study.trials if trial.domain == domain and self.groups[arm].holds(trial))
        return sorted(trials, key=lambda trial: trial.seed)

    def trials(self, domain: str, arm: str) -> list[Trial]:
        """Those of them that finished."""
        return [trial for trial in self.all_trials(domain, arm) if trial.status == "finished"]

    def ended(self, domain: str, arm: str) -> list[Trial]:
        """Those that came to a verdict, among them some that were stopped early."""
        return [trial for trial in self.all_trials(domain, arm) if trial.verdict]

    @property
    def variants(self) -> list[Trial]:
        """Trials with other settings than those that stand for their arm."""
        return [trial for trial in self.study.trials if not any(group.holds(trial) for group in self.groups.values())]

    def arms_in(self, domain: str) -> list[str]:
        """Arms with a finished trial in a domain."""
        return [arm for arm in self.arms if self.trials(domain, arm)]

    def median(self, domain: str, arm: str) -> Trial | None:
        """The finished trial whose final flow loss is the median of its arm's seeds (of an even number, the better middle one)."""
        ranked = sorted((t for t in self.trials(domain, arm) if math.isfinite(t.value("flow_loss"))), key=lambda t: t.value("flow_loss"))
        return ranked[(len(ranked) - 1) // 2] if ranked else None

    def values(self, domain: str, arm: str, metric: str) -> dict[int, float]:
        """Final values by seed, finite ones alone."""
        found = {trial.seed: trial.value(metric) for trial in self.trials(domain, arm)}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def collapsed(self, domain: str, arm: str) -> Share:
        """How many seeds were collapsed when they ended."""
        verdicts = [trial.verdict for trial in self.ended(domain, arm)]
        return wilson(verdicts.count("collapsed"), len(verdicts))

    def comparison(self, domain: str, metric: Metric) -> Comparison:
        """The arms of a domain under a metric: those tested that share two seeds or more, and half of all, with the reference."""
        key = (domain, metric.name)
        if key not in self._compared:
            self._compared[key] = self._compare(domain, metric)
        return self._compared[key]

    def _compare(self, domain: str, metric: Metric) -> Comparison:
        values = {arm: found for arm in self.arms if (found := self.values(domain, arm, metric.name))}
        known = values.get(self.reference, {}).keys()
        # The table rests on the seeds that all its arms share: one with a few of them would take the power from all others.
        enough = {arm: found for arm, found in values.items() if len(found.keys() & known) >= max(2, len(known) / 2)}
        alone = {arm: bootstrap_interval(list(found.values())) for arm, found in values.items() if arm not in enough}
        diverged = tuple(
            f"{trial.arm} seed {trial.seed}"
            for arm in self.arms
            for trial in self.trials(domain, arm)
            if trial.final and metric.name in trial.final.indicators and not math.isfinite(trial.value(metric.name))
        )
        table, reason = None, self._why_not(values, enough)
        if not reason:
            try:
                table = compare_arms(enough, self.reference, metric.better)
            except UserError as error:
                reason = str(error)
        if table is None:
            alone |= {arm: bootstrap_interval(list(found.values())) for arm, found in enough.items()}
        return Comparison(domain, metric, table, reason, {arm: alone[arm] for arm in self.arms if arm in alone}, diverged)

    def _why_not(self, values: Mapping[str, Mapping[int, float]], enough: Mapping[str, object]) -> str:
        if not values:
            return "not measured"
        if self.reference not in enough:
            return f"not tested: {self.reference} has fewer than two finished seeds"
        if len(enough) < 2:
            return f"not tested: no arm has two finished seeds, and half of all, in common with {self.reference}"
        return ""

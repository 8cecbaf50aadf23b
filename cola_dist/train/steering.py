"""The course of a run and the rules that may change it: the end of warm-up, the guard of joint training, the budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cola_dist.config import RunConfig
from cola_dist.diagnostics.rules import Decision, Look, guard, warmup_exit
from cola_dist.methods import Course, Phase, Span, phases

_log = logging.getLogger("cola_dist.train")


@dataclass(frozen=True)
class Ruling:
    """What a rule said after a look, as it is written down: ``act`` is ``end``, ``warmup``, ``stop``, ``log``, or empty where nothing is done."""

    step: int
    phase: str
    rule: str
    act: str
    why: str


@dataclass
class Steering:
    """Where a run stands in its phases. Every rank holds the same; rank 0 decides, because it alone has all indicators."""

    config: RunConfig
    spent_seconds: float = 0.0
    """Accelerator time of all workers so far."""
    looks: list[Look] = field(default_factory=list)
    rulings: list[Ruling] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.course = Course(phases(self.config))
        self.planned_steps = self.course.end

    def due(self, step: int) -> Span | None:
        """The span that ``step`` is to be made in; none at the end of the plan or of the budget."""
        budget = self.config.train.budget_seconds
        span = self.course.at(step)
        if span is not None and budget and self.spent_seconds >= budget:
            self.course.finish_run(step, f"the budget of {budget:g} s is spent")
            return None
        return span

    def decide(self, phase: Phase, step: int) -> Ruling | None:
        """What the rule of this phase says after the newest look; none where no rule has anything to say."""
        own = [look for look in self.looks if look.phase == phase.name]
        if phase.name == "warmup" and self.config.warmup.exit == "adaptive":
            span = next(span for span in self.course.spans if span.phase == phase)
            decision = warmup_exit(own, span.first, self.config.warmup)
            return Ruling(step, phase.name, "warmup.exit", "end" if decision.act else "", decision.why)
        decision = guard(own, self.config.joint) if phase.kind == "joint" else Decision(False, "")
        if not decision.act:
            return None
        act = self.config.joint.guard
        if act == "warmup" and self.course.returns("warmup") >= self.config.joint.guard_returns:
            act = "log"
        return Ruling(step, phase.name, "joint.guard", act, decision.why)

    def obey(self, ruling: Ruling) -> bool:
        """Write a ruling down and change the course; returns whether the phase is over."""
        self.rulings.append(ruling)
        if ruling.act:
            _log.warning("step %d, %s: %s: %s", ruling.step, ruling.rule, ruling.act, ruling.why)
        if ruling.act == "warmup":
            short = replace(self.config.warmup, steps=self.config.joint.guard_steps)
            warmup = next(phase for phase in phases(replace(self.config, warmup=short)) if phase.kind == "warmup")
            self.course.return_to(warmup, ruling.step, ruling.why)
        elif ruling.act == "stop":
            self.course.finish_run(ruling.step, ruling.why)
        elif ruling.act == "end":
            self.course.finish_phase(ruling.step, ruling.why)
        return ruling.act in ("warmup", "stop", "end")

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for a checkpoint."""
        lists = {"looks": [asdict(look) for look in self.looks], "rulings": [asdict(ruling) for ruling in self.rulings]}
        return {"course": self.course.state(), "spent_seconds": self.spent_seconds, **lists}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Take up what ``state`` gave, for a run that stands at ``step``."""
        self.course.restore(state["course"], step)
        self.spent_seconds = state["spent_seconds"]
        self.looks = [Look(**look) for look in state["looks"]]
        self.rulings = [Ruling(**ruling) for ruling in state["rulings"]]

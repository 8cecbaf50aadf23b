"""The phases of a run: planned as data, and as they came to be run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cola_dist.config import PhaseConfig, RunConfig

Objective = Literal["flow", "forward"]


@dataclass(frozen=True)
class Phase:
    """A span of steps with one set of training roles. Its end is a checkpoint boundary."""

    name: str
    """``lam``, ``warmup``, ``joint``, ``pretrain`` or ``adapt``; one that the guard returned to is ``warmup-2`` and so on."""
    trains: tuple[str, ...]
    """Roles that train; the others are frozen."""
    lr: Mapping[str, float]
    """Peak learning rate of each role in ``trains``."""
    steps: int
    """At most so many; a rule may end it earlier."""
    objective: Objective = "flow"
    """``forward``: the LAM's own forward model is all that is trained on; the generator is not asked."""

    @property
    def kind(self) -> str:
        """The name without its count."""
        return self.name.partition("-")[0]


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of ``config.method`` as planned, in order; those of 0 steps are left out.

    Co-training is ``config.lam_phase`` (the LAM with its own forward model), ``config.warmup`` with the generator frozen, then ``config.joint``.
    Pretraining reads the length and ``lr_world`` of ``config.joint`` alone, adaptation ``config.adapt`` alone. A role trains where its learning
    rate is above 0.
    """
    if config.method == "pretrain":
        planned: tuple[Phase, ...] = (Phase("pretrain", ("world",), {"world": config.joint.lr_world}, config.joint.steps),)
    elif config.method == "adapt":
        planned = (_phase("adapt", config.adapt, {"adapter": config.adapt.lr_adapter}),)
    else:
        planned = (
            Phase("lam", ("lam",), {"lam": config.lam_phase.lr_lam}, config.lam_phase.steps, "forward"),
            _phase("warmup", config.warmup),
            _phase("joint", config.joint),
        )
    return tuple(phase for phase in planned if phase.steps > 0)


def _phase(name: str, config: PhaseConfig, others: Mapping[str, float] | None = None) -> Phase:
    rates = {**(others or {}), "lam": config.lr_lam, "conditioning": config.lr_conditioning, "world": config.lr_world}
    lr = {role: rate for role, rate in rates.items() if rate > 0}
    return Phase(name, tuple(lr), lr, config.steps)


def uses_forward_model(config: RunConfig) -> bool:
    """Whether the LAM has a forward model of its own."""
    return config.method == "cotrain" and config.objective.forward_weight > 0


@dataclass(frozen=True)
class Span:
    """One phase as it is run: ``[first, end)`` in steps of the run. ``end`` is the plan until the phase has ended."""

    phase: Phase
    first: int
    end: int
    why: str = ""
    """What ended it, where that was not its plan."""


class Course:
    """Which phase each step belongs to: the plan, and the changes that rules made to it. All of it is kept in checkpoints.

    No change makes a run longer than its plan, so the clips of the plan suffice.
    """

    def __init__(self, planned: Sequence[Phase]) -> None:
        self.spans: list[Span] = []
        self._append(planned)

    def _append(self, planned: Iterable[Phase]) -> None:
        first = self.end
        for phase in planned:
            self.spans.append(Span(phase, first, first + phase.steps))
            first += phase.steps

    @property
    def end(self) -> int:
        """One past the last step, as far as is known."""
        return self.spans[-1].end if self.spans else 0

    def at(self, step: int) -> Span | None:
        """The span that ``step`` belongs to; none after the end."""
        return next((span for span in self.spans if span.first <= step < span.end), None)

    def finish_phase(self, step: int, why: str) -> None:
        """End the phase of the step before ``step`` there; what follows moves up."""
        index = self._index(step)
        rest = [span.phase for span in self.spans[index + 1 :]]
        self.spans[index:] = [replace(self.spans[index], end=step, why=why)]
        self._append(rest)

    def finish_run(self, step: int, why: str) -> None:
        """End the run before ``step``."""
        index = self._index(step)
        self.spans[index:] = [replace(self.spans[index], end=step, why=why)]

    def return_to(self, phase: Phase, step: int, why: str) -> None:
        """Interrupt the present phase at ``step`` for ``phase``, whose steps come out of what is left of it, then go on with it."""
        index = self._index(step)
        span, rest = self.spans[index], [later.phase for later in self.spans[index + 1 :]]
        left = span.end - step
        parts = [replace(phase, steps=min(phase.steps, left)), replace(span.phase, steps=left - phase.steps)]
        taken = {one.phase.name for one in self.spans}
        for number, part in enumerate(parts):
            name = next(name for count in itertools.count(2) if (name := f"{part.kind}-{count}") not in taken)
            taken.add(name)
            parts[number] = replace(part, name=name)
        self.spans[index:] = [replace(span, end=step, why=why)]
        self._append([*(part for part in parts if part.steps > 0), *rest])

    def returns(self, kind: str) -> int:
        """How often a phase of this kind was returned to."""
        return sum("-" in span.phase.name for span in self.spans if span.phase.kind == kind)

    def state(self) -> list[dict[str, Any]]:
        """The spans as plain data."""
        return [asdict(span) for span in self.spans]

    def restore(self, state: Sequence[Mapping[str, Any]], step: int) -> None:
        """Take up the spans of a run that stands at ``step``. Its last phase ends where today's plan says: a run may be prolonged, and one that a
        rule had ended may go on."""
        planned = [span.phase for span in self.spans]
        self.spans = [_span(entry) for entry in state]
        last = self.spans[-1]
        begun = [phase.kind for phase in planned].index(last.phase.kind)
        length = last.phase.steps
        if not last.why and begun < len(planned) - 1:
            return
        if begun == len(planned) - 1:
            first = next(span.first for span in self.spans if span.phase.kind == last.phase.kind)
            length = planned[-1].steps - (last.first - first)
        self.spans[-1] = replace(last, end=max(step, last.first + length), why="")
        self._append(planned[begun + 1 :])

    def _index(self, step: int) -> int:
        return next(i for i, span in enumerate(self.spans) if span.first < step <= span.end)


def _span(entry: Mapping[str, Any]) -> Span:
    phase = entry["phase"]
    return Span(Phase(**(phase | {"trains": tuple(phase["trains"])})), entry["first"], entry["end"], entry["why"])

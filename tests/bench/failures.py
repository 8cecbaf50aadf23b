"""What failures make of a run: simulated with the policy of the code, beside Daly's closed form.

Goodput is the time that the plan's steps take without any failure, over the time that they take. A checkpoint counts once rank 0 has committed it,
training goes on meanwhile, a next one waits for the one before, a failure goes back to the newest that counts and may strike during a restart,
after ``train.max_restarts`` of them a person is needed. Daly's form (Future Generation Computer Systems 22, 2006, for failures that may strike at any
time) knows no asynchronous writes: their time is added to the restart's.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

GIVEN_UP_AFTER = 100
"""A simulated run that has taken so many times the time of its steps is not followed any longer."""
PERSON_S = 3600.0
"""Until somebody says ``--resume``, once restarts are used up: an assumption."""


@dataclass(frozen=True)
class Job:
    """A run as failures see it, in seconds and steps."""

    steps: int
    step_s: float
    every: int
    """Steps between checkpoints."""
    blocked_s: float
    """That training stands still for a checkpoint, mean over the plan's steps."""
    write_s: float
    """From then until it counts."""
    restart_s: float
    """From a failure to the next step, apart from ``restart_per_step_s``."""
    restart_per_step_s: float
    """More of it for each step that is still to be made."""
    max_restarts: int


@dataclass(frozen=True)
class Course:
    """How a run went."""

    wall_s: float
    """Infinite for one that was given up."""
    failures: int
    calls: int
    """How often a person was needed."""


class _Failure(Exception):
    """Something broke before what was to be done was done."""


def simulate(job: Job, mtbf_s: float, draw: random.Random, person_s: float = PERSON_S) -> Course:
    """One run, with failures of the whole group that come on average every ``mtbf_s`` seconds, whatever it is doing."""
    clock = _Clock(mtbf_s, draw)
    done, safe, failures, used, calls = 0, 0, 0, 0, 0
    coming: tuple[int, float] | None = None  # a checkpoint that is being written: its step, and when it will count
    restarting, longest = False, GIVEN_UP_AFTER * job.steps * job.step_s
    while clock.now < longest:
        try:
            if restarting:
                clock.spend(job.restart_s + job.restart_per_step_s * (job.steps - done))
                restarting = False
            while done < job.steps:
                target = min(job.steps, done + job.every)
                clock.spend((target - done) * job.step_s)
                if coming is not None:
                    clock.spend(max(0.0, coming[1] - clock.now))
                    safe, coming = coming[0], None
                clock.spend(job.blocked_s)
                done, coming = target, (target, clock.now + job.write_s)
            clock.spend(job.write_s)
            return Course(clock.now, failures, calls)
        except _Failure:
            if coming is not None and coming[1] <= clock.now:
                safe = coming[0]
            done, coming, restarting = safe, None, True
            failures, used = failures + 1, used + 1
            if used > job.max_restarts:
                clock.wait(person_s)
                calls, used = calls + 1, 0
    return Course(math.inf, failures, calls)


class _Clock:
    """Time, and when the next failure comes."""

    def __init__(self, mtbf_s: float, draw: random.Random) -> None:
        self.now, self._mtbf_s, self._draw = 0.0, mtbf_s, draw
        self._next = draw.expovariate(1 / mtbf_s)

    def spend(self, seconds: float) -> None:
        """Be busy for so long. Raises ``_Failure`` at the failure that comes first."""
        if self.now + seconds >= self._next:
            self.now = self._next
            self._next += self._draw.expovariate(1 / self._mtbf_s)
            raise _Failure
        self.now += seconds

    def wait(self, seconds: float) -> None:
        """Do nothing for so long, in which nothing can be lost."""
        self.now += seconds
        self._next = self.now + self._draw.expovariate(1 / self._mtbf_s)


def daly_wall_s(job: Job, mtbf_s: float) -> float:
    """Daly's expected wall time with exponential failures that may strike during checkpoints and restarts: exact where a checkpoint counts at once
    and restarts have no limit, and else an approximation."""
    restart = job.restart_s + job.restart_per_step_s * job.steps / 2 + job.write_s
    segment = job.every * job.step_s + job.blocked_s
    try:
        return mtbf_s * math.exp(restart / mtbf_s) * math.expm1(segment / mtbf_s) * job.steps / job.every
    except OverflowError:
        return math.inf


def best_interval(job: Job, mtbf_s: float) -> int:
    """Steps between checkpoints after Young, sqrt(2 * cost * MTBF), but no more often than writing one takes a quarter of the time."""
    young = math.sqrt(2 * job.blocked_s * mtbf_s)
    return min(job.steps, max(1, math.ceil(max(young, 4 * job.write_s) / job.step_s)))


def goodput(job: Job, mtbf_s: float, trials: int, seed: int = 0) -> dict[str, float]:
    """Means over simulated runs. 0 where one of them was given up."""
    ideal = job.steps * job.step_s
    draw = random.Random(seed)
    courses = [simulate(job, mtbf_s, draw) for _ in range(trials)]
    return {
        "simulated": ideal / statistics.fmean(course.wall_s for course in courses),
        "closed_form": ideal / daly_wall_s(job, mtbf_s),
        "failures": statistics.fmean(course.failures for course in courses),
        "calls": statistics.fmean(course.calls for course in courses),
    }

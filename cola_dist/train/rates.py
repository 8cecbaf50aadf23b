"""Learning rates as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cola_dist.config import OptimConfig
from cola_dist.methods.schedule import Phase

_FINAL_SHARE = 0.1


def learning_rates(step: int, phases: Sequence[Phase], optim: OptimConfig) -> dict[str, float]:
    """Learning rate of each role that trains at ``step`` (counted from the run's start).

    A role's rate rises linearly from the first step at which it trains, so that a phase change does not start the LAM's rise again.
    """
    starts: dict[str, int] = {}
    first = 0
    total = sum(phase.steps for phase in phases)
    for phase in phases:
        for role in phase.trains:
            starts.setdefault(role, first)
        if step < first + phase.steps:
            course = 1.0
            if optim.decay == "cosine":
                course = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / total))
            return {
                role: phase.lr[role] * course * min(1.0, (step - starts[role] + 1) / max(1, optim.lr_warmup_steps)) for role in phase.trains
            }
        first += phase.steps
    raise ValueError(f"step {step} lies after the last phase's end {total}")

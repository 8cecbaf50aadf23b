"""Learning rates as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cola_dist.config import OptimConfig
from cola_dist.methods.schedule import Span

_FINAL_SHARE = 0.1


def learning_rates(step: int, spans: Sequence[Span], optim: OptimConfig) -> dict[str, float]:
    """Learning rate of each role that trains at ``step`` (counted from the run's start), which lies in one of the run's ``spans``.

    A role's rate rises linearly from the first step at which it trains, so that a phase change does not start the LAM's rise again.
    """
    starts: dict[str, int] = {}
    total = spans[-1].end
    for span in spans:
        for role in span.phase.trains:
            starts.setdefault(role, span.first)
        if step < span.end:
            course = 1.0
            if optim.decay == "cosine":
                course = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / total))
            lr = span.phase.lr
            return {
                role: lr[role] * course * min(1.0, (step - starts[role] + 1) / max(1, optim.lr_warmup_steps)) for role in span.phase.trains
            }
    raise ValueError(f"step {step} lies after the last phase's end {total}")

"""Steps that are left out: a loss or gradient that is not finite changes no weight, and its clips are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from cola_dist.train.engine import StepResult
from cola_dist.train.worker import Worker

_NAMED = 8
"""Clips of a step that are named: a micro-batch may hold many."""


class LeftOut:
    """Sees every step, tells of those that were left out, and says when they are too many in a row."""

    def __init__(self, limit: int, worker: Worker, group: Any) -> None:
        self._limit, self._worker, self._group = limit, worker, group
        self._row = 0

    def see(self, step: int, result: StepResult, sample: np.ndarray, record: list[dict[str, Any]]) -> str:
        """Add the step to ``record`` if it was left out; ``sample`` names this rank's clips. Returns what ends the run, or nothing. Collective."""
        if result.applied:
            self._row = 0
            return ""
        self._row += 1
        clips = self._suspects(result.finite, [str(one) for one in sample])
        record.append({"step": step, "clips": clips[:_NAMED]})
        named = ", ".join(clips[:_NAMED]) + (f" and {len(clips) - _NAMED} more" if len(clips) > _NAMED else "")
        if self._worker.rank == 0:
            self._worker.tell(f"step {step} left out: its loss or gradient was not finite (clips: {named})")
        if self._row < self._limit:
            return ""
        return (
            f"the loss or its gradient was not finite for {self._row} steps in a row, last at step {step} (clips: {named}): none of these steps was "
            "applied; lower the learning rate or look at the clips, then --resume this run"
        )

    def _suspects(self, finite: Sequence[bool], sample: Sequence[str]) -> list[str]:
        """The clips of those micro-batches, on all ranks, whose own loss is not finite; where it is the gradient alone, all clips of the step."""
        size = len(sample) // len(finite)
        own = [clip for place, clip in enumerate(sample) if not finite[place // size]]
        gathered: list[tuple[list[str], Sequence[str]]] = [([], [])] * self._worker.world
        dist.all_gather_object(gathered, (own, sample), group=self._group)
        suspects = [clip for own, _ in gathered for clip in own]
        return suspects or [clip for _, sample in gathered for clip in sample]

"""The phases of a run, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cola_dist.config import RunConfig


@dataclass(frozen=True)
class Phase:
    """A span of steps with one set of training roles. Its end is a checkpoint boundary."""

    name: str
    """``warmup``, ``joint`` or ``pretrain``."""
    trains: tuple[str, ...]
    """Roles that train; the others are frozen."""
    lr: Mapping[str, float]
    """Peak learning rate of each role in ``trains``."""
    steps: int


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of ``config.method`` in order; those of 0 steps are left out.

    Co-training is ``config.warmup`` with the generator frozen, then ``config.joint``. Pretraining reads the length and ``lr_world`` of
    ``config.joint`` alone.
    """
    if config.method == "pretrain":
        planned: tuple[Phase, ...] = (Phase("pretrain", ("world",), {"world": config.joint.lr_world}, config.joint.steps),)
    else:
        planned = (
            Phase("warmup", ("lam",), {"lam": config.warmup.lr_lam}, config.warmup.steps),
            Phase("joint", ("lam", "world"), {"lam": config.joint.lr_lam, "world": config.joint.lr_world}, config.joint.steps),
        )
    return tuple(phase for phase in planned if phase.steps > 0)

"""The domains by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from cola_dist.errors import UserError
from cola_dist.planning.domains.base import Domain, Frame
from cola_dist.planning.domains.robodesk import TASKS as ROBODESK_TASKS
from cola_dist.planning.domains.robodesk import RoboDeskDomain
from cola_dist.planning.domains.square import TASKS as SQUARE_TASKS
from cola_dist.planning.domains.square import SquareDomain

__all__ = ["DOMAINS", "Domain", "Frame", "check_domain", "open_domain"]

DOMAINS: Mapping[str, tuple[tuple[str, ...], Callable[[str], Domain]]] = {
    "square": (SQUARE_TASKS, SquareDomain),
    "robodesk": (ROBODESK_TASKS, RoboDeskDomain),
}
"""Tasks of each, the default first, and what opens one."""


def check_domain(name: str, task: str) -> str:
    """The task that is meant; empty means the domain's first. Raises `UserError` with the nearest known name."""
    if name not in DOMAINS:
        raise UserError(f"unknown domain {name!r}{_nearest(name, DOMAINS)}; there are: {', '.join(DOMAINS)}")
    tasks, _ = DOMAINS[name]
    if task and task not in tasks:
        raise UserError(f"unknown task {task!r} of {name}{_nearest(task, tasks)}; there are: {', '.join(tasks)}")
    return task or tasks[0]


def open_domain(name: str, task: str) -> Domain:
    """An environment. Raises `UserError` for an unknown name, and where a simulator or OpenGL is missing."""
    task = check_domain(name, task)
    return DOMAINS[name][1](task)


def _nearest(name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]!r}?" if near else ""

"""What is said of a worker group that broke down: which worker failed and why, in a line, and what the run does about it.

Where one worker is lost the others fail too, with whatever their libraries say of a connection that ended. That is no cause: those that have not
failed are asked for a sign of life first. Built on what Ray 2.60 names internal: callbacks are not told of errors otherwise.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.redact import redact
from cola_dist.train.shelf import latest

_SIGN_OF_LIFE_S = 5.0
_SILENT = TimeoutError("no sign of life")
_OUT_OF_MEMORY = re.compile(r"OUT_OF_MEMORY|low on memory|memory monitor")
_NODE_LOST = re.compile(r"[Nn]ode .*(died|dead|terminated|crashed)|node failure|NODE_DIED")
_OTHERS_LEFT = re.compile(r"gloo|[Cc]onnection (closed|reset|refused)|Broken pipe|NCCL")
_WAITED = re.compile(r"[Tt]imed out waiting|Watchdog caught collective operation timeout")

_log = logging.getLogger("cola_dist.train")


def _why(error: Exception) -> tuple[int, str]:
    """How near to the cause what a worker failed with is, 0 the nearest, and what it says of that worker."""
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    text = str(error)
    if isinstance(error, OutOfMemoryError) or _OUT_OF_MEMORY.search(text):
        return (
            0,
            "was ended because its node ran out of memory; lower what a worker or reader holds (optim.micro_batch, data.prefetch_reads)",
        )
    if isinstance(error, RayActorError):
        if _NODE_LOST.search(text):
            return 1, "was lost with its node"
        return 1, "was lost: its process was killed, as a system does that runs out of memory, or crashed"
    if error is _SILENT or isinstance(error, WorkerHealthCheckTimeoutError):
        return 2, "gives no sign of life: its process hangs or its node cannot be reached"
    if _WAITED.search(text):
        return 4, "waited for the others in vain (train.collective_timeout_s)"
    if _OTHERS_LEFT.search(text):
        return 5, "lost its connection to another one"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 3, f"failed: {lines[-1] if lines else type(error).__name__}"


def cause(errors: Mapping[int, Exception]) -> str:
    """Why a group broke down, of whose workers these (by rank) failed with these errors."""
    if not errors:
        return "the workers could not be started, or were told to go"
    found = {rank: _why(error) for rank, error in errors.items()}
    rank = min(found, key=lambda rank: (found[rank][0], rank))
    return redact(f"worker {rank} {found[rank][1]}")


def kept(run_uri: str) -> str:
    """What there is of a run that broke down, and what to do."""
    newest = _newest(run_uri)
    if newest is None:
        return "there is no checkpoint, so mend the cause and start it again"
    return f"checkpoint {storage.name(newest)} is kept, so mend the cause and --resume {run_uri}"


def _newest(run_uri: str) -> str | None:
    try:
        return latest(run_uri)
    except (UserError, OSError):  # storage may be what broke it
        return None


class Restarts(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Tells the board why each group broke down, and where the next one goes on, or that there is none."""

    def __init__(self, board: Any, run_uri: str, limit: int) -> None:
        self._board, self._run_uri, self._limit = board, run_uri, limit
        self._group: Any = None
        self._errors: dict[int, Exception] = {}
        self._told = ""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called for each group."""
        self._group, self._errors = worker_group, {}

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called every few seconds; what failed first is told of."""
        if worker_group_status.errors and not self._errors:
            self._errors = dict(worker_group_status.errors) | self._silent(worker_group_status.errors)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Called once a group is given up."""
        if ray.get(self._board.user_error.remote()):
            return  # which says what ended it
        why, self._errors = cause(self._errors), {}
        if failure_decision == FailureDecision.RETRY:
            newest = _newest(self._run_uri)
            line = f"{why}; a new group of workers goes on from {f'checkpoint {storage.name(newest)}' if newest else 'the beginning'}"
            if line != self._told:  # a group that waits for a node is tried again and again
                _log.warning(line)
                ray.get(self._board.note.remote(line))
            self._told = line
        else:
            ray.get(self._board.give_up.remote(f"{why}; given up after {self._limit} restarts (train.max_restarts): {kept(self._run_uri)}"))

    def _silent(self, failed: Mapping[int, Exception]) -> dict[int, Exception]:
        """Of the workers that have not failed, those that are lost or do not answer."""
        asked = {worker.actor.poll_status.remote(): rank for rank, worker in enumerate(self._group.get_workers()) if rank not in failed}
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_SIGN_OF_LIFE_S) if asked else ([], [])
        found: dict[int, Exception] = {asked[one]: _SILENT for one in silent}
        for one in answered:
            try:
                ray.get(one)
            except Exception as error:  # whatever it says, that worker is lost
                found[asked[one]] = error
        return found

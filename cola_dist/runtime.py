"""The door to a Ray cluster: the one that is there, or one for this job alone."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence

import ray
from ray._private import ray_logging
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET
from ray.util.placement_group import placement_group, remove_placement_group

from cola_dist.errors import UserError

_PATIENCE = "COLA_CLUSTER_PATIENCE_S"
_LOOK_EVERY_S = 5.0
_HOLD_TOGETHER = (PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET)

_log = logging.getLogger("cola_dist.runtime")


def connect(cpus: float, debug: bool) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), or start one in this machine that offers at least ``cpus``.

    A process that has joined one stays with it.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray holds a message back that it has just said, and prints it as it ends: to stdout, after a job's result.
    ray_logging.RAY_DEDUP_LOGS = False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=debug)
        return
    # Nobody reads a cluster's metrics that lives for one job and has no dashboard; its dozen processes would gather and send them all the same.
    os.environ.setdefault("RAY_enable_metrics_collection", "false")
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    logging_level = "INFO" if debug else "ERROR"
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(-(-cpus // 1))),
        include_dashboard=False,
        log_to_driver=debug,
        logging_level=logging_level,
    )


def lost_processes() -> list[str]:
    """Those of the processes that hold a cluster together which this one started and which have ended; none of a cluster that it joined.

    Ray says nothing, or only after a minute, and may end the process that asks for anything else.
    """
    node = ray._private.worker._global_node
    return [name for name, _ in node.dead_processes() if name in _HOLD_TOGETHER] if node is not None else []


def make_room(bundles: Sequence[Mapping[str, float]]) -> None:
    """Have a cluster with an autoscaler grow until ``bundles`` fit into it together, for at most ``COLA_CLUSTER_PATIENCE_S`` seconds.

    Without that variable nothing is waited for: a cluster does not say whether it can grow. Raises ``UserError`` where it is no number.
    """
    text = os.environ.get(_PATIENCE, "") or "0"
    try:
        patience = float(text)
    except ValueError:
        patience = math.nan
    if not 0 <= patience < math.inf:
        raise UserError(f"{_PATIENCE}: not a number of seconds; write 1800, not {text!r}")
    if patience == 0:
        return
    _log.warning("waiting up to %g s for the cluster to grow (%s)", patience, _PATIENCE)
    deadline = time.monotonic() + patience
    # A placement group is demand that ends with the driver; what ray.autoscaler.sdk.request_resources asks for stays, and keeps nodes alive.
    group = placement_group([dict(bundle) for bundle in bundles])
    try:
        while not group.wait(_LOOK_EVERY_S) and time.monotonic() < deadline:
            pass
    finally:
        remove_placement_group(group)

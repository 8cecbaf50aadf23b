"""The door to a Ray cluster: the one that is there, or one for this job alone."""

from __future__ import annotations

import os

import ray


def connect(cpus: float, debug: bool) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), or start one in this machine that offers at least ``cpus``.

    A process that has joined one stays with it.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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

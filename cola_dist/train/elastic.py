"""A worker group that shrinks when nodes are lost and grows when there are more: between how many, when, and what is saved before.

Ray Train starts the group anew at another size. Clips are the same at any size and checkpoints do not depend on it, so the run goes on as if nothing
had been. Built on what Ray 2.60 names internal: its policy takes any number of workers, ours only those that share a batch equally.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train.torch
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision

from cola_dist.train.shelf import latest

_SAVING_S = 300.0
"""How long a change of size waits for its checkpoint. A group that hangs is restarted all the same, from the checkpoint before."""
_LOOK_EVERY_S = 0.2

_log = logging.getLogger("cola_dist.elastic")


def leaving() -> frozenset[str]:
    """Ids of nodes that are about to go: those with a notice of preemption, or drained by somebody."""
    return frozenset(ray._private.state.state.get_draining_nodes())


class SizePolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's elastic policy, held to ``allowed`` sizes, with ``spare_cpus`` of the cluster left to readers."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, allowed: Sequence[int], spare_cpus: float) -> None:
        super().__init__(scaling_config)
        self._allowed, self._spare = allowed, spare_cpus

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # What Ray says is reserved is renewed every few seconds, and tells nothing of nodes that are about to go: a group that counts on
        # one that is lost waits for it in vain for a minute.
        gone = leaving()
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone}
        possible = super()._count_possible_workers({node: reserved for node, reserved in reserved_resources.items() if node in nodes})
        each = self.scaling_config._resources_per_worker_not_none.get("CPU", 0)
        if each:
            # What is reserved for training may be all CPUs; without a reader no worker gets on.
            cpus = sum(resources.get("CPU", 0) for resources in nodes.values())
            possible = min(possible, int((cpus - self._spare) / each + 1e-6))
        return max((size for size in self._allowed if size <= possible), default=0)


class SavedResize(ControllerCallback):  # type: ignore[misc]
    """Has a group that trains write a checkpoint before it is changed, and tells the board the next group's size."""

    def __init__(self, board: Any, run_uri: str) -> None:
        self._board, self._run_uri = board, run_uri
        self._training = False

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """The group is gone: nothing can be saved."""
        self._training = False

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        """Called before each group starts."""
        if self._training:
            _log.warning("the next group has %d workers: saving first", resize_decision.num_workers)
            self._save()
        ray.get(self._board.resize.remote(resize_decision.num_workers))
        self._training = True

    def _save(self) -> None:
        before, deadline = latest(self._run_uri), time.monotonic() + _SAVING_S
        ray.get(self._board.ask_to_save.remote())
        while latest(self._run_uri) == before and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)


class ElasticTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Ray's trainer with a `SizePolicy`."""

    def __init__(self, *args: Any, allowed: Sequence[int], spare_cpus: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._allowed, self._spare_cpus = allowed, spare_cpus

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        policy = SizePolicy(self.scaling_config, self._allowed, self._spare_cpus)
        return super()._initialize_and_run_controller(**(kwargs | {"scaling_policy": policy}))

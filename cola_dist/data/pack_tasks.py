"""Packing on a Ray cluster: one task a part, as many at a time as there are CPUs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from cola_dist import storage
from cola_dist.data.packing import Packing, Report
from cola_dist.data.sources import Item

_AHEAD = 2
"""Tasks submitted per CPU: what waits tells an autoscaler that more nodes would help."""


def pack_on_ray(packing: Packing, parts: Sequence[list[Item]], done: Callable[[Report], None]) -> None:
    """Pack every part; ``done`` hears of each. Raises what a task raised; parts that are done stay done.

    A part that kills its process (a decoder's crash, memory) is tried again in halves, until the one item that does it is known and left out.
    """
    handle = ray.put(packing)
    waiting = deque(parts)
    running: dict[ray.ObjectRef, list[Item]] = {}
    while waiting or running:
        room = _AHEAD * int(ray.cluster_resources().get("CPU", 1)) - len(running)
        for _ in range(min(room, len(waiting))):
            items = waiting.popleft()
            running[_pack.remote(handle, items)] = items
        (ready,), _ = ray.wait(list(running), num_returns=1)
        items = running.pop(ready)
        try:
            done(ray.get(ready))
        except (WorkerCrashedError, OutOfMemoryError) as error:
            if len(items) > 1:
                waiting.extend([items[: len(items) // 2], items[len(items) // 2 :]])
            else:
                done(packing.give_up(items[0], "ends the process" if isinstance(error, WorkerCrashedError) else "takes too much memory"))


@ray.remote(num_cpus=1, max_retries=1)  # type: ignore[untyped-decorator]
def _pack(packing: Packing, items: list[Item]) -> Report:
    storage.trust_endpoints()
    return packing.pack(items)

"""What a user hears of a worker group that broke down: its cause and not what followed from it."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import ActorDiedError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from cola_dist.train.restarts import cause
from tests.outcomes import Outcomes

CLOSED = RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. GLHF!")
WAITED = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete")
DIED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
SILENT = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 21 seconds.")


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({0: CLOSED, 1: DIED}, "worker 1 was lost: its process was killed"),
        ({0: WAITED, 1: SILENT}, "worker 1 gives no sign of life"),
        ({0: CLOSED, 1: ValueError("first\nlast"), 2: CLOSED}, "worker 1 failed: last"),
        ({1: WAITED}, "worker 1 waited for the others in vain"),
        ({2: CLOSED, 1: CLOSED}, "worker 1 lost its connection to another one"),
        ({0: OSError("s3://bucket?AWS_SECRET_ACCESS_KEY=abcdefgh is away")}, "worker 0 failed: s3://bucket?AWS_SECRET_ACCESS_KEY="),
        ({}, "the workers could not be started"),
    ],
)
def test_the_cause_is_told_and_not_what_followed(errors: dict[int, Exception], expected: str) -> None:
    said = cause(errors)
    assert said.startswith(expected)
    assert "abcdefgh" not in said


@ray.remote(num_cpus=0)
class Hungry:
    def poll_status(self) -> None:
        held = []
        while True:
            held.append(bytearray(1024))


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.long
def test_what_ray_ends_for_want_of_memory_is_told_as_that(outcomes: Outcomes) -> None:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100},
    )
    try:
        worker = Hungry.remote()
        with pytest.raises(RayError) as raised:
            ray.get(worker.poll_status.remote(), timeout=120)
    finally:
        ray.shutdown()
    said = cause({0: CLOSED, 1: WorkerHealthCheckFailedError("A worker health check failed.", raised.value)})
    assert said.startswith("worker 1 was ended because its node ran out of memory")
    outcomes.add("Ray's memory monitor ends a worker", "a worker alone", "told as that; the group is restarted as for SIGKILL", None, None)

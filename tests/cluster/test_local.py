"""The cluster of cluster/local.yaml with Ray's own autoscaler: it grows for what a job needs and shrinks when nothing needs it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.s3 import free_port

CLUSTER = Path(__file__).parents[2] / "cluster"
LIMIT_S = 240
"""On an idle machine all of it takes some 30 s; this is for one that is busy with other things."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None, reason="ray[default] is not installed: pip install 'cola-dist[cluster]'"
    ),
]

TOO_SLOW = ("Timed out waiting for node info", "The current node timed out during startup")
"""What Ray's head ends with on a machine that is too busy: it gives its own parts 30 s to start, which no setting changes."""
ATTEMPTS = 3


class TooSlow(Exception):
    """The head has not started in its time."""


# What a job does that needs a GPU worker and a reader: it asks, trains and reads, ends, and looks on.
DRIVER = """
import json, sys, time
import ray
from cola_dist import runtime

def nodes():
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted([node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0), node["Labels"].get("cola-role", "")] for node in alive)

@ray.remote(num_cpus=1, num_gpus=1)
class Worker:
    def train(self):
        return ray.get_runtime_context().get_node_labels().get("cola-role", "")

@ray.remote(num_cpus=1)
def read():
    return ray.get_runtime_context().get_node_labels().get("cola-role", "")

runtime.connect(2, debug=False)
seen = {"start": nodes()}
runtime.make_room([{"CPU": 1, "GPU": 1}, {"CPU": 1}])
seen["grown"] = nodes()
worker = Worker.remote()
seen["worker"] = ray.get(worker.train.remote())
seen["readers"] = sorted(ray.get([read.remote() for _ in range(3)]))
del worker
deadline = time.monotonic() + float(sys.argv[1])
while len(nodes()) > 1 and time.monotonic() < deadline:
    time.sleep(0.5)
seen["end"] = nodes()
print(json.dumps(seen))
"""


@contextmanager
def local_cluster() -> Iterator[dict[str, str]]:
    """local.sh on a port of its own, with nodes that are idle after six seconds. Yields the environment that joins it."""
    scratch = Path(tempfile.mkdtemp(prefix="cola-ray-"))  # short: it becomes part of socket names
    port = free_port()
    text = (CLUSTER / "local.yaml").read_text()
    text, ports = re.subn(r"(?<=gcs_address: 127\.0\.0\.1:)\d+", str(port), text)
    text, timeouts = re.subn(r"(?<=idle_timeout_minutes: )1\b", "0.1", text)
    assert ports == timeouts == 1
    (scratch / "local.yaml").write_text(text)
    (scratch / "token").write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(CLUSTER / "local.sh"), str(scratch / "local.yaml"), "--temp-dir", str(scratch), "--include-dashboard", "false"]
    command += ["--ray-client-server-port", str(free_port()), "--object-store-memory", "100000000"]
    with (scratch / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for("Ray runtime started", scratch / "head.log", head)
            yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
        except (AssertionError, subprocess.TimeoutExpired) as error:
            if any(sign in (scratch / "head.log").read_text() for sign in TOO_SLOW):
                raise TooSlow from error
            raise
        finally:
            processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)] if head.poll() is None else []
            for process in processes:
                if process.is_running():
                    process.kill()
            head.wait(LIMIT_S)
            psutil.wait_procs(processes, LIMIT_S)
            shutil.rmtree(scratch, ignore_errors=True)


def wait_for(sign: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while sign not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def drive(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", DRIVER, str(LIMIT_S / 2)]
    done = subprocess.run(command, cwd=CLUSTER.parent, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_nodes_come_for_a_job_and_go_when_it_is_done() -> None:
    head, gpu, data = [0, 0, ""], [1, 1, "train"], [2, 0, "data"]
    for attempt in range(ATTEMPTS):
        try:
            with local_cluster() as environment:
                seen = drive(environment | {"COLA_CLUSTER_PATIENCE_S": str(LIMIT_S / 2)})
            break
        except TooSlow:
            assert attempt + 1 < ATTEMPTS, "this machine is too busy to start a head"
    assert seen["start"] == [head]
    assert seen["grown"] == [head, gpu, data]
    assert seen["worker"] == "train"
    assert seen["readers"] == ["data"] * 3, "what needs a CPU alone ran where GPUs are"
    assert seen["end"] == [head]

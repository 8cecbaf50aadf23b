"""How fast workers add up gradients among each other: a short all-reduce, as training makes it."""

from __future__ import annotations

import datetime
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.util
import torch
import torch.distributed as dist

from cola_dist.train.hardware import computes_bf16

_CPU_BYTES, _GPU_BYTES = 16 * 2**20, 256 * 2**20
_REPEATS = 5
_LIMIT_S = 45.0
"""For each of: starting the workers, finding each other, the sums."""


@dataclass(frozen=True)
class About:
    """A worker's device."""

    node: str
    device: str
    bf16: bool
    libraries: str
    """CUDA and NCCL that its torch was built with; empty on CPU."""


@dataclass(frozen=True)
class Measured:
    """What a group of workers reached."""

    workers: int
    backend: str
    bytes: int
    """Size of the tensor that each worker gave."""
    seconds: float
    """Median of the slowest worker."""

    @property
    def algorithm(self) -> float:
        """Bytes of the tensor per second."""
        return self.bytes / self.seconds

    @property
    def bus(self) -> float:
        """Bytes per second that each worker's link must have carried: a ring sends 2 (n - 1) / n of the tensor."""
        return self.algorithm * 2 * (self.workers - 1) / self.workers


class Member:
    """One worker of the group; runs as an actor."""

    def __init__(self, rank: int, world: int, gpu: bool) -> None:
        self._rank, self._world = rank, world
        self._device = torch.device("cuda" if gpu else "cpu")
        torch.set_num_threads(1)

    def about(self) -> About:
        """What it computes on."""
        bf16 = computes_bf16("auto", self._device)
        if self._device.type == "cpu":
            return About(ray.util.get_node_ip_address(), "CPU", bf16, "")
        libraries = f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        return About(ray.util.get_node_ip_address(), torch.cuda.get_device_name(self._device), bf16, libraries)

    def address(self) -> str:
        """Where the others can meet this one."""
        with socket.socket() as sock:
            sock.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{sock.getsockname()[1]}"

    def join(self, address: str) -> None:
        """Find the others."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        limit = datetime.timedelta(seconds=_LIMIT_S)
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self._rank, world_size=self._world, timeout=limit)

    def add_up(self, size: int) -> float:
        """Seconds of an all-reduce of ``size`` bytes (fp32), the median. Raises ``RuntimeError`` where a sum is wrong."""
        tensor, took = torch.empty(size // 4, device=self._device), []
        for _ in range(1 + _REPEATS):  # the first one also connects
            tensor.fill_(self._rank + 1.0)
            self._settle()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            self._settle()
            took.append(time.perf_counter() - began)
        if not bool((tensor == self._world * (self._world + 1) / 2).all()):
            raise RuntimeError("the sum over all workers is wrong")
        return statistics.median(took[1:])

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(workers: int, gpus: bool) -> tuple[list[About], Measured]:
    """Start ``workers`` workers, spread over the nodes, a GPU each or a CPU each, and have them add up. Raises what goes wrong, in time."""
    needs = {"num_cpus": 0, "num_gpus": 1} if gpus else {"num_cpus": 1}
    actor = ray.remote(Member)
    members = [actor.options(scheduling_strategy="SPREAD", **needs).remote(rank, workers, gpus) for rank in range(workers)]
    try:
        about = _all([member.about.remote() for member in members], "start")
        address = ray.get(members[0].address.remote(), timeout=_LIMIT_S)
        _all([member.join.remote(address) for member in members], "find each other")
        size = _GPU_BYTES if gpus else _CPU_BYTES
        seconds = max(_all([member.add_up.remote(size) for member in members], "add up"))
        return about, Measured(workers, "NCCL" if gpus else "gloo", size, seconds)
    finally:
        for member in members:
            ray.kill(member)


def _all(answers: list[Any], what: str) -> list[Any]:
    done, open_ = ray.wait(answers, num_returns=len(answers), timeout=_LIMIT_S)
    ray.get(done)  # an error of its own says more than that others still wait
    if open_:
        raise TimeoutError(f"{len(open_)} of {len(answers)} workers did not {what} within {_LIMIT_S:.0f} s")
    return list(ray.get(answers))

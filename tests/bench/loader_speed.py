"""How fast a loader gives clips and what that costs; used by bench_data.py and, under another interpreter, by lerobot_loader.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

WARM_S = 8.0
"""Left out of every measurement, from the first clips on."""


@dataclass(frozen=True)
class Speed:
    """Of one loader in one round."""

    clips_per_s: float
    cpu_ms_per_clip: float
    elsewhere: float
    """Cores that other work on the machine took meanwhile."""


def cpu_seconds() -> float:
    """Processor time of this process and all that it started and that still run."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def machine_seconds() -> float:
    """Processor time of all that runs on the machine."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def measure(clips: Iterator[int], seconds: float) -> Speed:
    """Speed of a loader whose items are numbers of clips, once warm."""
    next(clips)
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_S:
        next(clips)
    began, cpu, machine, count = time.perf_counter(), cpu_seconds(), machine_seconds(), 0
    while time.perf_counter() - began < seconds:
        count += next(clips)
    took, cpu, machine = time.perf_counter() - began, cpu_seconds() - cpu, machine_seconds() - machine
    return Speed(count / took, 1000 * cpu / count, max(0.0, machine - cpu) / took)

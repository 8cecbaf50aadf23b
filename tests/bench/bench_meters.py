"""What it costs a training process to tell Prometheus and its log lines how it does. Prints one JSON line.

    python tests/bench/bench_meters.py [--calls 20000]

An actor in a Ray that gathers metrics makes the calls of a step, of a logged step, and of the thread that sets all gauges again every 5 seconds.
Microseconds of processor time per call, all threads of the process; divide by a step's seconds to see its share.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

import ray

from cola_dist import logs
from cola_dist.spool import Delivered, Spool, SpoolWriter
from cola_dist.train.meters import GAUGES, RayMeters


def microseconds(call: Callable[[int], object], calls: int) -> float:
    began = time.process_time()
    for number in range(calls):
        call(number)
    return (time.process_time() - began) / calls * 1e6


def measure(calls: int) -> dict[str, float]:
    meters = RayMeters("bench")
    meters.enter("joint")
    meters.show(dict.fromkeys(GAUGES, 1.0))
    spool = Spool(Path(tempfile.mkdtemp(prefix="cola-bench-")))
    SpoolWriter(spool).append({"metrics": {"loss": 1.0}, "step": 1})
    spool.write_delivered(Delivered("run", 0))

    def step(number: int) -> None:
        logs.bind(step=number)
        meters.show({"step": number, "steps_planned": 100, "step_seconds": 0.5, "clips_per_second": 64.0, "loss": 0.1})
        meters.show({"checkpoint_seconds": 1.0, "checkpoint_timestamp_seconds": 1e9})

    def logged(number: int) -> None:
        meters.show({"data_stall_ratio": 0.01, "tracking_backlog_bytes": spool.backlog_bytes()})
        meters.skipped({("robot", "checksum"): 1.0, ("robot", "undecodable"): 0.0})

    gauges = [meters._gauges[name] for name in GAUGES]

    def set_all(number: int) -> None:
        for gauge in gauges:
            gauge.set(float(number), {"run": "bench", "phase": "joint"})

    found = {
        "step_us": microseconds(step, calls),
        "logged_step_us": microseconds(logged, calls // 10),
        "set_all_us": microseconds(set_all, calls // 10),
    }
    meters.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    args = parser.parse_args()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        found = ray.get(ray.remote(num_cpus=0)(measure).remote(args.calls))
    finally:
        ray.shutdown()
    print(json.dumps({"bench": "meters", "calls": args.calls, "gauges": len(GAUGES)} | {name: round(us, 2) for name, us in found.items()}))


if __name__ == "__main__":
    main()

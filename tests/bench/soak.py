"""A job under random faults for a while, compared with an undisturbed one: clips, losses, what MLflow heard, memory and file handles of the driver.

    python tests/bench/soak.py [--minutes 10] [--seed 0]

Toy sources in object storage on this machine, two workers. A third of the time goes to the undisturbed run, which is stopped then; the steps that
it made are what the disturbed run has to make. Faults come one after another, each once the run has written a checkpoint after the one before.
Prints one JSON line last; exit code 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from mlflow import MlflowClient

from cola_dist.data.stream import open_reader
from cola_dist.settings import from_yaml, to_yaml
from cola_dist.train.keeping import examine
from cola_dist.train.shelf import committed, latest
from cola_dist.train.trace import digest, read_trace
from tests.s3 import S3, serve
from tests.train.harness import toy_config
from tests.train.jobs import Ended, Job, interrupt, newest_step, runs_in, steps_again

WARMUP, UNLIMITED = 40, 1_000_000
SETTLING_S = 60.0
"""Of a driver's life that its slopes leave out: it still grows while it starts."""
LOOK_EVERY_S = 2.0
LONGEST_QUIET_S = 30.0
"""Between the first checkpoint after a fault and the next fault."""


@dataclass
class Driver:
    """What one driver process held, over the seconds of its life."""

    seen: list[tuple[float, int, int]] = field(default_factory=list)
    """Second, bytes of memory, open file handles."""

    def settled(self) -> list[tuple[float, int, int]]:
        return [look for look in self.seen if look[0] >= SETTLING_S]

    def slope(self, column: int) -> float:
        """Least squares, per hour."""
        looks = self.settled()
        return 3600 * statistics.linear_regression([look[0] for look in looks], [look[column] for look in looks]).slope


class Soak:
    """The disturbed run: a job that is begun again whenever a fault ends it."""

    def __init__(self, config: Path, output: Path, server: S3) -> None:
        self._config, self._output, self._server = config, output, server
        self.drivers: list[Driver] = []
        self._job = self._begin("--config", config)

    @property
    def run(self) -> Path:
        (run,) = runs_in(self._output)
        return run

    def _begin(self, *args: str | Path) -> Job:
        self.drivers.append(Driver())
        return Job(*args, environment=self._server.environment | {"COLA_STORAGE_PATIENCE_S": "120"})

    def _look(self) -> None:
        try:
            process = psutil.Process(self._job.process.pid)
            now = time.time() - process.create_time()
            self.drivers[-1].seen.append((now, process.memory_info().rss, process.num_fds()))
        except psutil.Error:  # it has ended
            return

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait until ``condition`` holds; false where the job ended before."""
        while self._job.process.poll() is None:
            self._look()
            if condition():
                return True
            time.sleep(LOOK_EVERY_S)
        return False

    def has_written(self, more_than: int) -> bool:
        return bool(runs_in(self._output)) and newest_step(self.run) > more_than

    def again(self) -> None:
        """Go on after the job was ended."""
        self._job.close()
        self._job = self._begin("--resume", self.run)

    def end(self) -> Ended:
        while self._job.process.poll() is None:
            self._look()
            time.sleep(LOOK_EVERY_S)
        ended = self._job.wait()
        self._job.close()
        return ended

    def lose_a_worker(self) -> None:
        if self._job.workers():
            self._job.kill_a_worker()

    def lose_everything(self) -> None:
        self._job.kill_all()
        self.again()

    def stop_and_resume(self) -> None:
        interrupt(self._job)
        self.again()

    def lose_storage(self) -> None:
        self._server.kill()
        time.sleep(10)
        self._server.start()

    def lose_a_worker_and_the_newest_checkpoint(self) -> None:
        self.lose_a_worker()
        newest = Path(latest(str(self.run)) or "") / "rank-00000.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1])


FAULTS: Sequence[Callable[[Soak], None]] = (
    Soak.lose_a_worker,
    Soak.lose_everything,
    Soak.stop_and_resume,
    Soak.lose_storage,
    Soak.lose_a_worker_and_the_newest_checkpoint,
)


def write_config(server: S3, name: str, steps: int) -> tuple[Path, Path]:
    """A run of so many joint steps, as a file, and the folder that its run goes to."""
    output = server.root / name
    options = ("--warmup.steps", str(WARMUP), "--joint.steps", str(steps), "--output", str(output), "--data.decoded-cache-bytes", "0")
    often = (
        "--train.checkpoint-every",
        "10",
        "--train.max-restarts",
        "1000",
        "--diagnostics.every",
        "100",
        "--train.keep-checkpoints",
        "3",
    )
    config = toy_config(server.root / "bucket", *options, *often, "--data.mixture", "s3://bucket/robot", "0.5", "s3://bucket/hand", "0.5")
    path = server.root / f"{name}.yaml"
    path.write_text(to_yaml(config))
    return path, output


def undisturbed(server: S3, seconds: float) -> Path:
    """A run that is left alone, and stopped after so long."""
    config, output = write_config(server, "undisturbed", UNLIMITED)
    running = Job("--config", config, environment=server.environment)
    try:
        running.wait_until(lambda: bool(runs_in(output)) and newest_step(runs_in(output)[0]) > WARMUP)
        time.sleep(max(0.0, seconds - (time.time() - psutil.Process(running.process.pid).create_time())))
        interrupt(running)
    finally:
        running.close()
    return runs_in(output)[0]


def planned(server: S3, config: Path, steps: int) -> list[int]:
    """Digest of the sample ids that the order names for each step: arithmetic, no clip is read."""
    run = from_yaml(config.read_text(), str(config))
    local = replace(run.data, mixture={str(server.root / "bucket" / name): 0.5 for name in ("robot", "hand")})
    reader, size = open_reader(local, run.train.seed), run.optim.global_batch

    def name(position: int) -> str:
        clip = reader.order.clip(position)
        return f"{reader.folders[clip.source].source}/{reader.episodes[clip.source][clip.episode].key}@{clip.start}"

    return [digest(name(position) for position in range(step * size, (step + 1) * size)) for step in range(steps)]


def disturbed(server: S3, steps: int, draw: random.Random) -> tuple[Soak, Ended, list[str]]:
    """A run that is given one fault after the other, until it has made its steps."""
    config, output = write_config(server, "disturbed", steps - WARMUP)
    soak, struck = Soak(config, output, server), []
    written = 0
    while soak.until(partial(soak.has_written, written)):
        quiet_until = time.monotonic() + draw.uniform(0, LONGEST_QUIET_S)
        fault = draw.choice(FAULTS)
        if not soak.until(lambda until=quiet_until: time.monotonic() > until):
            break
        written = newest_step(soak.run)
        if written + 20 >= steps:
            break
        print(f"step {written}: {fault.__name__}", file=sys.stderr, flush=True)
        fault(soak)
        struck.append(fault.__name__)
    return soak, soak.end(), struck


def heard(run: Path) -> int:
    """Different steps of which MLflow has the loss."""
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("cola-dist").experiment_id])
    return len({point.step for point in client.get_metric_history(tracked.info.run_id, "train/loss")})


def report(server: S3, quiet: Path, soak: Soak, ended: Ended, struck: Sequence[str], steps: int) -> dict[str, Any]:
    run = soak.run
    trace, before = read_trace(str(run)), read_trace(str(quiet))[:steps]
    longest = max(soak.drivers, key=lambda driver: len(driver.settled()))
    faults = {fault.__name__: struck.count(fault.__name__) for fault in FAULTS}
    checks = {
        "finished": ended.code == 0 and ended.result["steps"] == steps,
        "clips_as_planned": [line.ids for line in trace] == planned(server, server.root / "disturbed.yaml", steps),
        "trace_equal": trace == before,
        "mlflow_has_all_steps": heard(run) == steps,
        "newest_checkpoint_whole": not examine(committed(str(run / "checkpoints"))[-1]).fault,
    }
    flat: dict[str, Any] = {"drivers": len(soak.drivers), "longest_life_s": round(longest.seen[-1][0])}
    if len(longest.settled()) > 2:
        first, last = longest.settled()[0], longest.settled()[-1]
        flat |= {"driver_rss_mb": [round(first[1] / 1e6), round(last[1] / 1e6)], "driver_rss_mb_per_hour": round(longest.slope(1) / 1e6, 1)}
        flat |= {"driver_handles": [first[2], last[2]], "driver_handles_per_hour": round(longest.slope(2), 1)}
    return {"steps": steps, "steps_made_again": steps_again(run), "faults": faults, **checks, **flat, "same": all(checks.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cola-soak-") as folder, serve(Path(folder)) as server:
        toy_config(Path(folder) / "bucket")
        quiet = undisturbed(server, 20 * asked.minutes)
        steps = len(read_trace(str(quiet)))
        print(f"undisturbed: {steps} steps", file=sys.stderr, flush=True)
        soak, ended, struck = disturbed(server, steps, random.Random(asked.seed))
        found = report(server, quiet, soak, ended, struck, steps)
    print(json.dumps({"seed": asked.seed, "minutes": round((time.monotonic() - began) / 60, 1), **found}))
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())

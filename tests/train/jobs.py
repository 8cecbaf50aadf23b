"""Starts jobs as a user does, each in a process of its own, and disturbs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from cola_dist.data.shards import open_folder, read_member
from cola_dist.settings import to_yaml
from cola_dist.train.shelf import MANIFEST, committed
from tests.toy import FolderWriter, write_folder
from tests.train.harness import toy_config

ROOT = Path(__file__).parents[2]
LIMIT_S = 400.0
"""Longest life of one job: ten times what it takes on two idle cores."""
WARMUP, JOINT = 40, 40
OPTIONS = (
    *("--warmup.steps", str(WARMUP), "--joint.steps", str(JOINT)),
    *("--train.checkpoint-every", "4", "--train.keep-checkpoints", "1000", "--diagnostics.every", "20"),
)


def write_config(folder: Path, *options: str) -> Path:
    """A YAML file with a short run on the toy sources of ``folder``, in many small checkpoints. Its runs go to a folder of their own."""
    number = len(list(folder.glob("config-*")))
    path = folder / f"config-{number}.yaml"
    path.write_text(to_yaml(toy_config(folder, *OPTIONS, "--output", str(folder / f"runs-{number}"), *options)))
    return path


def write_damaged_sources(folder: Path) -> None:
    """Toy sources in which one training episode each is damaged: ``robot`` by bytes that changed later, ``hand`` by a torn video."""
    write_folder(folder / "robot", "robot", seed=0)
    flip_bytes(folder / "robot", "robot-0000")
    whole = write_folder(folder / "whole", "hand", actions=False, seed=1)
    writer = FolderWriter(str(folder / "hand"), "hand", "human")
    for episode in whole.episodes:
        video = read_member(whole, episode, "mp4")
        torn = video[: len(video) // 2] if episode.key == "hand-0000" else video
        writer.add(episode.key, episode.split, torn, {}, episode.frames, episode.fps)
    writer.close()


def flip_bytes(folder: Path, *keys: str) -> None:
    """Change the middle of the videos of some episodes where they lie in their shard."""
    for episode in open_folder(str(folder)).episodes:
        if episode.key in keys:
            member = episode.members["mp4"]
            shard = folder / episode.shard
            data = bytearray(shard.read_bytes())
            middle = member.offset + member.size // 2
            data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
            shard.write_bytes(data)


@dataclass(frozen=True)
class Ended:
    """What a job left: exit code and output."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line of stdout."""
        assert self.code == 0, self.stderr
        value: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return value


class Job:
    """A running ``python jobs/cotrain.py``, or another of the jobs."""

    def __init__(self, *args: str | Path, environment: Mapping[str, str] | None = None, script: str = "cotrain.py") -> None:
        self._orphans: list[psutil.Process] = []
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 closed with the job
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / script), *map(str, args)],
            cwd=ROOT,
            env=os.environ | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )

    def wait(self) -> Ended:
        """Wait for the job's end."""
        code = self.process.wait(LIMIT_S)
        self._out.seek(0)
        self._err.seek(0)
        return Ended(code, self._out.read(), self._err.read())

    def wait_until(self, condition: Callable[[], bool]) -> float:
        """Wait until ``condition`` holds while the job runs. Returns how many seconds that took."""
        began = time.monotonic()
        deadline = began + LIMIT_S
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended too early: {self.wait()}")
            assert time.monotonic() < deadline, "the job does not get there"
            time.sleep(0.02)
        return time.monotonic() - began

    def workers(self) -> list[psutil.Process]:
        """The job's training processes."""
        found = []
        for process in self._children():
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RayTrainWorker"):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def kill_a_worker(self) -> None:
        """SIGKILL one training process, as the kernel does when memory runs out."""
        workers = self.workers()
        assert workers, "no training process to kill"
        workers[-1].kill()

    def kill_ray(self, name: str) -> None:
        """SIGKILL the process ``name`` of those that hold the job's cluster together; what is left of the others is ended with the job's block."""
        self._orphans = self._children()
        for process in self._orphans:
            with _gone_is_fine():
                if process.name() == name:
                    process.kill()

    def kill_within_a_checkpoint(self, run: Path) -> Path:
        """SIGKILL all training processes while a checkpoint has files and no manifest; returns its folder."""
        deadline, workers = time.monotonic() + LIMIT_S, self.workers()
        while time.monotonic() < deadline:
            if not unfinished(run):
                continue
            for worker in workers:
                worker.suspend()
            while any(worker.status() != psutil.STATUS_STOPPED for worker in workers):
                time.sleep(0.01)
            if caught := unfinished(run):
                for worker in workers:
                    worker.kill()
                return caught[-1]
            for worker in workers:
                worker.resume()
        raise AssertionError("no checkpoint was met in the midst of its writing")

    def kill_alone(self) -> None:
        """SIGKILL the job and none of the processes that it started; what is left of those is ended with the job's block."""
        self._orphans = self._children()
        self.process.kill()
        self.process.wait(LIMIT_S)

    def kill_all(self) -> None:
        """SIGKILL the job and every process that it started, as when the machine goes away."""
        children = self._children() if self.process.poll() is None else self._orphans
        self.process.kill()
        for child in children:
            with _gone_is_fine():
                child.kill()
        self.process.wait(LIMIT_S)
        psutil.wait_procs(children, LIMIT_S)

    def close(self) -> None:
        """Leave nothing running."""
        self.kill_all()
        self._out.close()
        self._err.close()

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return


@contextmanager
def job(*args: str | Path, environment: Mapping[str, str] | None = None, script: str = "cotrain.py") -> Iterator[Job]:
    """A job that does not outlive the block."""
    running = Job(*args, environment=environment, script=script)
    try:
        yield running
    finally:
        running.close()


def run_job(*args: str | Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Start a job and wait for its end."""
    with job(*args, environment=environment) as running:
        return running.wait()


def interrupt(running: Job) -> Ended:
    """SIGTERM to the job alone, as a scheduler sends it."""
    running.process.send_signal(signal.SIGTERM)
    return running.wait()


def runs_in(output: Path) -> list[Path]:
    """The run folders below an output folder."""
    return sorted(path.parent for path in output.glob("*/config.yaml"))


def wait_for_run(running: Job, output: Path) -> Path:
    """The folder of the only run below ``output``, once it is there."""
    running.wait_until(lambda: bool(runs_in(output)))
    (run,) = runs_in(output)
    return run


def steps_by_attempt(run: Path) -> dict[str, list[int]]:
    """The steps of the committed checkpoints of each worker group, in the order in which the groups came."""
    found: dict[str, list[int]] = {}
    for uri in committed(str(run / "checkpoints")):
        _, step, attempt = uri.rsplit("/", 1)[-1].split("-")
        found.setdefault(attempt, []).append(int(step))
    return found


def unfinished(run: Path) -> list[Path]:
    """Folders of checkpoints that have no manifest, oldest first."""
    return [path for path in sorted((run / "checkpoints").glob("step-*")) if not (path / MANIFEST).exists()]


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; whoever started it need not have noticed."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def errors_of(ended: Ended) -> list[str]:
    """The lines by which a job tells its user that it failed."""
    return [line for line in ended.stderr.splitlines() if line.startswith("error:")]


def steps_again(run: Path) -> int:
    """How many steps of the run were made more than once, by what MLflow heard of each."""
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("cola-dist").experiment_id])
    steps = [point.step for point in client.get_metric_history(tracked.info.run_id, "train/loss")]
    return len(steps) - len(set(steps))


def newest_step(run: Path) -> int:
    """The step of the newest committed checkpoint, 0 without one."""
    return max((steps[-1] for steps in steps_by_attempt(run).values()), default=0)

"""Processes that break down at the worst moment: within a checkpoint, within a collective, and those that hold the job and its cluster together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.shelf import MANIFEST, latest
from cola_dist.train.trace import read_trace
from tests.conftest import Undisturbed
from tests.outcomes import ONE_ERROR, RECOVERED, Outcomes
from tests.train.jobs import (
    WARMUP,
    Job,
    errors_of,
    is_gone,
    job,
    newest_step,
    run_job,
    steps_again,
    steps_by_attempt,
    wait_for_run,
    write_config,
)
from tests.train.test_faults import SETTINGS, SETTLED, hashes

pytestmark = [pytest.mark.ray, pytest.mark.fault, pytest.mark.long]

PATIENCE_S = 20
"""After which a group counts as hung."""
LAST_TO_GO_S = 120.0


def groups(run: Path) -> int:
    return len(steps_by_attempt(run))


def all_gone(processes: list[psutil.Process]) -> float:
    """Seconds until none of them is left."""
    began = time.monotonic()
    while not all(is_gone(process) for process in processes):
        assert time.monotonic() - began < LAST_TO_GO_S, "training goes on without its job"
        time.sleep(0.1)
    return time.monotonic() - began


def newest_is_loadable(run: Path) -> bool:
    return Checkpoint(latest(str(run)) or "").position.step == newest_step(run)


def test_a_kill_within_a_checkpoint_and_a_worker_that_hangs_change_nothing(undisturbed: Undisturbed, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS, "--train.collective-timeout-s", str(PATIENCE_S))
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        half = running.kill_within_a_checkpoint(run)
        killed = running.wait_until(lambda: groups(run) == 2)
        running.wait_until(lambda: newest_step(run) >= WARMUP + SETTLED)
        hung = running.workers()[-1]
        hung.suspend()
        noticed = running.wait_until(lambda: is_gone(hung))
        hanging = noticed + running.wait_until(lambda: groups(run) == 3)
        ended = running.wait()
    assert ended.result["status"] == "finished"
    assert list(half.iterdir()), "its files are there"
    assert not (half / MANIFEST).exists(), "and it counts for nothing"
    # What the setting says, and what it takes Ray to look, to ask the others, and to end them.
    assert noticed < PATIENCE_S + 60
    lost, silent = [line for line in ended.stderr.splitlines() if "a new group of workers goes on from checkpoint step-" in line]
    assert "was lost: its process was killed" in lost
    assert "gives no sign of life" in silent
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)
    outcomes.add("SIGKILL of all workers", "between a rank's file and the manifest", RECOVERED, steps_again(run), killed)
    when = f"SIGSTOP in joint training, noticed after {noticed:.0f} s where train.collective_timeout_s is {PATIENCE_S}"
    outcomes.add("a worker hangs", when, RECOVERED, None, hanging)


def test_driver_node_and_head_lost_one_after_another(undisturbed: Undisturbed, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS)
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        workers = running.workers()
        assert len(workers) == 2
        running.kill_alone()
        ended = all_gone(workers)
    assert newest_is_loadable(run)
    outcomes.add("SIGKILL of the driver", "in warm-up", "its workers end, loadable checkpoint; resumed to the same losses", None, ended)

    for name, what in (("raylet", "raylet (the node)"), ("gcs_server", "head (GCS)")):
        kept = newest_step(run)
        with job("--resume", run) as running:
            running.wait_until(lambda kept=kept: newest_step(run) >= kept + SETTLED)
            seconds = strike(running, lambda running, name=name: running.kill_ray(name))
            ended_job = running.wait()
        assert ended_job.code == 1
        (error,) = errors_of(ended_job)
        assert error.startswith(f"error: this machine's Ray broke down under the run ({name} ended): checkpoint step-")
        assert f"--resume {run}" in error
        assert newest_is_loadable(run)
        outcomes.add(f"SIGKILL of the {what}", "at a random step", ONE_ERROR, None, seconds)

    assert run_job("--resume", run).result["status"] == "finished"
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)


def strike(running: Job, fault: Callable[[Job], None]) -> float:
    """Seconds from a fault until the job and its training processes have ended."""
    workers, began = running.workers(), time.monotonic()
    fault(running)
    running.wait()
    all_gone(workers)
    return time.monotonic() - began

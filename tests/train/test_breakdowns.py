"""Processes that break down at the worst moment: within a checkpoint, within a collective, and those that hold the job and its cluster together."""

from __future__ import annotations

import time
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
    assert noticed < PATIENCE_S + 120
    lost, silent = [line for line in ended.stderr.splitlines() if "a new group of workers goes on from checkpoint step-" in line]
    assert "was lost: its process was killed" in lost
    assert "gives no sign of life" in silent
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)
    outcomes.add("SIGKILL of all workers", "between a rank's file and the manifest", RECOVERED, steps_again(run), killed)
    when = f"SIGSTOP in joint training, noticed after {noticed:.0f} s where train.collective_timeout_s is {PATIENCE_S}"
    outcomes.add("a worker hangs", when, RECOVERED, None, hanging)


def test_a_lost_driver_takes_its_workers_along(undisturbed: Undisturbed, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS)
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        workers = running.workers()
        assert len(workers) == 2
        running.kill_alone()
        seconds = all_gone(workers)
    goes_on(run, undisturbed)
    outcome = "its workers end, loadable checkpoint; resumed to the same losses"
    outcomes.add("SIGKILL of the driver", "in warm-up", outcome, steps_again(run), seconds)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_lost_node_or_head_is_one_error(undisturbed: Undisturbed, outcomes: Outcomes, name: str) -> None:
    config = write_config(undisturbed.folder, *SETTINGS)
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        workers, began = running.workers(), time.monotonic()
        running.kill_ray(name)
        ended = running.wait()
        all_gone(workers)
        seconds = time.monotonic() - began
    assert ended.code == 1
    (error,) = errors_of(ended)
    assert error.startswith(f"error: this machine's Ray broke down under the run ({name} ended): checkpoint step-")
    assert f"--resume {run}" in error
    goes_on(run, undisturbed)
    outcomes.add(
        f"SIGKILL of the {'node (raylet)' if name == 'raylet' else 'head (GCS)'}", "in warm-up", ONE_ERROR, steps_again(run), seconds
    )


def goes_on(run: Path, undisturbed: Undisturbed) -> None:
    """What was kept can be loaded, and resuming it gives the undisturbed run's losses."""
    assert Checkpoint(latest(str(run)) or "").position.step == newest_step(run) >= SETTLED
    assert run_job("--resume", run).result["status"] == "finished"
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)

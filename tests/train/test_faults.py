"""Jobs that lose a worker, are killed, or are told to stop: each ends with the very losses of an undisturbed one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cola_dist.train.shelf import committed
from cola_dist.train.trace import read_trace
from tests.conftest import Undisturbed
from tests.outcomes import RECOVERED, Outcomes
from tests.train.jobs import (
    JOINT,
    WARMUP,
    interrupt,
    job,
    newest_step,
    run_job,
    steps_again,
    steps_by_attempt,
    wait_for_run,
    write_config,
)

pytestmark = [pytest.mark.ray, pytest.mark.fault]

SETTLED = 8
"""Steps into a phase at which the fault strikes: checkpoints of the phase are there, most of its steps are not done."""
SETTINGS = ("--data.max-bad-share", "0.9", "--diagnostics.probe-clips", "16")


def hashes(run: Path) -> dict[str, Any]:
    """Hash of each role's weights at the start and the end of each phase."""
    record: dict[str, Any] = json.loads((run / "result.json").read_text())["record"]
    return record["hashes"]


def test_lost_workers_in_both_phases_change_nothing(undisturbed: Undisturbed, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS)
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        for groups, struck_at in enumerate((SETTLED, WARMUP + SETTLED), start=1):
            running.wait_until(lambda step=struck_at: newest_step(run) >= step)
            running.kill_a_worker()
            seconds = running.wait_until(lambda groups=groups: len(steps_by_attempt(run)) > groups)
        result = running.wait().result
    first, second, third = steps_by_attempt(run).values()
    assert first[-1] < WARMUP < second[-1] < third[-1] == WARMUP + JOINT, "one worker was lost in each phase"
    assert result["status"] == "finished"
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)
    outcomes.add("SIGKILL of a worker", "once in each phase", RECOVERED, steps_again(run), seconds)


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_passed_over_when_a_worker_is_lost(undisturbed: Undisturbed, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS)
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        running.kill_a_worker()
        time.sleep(0.3)  # a manifest that was on its way is there now; a new worker group takes seconds
        newest = Path(committed(str(run / "checkpoints"))[-1])
        whole = newest / "rank-00001.safetensors"
        whole.write_bytes(whole.read_bytes()[:-1])
        ended = running.wait()
    assert ended.result["status"] == "finished"
    (line,) = [line for line in ended.stderr.splitlines() if "damaged" in line]
    assert line.startswith(f"damaged checkpoint passed over: {newest.name} (rank-00001.safetensors has ")
    assert "; going on from step-" in line
    assert whole.exists(), "nobody but a person removes it"
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)
    outcomes.add("the newest checkpoint is damaged", "as a worker is lost", RECOVERED, steps_again(run), None)


@pytest.mark.long
def test_killed_and_interrupted_jobs_resume_to_the_same_losses(undisturbed: Undisturbed, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS)
    with job("--config", config) as running:
        run = wait_for_run(running, undisturbed.folder / config.stem.replace("config", "runs"))
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        running.kill_all()
    assert newest_step(run) < WARMUP
    assert not (run / "result.json").exists()

    with job("--resume", run) as running:
        running.wait_until(lambda: newest_step(run) >= WARMUP + SETTLED)
        stopped = interrupt(running).result
    assert stopped["status"] == "interrupted"
    assert WARMUP < stopped["steps"] == newest_step(run) < WARMUP + JOINT

    result = run_job("--resume", run).result
    assert (result["run_id"], result["status"]) == (run.name, "finished")
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("cola-dist").experiment_id])
    assert (tracked.info.run_id, tracked.info.status) == (result["mlflow_run"], "FINISHED")
    assert {point.step for point in client.get_metric_history(tracked.info.run_id, "train/loss")} == set(range(1, WARMUP + JOINT + 1))
    outcomes.add(
        "SIGKILL of the job and all its processes; SIGTERM to the job",
        "in warm-up; in joint",
        RECOVERED,
        steps_again(run),
        None,
    )

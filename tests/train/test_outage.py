"""Object storage that goes away in mid-training: for twenty seconds nobody notices, for good there is one error and a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.settings import from_yaml, to_yaml
from cola_dist.train.trace import digest, read_trace
from tests.outcomes import Outcomes
from tests.s3 import S3, serve
from tests.train.harness import toy_config
from tests.train.jobs import job, newest_step, run_job, wait_for_run

pytestmark = [pytest.mark.ray, pytest.mark.fault]

STEPS = 40
"""Of each phase."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    root = tmp_path_factory.mktemp("server")
    toy_config(root / "bucket")
    with serve(root) as s3:
        yield s3


def write_config(server: S3, folder: Path) -> Path:
    """A run on the toy sources in object storage that fetches every clip anew; its own files are local."""
    options = ("--warmup.steps", str(STEPS), "--joint.steps", str(STEPS), "--output", str(folder), "--train.checkpoint-every", "10")
    config = toy_config(server.root / "bucket", *options, "--data.decoded-cache-bytes", "0", "--diagnostics.every", "1000")
    config = replace(config, data=replace(config.data, mixture={"s3://bucket/robot": 0.5, "s3://bucket/hand": 0.5}))
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return path


def planned(server: S3, config: Path) -> list[int]:
    """Digest of the sample ids that the order names for each step."""
    run: RunConfig = from_yaml(config.read_text(), str(config))
    local = replace(run.data, mixture={str(server.root / "bucket" / name): 0.5 for name in ("robot", "hand")})
    reader, size = open_reader(local, run.train.seed), run.optim.global_batch
    return [digest(reader.read_many(range(step * size, (step + 1) * size)).sample) for step in range(2 * STEPS)]


def environment(server: S3, patience_s: float) -> dict[str, str]:
    return server.environment | {"COLA_STORAGE_PATIENCE_S": str(patience_s)}


def test_twenty_seconds_without_storage_change_nothing(server: S3, tmp_path: Path, outcomes: Outcomes) -> None:
    config = write_config(server, tmp_path)
    with job("--config", config, environment=environment(server, 60)) as running:
        run = wait_for_run(running, tmp_path)
        running.wait_until(lambda: newest_step(run) >= 20)
        server.kill()
        time.sleep(20)
        before = newest_step(run)
        server.start()
        seconds = running.wait_until(lambda: newest_step(run) > before)
        result = running.wait().result
    assert before < STEPS, "without storage the run had to wait"
    assert (result["status"], result["steps"]) == ("finished", 2 * STEPS)
    assert [line.ids for line in read_trace(str(run))] == planned(server, config)
    outcomes.add("object storage away for 20 s", "in warm-up", "recovered: same clips", 0, 20 + seconds)


@pytest.mark.long
def test_storage_gone_for_good_is_one_error_and_a_checkpoint(server: S3, tmp_path: Path, outcomes: Outcomes) -> None:
    config = write_config(server, tmp_path)
    with job("--config", config, environment=environment(server, 4)) as running:
        run = wait_for_run(running, tmp_path)
        running.wait_until(lambda: newest_step(run) >= 20)
        server.kill()
        gone = time.monotonic()
        ended = running.wait()
    seconds = time.monotonic() - gone
    server.start()
    assert ended.code == 1
    errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, ended.stderr
    assert f"object storage at 127.0.0.1:{server.port} does not answer" in errors[0]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["status"] == "failed"
    assert 20 <= result["steps"] == newest_step(run) == len(read_trace(str(run))) < 2 * STEPS, "every step that was made is kept"

    resumed = run_job("--resume", run, environment=environment(server, 60)).result
    assert (resumed["status"], resumed["steps"]) == ("finished", 2 * STEPS)
    assert [line.ids for line in read_trace(str(run))] == planned(server, config)
    outcomes.add("object storage gone for good", "in warm-up", "one error, loadable checkpoint; resumed with the same clips", 0, seconds)

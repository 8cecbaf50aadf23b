"""A job whose latents are encoded in the stream is the same run as one that encodes in the training step."""

from __future__ import annotations

from pathlib import Path

import pytest

from cola_dist.settings import from_yaml
from cola_dist.train.trace import read_trace
from tests.train.harness import run_local
from tests.train.jobs import run_job, runs_in, write_config

SHORT = ("--warmup.steps", "6", "--joint.steps", "5", "--diagnostics.every", "6", "--optim.micro-batch", "2", "--data.random-crop", "False")


@pytest.mark.ray
def test_latents_from_the_stream_and_from_its_cache_train_alike(tmp_path: Path) -> None:
    config = write_config(tmp_path, *SHORT)
    run_local(from_yaml(config.read_text(), str(config)), tmp_path / "plain")
    plain = read_trace(str(tmp_path / "plain"))
    assert len(plain) == 11
    cache = tmp_path / "latents"
    options = ("--config", config, "--data.latents", "True", "--data.latents-cache", cache)
    assert run_job(*options).result["status"] == "finished"
    files = {path: path.stat().st_mtime_ns for path in cache.glob("??/*.npy")}
    assert len(files) == len({path.name for path in files}) > 11
    assert run_job(*options).result["status"] == "finished"
    assert {path: path.stat().st_mtime_ns for path in cache.glob("??/*")} == files, "everything was found there, nothing is encoded again"
    first, second = runs_in(tmp_path / "runs-0")
    assert read_trace(str(first)) == read_trace(str(second)) == plain

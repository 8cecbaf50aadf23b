"""A job whose latents are encoded in the stream is the same run as one that encodes in the training step."""

from __future__ import annotations

from pathlib import Path

import pytest

from cola_dist.data.latents import EncodeLatents
from cola_dist.data.stream import open_reader
from cola_dist.settings import from_yaml
from cola_dist.train.encoding import EncoderFactory
from cola_dist.train.trace import read_trace
from tests.train.harness import run_local
from tests.train.jobs import run_job, runs_in, write_config

SHORT = ("--warmup.steps", "6", "--joint.steps", "5", "--diagnostics.every", "6", "--optim.micro-batch", "2", "--data.random-crop", "False")


@pytest.mark.ray
def test_latents_from_the_stream_and_from_its_cache_train_alike(tmp_path: Path) -> None:
    """The first half of the latents is there already, from other processes; what is found is not encoded again (tests/data/test_latents.py)."""
    config = write_config(tmp_path, *SHORT)
    run_local(from_yaml(config.read_text(), str(config)), tmp_path / "plain")
    plain = read_trace(str(tmp_path / "plain"))
    assert len(plain) == 11
    cache = tmp_path / "latents"
    made = from_yaml(config.read_text(), str(config))
    reader = open_reader(made.data, made.train.seed)
    EncodeLatents(EncoderFactory(made), str(cache))(vars(reader.read_many(range(5 * made.optim.global_batch))))
    files = {path: path.stat().st_mtime_ns for path in cache.glob("??/*.npy")}
    assert files
    assert run_job("--config", config, "--data.latents", "True", "--data.latents-cache", cache).result["status"] == "finished"
    after = {path: path.stat().st_mtime_ns for path in cache.glob("??/*.npy")}
    assert len(after) > len(files)
    assert {path: after[path] for path in files} == files, "what was found there is not written again"
    (run,) = runs_in(tmp_path / "runs-0")
    assert read_trace(str(run)) == plain

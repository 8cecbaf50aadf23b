"""From recordings of every family to a trained run: packed into object storage, read by plain webdataset, mixed exactly, trained on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from mlflow import MlflowClient

from cola_dist import storage
from cola_dist.data.shards import open_folder
from cola_dist.train.trace import read_trace
from tests.data.lerobot_files import write_v3
from tests.data.videos import real_videos
from tests.s3 import S3, serve
from tests.train.jobs import ROOT, run_job, write_config

STEPS, BATCH = 8, 20
"""Steps of each phase, and clips per step."""
MIXTURE = {"real": 30, "bridge": 20, "lerobot": 25, "metaworld-sawyer": 25}
"""Human video, and robots in two data sets' formats and in a simulator: 30 / 20 / 50."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with serve(tmp_path / "server", "bucket") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        yield s3


def pack(family: str, source: str, folder: Path) -> None:
    options = (
        "--input",
        str(folder),
        "--source",
        source,
        "--output",
        f"s3://bucket/{source}",
        "--cut.min-seconds",
        "1",
        "--resolution",
        "64",
    )
    done = subprocess.run(
        [sys.executable, "jobs/pack.py", family, *options], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
def test_every_family_streams_from_object_storage_in_its_share(server: S3, tmp_path: Path) -> None:
    pack("video", "real", real_videos())
    pack("rlds", "bridge", real_videos())
    pack("lerobot", "lerobot", write_v3(tmp_path / "dataset"))
    for name in storage.list_files("embedded:robot"):
        storage.upload_file(storage.local_path(f"embedded:robot/{name}") or "", f"s3://bucket/metaworld-sawyer/{name}")
    for source in MIXTURE:
        folder = open_folder(f"s3://bucket/{source}")
        shards = [str(server.root / "bucket" / source / name) for name in folder.shards]
        assert {sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)} == {e.key for e in folder.episodes}
        assert folder.source == source

    config = write_config(tmp_path, "--output", "s3://bucket/runs", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    steps = (
        "--warmup.steps",
        str(STEPS),
        "--joint.steps",
        str(STEPS),
        "--optim.global-batch",
        str(BATCH),
        "--data.mixture-block",
        str(BATCH),
    )
    mixture = [word for source, weight in MIXTURE.items() for word in (f"s3://bucket/{source}", str(weight))]
    result = run_job("--config", config, *steps, "--data.mixture", *mixture).result
    assert result["status"] == "finished"
    run = f"s3://bucket/runs/{result['run_id']}"
    assert len(read_trace(run)) == 2 * STEPS
    assert "manifest.json" in storage.list_files(result["checkpoint"])
    assert result["checkpoint"].startswith(f"{run}/checkpoints/step-{2 * STEPS:08d}-")
    seen = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(result["mlflow_run"]).data.metrics
    assert {source: seen[f"train/clips_seen/{source}"] for source in MIXTURE} == {
        source: 2 * STEPS * BATCH * weight / 100 for source, weight in MIXTURE.items()
    }
    assert not any(value for name, value in seen.items() if name.startswith("train/clips_skipped"))
    assert list((tmp_path / "mlartifacts").rglob("*.mp4")), "what the tracker keeps as files lies beside its database"

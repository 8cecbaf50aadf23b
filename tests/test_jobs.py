"""Jobs as a user runs them: what they print and record, what they refuse and how, from S3, and through ``ray job submit``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from cola_dist.command import run_command
from cola_dist.data.decode import probe_video
from cola_dist.data.shards import open_folder
from cola_dist.methods import build_world
from cola_dist.settings import to_yaml
from cola_dist.train.shelf import latest
from cola_dist.train.trace import read_trace
from jobs import cotrain
from tests.conftest import Undisturbed
from tests.s3 import S3, free_port, serve
from tests.toy import write_folder
from tests.train.harness import toy_config
from tests.train.jobs import JOINT, LIMIT_S, ROOT, WARMUP, run_job, runs_in, write_config

SOURCES = ("robot", "hand")


# What a finished job says and leaves.


@pytest.mark.ray
def test_result_tells_what_training_did_and_left_alone(undisturbed: Undisturbed) -> None:
    result = undisturbed.result
    assert (result["status"], result["steps"], result["run_id"]) == ("finished", WARMUP + JOINT, undisturbed.run.name)
    assert result["checkpoint"] == latest(str(undisturbed.run))
    assert result["world_hash_start"] == result["world_hash_warmup_end"]
    assert result["lam_hash_warmup_end"] == result["lam_hash_joint_start"]
    for name in ("wall_seconds", "clips_per_s", "warmup_step_seconds", "joint_step_seconds", "perplexity_start", "perplexity"):
        assert result[name] > 0, name
    for name in ("sensitivity_gap_start", "sensitivity_gap", "probe_r2", "probe_r2_permuted", "probe_r2_random_idm"):
        assert isinstance(result[name], float), name
    trace = read_trace(str(undisturbed.run))
    assert [line.step for line in trace] == list(range(WARMUP + JOINT))
    assert sum(line.loss for line in trace[-5:]) < sum(line.loss for line in trace[:5])
    assert "Traceback" not in undisturbed.stderr


@pytest.mark.ray
def test_every_indicator_is_a_curve_in_mlflow(undisturbed: Undisturbed) -> None:
    client, run_id = MlflowClient(f"sqlite:///{undisturbed.run.parent}/mlflow.db"), undisturbed.result["mlflow_run"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    data = ("data_wait_seconds", "data_stall_percent", "data/read_bytes_per_s", "data/read_ms", "data/decode_ms")
    for name in ("train/loss", "train/grad_norm", "train/lr/lam", "train/step_seconds", *(f"train/{one}" for one in data)):
        assert {point.step for point in client.get_metric_history(run_id, name)} == set(range(1, WARMUP + JOINT + 1)), name
    looks = {0, 20, WARMUP, 60, WARMUP + JOINT}
    indicators = ("perplexity", "perplexity/joint", "utilisation", "utilisation/slot0", "max_usage", "entropy", "effective_rank", "z_std")
    indicators += ("flow_loss", "sensitivity_gap", "sensitivity_gap_null", "sensitivity_gap/tau0", "sensitivity_gap/tau3", "copy_loss")
    for name in indicators:
        assert {point.step for point in client.get_metric_history(run_id, f"heldout/{name}")} == looks, name
    verdicts = {point.step for point in client.get_metric_history(run_id, "heldout/verdict")}
    assert verdicts == looks - {0}, "before training there is nothing to judge"
    for name in ("probe_r2", "probe_r2_permuted", "probe_r2_random_idm"):
        assert {point.step for point in client.get_metric_history(run_id, f"heldout/{name}")} == {0, WARMUP, WARMUP + JOINT}, name


@pytest.mark.ray
def test_unreadable_clips_are_replaced_and_counted_by_source(undisturbed: Undisturbed) -> None:
    client, run_id = MlflowClient(f"sqlite:///{undisturbed.run.parent}/mlflow.db"), undisturbed.result["mlflow_run"]
    for source in SOURCES:
        kinds = ("skipped/checksum", "skipped/undecodable", "seen")
        damaged, torn, seen = (client.get_metric_history(run_id, f"train/clips_{kind}/{source}")[-1].value for kind in kinds)
        assert (damaged > 0, torn > 0) == (source == "robot", source == "hand"), "each reason is told apart"
        epochs = client.get_metric_history(run_id, f"train/epochs/{source}")[-1].value
        assert epochs == seen / 16, "16 clips make an epoch of either source"
        assert seen == (WARMUP + JOINT) * 8 / 2, "replacements come from the same source: the mixture stays exact"


@pytest.mark.ray
def test_mlflow_holds_the_origin_pictures_and_videos(undisturbed: Undisturbed, tmp_path: Path) -> None:
    client, run_id = MlflowClient(f"sqlite:///{undisturbed.run.parent}/mlflow.db"), undisturbed.result["mlflow_run"]
    run = client.get_run(run_id)
    assert (run.data.params["warmup.steps"], run.data.params["recipe"]) == (str(WARMUP), "tiny")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert run.data.tags["git.commit"] == (commit.stdout.strip() if commit.returncode == 0 else "unknown")
    assert run.data.tags["version.torch"] == importlib.metadata.version("torch")
    assert run.data.tags["pretrained.world"] == undisturbed.result["world_hash_start"]
    for source in SOURCES:
        assert run.data.tags[f"data.{source}"] == open_folder(str(undisturbed.folder / source)).content_hash
    files = {folder: [entry.path for entry in client.list_artifacts(run_id, folder)] for folder in ("", "codes", "rollouts")}
    assert "config.yaml" in files[""]
    assert files["codes"] == [f"codes/step-{step:08d}.png" for step in (0, 20, 40, 60, 80)]
    assert f"rollouts/step-{WARMUP + JOINT:08d}.mp4" in files["rollouts"]
    video = Path(client.download_artifacts(run_id, files["rollouts"][-1], str(tmp_path)))
    assert probe_video(video.read_bytes())[0] == 5
    picture = Path(client.download_artifacts(run_id, files["codes"][-1], str(tmp_path)))
    assert picture.read_bytes().startswith(b"\x89PNG")


# A cluster.

STARTING = ("No available agent to submit job", "Failed to connect to Ray at address", "Connection refused")


@contextmanager
def ray_cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own on the loopback interface, with a token of its own. Yields the dashboard's address and the environment."""
    scratch = Path(tempfile.mkdtemp(prefix="cola-ray-"))  # short: it becomes part of socket names, which Linux limits to 107 bytes
    (scratch / "token").write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    command = ["ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "4"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--ray-client-server-port", str(free_port())]
    command += ["--temp-dir", str(scratch), "--object-store-memory", "200000000"]
    with (scratch / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)] if head.poll() is None else []
        for process in processes:
            if process.is_running():
                process.kill()
        head.wait(LIMIT_S)
        psutil.wait_procs(processes, LIMIT_S)
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason="ray[default] is not installed: pip install 'cola-dist[cluster]'"
)
def test_ray_job_submit_runs_the_same_command(tmp_path: Path) -> None:
    config = write_config(tmp_path, "--warmup.steps", "4", "--joint.steps", "4")
    with ray_cluster() as (address, environment):
        command = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", "python", "jobs/cotrain.py"]
        deadline = time.monotonic() + LIMIT_S
        while True:  # a head that has just started refuses jobs: for some seconds, on a busy machine for minutes
            done = subprocess.run(
                [*command, "--config", str(config)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
            if done.returncode == 0 or not any(sign in done.stderr for sign in STARTING) or time.monotonic() > deadline:
                break
            time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(line)
    (run,) = runs_in(tmp_path / "runs-0")
    assert (result["status"], result["steps"], result["run_id"]) == ("finished", 8, run.name)


# What a user did wrong: exit code 2, one line that names it and the remedy.


@pytest.mark.ray
@pytest.mark.long
def test_too_many_unreadable_clips_end_the_run(undisturbed: Undisturbed) -> None:
    config = write_config(undisturbed.folder, "--data.max-bad-share", "0.05")
    ended = run_job("--config", config)
    assert ended.code == 2
    lines = [line for line in ended.stderr.splitlines() if line and not line.startswith("step ")]
    assert len(lines) == 1, ended.stderr
    assert "clips could not be read" in lines[0]
    assert "limit data.max_bad_share 5.0%" in lines[0]
    assert "jobs/data.py lint" in lines[0]


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A folder with the toy sources and ``config.yaml``, whose generator is pretrained."""
    config = toy_config(tmp_path)
    build_world(config).save_pretrained(str(tmp_path / "world"))
    (tmp_path / "config.yaml").write_text(to_yaml(toy_config(tmp_path, "--world.pretrained", str(tmp_path / "world"))))
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line that a job refuses ``args`` with."""
    capsys.readouterr()
    assert run_command(cotrain.main, args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_dry_run_of_the_same_configuration_is_accepted(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cotrain.main, ["--config", str(toys / "config.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "roles" in said
    assert "new, its last layer at zero" in said
    report = json.loads(said.splitlines()[-1])
    assert report["status"] == "dry run"
    assert [phase["name"] for phase in report["plan"]["phases"]] == ["warmup", "joint"]
    assert report["plan"]["parameters"] == report["parameters"] | {"lam": report["plan"]["parameters"]["lam"]}
    assert report["plan"]["parameters"]["lam"] < report["parameters"]["lam"], "the codebook is not planned for"
    assert report["windows"]["train"] == {"robot": 16, "hand": 16}
    assert not (toys / "runs").exists(), "a dry run writes nothing"


def test_missing_and_empty_shard_folders_are_refused(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toys / "empty").mkdir()
    for name in ("missing", "empty"):
        line = refusal(capsys, "--config", str(toys / "config.yaml"), "--data.mixture", str(toys / name), "1")
        assert str(toys / name) in line
        assert "jobs/pack.py makes one" in line


def test_unreachable_buckets_are_refused(toys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def line(uri: str, s3: S3, **changed: str) -> str:
        for name, value in (s3.environment | changed).items():
            monkeypatch.setenv(name, value)
        return refusal(capsys, "--config", str(toys / "config.yaml"), "--data.mixture", uri, "1")

    with serve(toys / "server", "bucket") as s3:
        missing = line("s3://no-such-bucket/real", s3)
        denied = line("s3://bucket/real", s3, AWS_SECRET_ACCESS_KEY="not-the-secret")
        empty = line("s3://bucket/real", s3)
    away = line("s3://bucket/real", s3, COLA_STORAGE_PATIENCE_S="2")
    assert "bucket no-such-bucket does not exist" in missing
    assert "create it or correct the name" in missing
    assert "access to bucket bucket" in denied
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in denied
    assert "not-the-secret" not in denied
    assert "s3://bucket/real is no finished shard folder" in empty
    assert "does not answer; check AWS_ENDPOINT_URL" in away


def test_runs_in_object_storage_need_a_tracking_server(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command(cotrain.main, ["--config", str(toys / "config.yaml"), "--output", "s3://bucket/runs"]) == 2
    assert "tracking.uri" in capsys.readouterr().err


def test_an_index_that_disagrees_with_its_shard_is_refused(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = toys / "robot" / "robot-toy-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    line = refusal(capsys, "--config", str(toys / "config.yaml"))
    assert f"{shard}: {shard.stat().st_size} bytes where the index says" in line
    assert "pack or copy the folder again" in line


def test_a_source_without_a_readable_video_is_refused(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = toys / "robot"
    shard = folder / "robot-toy-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    line = refusal(capsys, "--config", str(toys / "config.yaml"))
    assert "16 clips in a row could not be read" in line
    assert "robot-toy-00000.tar" in line
    assert f"jobs/data.py lint {folder}" in line


def test_an_index_of_another_format_is_refused(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = toys / "robot" / "index.parquet"
    table = pq.read_table(io.BytesIO(index.read_bytes()))
    for data, complaint in (
        (_parquet(table.replace_schema_metadata({"cola_dist.version": "99"})), "shard format 99, this version reads 2"),
        (_parquet(table.drop_columns(["offset"])), "column offset missing"),
        (b"no parquet", "not a readable Parquet file"),
    ):
        index.write_bytes(data)
        line = refusal(capsys, "--config", str(toys / "config.yaml"))
        assert f"{index}: {complaint}" in line


def test_a_pretrained_model_that_does_not_fit_is_refused(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--config", str(toys / "config.yaml"))
    line = refusal(capsys, *args, "--world.width", "32")
    assert str(toys / "world") in line
    assert "width" in line
    missing = refusal(capsys, *args, "--world.pretrained", str(toys / "nowhere"))
    assert str(toys / "nowhere") in missing
    weights = toys / "world" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert str(weights) in refusal(capsys, *args)


@pytest.mark.ray
def test_a_run_that_does_not_fit_is_not_resumed(undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    shutil.copy(undisturbed.run / "config.yaml", run)
    assert "has no checkpoint yet: start a new run" in refusal(capsys, "--resume", str(run))
    assert f"no run to resume in {tmp_path}/runs/yours" in refusal(capsys, "--resume", "yours", "--output", str(tmp_path / "runs"))
    checkpoint = run / "checkpoints" / Path(undisturbed.result["checkpoint"]).name
    shutil.copytree(undisturbed.result["checkpoint"], checkpoint)
    line = refusal(capsys, "small", "--resume", str(run))
    assert "is of recipe 'tiny', not 'small'" in line
    assert "leave the recipe out" in line
    line = refusal(capsys, "--resume", str(run), "--world.depth", "3")
    assert "world.depth: 2 in the run, 3 asked for" in line
    assert "start a new run" in line

    write_folder(tmp_path / "robot", "robot", seed=7)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(undisturbed.folder / "robot"), str(tmp_path / "robot")))
    line = refusal(capsys, "--resume", str(run))
    assert f"checkpoint {checkpoint} was trained on another sequence of clips: restore the shards" in line
    (run / "config.yaml").write_text(settings)
    (checkpoint / "rank-00000.safetensors").unlink()
    line = refusal(capsys, "--resume", str(run))
    assert f"no checkpoint of run {run} is whole ({checkpoint.name} (rank-00000.safetensors is missing)): bring back the files" in line


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--train.worker", "3"), ("unknown option '--train.worker'", "did you mean 'train.workers'?")),
        (("--warmup.step=3",), ("did you mean 'warmup.steps'?",)),
        (("tinny",), ("unknown recipe 'tinny'", "did you mean 'tiny'?")),
        (("tiny-pretrain",), ("jobs/pretrain.py",)),
        (("--config", "no-such.yaml"), ("no-such.yaml",)),
    ],
)
def test_misspelt_names_are_refused_with_the_nearest(
    args: tuple[str, ...], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *args)
    for part in parts:
        assert part in line


def test_a_misspelt_key_in_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("train:\n  worker: 3\n")
    line = refusal(capsys, "--config", str(tmp_path / "config.yaml"))
    assert "unknown key 'train.worker'" in line
    assert "did you mean 'train.workers'?" in line


def test_debug_shows_where_an_error_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cotrain.main, ["--debug", "--data.mixture", str(tmp_path / "missing"), "1"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert f"{tmp_path}/missing/index.parquet: not found" in error


def test_the_command_line_is_the_real_one(tmp_path: Path) -> None:
    ended = run_job("--data.mixture", str(tmp_path / "missing"), "1")
    assert (ended.code, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/missing/index.parquet: not found")


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()

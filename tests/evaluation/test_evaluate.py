"""The evaluation of a run as a user asks for it, on a cluster of this machine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient

from cola_dist import runtime
from cola_dist.data.decode import probe_video
from cola_dist.errors import UserError
from cola_dist.evaluation.evaluate import NetworkChoice, Request, evaluate, plan
from cola_dist.evaluation.results import ALL, METRICS
from jobs import evaluate as job
from tests.evaluation.networks import fvd_network, lpips_network
from tests.train.harness import run_local, toy_config

pytestmark = pytest.mark.ray
CLIPS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    config = toy_config(folder, "--train.workers=1", "--flow.sampler-steps=2", f"--tracking.uri=sqlite:///{folder}/mlflow.db")
    run_local(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    runtime.connect(2, debug=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cola_dist.runtime.connect", lambda cpus, debug: None)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    return fvd_network(folder / "i3d.pt"), lpips_network(folder / "lpips.pt")


@pytest.fixture(scope="module")
def alone(run: Path, networks: tuple[str, str]) -> tuple[Path, dict[str, Any]]:
    """The folder and results of one worker that measures two clips at once."""
    task = plan(request(run, networks))
    folder = run / "alone"
    return folder, evaluate(task, str(folder), workers=1, batch=2, probe_clips=8)


def request(run: Path, networks: tuple[str, str], clips: int = CLIPS) -> Request:
    return Request(str(run), clips=clips, fvd=NetworkChoice(networks[0]), lpips=NetworkChoice(networks[1]))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "clips.parquet").to_pylist()


def test_figures_do_not_depend_on_workers_and_batches(alone: tuple[Path, dict[str, Any]], run: Path, networks: tuple[str, str]) -> None:
    folder, result = alone
    other = evaluate(plan(request(run, networks)), str(run / "two"), workers=2, batch=3, probe_clips=8)
    for one, two in zip(rows_of(folder), rows_of(run / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value), name
    assert other["figures"][ALL]["fvd"]["value"] == pytest.approx(result["figures"][ALL]["fvd"]["value"], rel=1e-3)
    assert other["protocol"] == result["protocol"]


def test_each_figure_has_an_interval_and_each_clip_a_row(alone: tuple[Path, dict[str, Any]]) -> None:
    folder, result = alone
    assert json.loads(json.dumps(result)) == json.loads((folder / "results.json").read_text())
    assert set(result["figures"]) == {ALL, "robot", "hand"}
    rows = rows_of(folder)
    assert [row["position"] for row in rows] == list(range(CLIPS))
    assert [row["clip"] for row in rows] == list(result["protocol"]["clips"])
    for name in METRICS:
        figure = result["figures"][ALL][name]
        assert figure["low"] <= figure["mean"] <= figure["high"], name
        assert figure["mean"] == pytest.approx(math.fsum(row[name] for row in rows) / CLIPS, abs=1e-12)
    assert result["figures"][ALL]["fvd"]["n"] == CLIPS
    assert result["figures"][ALL]["fvd"]["value"] > 0
    assert result["protocol"]["fvd"]["sha256"]
    assert set(result["probe"]) == {"robot"}
    assert {name: set(score) for name, score in result["probe"]["robot"].items()} == {
        name: {"r2", "l1", "penalty"} for name in ("codes", "random_idm", "frame_difference", "permuted")
    }
    for name in ("rollouts.mp4", "transfer.mp4", "atlas.mp4"):
        assert probe_video((folder / name).read_bytes())[0] == 5
    assert (folder / "atlas.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_what_is_finished_is_not_computed_again(alone: tuple[Path, dict[str, Any]], run: Path, networks: tuple[str, str]) -> None:
    folder, result = alone
    resumed = run / "resumed"
    shutil.copytree(folder, resumed)
    parts = sorted((resumed / "parts").iterdir())
    for lost in (parts[1], resumed / "results.json", resumed / "clips.parquet", resumed / "films.json"):
        lost.unlink()
    # A row that was not measured shows that it is read and not made.
    marked = pq.read_table(parts[0])
    pq.write_table(marked.set_column(marked.column_names.index("psnr"), "psnr", [[77.0] * len(marked)]), parts[0])
    again = evaluate(plan(request(run, networks, CLIPS + 2)), str(resumed), workers=1, batch=4, probe_clips=8)
    rows = rows_of(resumed)
    assert [row["psnr"] for row in rows[:2]] == [77.0, 77.0]
    for one, two in zip(rows_of(folder)[2:], rows[2:], strict=False):
        assert two["psnr"] == pytest.approx(one["psnr"], abs=1e-4)
    assert len(rows) == CLIPS + 2
    assert again["protocol"]["key"] == result["protocol"]["key"]
    (resumed / "parts" / "000004.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"000004\.parquet is damaged .* delete it"):
        evaluate(plan(request(run, networks)), str(resumed), workers=1, batch=4, probe_clips=8)


def test_the_job_prints_stores_and_tracks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result: Mapping[str, Any] = job.main([str(run), "--clips", "4", "--probe-clips", "0"])
    printed = capsys.readouterr()
    assert f"protocol {result['protocol']}" in printed.out
    assert "delta_psnr" in printed.out
    for line in ("no LPIPS: give its network", "no FVD: give its network", "no probe of robot: --probe-clips is 0"):
        assert line in printed.err
    assert not {"lpips", "fvd"} & set(result["figures"])
    folder = Path(result["output"])
    assert folder.parent == run / "evaluation"
    assert all((folder / name).exists() for name in result["files"])
    tracked = json.loads((run / "result.json").read_text())["mlflow_run"]
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    assert result["tracked"]
    assert client.get_run(tracked).info.status == "FINISHED"
    assert client.get_run(tracked).data.metrics["evaluation/psnr"] == pytest.approx(result["figures"]["psnr"]["mean"])
    kept = {Path(file.path).name for file in client.list_artifacts(tracked, f"evaluation/{result['protocol']}")}
    assert kept == set(result["files"])


@pytest.mark.long
def test_a_continuous_bottleneck_gets_no_atlas_and_its_export_no_mlflow(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--train.workers=1", "--warmup.steps=1", "--joint.steps=1", "--flow.sampler-steps=2", "--lam.bottleneck.kind=continuous")
    run_local(toy_config(tmp_path, *options), tmp_path / "run")
    result = job.main([str(tmp_path / "run" / "export"), "--clips", "2", "--output", str(tmp_path / "out")])
    assert "no atlas of codes: this run's bottleneck is continuous and has none" in result["notes"]
    assert not {"atlas.png", "atlas.mp4"} & set(result["files"])
    assert "robot" in result["probe"]
    assert not result["tracked"]
    assert "not in MLflow: " in capsys.readouterr().err


def test_what_a_worker_finds_wrong_is_one_line(run: Path, tmp_path: Path) -> None:
    narrow = NetworkChoice(fvd_network(tmp_path / "narrow.pt", 7))
    with pytest.raises(UserError, match=r"narrow\.pt gave \[2, 7\] where \[2, 400\] is expected") as raised:
        evaluate(plan(Request(str(run), clips=2, fvd=narrow)), str(tmp_path / "out"), workers=1, batch=2, probe_clips=0)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"--workers 99: the cluster has \d+ CPUs"):
        evaluate(plan(Request(str(run), clips=2)), str(tmp_path / "out"), workers=99, batch=2, probe_clips=0)
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "conditioning" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"conditioning/model\.safetensors is missing: export the run again"):
        evaluate(plan(Request(str(tmp_path / "export"), clips=2)), str(tmp_path / "out"), workers=1, batch=2, probe_clips=0)

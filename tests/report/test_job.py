"""jobs/report.py as a user runs it: on real runs, with figures, data and MLflow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from cola_dist.arms import ARMS
from cola_dist.command import run_command
from jobs import report
from tests.report.pages import Page
from tests.report.studies import Made, study_trials, write_sweep
from tests.s3 import serve
from tests.train.harness import run_local, toy_config


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run_command(report.main, options) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_page_figures_and_data_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [*study_trials({"cola": 0.045, "two-stage": 0.055}, 5, 0.0002), Made("two-stage", 9, status="failed", why="lost")]
    sweep = write_sweep(tmp_path / "sweep", trials, every=250)
    options = ("--output", str(tmp_path / "page.html"), "--figures", str(tmp_path / "figures"), "--data", str(tmp_path / "data"))
    result = run(capsys, str(sweep), *options)
    assert (result["arms"], result["trials"], result["finished"], result["damaged"]) == (["cola", "two-stage"], 11, 10, [])
    assert result["winners"]["robot"]["flow_loss"]["winner"] == "cola"
    assert result["winners"]["robot"]["probe_r2"]["winner"] is None
    assert result["winners"]["robot"]["probe_r2"]["verdict"].startswith("no winner")
    assert Page((tmp_path / "page.html").read_text()).conclusions
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(result["figures"])
    assert {"curves-robot.png", "codes-robot.png", "run-robot-cola.png", "rollouts-robot.png"} <= set(result["figures"])
    for name in result["figures"]:
        data = (tmp_path / "figures" / name).read_bytes()
        assert imread(io.BytesIO(data), format="png").shape[1] >= 400
        assert len(data) < 300_000
    rows = pq.read_table(tmp_path / "data" / "trials.parquet").to_pylist()
    assert [(row["arm"], row["seed"], row["status"]) for row in rows[::5]] == [
        ("cola", 0, "finished"), ("two-stage", 0, "finished"), ("two-stage", 9, "failed")
    ]  # fmt: skip
    assert rows[0]["flow_loss"] == pytest.approx(trials[0].loss)
    assert rows[-1]["flow_loss"] is None
    assert rows[-1]["why"] == "lost"
    curves = pq.read_table(tmp_path / "data" / "curves.parquet").to_pylist()
    assert [row["step"] for row in curves if row["trial"] == "cola-robot-0"] == [0, 250, 400, 500, 750, 1000]


def test_figures_of_names_that_look_alike_do_not_replace_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path / "sweep", [Made("cola", 0), Made("a b", 0), Made("a/b", 0)], every=500, video=False)
    result = run(capsys, str(sweep), "--output", str(tmp_path / "page.html"), "--figures", str(tmp_path / "figures"))
    assert [name for name in result["figures"] if "a-b" in name] == ["run-robot-a-b.png", "run-robot-a-b~2.png"]
    assert len(set(result["figures"])) == len(list((tmp_path / "figures").iterdir()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("nowhere",), "nowhere: no sweep there"),
        (("SWEEP", "--reference", "colla"), "did you mean 'cola'?"),
        ((), "no sweep given"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    sweep = write_sweep(tmp_path / "sweep", [Made("cola", 0)], every=500, video=False)
    assert run_command(report.main, [str(sweep) if option == "SWEEP" else option for option in options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_page_is_added_to_the_sweeps_run_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    parent = client.create_run(client.create_experiment("sweeps", artifact_location=(tmp_path / "artifacts").as_uri()))
    sweep = write_sweep(tmp_path / "sweep", [Made("cola", 0)], every=500, video=False, mlflow_parent=parent.info.run_id, tracking_uri=uri)
    page = tmp_path / "page.html"
    assert run(capsys, str(sweep), "--output", str(page))["tracked"], "the sweep says where"
    kept = client.download_artifacts(parent.info.run_id, "report/report.html", str(tmp_path))
    assert Path(kept).read_text() == page.read_text()
    assert client.get_run(parent.info.run_id).info.status == "RUNNING", "the page is no reason to end a run"


def test_without_mlflow_the_page_is_made_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path / "sweep", [Made("cola", 0)], every=500, video=False, mlflow_parent="0123")
    page = tmp_path / "page.html"
    assert run_command(report.main, [str(sweep), "--output", str(page), "--tracking.uri", "http://127.0.0.1:9"]) == 0
    out, error = capsys.readouterr()
    assert page.exists()
    for options, words in (((), "no --tracking.uri given"), (("--tracking.uri", f"sqlite:///{tmp_path}/none.db"), "no database")):
        run_command(report.main, [str(sweep), "--output", str(page), *options])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
    assert not json.loads(out.splitlines()[-1])["tracked"]
    assert error.startswith("not in MLflow: MLflow at http://127.0.0.1:9")
    assert error.count("\n") == 1


def test_sweep_and_outputs_may_lie_in_object_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path / "s3" / "bucket" / "sweep", [Made("cola", 0)], every=500)
    entries = (sweep / "trials.json").read_text().replace(str(tmp_path / "s3" / "bucket"), "s3://bucket")
    (sweep / "trials.json").write_text(entries)
    with serve(tmp_path / "s3", "bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        outputs = ("--output", "s3://bucket/out/page.html", "--data", "s3://bucket/out", "--figures", "s3://bucket/out/figures")
        result = run(capsys, "s3://bucket/sweep", *outputs)
    assert result["finished"] == 1
    page = Page((tmp_path / "s3" / "bucket" / "out" / "page.html").read_text())
    assert len(page.all("video")) == 1
    assert {path.name for path in (tmp_path / "s3" / "bucket" / "out" / "figures").iterdir()} == set(result["figures"])


def test_real_runs_make_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = []
    for arm in ("cola", "no-warmup"):
        for seed in range(2):
            options = ("--train.workers", "1", "--train.seed", str(seed), "--diagnostics.every", "2", "--diagnostics.probe-clips", "16")
            folder = tmp_path / "sweep" / "runs" / f"{arm}-{seed}"
            made = run_local(ARMS[arm](toy_config(tmp_path, *options)), folder)
            entry = {"id": folder.name, "arm": arm, "domain": "robot", "seed": seed, "params": {"train.seed": seed}, "why": ""}
            spent = made["record"]["steering"]["spent_seconds"]
            entries.append(entry | {"status": "finished", "run": str(folder), "spent_seconds": spent, "steps": made["steps"]})
    sweep = write_sweep(tmp_path / "sweep", [])
    (sweep / "trials.json").write_text(json.dumps(entries))
    result = run(capsys, str(sweep), "--output", str(tmp_path / "page.html"), "--data", str(tmp_path / "data"))
    assert (result["finished"], result["damaged"]) == (4, [])
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.all("video")) == 2
    assert "4 of 4 runs were collapsed when they ended" in page.conclusions["arms"]
    assert "after 4 steps of warm-up" in page.conclusions["response"] or "after 0 steps" in page.conclusions["response"]
    last = pq.read_table(tmp_path / "data" / "trials.parquet").to_pylist()[-1]
    assert last["flow_loss"] > 0
    assert (last["total_steps"], last["warmup_steps"]) == (8, 0)

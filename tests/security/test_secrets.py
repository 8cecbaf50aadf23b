"""Planted secrets, searched for in every byte that runs, sweeps, reports and jobs leave behind or print."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cola_dist import storage
from cola_dist.checks import check
from cola_dist.command import run_command
from cola_dist.errors import UserError
from cola_dist.report.analysis import Analysis
from cola_dist.report.origin import origin
from cola_dist.report.page import build, render
from cola_dist.report.raw import write_raw
from cola_dist.report.study import read_study
from cola_dist.settings import from_yaml, to_yaml
from cola_dist.tracking import Tracker, deliver, run_id
from cola_dist.train.job import write_config
from cola_dist.train.sweep.ledger import FAILED, Ledger
from cola_dist.train.sweep.plan import Trial
from jobs import cotrain
from tests.report.studies import Made, write_sweep
from tests.s3 import free_port
from tests.train.harness import run_local, toy_config

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "PLANTED-aws-id-0123456789",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/aws+secret/0123456789",
    "RAY_AUTH_TOKEN": "PLANTED-ray-token-0123456789",
    "HF_TOKEN": "hf_PLANTEDfaceTokenOfThirtyLetters",
    "MLFLOW_TRACKING_PASSWORD": "PLANTED pass word",
}
IN_URI, IN_ENDPOINT, BEARER = "PLANTED-uri-password", "PLANTED-endpoint-password", "PLANTED.bearer.0123456789"
SECRETS = (*ENVIRONMENT.values(), IN_URI, IN_ENDPOINT, BEARER)
MESSAGE = f"PUT refused: Authorization: Bearer {BEARER}, " + ", ".join(ENVIRONMENT.values())
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow puts files below it where nobody says where they belong
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def away() -> str:
    """MLflow with credentials in its address, where nobody answers."""
    return f"http://user:{IN_URI}@127.0.0.1:{free_port()}"


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, and what compressed ones hold."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()
            if path.suffix == ".parquet":
                yield f"{path} (its rows)", str(pq.read_table(path).to_pylist()).encode() + str(pq.read_schema(path).metadata).encode()


def found(folder: Path, printed: str) -> list[str]:
    """Where a secret stands: files, or what was printed."""
    texts = [*written(folder), ("printed", printed.encode())]
    assert len(texts) > 1, "there is something to search"
    return [f"{where}: {secret}" for where, data in texts for secret in SECRETS if secret.encode() in data]


def printed_by(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    out, err = capfd.readouterr()
    return out + err + caplog.text


def test_a_run_whose_mlflow_is_away_and_one_that_fails(
    tmp_path: Path, away: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also what MLflow is told of them later, and going on with one of them."""
    caplog.set_level(logging.DEBUG)
    finish = Tracker.finish
    monkeypatch.setattr(Tracker, "finish", lambda self, status, wait=1.0: finish(self, status, min(wait, 1.0)))
    short = ("--joint.steps=1", "--warmup.steps=1", "--diagnostics.video-clips=0", "--diagnostics.alignment-clips=0")
    short += ("--data.decoded-cache-bytes=0", "--diagnostics.clips=4")
    config = toy_config(tmp_path, "--train.workers=1", f"--tracking.uri={away}", *short)
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    for run in (whole, broken):
        write_config(config, str(run))
    assert run_local(config, whole)["status"] == "finished"

    sound, reads = storage.read_bytes, iter(range(10**6))

    def read(uri: str, start: int = 0, length: int | None = None) -> bytes:
        if length and uri.endswith(".tar") and next(reads) > 10:
            raise OSError(MESSAGE)
        return sound(uri, start, length)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", read)
        failed = run_local(config, broken)
    assert failed["status"] == "failed"
    assert "PUT refused" in failed["error"]
    assert json.loads((broken / "result.json").read_text())["error"] == failed["error"]
    assert run_command(lambda _: failed, []) == 1
    assert (whole / "export" / "lam" / "config.yaml").exists()

    for run in (whole, broken):
        assert deliver(run / "tracking", PATIENCE, f"sqlite:///{tmp_path}/mlflow.db")
        assert run_id(run / "tracking")
    assert (tmp_path / "mlflow.db").exists()
    assert list(tmp_path.glob("mlruns/*/*/artifacts/config.yaml")), "what MLflow keeps is searched too"
    assert found(tmp_path, printed_by(capfd, caplog)) == []

    # Its address is needed again, and the message says where the password goes.
    resume = ["--resume", str(whole), "--dry-run"]
    assert run_command(cotrain.main, resume) == 2
    said = printed_by(capfd, caplog)
    assert "tracking.uri holds a user or password" in said
    assert "also where a run is resumed, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
    assert run_command(cotrain.main, [*resume, f"--tracking.uri=sqlite:///{tmp_path}/mlflow.db"]) == 0
    assert found(tmp_path, said + printed_by(capfd, caplog)) == []


@pytest.mark.parametrize(
    "options",
    [
        [f"--tracking.uri=http://user:{IN_URI}@mlflow:5000"],
        [f"--tracking.uri=http://user:{IN_URI}/more@mlflow:5000"],
        [f"--tracking.uri=mysql://mlflow/db?user=a&password={IN_URI}"],
        ["--data.mixture", f"s3://bucket/x?endpoint=http://user:{IN_ENDPOINT}@host:9000", "1"],
        ["--data.mixture", f"s3://id:{IN_ENDPOINT}@bucket/x", "1"],
        ["--data.stages", f"{{5: {{'s3://bucket/x?endpoint=http://user:{IN_ENDPOINT}@host:9000': 1}}}}"],
        [f"--output=s3://bucket/runs?endpoint=http://user:{IN_ENDPOINT}@host:9000", "--tracking.uri=http://mlflow"],
        [f"--data.latents-cache=s3://bucket/l?endpoint=http://user:{IN_ENDPOINT}@host:9000", "--data.latents=True"],
        [f"--world.pretrained=https://host/w?X-Amz-Signature={IN_ENDPOINT}"],
    ],
)
def test_credentials_in_any_option_are_refused_before_anything_is_written(
    tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    assert run_command(cotrain.main, [*options, "--debug"]) == 2
    out, err = capfd.readouterr()
    assert options[0].partition("=")[0].removeprefix("--").replace("-", "_") in err or "option endpoint must be" in err
    assert found(tmp_path, out + err) == []
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_older_runs_stored_password_is_not_carried_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    text = to_yaml(config).replace("  uri: ''", f"  uri: http://user:{IN_URI}@mlflow:5000")
    assert IN_URI in text
    old = from_yaml(text, "config.yaml")
    with pytest.raises(UserError, match=r"tracking\.uri holds a user or password"):
        check(old)
    assert IN_URI not in to_yaml(old)


def test_a_sweep_its_page_and_its_raw_results(tmp_path: Path, away: str, capfd: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(str(tmp_path / "ledger.json"))
    ledger.begin(Trial(0, "a", "cola", "robot", 0, {}), "run")
    ledger.end("a", FAILED, MESSAGE)
    assert found(tmp_path, "") == []

    about: dict[str, Any] = {"command": f"python jobs/sweep.py --tracking.uri {away}", "overrides": [f"--tracking.uri={away}"]}
    about |= {"tracking_uri": away, "recipe": f"tiny {BEARER and MESSAGE}"}
    trials = [Made("cola", 0), Made("fsq", 1, status="failed", why=MESSAGE)]
    sweep = write_sweep(tmp_path.parent / f"{tmp_path.name}-sweep", trials, every=500, **about)
    study = read_study([str(sweep)])
    analysis = Analysis(study, "cola")
    page = render(analysis, build(analysis, origin(["python", "jobs/report.py", "--tracking.uri", away])))
    (tmp_path / "report.html").write_text(page)
    write_raw(str(tmp_path / "raw"), study)
    assert "PUT refused" in page
    assert found(tmp_path, "".join(capfd.readouterr())) == []


def test_what_a_job_raises_is_printed_without(capfd: pytest.CaptureFixture[str]) -> None:
    def work(_: object) -> dict[str, Any]:
        raise OSError(MESSAGE + " \x1b]0;title\x07")

    for words in ([], ["--debug"]):
        assert run_command(work, words) == 1
        out, err = capfd.readouterr()
        assert "PUT refused" in err
        assert not [secret for secret in SECRETS if secret in out + err]
        assert "\x1b" not in err, "nor does a message steer the terminal"


def test_a_tracker_keeps_no_secret_that_it_is_told(tmp_path: Path, away: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path / "run", away, "told", "told")
    tracker.log_params({"uri": away, "message": MESSAGE})
    tracker.set_tags({"uri": f"mysql://db/mlflow?user=a&password={IN_URI}", "message": MESSAGE})
    tracker.log_text(MESSAGE, "note.txt")
    tracker.finish("FAILED", wait=2.0)
    assert found(tmp_path, caplog.text) == []

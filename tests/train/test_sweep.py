"""Sweeps as a user runs them: healthy trials beside dead ones, budgets, MLflow, figures; killed, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from cola_dist.settings import from_yaml
from cola_dist.train.looks import read_looks
from cola_dist.train.shelf import latest
from cola_dist.train.trace import read_trace
from tests.train.harness import run_local, toy_config
from tests.train.jobs import Ended, Job, job, newest_step

pytestmark = pytest.mark.ray

SHORT, LONG = 8, 500
BUDGET = 6.0


def write_space(folder: Path, **space: Any) -> Path:
    """A space on toy runs with one worker, whose own keys are ``space``."""
    options = ("--train.workers", "1", "--train.checkpoint-every", "4", "--diagnostics.every", "12", "--diagnostics.video-clips", "0")
    tree = dataclasses.asdict(toy_config(folder, *options))
    fixed = {name: tree[name] for name in ("data", "lam", "conditioning", "world", "warmup", "optim", "train", "diagnostics")}
    for name in ("seed", "budget_seconds"):
        del fixed["train"][name]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"fixed": fixed, **space}))
    return path


def sweep(*args: str | Path) -> Ended:
    """Run the job to its end."""
    with job(*args, script="sweep.py") as running:
        return running.wait()


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@dataclass(frozen=True)
class Study:
    """A finished sweep: its folder, result, trials by (rate, steps), and what it said."""

    folder: Path
    result: Mapping[str, Any]
    trials: Mapping[tuple[float, int], Mapping[str, Any]]
    ended: Ended


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Four trials, two at once: a short and a long one at a sound learning rate, the long one dead; both at a rate at which the loss is lost."""
    folder = tmp_path_factory.mktemp("study")
    space = write_space(folder, fields={"joint.lr_lam": [1e-3, 1e30], "joint.steps": [SHORT, LONG]}, collapse={"after_looks": 2})
    ended = sweep(space, "--output", folder / "runs", "--concurrent", "2", "--budget", str(BUDGET))
    result = ended.result
    rows = read(Path(result["sweep"]), "trials.json")
    trials = {(row["params"]["joint.lr_lam"], row["params"]["joint.steps"]): row for row in rows}
    return Study(Path(result["sweep"]), result, trials, ended)


def test_the_sweep_goes_on_with_the_healthy_trials_and_says_which_failed_and_why(study: Study) -> None:
    assert study.result["status"] == "finished"
    assert study.result["trials"] == {"finished": 1, "stopped": 1, "failed": 2, "running": 0}
    assert {name: trial["status"] for name, trial in study.trials.items()} == {
        (1e-3, SHORT): "finished",
        (1e-3, LONG): "stopped",
        (1e30, SHORT): "failed",
        (1e30, LONG): "failed",
    }
    assert study.result["best"]["id"] == study.trials[1e-3, SHORT]["id"]
    assert [one["id"] for one in study.result["failed"]] == [study.trials[1e30, steps]["id"] for steps in (SHORT, LONG)]
    for steps in (SHORT, LONG):
        why = study.trials[1e30, steps]["why"]
        assert why.startswith("the loss or its gradient was not finite for 3 steps in a row")
        assert why in study.ended.stdout.replace("\n", " ")
        assert f"{study.trials[1e30, steps]['id']} failed: " in study.ended.stderr
    assert "Traceback" not in study.ended.stderr


def test_a_collapsed_trial_is_stopped_with_a_checkpoint_once_its_share_is_spent(study: Study) -> None:
    trial = study.trials[1e-3, LONG]
    looks = read_looks(trial["run"])
    assert trial["why"].startswith("collapsed at 2 evaluations in a row")
    assert 0.4 * BUDGET <= trial["spent_seconds"] < BUDGET
    assert [look["verdict"] for look in looks[-2:]] == ["collapsed", "collapsed"]
    result = read(Path(trial["run"]), "result.json")
    assert (result["status"], result["steps"]) == ("interrupted", trial["steps"])
    assert result["checkpoint"] == latest(trial["run"])


def test_a_trial_that_ends_before_its_budget_is_marked(study: Study) -> None:
    trial = study.trials[1e-3, SHORT]
    assert trial["steps"] == 4 + 4 * SHORT, "with a budget the last phase may take four times its steps"
    assert f"of {BUDGET:g} s: for equal compute raise joint.steps" in trial["why"]
    assert trial["value"] == read_looks(trial["run"])[-1]["indicators"]["flow_loss"]


def test_the_folder_says_what_the_sweep_was_about(study: Study) -> None:
    about = read(study.folder, "sweep.json")
    assert {name: about[name] for name in ("recipe", "space", "budget_seconds", "metric")} == {
        **{"recipe": "tiny", "space": "study"},
        **{"budget_seconds": BUDGET, "metric": "flow_loss"},
    }
    assert "jobs/sweep.py" in about["command"]
    for trial in study.trials.values():
        run = Path(trial["run"])
        assert run == study.folder / "trials" / trial["id"]
        config = from_yaml((run / "config.yaml").read_text(), "config")
        assert config.joint.lr_lam == trial["params"]["joint.lr_lam"]
        assert (config.recipe, config.train.budget_seconds) == ("tiny+cola", BUDGET)


def test_trials_are_nested_in_one_mlflow_run(study: Study) -> None:
    client = MlflowClient(f"sqlite:///{study.folder.parent}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("cola-dist").experiment_id])
    parent = next(run for run in runs if run.info.run_name == study.folder.name)
    assert parent.info.run_id == study.result["mlflow_parent"] == read(study.folder, "sweep.json")["mlflow_parent"]
    assert parent.info.status == "FINISHED"
    assert "parallel-coordinates.png" not in study.result["figures"] or (study.folder / "parallel-coordinates.png").exists()
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"space.yaml", "trials.json", *study.result["figures"]}
    assert {name: parent.data.metrics[f"trials/{name}"] for name in ("finished", "stopped", "failed")} == {
        **{"finished": 1.0, "stopped": 1.0},
        **{"failed": 2.0},
    }
    nested = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(nested) == {trial["id"] for trial in study.trials.values()}
    assert len(runs) == 5
    states = {trial["status"]: nested[trial["id"]].info.status for trial in study.trials.values()}
    assert states == {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@pytest.mark.long
def test_a_metric_that_no_trial_logs_is_named(tmp_path: Path) -> None:
    ended = sweep(write_space(tmp_path, metric="flow_lost", fields={"joint.steps": [LONG]}), "--output", tmp_path / "runs")
    assert ended.code == 1
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["status"], result["trials"]["failed"], result["best"]) == ("failed", 1, None)
    assert "no evaluation logs the metric 'flow_lost' (did you mean 'flow_loss'?); there are: " in result["failed"][0]["why"]
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: all 1 trials failed: 000-cola-s0-")


def running_trial(running: Job, output: Path, beyond: int) -> Path:
    """The folder of the first long trial, once it has a checkpoint beyond that step."""

    def there() -> list[Path]:
        return [run for run in output.glob("study-*/trials/002-*") if newest_step(run) > beyond]

    running.wait_until(lambda: bool(there()))
    return there()[0]


@pytest.mark.fault
@pytest.mark.long
def test_a_sweep_that_is_killed_and_interrupted_ends_with_the_losses_of_undisturbed_runs(tmp_path: Path) -> None:
    space = write_space(tmp_path, fields={"joint.steps": [SHORT, LONG]}, seeds=2)
    with job(space, "--output", tmp_path / "runs", "--concurrent", "2", script="sweep.py") as killed:
        long = running_trial(killed, tmp_path / "runs", beyond=8)
        folder = long.parent.parent
        with job("--resume", folder, script="sweep.py") as second:
            refused = second.wait()
        killed.kill_alone()
        assert refused.code == 2
        assert f"sweep {folder} is running in another process" in refused.stderr
        before = read(folder, "trials.json")
        assert "finished" in {trial["status"] for trial in before}
        assert before[2]["status"] == "running"
        struck_at = newest_step(long)
        with job("--resume", folder, "--concurrent", "2", script="sweep.py") as running:
            running.wait_until(lambda: newest_step(long) > struck_at + 40)
            running.process.send_signal(signal.SIGTERM)
            stopped = running.wait()
    assert stopped.result["status"] == "interrupted"
    assert read(long, "result.json")["status"] == "interrupted"
    assert read(folder, "trials.json")[2]["status"] == "running"
    assert struck_at < newest_step(long) < 4 + LONG

    result = sweep("--resume", folder.name, "--output", tmp_path / "runs", "--concurrent", "2").result
    assert (result["status"], result["trials"]["finished"]) == ("finished", 4)
    trials = {trial["id"]: trial for trial in read(folder, "trials.json")}
    assert all(trials[trial["id"]] == trial for trial in before if trial["status"] == "finished"), "what had ended is left alone"
    assert {path.name for path in (folder / "trials").iterdir()} == set(trials)
    for trial in (read(folder, "trials.json")[0], read(folder, "trials.json")[2]):
        config = from_yaml((Path(trial["run"]) / "config.yaml").read_text(), "config")
        alone = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=""), output=str(tmp_path / "alone"))
        run_local(alone, tmp_path / "alone" / trial["id"])
        assert read_trace(trial["run"]) == read_trace(str(tmp_path / "alone" / trial["id"]))
        assert trial["value"] == read_looks(str(tmp_path / "alone" / trial["id"]))[-1]["indicators"]["flow_loss"]

    assert {"parallel-coordinates.png", "heat-maps.png"} == set(result["figures"])
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("cola-dist").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted([folder.name, *trials])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(result["mlflow_parent"])} >= {"parallel-coordinates.png", "heat-maps.png"}

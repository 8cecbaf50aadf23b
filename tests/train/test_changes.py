"""A resumed run's settings: what may change from its checkpoint on, and the record that is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.methods import build_method
from cola_dist.settings import from_yaml, parse_job
from cola_dist.train.checkpoint import CheckpointWriter
from cola_dist.train.job import resolve, write_config
from cola_dist.train.shelf import Position, latest, read_manifest
from cola_dist.train.stage import check_fit
from cola_dist.train.trace import read_trace
from tests.train.harness import run_local, toy_config

STEP, BATCH = 4, 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 8 steps, a stage at step 2, whose newest checkpoint stands at step 4."""
    folder = tmp_path / "runs" / "mine"
    config = with_stages(tmp_path, f"{{2: {{{tmp_path}/robot: 1}}}}")
    write_config(config, str(folder))
    order = open_reader(config.data, config.train.seed, global_batch=BATCH).order
    writer = CheckpointWriter(str(folder), rank=0, world=1, attempt="first", keep=2)
    writer.save(Position(STEP, "warmup", "tiny", order.hash_until(STEP * BATCH), {}), [], {}, {}, {})
    writer.wait()
    return folder


def with_stages(folder: Path, stages: str) -> RunConfig:
    return toy_config(folder, "--data.stages", stages)


def resumed(run: Path, *options: str) -> RunConfig:
    """The configuration that a job resumes the run with."""
    job = parse_job(("--resume", str(run), *options), default_recipe="tiny", prog="jobs/cotrain.py", method="cotrain")
    return resolve(job, "fresh")[0]


def check_clips(config: RunConfig, run: Path) -> None:
    """What a job checks before it goes on from a checkpoint."""
    manifest = read_manifest(latest(str(run)) or "")
    order = open_reader(config.data, config.train.seed, global_batch=BATCH).order
    check_fit(manifest, config, build_method(config, bf16=False), order.hash_until(manifest.position.step * BATCH))


def test_stages_from_the_checkpoint_on_are_accepted_and_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robot, hand = (f"{run.parents[1]}/{name}" for name in ("robot", "hand"))
    first = resumed(run, "--data.stages", f"{{2: {{{robot}: 1}}, 4: {{{hand}: 1}}}}")
    assert first.data.stages == {2: {robot: 1.0}, 4: {hand: 1.0}}
    check_clips(first, run)
    assert not (run / "changes.yaml").exists(), "asking changes nothing"
    write_config(first, str(run))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("resumed at step 4 with other settings: data.stages: {2: ")
    second = resumed(run, "--joint.steps", "6", "--train.workers", "1")
    check_clips(second, run)
    write_config(second, str(run))
    assert yaml.safe_load((run / "changes.yaml").read_text()) == [
        {"step": 4, "changes": {"data.stages": {"from": {2: {robot: 1.0}}, "to": {2: {robot: 1.0}, 4: {hand: 1.0}}}}},
        {"step": 4, "changes": {"joint.steps": {"from": 4, "to": 6}, "train.workers": {"from": 2, "to": 1}}},
    ]
    assert from_yaml((run / "config.yaml").read_text(), "config.yaml") == second


def test_an_unchanged_run_leaves_no_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    config = resumed(run)
    check_clips(config, run)
    write_config(config, str(run))
    assert not (run / "changes.yaml").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stages", ["{}", "{2: {robot: 2, hand: 1}}", "{2: {robot: 1}, 3: {hand: 1}}", "{1: {robot: 1}}"])
def test_stages_before_the_checkpoint_are_refused_with_its_step(run: Path, stages: str) -> None:
    for name in ("robot", "hand"):
        stages = stages.replace(name, f"{run.parents[1]}/{name}")
    with pytest.raises(UserError, match=r"data\.stages before step 4, where the newest checkpoint stands: ") as refusal:
        resumed(run, "--data.stages", stages)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"was trained on another sequence of clips"):
        check_clips(with_stages(run.parents[1], stages), run)


def test_other_clips_are_refused_beside_a_new_stage(run: Path) -> None:
    late = f"{{2: {{{run.parents[1]}/robot: 1}}, 5: {{{run.parents[1]}/hand: 1}}}}"
    with pytest.raises(UserError, match=r"cannot be resumed with other settings \(data.mixture_block: 8 in the run, 16 asked for\)"):
        resumed(run, "--data.stages", late, "--data.mixture_block", "16")
    with pytest.raises(UserError, match=r"was trained on another sequence of clips"):
        check_clips(toy_config(run.parents[1], "--data.stages", late, "--data.mixture_block", "16"), run)


def test_a_stage_added_on_resume_trains_as_if_it_had_been_there(tmp_path: Path) -> None:
    runs = {name: tmp_path / "runs" / name for name in ("plain", "whole", "resumed")}
    plain = toy_config(tmp_path, "--train.workers", "1", "--joint.steps", "6")
    staged = toy_config(tmp_path, "--train.workers", "1", "--joint.steps", "6", "--data.stages", f"{{6: {{{tmp_path}/hand: 1}}}}")
    run_local(plain, runs["plain"])
    run_local(staged, runs["whole"])
    run_local(plain, runs["resumed"], stop_at=5)
    assert run_local(staged, runs["resumed"], stop_at=7)["status"] == "interrupted"
    with pytest.raises(UserError, match=r"was trained on another sequence of clips"):
        run_local(plain, runs["resumed"])
    assert run_local(staged, runs["resumed"])["status"] == "finished"
    lines = {name: read_trace(str(run)) for name, run in runs.items()}
    assert lines["resumed"] == lines["whole"]
    assert lines["whole"][:6] == lines["plain"][:6]
    assert all(one.ids != other.ids for one, other in zip(lines["whole"][6:], lines["plain"][6:], strict=True))

"""Runs whose phases are not those of the plain recipe, through the real loop: arms, rules that change the course, budgets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_dist.arms import ARMS
from cola_dist.config import RunConfig
from cola_dist.diagnostics.monitor import Monitor
from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.looks import read_looks
from cola_dist.train.shelf import committed
from cola_dist.train.trace import read_trace
from tests.train.harness import run_local, toy_config


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


def config_of(toys: Path, *options: str) -> RunConfig:
    config = toy_config(toys, "--train.workers", "1", "--train.keep-checkpoints", "100", "--diagnostics.video-clips", "0", *options)
    return replace(config, diagnostics=replace(config.diagnostics, alignment_clips=0))


def spans(result: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(span["phase"]["name"], span["first"], span["end"]) for span in result["record"]["steering"]["course"]]


def test_two_stages_share_one_engine_and_the_frozen_lam_travels_by_value(toys: Path) -> None:
    run = toys / "runs" / "two-stage"
    result = run_local(ARMS["two-stage"](config_of(toys)), run)
    assert spans(result) == [("lam", 0, 4), ("joint", 4, 8)]
    hashes = result["record"]["hashes"]
    assert hashes["lam_start"]["world"] == hashes["lam_end"]["world"]
    assert hashes["lam_end"]["lam"] == hashes["joint_start"]["lam"] == hashes["joint_end"]["lam"] != hashes["lam_start"]["lam"]
    assert hashes["joint_end"]["conditioning"] != hashes["joint_start"]["conditioning"]
    last = Checkpoint(committed(str(run / "checkpoints"))[-1])
    assert dict(last.position.adam_steps) == {"lam": 4, "conditioning": 4, "world": 4}
    assert not last.position.frozen
    assert torch.isfinite(last.read("exp_avg_sq", "lam.idm.embed.weight")).all()
    assert "forward_error" in result["record"]["evaluations"]["joint_end"]


def test_a_run_with_a_frozen_lam_resumes_to_the_same_losses(toys: Path) -> None:
    config = ARMS["freeze-lam-after-warmup"](config_of(toys))
    whole, parted = toys / "runs" / "whole", toys / "runs" / "parted"
    run_local(config, whole)
    assert run_local(config, parted, stop_at=6)["status"] == "interrupted"
    assert run_local(config, parted)["status"] == "finished"
    assert read_trace(str(parted)) == read_trace(str(whole))


def test_the_budget_ends_a_run_and_more_of_it_goes_on(toys: Path) -> None:
    run = toys / "runs" / "budget"
    result = run_local(config_of(toys, "--train.budget-seconds", "1e-6"), run)
    assert (result["status"], result["steps"]) == ("finished", 1)
    assert "budget of 1e-06 s is spent" in result["record"]["steering"]["course"][-1]["why"]
    assert result["record"]["steering"]["spent_seconds"] > 1e-6
    result = run_local(config_of(toys), run)
    assert (result["steps"], spans(result)) == (8, [("warmup", 0, 4), ("joint", 4, 8)])


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verdicts of the looks to come; after the last one all are healthy."""
    coming: list[str] = []
    monkeypatch.setattr(Monitor, "verdict", lambda *_: coming.pop(0) if coming else "healthy")
    return coming


def test_an_adaptive_warm_up_ends_by_its_indicators(toys: Path, verdicts: list[str]) -> None:
    options = (
        "--warmup.exit",
        "adaptive",
        "--warmup.steps",
        "12",
        "--warmup.min-steps",
        "2",
        "--warmup.window",
        "2",
        "--warmup.settled",
        "9",
    )
    verdicts += ["collapsed", "collapsed", "at risk"]
    run = toys / "runs" / "adaptive"
    result = run_local(config_of(toys, *options, "--diagnostics.every", "2"), run)
    assert spans(result) == [("warmup", 0, 6), ("joint", 6, 10)]
    steering = result["record"]["steering"]
    assert [(ruling["step"], ruling["act"]) for ruling in steering["rulings"]] == [(2, ""), (4, ""), (6, "end")]
    assert "healthy and settled" in steering["course"][0]["why"]
    assert "warmup_end" in result["record"]["evaluations"]
    assert result["record"]["hashes"]["warmup_end"]["lam"] == result["record"]["hashes"]["joint_start"]["lam"]
    names = {look["step"]: look["name"] for look in read_looks(str(run))}
    assert names == {0: "start", 2: "", 4: "", 6: "warmup_end", 8: "", 10: "joint_end"}


def test_the_guard_returns_to_warm_up_once_and_the_generator_keeps_its_weights_and_moments(toys: Path, verdicts: list[str]) -> None:
    options = ("--joint.guard", "warmup", "--joint.guard-after", "2", "--joint.guard-steps", "2", "--joint.steps", "12")
    verdicts += ["collapsed"] * 20
    run = toys / "runs" / "guarded"
    config = config_of(toys, *options, "--diagnostics.every", "2", "--train.checkpoint-every", "1", "--optim.ema-decay", "0.5")
    result = run_local(config, run)
    assert spans(result) == [("warmup", 0, 4), ("joint", 4, 8), ("warmup-2", 8, 10), ("joint-2", 10, 16)]
    hashes = result["record"]["hashes"]
    assert hashes["joint_end"]["world"] == hashes["warmup-2_start"]["world"] == hashes["warmup-2_end"]["world"]
    assert hashes["warmup-2_end"]["world"] == hashes["joint-2_start"]["world"] != hashes["joint-2_end"]["world"]
    acts = [ruling["act"] for ruling in result["record"]["steering"]["rulings"]]
    assert acts[0] == "warmup"
    assert set(acts[1:]) == {"log"}, "once is enough; after that it is only said"
    found = {Checkpoint(uri).position.step: Checkpoint(uri) for uri in committed(str(run / "checkpoints"))}
    name = "world.out.weight"
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        assert torch.equal(found[8].read(kind, name), found[10].read(kind, name)), kind
        assert not torch.equal(found[10].read(kind, name), found[16].read(kind, name)), kind
    assert found[10].position.adam_steps["world"] == 4

    again = toys / "runs" / "guarded-parted"
    verdicts += ["collapsed"] * 20
    assert run_local(config, again, stop_at=9)["status"] == "interrupted"
    verdicts[:] = ["collapsed"] * 20
    assert spans(run_local(config, again)) == spans(result)
    assert [line.loss for line in read_trace(str(again))] == [line.loss for line in read_trace(str(run))]


def test_the_guard_may_stop_the_run(toys: Path, verdicts: list[str]) -> None:
    verdicts += ["collapsed"] * 20
    options = ("--joint.guard", "stop", "--joint.guard-after", "1", "--diagnostics.every", "2")
    result = run_local(config_of(toys, *options), toys / "runs" / "stopped")
    assert (result["status"], result["steps"]) == ("finished", 6)
    assert "not healthy" in result["record"]["steering"]["course"][-1]["why"]


def test_nothing_is_called_collapsed_before_its_grace_is_over(toys: Path, verdicts: list[str]) -> None:
    verdicts += ["collapsed"] * 20
    run = toys / "runs" / "grace"
    run_local(config_of(toys, "--diagnostics.every", "2", "--diagnostics.grace-steps", "5"), run)
    assert [look["verdict"] for look in read_looks(str(run))] == ["", "at risk", "at risk", "collapsed", "collapsed"]


def test_looks_hold_what_a_report_needs(toys: Path) -> None:
    run = toys / "runs" / "looks"
    config = config_of(toys)
    run_local(replace(config, diagnostics=replace(config.diagnostics, alignment_clips=8, video_clips=2)), run)
    start, warmup, joint = read_looks(str(run))
    assert [look["name"] for look in (start, warmup, joint)] == ["start", "warmup_end", "joint_end"]
    assert start["spent_seconds"] == 0 < warmup["spent_seconds"] < joint["spent_seconds"]
    for look in (start, warmup, joint):
        assert sum(map(sum, look["code_counts"])) == 8 * 4 * 2
        assert len(look["clips"]["position"]) == 8
        assert sum(look["clips"]["own"]) / 8 == pytest.approx(look["indicators"]["flow_loss"], rel=0.2)
        assert {"rollout_psnr", "delta_psnr", "modulation_share", "gradient_norm/flow/lam"} <= look["indicators"].keys()
    assert "gradient_norm/flow/world" in joint["indicators"]
    assert "gradient_norm/flow/world" not in warmup["indicators"]
    assert not any(name.startswith("alignment") for name in joint["indicators"]), "four episodes are too few to compare"
    assert (run / "looks" / "step-00000008.mp4").read_bytes()[4:8] == b"ftyp"
    json.dumps(joint, allow_nan=False)

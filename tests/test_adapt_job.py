"""The adaptation job as a user starts it: a curve over shares of the episodes under Ray Train, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cola_dist.settings import from_yaml
from cola_dist.train.trace import read_trace
from tests.train.harness import run_local, toy_config
from tests.train.jobs import job
from tests.train.test_adapt import OPTIONS


@pytest.mark.ray
@pytest.mark.long
def test_a_curve_over_shares_of_the_episodes(tmp_path: Path) -> None:
    run_local(toy_config(tmp_path, "--train.workers=1"), tmp_path / "runs" / "start")
    options = (*OPTIONS, "--train.workers=2", "--data.mixture", str(tmp_path / "robot"), "1", "--output", str(tmp_path / "runs"))
    with job("start", "--shares", "1", "0.3", *options, script="adapt.py") as running:
        ended = running.wait()
    result = ended.result
    assert result["status"] == "finished"
    assert [(point["share"], point["episodes"]) for point in result["points"]] == [(0.3, 2), (1.0, 4)]
    assert "held-out clips driven by real actions" in ended.stdout
    series = Path(result["series"])
    assert (series / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((series / "curve.json").read_text()) == result["points"]
    for point in result["points"]:
        run = Path(point["run"])
        config = from_yaml((run / "config.yaml").read_text(), "config.yaml")
        assert config.adapt.share_of_episodes == point["share"]
        assert config.adapt.action_dim == 2
        end = json.loads((run / "result.json").read_text())["record"]["evaluations"]["adapt_end"]
        assert point["rollout_psnr"] == end["rollout_psnr"]
        assert (run / "export" / "adapter" / "config.json").exists()
    # What a worker trained on through Ray Data is what a reader in one process gives.
    config = from_yaml((Path(result["points"][1]["run"]) / "config.yaml").read_text(), "config.yaml")
    plain = tmp_path / "runs" / "plain"
    run_local(config, plain)
    one, other = (read_trace(str(run)) for run in (Path(result["points"][1]["run"]), plain))
    assert [line.ids for line in one] == [line.ids for line in other]
    assert [line.loss for line in one] == pytest.approx([line.loss for line in other], rel=1e-5)


def test_the_job_says_in_one_line_what_it_needs(tmp_path: Path) -> None:
    with job(tmp_path, script="adapt.py") as running:
        ended = running.wait()
    assert ended.code == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path} holds no export (no lam/config.yaml): give the folder of a finished run of jobs/cotrain.py")

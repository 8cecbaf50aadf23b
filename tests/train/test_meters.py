"""What the loop says of a run while it goes on, and that it says it without Ray as well."""

from __future__ import annotations

import json
import os
import re
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from cola_dist.train.looks import VERDICTS
from cola_dist.train.meters import GAUGES, NullMeters
from cola_dist.train.session import run_worker
from cola_dist.train.worker import LocalWorker
from tests.train.harness import toy_config
from tests.train.jobs import (
    JOINT,
    WARMUP,
    flip_bytes,
    job,
    newest_step,
    steps_by_attempt,
    wait_for_run,
    write_config,
    write_damaged_sources,
)


class Listener(NullMeters):
    """Keeps all that is said."""

    def __init__(self) -> None:
        self.phase = ""
        self.said: dict[str, list[tuple[str, float]]] = {}
        self.totals: dict[tuple[str, str], float] = {}

    def enter(self, phase: str) -> None:
        self.phase = phase

    def show(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.said.setdefault(name, []).append((self.phase, float(value)))

    def skipped(self, totals: Mapping[tuple[str, str], float]) -> None:
        self.totals |= totals


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Listener:
    """A run of 4 + 4 steps in this process, two of whose clips are damaged."""
    folder, listener = tmp_path_factory.mktemp("heard"), Listener()
    config = toy_config(folder, "--train.workers", "1", "--data.max-bad-share", "0.9", "--data.decoded-cache-bytes", "0")
    flip_bytes(folder / "robot", "robot-0000", "robot-0001")
    os.environ["LOCAL_RANK"] = "0"
    result = run_worker(config, str(folder / "runs" / "heard"), LocalWorker(torch.device("cpu"), meters=listener))
    assert result["status"] == "finished"
    return listener


def test_all_is_said_but_restarts_which_ray_counts(heard: Listener) -> None:
    assert heard.said.keys() == GAUGES.keys() - {"restarts"}


def test_steps_belong_to_their_phase_and_looks_to_theirs(heard: Listener) -> None:
    assert heard.said["step"] == [("", 0), *(("warmup" if step <= 4 else "joint", step) for step in range(1, 9))]
    assert [phase for phase, _ in heard.said["loss"]] == ["warmup"] * 4 + ["joint"] * 4
    assert [phase for phase, _ in heard.said["perplexity"]] == ["warmup", "warmup", "joint"]
    assert [phase for phase, _ in heard.said["verdict"]] == ["warmup", "joint"], "before training there is nothing to judge"
    assert {value for _, value in heard.said["verdict"]} <= set(VERDICTS.values())
    assert {value for _, value in heard.said["steps_planned"]} == {8}


def test_figures_are_of_their_kind(heard: Listener) -> None:
    figures = {name: [value for _, value in said] for name, said in heard.said.items()}
    assert all(0 <= share <= 1 for share in figures["data_stall_ratio"])
    assert all(seconds > 0 for seconds in figures["step_seconds"] + figures["checkpoint_seconds"])
    assert all(value == pytest.approx(8 / s) for value, s in zip(figures["clips_per_second"], figures["step_seconds"], strict=True))
    commits = figures["checkpoint_timestamp_seconds"]
    assert commits == sorted(commits)
    assert commits[-1] > commits[0]
    assert figures["checkpoint_every_steps"] == [2]
    assert max(figures["tracking_backlog_bytes"]) > 0, "MLflow hears of it later"


def test_skipped_clips_are_counted_by_source_and_reason(heard: Listener) -> None:
    assert heard.totals[("robot", "checksum")] > 0
    assert {total for (source, _), total in heard.totals.items() if source == "hand"} == {0}


def test_verdicts_have_the_numbers_that_their_description_says() -> None:
    text = GAUGES["verdict"]
    assert all(f"{number:g} {verdict}" in text for verdict, number in VERDICTS.items())


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.long
def test_a_job_that_loses_a_worker_says_so_to_prometheus_and_in_its_lines(tmp_path: Path) -> None:
    write_damaged_sources(tmp_path)
    config = write_config(tmp_path, "--data.max-bad-share", "0.9", "--data.decoded-cache-bytes", "0")
    scraped: dict[str, float] = {}
    # A short path, because sockets lie in it. A job's own Ray gathers no metrics unless it is told to.
    with tempfile.TemporaryDirectory(prefix="cola-", dir="/tmp") as session:
        environment = {"COLA_LOG_FORMAT": "json", "RAY_TMPDIR": session, "RAY_enable_metrics_collection": "true", "RAY_DEDUP_LOGS": "0"}
        with job("--config", config, "--debug", environment=environment) as running:
            run = wait_for_run(running, tmp_path / "runs-0")

            def says(name: str, at_least: float) -> bool:
                scraped.update(scrape(Path(session), run.name))
                return scraped.get(name, -1.0) >= at_least

            running.wait_until(lambda: newest_step(run) >= 4 and says("step", 1))
            assert (scraped["restarts"], scraped["steps_planned"]) == (0, WARMUP + JOINT)
            running.kill_a_worker()
            running.wait_until(lambda: says("restarts", 1))
            ended = running.wait()
    assert ended.result["status"] == "finished"
    # Ray puts a worker's name before its line, and a colour's end behind it.
    found = [json.JSONDecoder().raw_decode(line, line.index('{"time"'))[0] for line in ended.stderr.splitlines() if '{"time"' in line]
    skipped = [line for line in found if line["message"].startswith("skipped ") and "step" in line]
    assert {line["run"] for line in skipped} == {run.name}
    assert {line["attempt"] for line in skipped} <= set(steps_by_attempt(run))
    assert {line["rank"] for line in skipped} <= {0, 1}
    assert all(0 < line["step"] <= WARMUP + JOINT for line in skipped)
    assert skipped


def scrape(session: Path, run: str) -> dict[str, float]:
    """The newest value of each gauge of the run, from the agent of the only node of the Ray below ``session``; nothing while there is none."""
    for written in session.glob("ray/session_2*/metrics_export_port_*"):
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{int(written.read_text())}/metrics", timeout=10).read().decode()
        except (OSError, ValueError):
            continue
        series = re.findall(rf'^ray_cola_(\w+)\{{.*run="{run}".*\}} (\S+)$', page, re.MULTILINE)
        return {name: float(value) for name, value in series}
    return {}

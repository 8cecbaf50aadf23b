"""Clocks that are wrong: steps say which checkpoint is the newest, and storage's own clock how old a file is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cola_dist.train.shelf import committed, latest
from cola_dist.train.trace import read_trace
from cola_dist.train.upkeep import clearing
from tests.outcomes import RECOVERED, Outcomes
from tests.train.harness import run_local, toy_config
from tests.train.test_keeping import RANK0, shelf_of, step_of

DAY_S = 24 * 3600.0


def turn_the_clock(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """What this process takes for the time from now on, and writes into its files as such."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + days * DAY_S)


@pytest.mark.parametrize("days", [-2.0, 2.0])
def test_a_write_that_goes_on_is_left_alone_whatever_the_clock_of_who_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float
) -> None:
    shelf_of(tmp_path, 4)
    for step, age in ((6, DAY_S), (8, 0.0)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}-x"
        folder.mkdir()
        (folder / RANK0).write_bytes(b"half")
        written = time.time() - age
        os.utime(folder / RANK0, (written, written))
    turn_the_clock(monkeypatch, days)
    plan = {entry.step: (goes, why) for entry, goes, why in clearing(str(tmp_path), 1, False)}
    assert plan == {
        4: (False, "whole"),
        6: (True, "interrupted write"),
        8: (False, "no manifest: may still be being written"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("days", [-400.0, 400.0])
def test_a_run_goes_on_from_its_newest_step_on_a_machine_of_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: Outcomes, days: float
) -> None:
    config = toy_config(tmp_path, "--train.workers", "1", "--train.keep-checkpoints", "2")
    run_local(config, tmp_path / "plain")
    run = tmp_path / "run"
    assert run_local(config, run, stop_at=5)["status"] == "interrupted"
    kept = committed(str(run / "checkpoints"))
    # The older it is by its step, the newer it looks.
    for place, uri in enumerate(kept):
        for file in Path(uri).iterdir():
            moment = time.time() + (10 - place) * DAY_S
            os.utime(file, (moment, moment))
    turn_the_clock(monkeypatch, days)
    assert latest(str(run)) == kept[-1]
    assert run_local(config, run)["status"] == "finished"
    assert [step_of(uri) for uri in committed(str(run / "checkpoints"))] == [6, 8], "the newest two by step"
    assert read_trace(str(run)) == read_trace(str(tmp_path / "plain"))
    outcomes.add("clock skew", f"a resume {days:+.0f} days away, files' times in reverse", RECOVERED, 0, None)

"""The script that says whether a change of the code left the loss as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cola_dist.train.trace import Trace, TraceLine

SCRIPT = Path(__file__).parents[1] / "bench" / "loss_compare.py"


def run(folder: Path, losses: list[float], ids: int = 7) -> str:
    trace = Trace(str(folder))
    for step, loss in enumerate(losses):
        trace.add(TraceLine(step, loss, ids + step))
    trace.flush()
    return str(folder)


def compare(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


@pytest.mark.parametrize(
    ("second", "options", "code", "found"),
    [
        ([1.0, 0.5, 0.25], [], 0, {"steps": 3, "same": True, "largest_relative_difference": 0.0, "other_loss_from": None}),
        ([1.0, 0.5, 0.26], [], 1, {"steps": 3, "same": False, "other_loss_from": 2}),
        ([1.0, 0.5, 0.26], ["--tolerance", "0.05"], 0, {"same": True}),
        ([1.0, 0.5], [], 0, {"steps": 2, "only_in_one": 1, "same": True}),
        ([1.0, float("nan"), 0.25], [], 1, {"same": False, "other_loss_from": 1}),
    ],
)
def test_losses_are_compared_step_by_step(
    tmp_path: Path, second: list[float], options: list[str], code: int, found: dict[str, Any]
) -> None:
    ended, line = compare(run(tmp_path / "a", [1.0, 0.5, 0.25]), run(tmp_path / "b", second), *options)
    assert ended == code
    assert {name: line[name] for name in found} == found


def test_other_clips_are_seen(tmp_path: Path) -> None:
    ended, line = compare(run(tmp_path / "a", [1.0]), run(tmp_path / "b", [1.0], ids=8))
    assert (ended, line["same"], line["other_clips_from"]) == (1, False, 0)


def test_runs_without_a_common_step_are_an_error(tmp_path: Path) -> None:
    assert compare(run(tmp_path / "a", [1.0]), str(tmp_path / "none"))[0] == 2

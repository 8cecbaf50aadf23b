"""A batch whose loss is no number: no weight, moment or codebook hears of it, its clips are named, and too many in a row end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.shelf import committed
from cola_dist.train.trace import read_trace
from tests.outcomes import Outcomes
from tests.train.harness import run_local, toy_config

pytestmark = [pytest.mark.fault, pytest.mark.long]

BATCH = 8


def clips_of(config: RunConfig, *positions: int) -> list[str]:
    return [str(one) for one in open_reader(config.data, config.train.seed, global_batch=BATCH).read_many(positions).sample]


def state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All numbers of a checkpoint, by kind and name."""
    found = {
        f"{kind} {name}": checkpoint.read(kind, name)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name in checkpoint.shapes
        if checkpoint.has(kind, name)
    }
    return found | {f"buffer {name}": tensor for name, tensor in checkpoint.buffers.items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_batch_that_is_no_number_changes_nothing_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: int) -> None:
    # Codes are placed anew every second step: at step 2 the forward pass writes the codebook.
    every = ("--lam.bottleneck.reset-every", "2", "--train.checkpoint-every", "1", "--train.keep-checkpoints", "10")
    config = toy_config(tmp_path, "--train.zero-stage", str(stage), *every)
    bad = 2 * BATCH + 5
    result = run_local(config, tmp_path / "run", lost=frozenset([bad]))
    assert result["status"] == "finished"
    share = BATCH // config.train.workers
    first = bad - bad % share
    clips = clips_of(config, *range(first, first + share))
    assert result["record"]["left_out"] == [{"step": 2, "clips": clips}]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert line == f"step 2 left out: its loss or gradient was not finite (clips: {', '.join(clips)})"

    losses = [line.loss for line in read_trace(str(tmp_path / "run"))]
    assert [math.isfinite(loss) for loss in losses] == [step != 2 for step in range(8)]
    at = {Checkpoint(uri).position.step: Checkpoint(uri) for uri in committed(str(tmp_path / "run" / "checkpoints"))}
    before, after = state(at[2]), state(at[3])
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert at[2].position.adam_steps == at[3].position.adam_steps
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state(at[8]).values())


def test_too_many_in_a_row_end_the_run_with_their_clips_and_it_goes_on_after_them(tmp_path: Path, outcomes: Outcomes) -> None:
    config = toy_config(tmp_path, "--train.workers", "1", "--optim.micro-batch", "2", "--train.max-nonfinite", "2")
    # One at a time is borne.
    lost = frozenset([BATCH, 3 * BATCH + 1, 4 * BATCH])
    result = run_local(config, tmp_path / "run", lost=lost)
    assert (result["status"], result["steps"]) == ("failed", 5)
    assert "not finite for 2 steps in a row, last at step 4 " in result["error"]
    assert f"(clips: {', '.join(clips_of(config, 4 * BATCH, 4 * BATCH + 1))})" in result["error"], "of the micro-batch alone"
    assert Checkpoint(result["checkpoint"]).position.step == 5

    resumed = run_local(config, tmp_path / "run", lost=lost)
    assert (resumed["status"], resumed["steps"]) == ("finished", 8)
    assert [one["step"] for one in resumed["record"]["left_out"]] == [1, 3, 4]
    manifest = json.loads((Path(resumed["checkpoint"]) / "manifest.json").read_text())
    assert manifest["position"]["record"]["left_out"] == resumed["record"]["left_out"]
    outcomes.add(
        "a batch whose loss is no number", "one step", "left out, told with its clips; weights, moments and codebook as before", 0, 0.0
    )
    outcomes.add(
        "the same, train.max_nonfinite steps in a row", "consecutive steps", "one error, loadable checkpoint; resumed after them", 0, None
    )

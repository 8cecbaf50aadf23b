"""A model that is too large for its workers is refused when a phase begins, with what would help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from cola_dist.errors import UserError
from cola_dist.recipes import build_recipe
from cola_dist.train import stage
from cola_dist.train.engine import Engine
from cola_dist.train.hardware import check_memory
from tests.train.harness import run_local, toy_config


def refusal(available: float, zero_stage: Literal[0, 2] = 2) -> str:
    train = replace(build_recipe("opensora").train, zero_stage=zero_stage)
    with pytest.raises(UserError) as caught:
        check_memory(train, "joint", 1_000_000_000, 0, int(available))
    return str(caught.value)


def test_what_does_not_fit_is_told_with_figures_and_the_stage_that_fits() -> None:
    # 4 GB of weights on each, 12 GB of gradients and moments over eight workers
    check_memory(build_recipe("opensora").train, "joint", 1_000_000_000, 0, 6_000_000_000)
    told = refusal(5e9)
    assert "phase joint needs 5.5 GB on each of 8 workers" in told
    assert "of 1.00 B parameters at ZeRO stage 2, and this worker has 5.0 GB: set --train.zero-stage (3 needs 2.0 GB)" in told
    assert "set --train.zero-stage (1 needs 9.0 GB)" in refusal(10e9, zero_stage=0), "the least that helps"
    assert "give the run more workers (with --train.zero-stage 3), or choose a smaller model" in refusal(1e9)


def test_a_run_asks_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "memory_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"phase warmup needs 0\.0 GB on each of 1 workers"):
        run_local(toy_config(tmp_path, "--train.workers=1"), tmp_path / "run")


def test_a_first_step_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Engine, "step", full)
    with pytest.raises(
        UserError, match=r"phase warmup does not fit .* 8 clips at a time \(CUDA out .* 2.00 GiB.\): lower optim.micro_batch"
    ):
        run_local(toy_config(tmp_path, "--train.workers=1"), tmp_path / "run")

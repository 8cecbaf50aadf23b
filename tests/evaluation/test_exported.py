"""A finished run's models, loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import load_export
from cola_dist.methods import build_method
from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.observer import to_clips
from cola_dist.train.shelf import latest
from cola_dist.train.stage import load_tensors
from tests.train.harness import run_local, toy_config


def test_an_export_does_what_the_runs_last_weights_do(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "--train.workers=1")
    run_local(config, tmp_path / "run")
    trained = build_method(config, bf16=False)
    checkpoint = Checkpoint(latest(str(tmp_path / "run")) or "")
    for role in trained.roles():
        load_tensors(trained, checkpoint.weights(role))
    load_tensors(trained, checkpoint.buffers.items())
    clips = to_clips(open_reader(config.data, 0).read_many(range(4)))
    for folder in (tmp_path / "run", tmp_path / "run" / "export"):
        loaded = load_export(str(folder), torch.device("cpu"))
        assert not loaded.training
        for name, value in trained.eval().evaluate(clips).items():
            assert torch.equal(value, loaded.evaluate(clips)[name]), name


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no export"):
        load_export(str(tmp_path), torch.device("cpu"))

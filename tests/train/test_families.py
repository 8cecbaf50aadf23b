"""Published generators and autoencoders through the whole engine: load, encode, warm up, train jointly, export, reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.methods import build_method
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.models.lam import InverseDynamics
from cola_dist.models.world import KINDS, STDiT3
from cola_dist.recipes import build_recipe
from cola_dist.train.observer import to_clips
from tests.models.published import STDIT, write_opensora_vae, write_stdit3
from tests.train.harness import run_local, toy_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("families")
    world = {"kind": "stdit3", "pretrained": write_stdit3(folder / "generator")} | {k: v for k, v in STDIT.items() if k != "channels"}
    options = [f"--world.{name}={value}" for name, value in world.items()]
    options += ["--autoencoder.kind=opensora", f"--autoencoder.pretrained={write_opensora_vae(folder / 'vae')}", "--lam.resolution=16"]
    return toy_config(folder, *options, "--train.workers=1", "--flow.tau-min=0")


def test_opensora_from_published_files_to_an_export(config: RunConfig, tmp_path: Path) -> None:
    result = run_local(config, tmp_path / "run")
    assert result["status"] == "finished", result["error"]
    hashes = json.loads((tmp_path / "run" / "result.json").read_text())["record"]["hashes"]
    assert hashes["warmup_start"]["world"] == hashes["warmup_end"]["world"] != hashes["joint_end"]["world"]
    assert hashes["warmup_start"]["lam"] != hashes["warmup_end"]["lam"]
    again = STDiT3.from_pretrained(str(tmp_path / "run" / "export" / "world"), STDIT)
    x, tau = torch.randn(1, 2, 4, 4, 4), torch.full((1, 2), 0.5)
    theirs = STDiT3.from_pretrained(config.world.pretrained or "", STDIT)
    assert not torch.equal(again(x, tau, None), theirs(x, tau, None))
    # What a run exports is what another run starts from, at ZeRO stage 3 and two workers as well.
    from dataclasses import replace

    exported = replace(config.world, pretrained=str(tmp_path / "run" / "export" / "world"))
    train = replace(config.train, workers=2, zero_stage=3)
    second = run_local(replace(config, world=exported, train=train), tmp_path / "second")
    assert second["status"] == "finished", second["error"]
    STDiT3.from_pretrained(str(tmp_path / "second" / "export" / "world"), STDIT)


def test_before_training_actions_change_nothing(config: RunConfig) -> None:
    method = build_method(config, bf16=False).eval()
    clips = to_clips(open_reader(config.data, 0).read_many(range(4)))
    with torch.no_grad():
        x0 = method.autoencoder.encode(clips.video)  # type: ignore[union-attr,operator]
        tau = torch.rand(x0.shape[:2])
        actions = torch.randn(len(x0), clips.video.shape[1] - 1, config.lam.tokens, config.lam.bottleneck.dim)
        conditioned = method.world(x0, tau, method.conditioning(actions))  # type: ignore[operator]
        assert torch.equal(conditioned, method.world(x0, tau, None))
        theirs = STDiT3.from_pretrained(config.world.pretrained or "", STDIT)
        assert torch.equal(conditioned, theirs(x0, tau, None))


def test_the_papers_run_has_the_papers_sizes() -> None:
    """Inverse dynamics about 0.12 B, action modules about 74 M, generator about 0.90 B."""
    run = build_recipe("opensora")
    with torch.device("meta"):
        world = KINDS[run.world.kind](**{name: {"channels": 4, **vars(run.world)}[name] for name in STDiT3.shape_names})
        parts = {
            "idm": InverseDynamics(run.lam),
            "conditioning": ActionConditioning(run.conditioning, run.lam.tokens, run.lam.bottleneck.dim, world.modulation_shape, stride=4),
            "world": world,
        }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert counts["idm"] == pytest.approx(0.12e9, rel=0.05)
    assert counts["conditioning"] == pytest.approx(74e6, rel=0.01)
    assert counts["world"] == pytest.approx(0.90e9, rel=0.01)

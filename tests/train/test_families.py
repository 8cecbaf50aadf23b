"""Published generators and autoencoders through the whole engine: load, encode, warm up, train jointly, export, reload."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.methods import build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.models.lam import InverseDynamics
from cola_dist.models.world import KINDS, STDiT3
from cola_dist.recipes import build_recipe
from cola_dist.train.job import preflight
from cola_dist.train.observer import to_clips
from tests.models.published import (
    COSMOS,
    STDIT,
    SVD,
    WAN,
    write_cosmos,
    write_opensora_vae,
    write_stdit3,
    write_svd,
    write_svd_vae,
    write_wan,
    write_wan_vae,
)
from tests.train.harness import run_local, toy_config


@dataclass(frozen=True)
class Family:
    """How a small one is written in the published layout, and what the run has to be told of it."""

    write: Callable[[Path], Path]
    write_autoencoder: Callable[[Path], Path]
    autoencoder: str
    shape: Mapping[str, int]
    resolution: int = 32


FAMILIES = {
    "stdit3": Family(write_stdit3, write_opensora_vae, "opensora", STDIT),
    "wan": Family(write_wan, write_wan_vae, "wan", WAN),
    "cosmos": Family(write_cosmos, write_wan_vae, "wan", COSMOS),
    "svd": Family(write_svd, write_svd_vae, "svd", SVD, resolution=64),
}


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    world = {"kind": request.param, "pretrained": family.write(folder / "generator")}
    world |= {name: value for name, value in family.shape.items() if name != "channels"}
    options = [f"--world.{name}={value}" for name, value in world.items()]
    options += [f"--autoencoder.kind={family.autoencoder}", f"--autoencoder.pretrained={family.write_autoencoder(folder / 'vae')}"]
    options += [
        "--lam.resolution=16",
        f"--data.resolution={family.resolution}",
        "--train.workers=1",
        "--flow.tau-min=0",
        "--warmup.steps=2",
    ]
    options += [
        "--joint.steps=2",
        "--diagnostics.every=2",
        "--flow.sampler-steps=2",
        "--diagnostics.video-clips=0",
        "--diagnostics.alignment-clips=0",
    ]
    return toy_config(folder, *options)


def test_from_published_files_to_an_export_that_begins_the_next_run(config: RunConfig, tmp_path: Path) -> None:
    kind, shape = KINDS[config.world.kind], FAMILIES[config.world.kind].shape
    result = run_local(config, tmp_path / "run")
    assert result["status"] == "finished", result["error"]
    hashes = json.loads((tmp_path / "run" / "result.json").read_text())["record"]["hashes"]
    assert hashes["warmup_start"]["world"] == hashes["warmup_end"]["world"] != hashes["joint_end"]["world"]
    assert hashes["warmup_start"]["lam"] != hashes["warmup_end"]["lam"]
    export = str(tmp_path / "run" / "export" / "world")
    trained, theirs = (dict(kind.from_pretrained(uri, shape).named_parameters()) for uri in (export, config.world.pretrained or ""))
    assert any(not torch.equal(weight, theirs[name]) for name, weight in trained.items())
    if config.world.kind == "stdit3":  # one family at the stage that parts weights, on two workers
        train = replace(config.train, workers=2, zero_stage=3)
        second = run_local(replace(config, world=replace(config.world, pretrained=export), train=train), tmp_path / "second")
        assert second["status"] == "finished", second["error"]
        kind.from_pretrained(str(tmp_path / "second" / "export" / "world"), shape)


def test_a_driver_of_gpus_checks_the_files_and_holds_no_model(config: RunConfig, tmp_path: Path) -> None:
    here = preflight(config, str(tmp_path / "run"))
    far = preflight(replace(config, train=replace(config.train, gpus=True)), str(tmp_path / "run"))
    assert far["loss"] is None
    assert math.isfinite(here["loss"])
    assert far | {"loss": 0} == here | {"loss": 0}
    files = far["files"]
    assert files["world"]["tensors"] > 20
    assert files["autoencoder"]["tensors"] > 20
    assert bool(files["world"]["dropped"]) == (config.world.kind in ("stdit3", "cosmos")), "theirs is text"
    assert len(files["world"]["sha256"]) == 64


def test_before_training_actions_change_nothing(config: RunConfig) -> None:
    method = build_method(config, bf16=False).eval()
    assert isinstance(method, CoTrain)
    clips = to_clips(open_reader(config.data, 0).read_many(range(2)))
    with torch.no_grad():
        x0 = method.autoencoder.encode(clips.video)
        tau = torch.rand(x0.shape[:2])
        actions = torch.randn(len(x0), clips.video.shape[1] - 1, config.lam.tokens, config.lam.bottleneck.dim)
        conditioned = method.world(x0, tau, method.conditioning(actions))
        theirs = KINDS[config.world.kind].from_pretrained(config.world.pretrained or "", FAMILIES[config.world.kind].shape)
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

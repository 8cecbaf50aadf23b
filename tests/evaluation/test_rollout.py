from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_dist.config import ConditioningConfig, LamConfig, WorldConfig
from cola_dist.evaluation.rollout import Rollouts, rollout_figures, rollouts
from cola_dist.methods import Clips, build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.recipes import tiny


def method(guidance: float = 1.0) -> CoTrain:
    base = tiny()
    config = replace(
        base,
        lam=LamConfig(width=16, depth=1, heads=2),
        conditioning=ConditioningConfig(depth=1, width=16, heads=2),
        world=WorldConfig(width=16, depth=1, heads=2),
        flow=replace(base.flow, sampler_steps=3, guidance=guidance),
    )
    built = build_method(config, bf16=False)
    assert isinstance(built, CoTrain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


@pytest.fixture
def clips() -> Clips:
    video = torch.randint(0, 256, (3, 5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Clips(video, torch.arange(3), torch.zeros(3, dtype=torch.int64))


def test_rollouts_start_from_the_first_frame_and_follow_the_actions(clips: Clips) -> None:
    result = rollouts(method(), clips)
    for frames in (result.own, result.other):
        assert frames.shape == clips.video.shape
        assert frames.dtype == torch.uint8
        assert torch.equal(frames[:, 0], clips.video[:, 0])
    assert not torch.equal(result.own, result.other)
    assert torch.equal(rollouts(method(), clips).own, result.own)


def test_a_generator_that_ignores_actions_gives_the_same_rollout_for_any(clips: Clips) -> None:
    deaf = method()
    torch.nn.init.zeros_(deaf.conditioning.head[-1].weight)
    result = rollouts(deaf, clips)
    assert torch.equal(result.own, result.other)
    assert rollout_figures(result)["delta_psnr"] == 0


def test_guidance_goes_beyond_the_conditioned_velocity(clips: Clips) -> None:
    assert not torch.equal(rollouts(method(guidance=4.0), clips).own, rollouts(method(), clips).own)


def test_delta_psnr_of_a_known_case() -> None:
    truth = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    own, other = truth.clone(), truth.clone()
    own[:, 1], other[:, 1] = 1, 10
    figures = rollout_figures(Rollouts(truth, own, other))
    assert figures["delta_psnr"] == pytest.approx(20.0, abs=1e-4)
    assert figures["rollout_psnr"] == pytest.approx(48.1308, abs=1e-3)

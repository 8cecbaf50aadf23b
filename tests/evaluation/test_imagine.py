"""Rollouts of any length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cola_dist.config import AUTOENCODERS, AutoencoderConfig, ConditioningConfig, LamConfig, WorldConfig
from cola_dist.evaluation.imagine import Piece, Sampling, imagine, keyed_noise, sampling_of
from cola_dist.evaluation.rollout import generate
from cola_dist.methods import build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.autoencoder import Autoencoder, PixelAutoencoder
from cola_dist.recipes import tiny
from tests.methods.method_parts import awaken

WORLDS: Mapping[str, WorldConfig] = {
    "space_time_dit": WorldConfig(width=16, depth=2, heads=2),
    "stdit3": WorldConfig(kind="stdit3", patch=2, width=16, depth=2, heads=2),
}


class EveryOther(Autoencoder):
    """A latent frame for every two video frames after the first: the later one of them, at every fourth place."""

    shape = replace(AUTOENCODERS["opensora"], channels=3, stride=2)
    hash = "every other"

    def encode(self, video: Tensor) -> Tensor:
        return PixelAutoencoder().encode(video[:, ::2])

    def decode(self, latents: Tensor) -> Tensor:
        video = PixelAutoencoder().decode(latents)
        return video.repeat_interleave(2, 1)[:, 1:]


def method(kind: str = "space_time_dit", guidance: float = 1.0, autoencoder: Autoencoder | None = None) -> CoTrain:
    base = tiny()
    config = replace(
        base,
        data=replace(base.data, resolution=16),
        lam=LamConfig(width=16, depth=1, heads=2),
        conditioning=ConditioningConfig(depth=1, width=16, heads=2),
        world=WORLDS[kind],
        flow=replace(base.flow, sampler_steps=3, guidance=guidance),
    )
    built = build_method(config, bf16=False, autoencoder=autoencoder)
    assert isinstance(built, CoTrain)
    if autoencoder is not None:
        built.conditioning = type(built.conditioning)(
            config.conditioning, config.lam.tokens, config.lam.bottleneck.dim, built.world.modulation_shape, autoencoder.shape.stride
        )
    awaken(built)
    return built.eval()


def given(frames: int, transitions: int, clips: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    context = torch.rand(clips, frames, 3, 16, 16, generator=generator) * 2 - 1
    return context, torch.randn(clips, transitions, 2, 32, generator=generator)


def roll(built: CoTrain, context: Tensor, actions: Tensor, sampling: Sampling, key: Tensor | None = None) -> tuple[Tensor, list[Piece]]:
    keys = torch.arange(len(context)) if key is None else key
    pieces = list(imagine(built, context, actions, keyed_noise(0, keys, (3, 16, 16), torch.device("cpu")), sampling))
    return torch.cat([piece.latents for piece in pieces], 1), pieces


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_keeping_the_context_changes_no_frame(kind: str, guidance: float, context: int) -> None:
    built = method(kind, guidance)
    start, actions = given(1, 11)
    sampling = Sampling(5, context, built.config.flow)
    cached, _ = roll(built, start, actions, sampling)
    plain, _ = roll(built, start, actions, replace(sampling, cached=False))
    assert cached.shape == (3, 12, 3, 16, 16)
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-5)


def test_pieces_come_as_they_are_done_and_begin_with_the_context() -> None:
    built = method()
    start, actions = given(2, 8)
    latents, pieces = roll(built, start, actions, Sampling(5, 2, built.config.flow))
    assert [piece.frames.shape[1] for piece in pieces] == [5, 3, 1]
    assert torch.equal(latents[:, :2], start)
    made = imagine(
        built, start, actions, keyed_noise(0, torch.arange(3), (3, 16, 16), torch.device("cpu")), Sampling(5, 2, built.config.flow)
    )
    assert torch.equal(next(made).frames, pieces[0].frames)


def test_a_longer_rollout_begins_as_a_shorter_one_and_no_clip_depends_on_the_others() -> None:
    built = method(guidance=2.0)
    start, actions = given(1, 9)
    sampling = sampling_of(built.config)
    whole, _ = roll(built, start, actions, sampling)
    shorter, _ = roll(built, start, actions[:, :6], sampling)
    torch.testing.assert_close(shorter, whole[:, :7], atol=1e-5, rtol=1e-5)
    alone, _ = roll(built, start[1:2], actions[1:2], sampling, torch.tensor([1]))
    torch.testing.assert_close(alone, whole[1:2], atol=1e-5, rtol=1e-5)
    again, _ = roll(built, start, actions, sampling)
    assert torch.equal(again, whole)
    other, _ = roll(built, start, actions, sampling, torch.tensor([7, 8, 9]))
    assert not torch.allclose(other[:, 1:], whole[:, 1:], atol=1e-3)


def test_an_action_moves_no_earlier_frame() -> None:
    built = method()
    start, actions = given(1, 9)
    changed = actions.clone()
    changed[:, 6] += 1.0
    moved = (roll(built, start, actions, sampling_of(built.config))[0] - roll(built, start, changed, sampling_of(built.config))[0]).abs()
    assert (moved.amax((0, 2, 3, 4)) > 1e-4).tolist() == [frame >= 7 for frame in range(10)]


def test_one_window_is_what_generate_makes() -> None:
    built = method()
    start, actions = given(1, 4)
    frames = roll(built, start, actions, Sampling(5, 1, built.config.flow, cached=False))[1][0].frames
    drawn = keyed_noise(0, torch.arange(3), (3, 16, 16), torch.device("cpu"))(1, 5)
    assert torch.equal(frames, generate(built, start, actions, torch.cat([start, drawn], 1)))


def test_latent_frames_of_several_video_frames_take_as_many_actions() -> None:
    built = method(autoencoder=EveryOther())
    start, actions = given(1, 12)
    sampling = Sampling(3, 2, built.config.flow)
    latents, pieces = roll(built, start, actions, sampling)
    frames = torch.cat([piece.frames for piece in pieces], 1)
    assert latents.shape[1] == 7
    assert frames.shape[1] == 13
    changed = actions.clone()
    changed[:, 7] += 1.0
    moved = (roll(built, start, changed, sampling)[0] - latents).abs().amax((0, 2, 3, 4)) > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 3


def test_the_window_is_the_length_of_training() -> None:
    config = replace(tiny(), data=replace(tiny().data, frames=17), autoencoder=AutoencoderConfig("opensora"))
    assert (sampling_of(config).window, sampling_of(config).context) == (5, 2)
    assert sampling_of(config, steps=2).flow.sampler_steps == 2
    with pytest.raises(ValueError, match="fill the window"):
        sampling_of(config, context=5)


def test_lengths_that_do_not_fit_are_refused() -> None:
    built = method()
    for frames, transitions, sampling in ((3, 2, sampling_of(built.config)), (5, 8, sampling_of(built.config))):
        with pytest.raises(ValueError, match="as context"):
            roll(built, *given(frames, transitions), sampling)

"""Action metrics on a world that is known exactly, in which generator and inverse dynamics are what a test says they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cola_dist.config import BottleneckConfig, ConditioningConfig, LamConfig, WorldConfig
from cola_dist.evaluation import actions
from cola_dist.methods import Clips, build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.autoencoder import to_pixels, to_video
from cola_dist.recipes import tiny

Infer = Callable[[CoTrain, Tensor], Tensor]
SIDE = 16


def method(kind: str = "vq") -> CoTrain:
    base = tiny()
    config = replace(
        base,
        lam=LamConfig(width=16, depth=1, heads=2, bottleneck=BottleneckConfig(kind=kind, codes=8, dim=4)),  # type: ignore[arg-type]
        conditioning=ConditioningConfig(depth=1, width=16, heads=2),
        world=WorldConfig(width=16, depth=1, heads=2),
        flow=replace(base.flow, sampler_steps=2),
    )
    built = build_method(config, bf16=False)
    assert isinstance(built, CoTrain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


def brighter(levels: list[list[int]], first: int = 0) -> Clips:
    """Clips of a dark texture of their own whose brightness at each frame is given."""
    generator = torch.Generator().manual_seed(first)
    texture = torch.randint(0, 40, (len(levels), 1, 3, SIDE, SIDE), generator=generator)
    video = (texture + torch.tensor(levels)[:, :, None, None, None]).byte()
    return Clips(video, torch.arange(first, first + len(levels)), torch.zeros(len(levels), dtype=torch.int64))


def a_and_b() -> tuple[Clips, Clips]:
    return brighter([[0, 20, 20, 60, 90], [50, 40, 30, 20, 10]]), brighter([[100, 90, 90, 80, 120], [100, 130, 160, 160, 160]], first=7)


def dims(_: CoTrain, frames: Tensor) -> Tensor:
    """An inverse dynamics that says how much brighter the picture got, and nothing else: ``[B, T-1, 1, 4]``."""
    means = to_pixels(frames).mean((2, 3, 4))
    return (means[:, 1:] - means[:, :-1])[:, :, None, None].expand(-1, -1, 1, 4).contiguous()


def paints(_: CoTrain, frames: Tensor) -> Tensor:
    """One that leaks: its action is the whole change of the picture."""
    pixels = to_pixels(frames).flatten(2)
    return (pixels[:, 1:] - pixels[:, :-1])[:, :, None]


def exact(method: CoTrain, context: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
    """A generator that does what actions of either kind say."""
    steps = chosen[:, context.shape[1] - 1 :, 0]
    steps = steps.unflatten(2, context.shape[2:]) if steps.shape[2] > 4 else steps.mean(2)[:, :, None, None, None]
    frames = context[:, -1:] + steps.cumsum(1)
    return to_video(torch.cat([context, frames.expand(-1, -1, *context.shape[2:])], 1))


def known(monkeypatch: pytest.MonkeyPatch, infer: Infer) -> CoTrain:
    built = method()
    monkeypatch.setattr(actions, "infer", infer)
    monkeypatch.setattr(actions, "generate", exact)
    null = torch.zeros(1, 3 * SIDE**2 if infer is paints else 4)
    monkeypatch.setattr(built.conditioning, "null_actions", lambda batch, transitions: null.expand(batch, transitions, -1, -1))
    return built


def test_actions_that_carry_over_survive_the_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = a_and_b()
    scenes = actions.play(known(monkeypatch, dims), a, b, context=1)
    figures = actions.action_figures(scenes, 1)
    assert (figures["cycle_error"] < 2 / 255).all(), "rounding"
    assert (figures["shuffled_error"] > 10 / 255).all()
    torch.testing.assert_close(figures["cycle_margin"], figures["shuffled_error"] - figures["cycle_error"])
    assert (figures["delta_psnr"] > 10).all()
    # B with A's actions: B's texture, A's course of brightness.
    moved = scenes.transfer.float().mean((2, 3, 4))
    course = a.video.float().mean((2, 3, 4))
    torch.testing.assert_close((moved - moved[:, :1])[0], (course - course[:, :1])[0], atol=1.5, rtol=0)
    assert torch.equal(scenes.transfer[:, 0], b.video[:, 0])
    assert torch.equal(scenes.returned[:, 0], a.video[:, 0])


def test_only_an_action_that_paints_the_next_scene_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = brighter([[0, 20, 20, 60, 90]]), brighter([[150, 150, 150, 150, 150]], first=7)
    b.video[:, :, :, : SIDE // 2] = 0  # another picture, not only another brightness
    honest = actions.leakage_figures(known(monkeypatch, dims), a, b)
    leaky = actions.leakage_figures(known(monkeypatch, paints), a, b)
    assert float(honest["leakage"]) < 5
    assert float(leaky["cut_gain"]) > 30
    assert float(leaky["leakage"]) > float(honest["leakage"]) + 5
    for figures in (honest, leaky):
        torch.testing.assert_close(figures["leakage"], figures["cut_gain"] - figures["ordinary_gain"])


def test_a_deaf_generator_has_no_action_figures_but_zeros() -> None:
    deaf = method()
    torch.nn.init.zeros_(deaf.conditioning.head[-1].weight)
    a, b = a_and_b()
    scenes = actions.play(deaf, a, b, context=2)
    figures = actions.action_figures(scenes, 2) | actions.leakage_figures(deaf, a, b)
    assert {name: values.tolist() for name, values in figures.items() if name != "other_psnr"} == {
        name: [0.0, 0.0] for name in figures if name != "other_psnr"
    }
    assert torch.equal(scenes.own[:, :2], a.video[:, :2])


def test_noise_is_the_clips_own_whatever_stands_beside_it() -> None:
    built = method()
    a, b = a_and_b()
    together = actions.play(built, a, b, context=1)
    alone = actions.play(built, a.split(1)[1], b.split(1)[1], context=1)
    for name in ("own", "other", "transfer", "returned"):
        difference = getattr(together, name)[1:].int() - getattr(alone, name).int()
        assert difference.abs().max() <= 1, name


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_an_atlas_has_a_rollout_per_code(kind: str) -> None:
    built = method(kind)
    clip = a_and_b()[0].split(1)[0]
    rollouts = actions.atlas(built, clip, context=1)
    assert rollouts is not None
    assert rollouts.shape == (8, *clip.video.shape[1:])
    assert all(torch.equal(rollout[0], clip.video[0, 0]) for rollout in rollouts)
    assert len({rollout.numpy().tobytes() for rollout in rollouts}) > 1


def test_no_codes_no_atlas() -> None:
    assert actions.atlas(method("continuous"), a_and_b()[0].split(1)[0], context=1) is None

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from cola_dist.config import BottleneckConfig, ConditioningConfig, LamConfig
from cola_dist.models.conditioning import ActionConditioning, actions_per_frame
from cola_dist.models.lam import InverseDynamics

CONFIG = LamConfig(patch=4, width=16, depth=2, heads=2, tokens=3, bottleneck=BottleneckConfig(dim=5))


@pytest.mark.parametrize("seen", ["frames", "frames+change", "change"])
@pytest.mark.parametrize("frame", range(5))
def test_a_frame_moves_the_action_into_it_and_later_ones_only(seen: Literal["frames", "frames+change", "change"], frame: int) -> None:
    torch.manual_seed(0)
    idm = InverseDynamics(replace(CONFIG, input=seen))
    pixels = torch.randn(2, 5, 3, 8, 8)
    changed = pixels.clone()
    changed[:, frame] += torch.randn(2, 3, 8, 8)
    moved = (idm(pixels) - idm(changed)).abs().amax((0, 2, 3)) > 1e-6
    assert idm(pixels).shape == (2, 4, 3, 5)
    assert moved.tolist() == [transition >= frame - 1 for transition in range(4)]


def test_change_is_all_that_the_change_input_sees() -> None:
    torch.manual_seed(0)
    idm = InverseDynamics(replace(CONFIG, input="change"))
    pixels = torch.randn(1, 5, 3, 8, 8)
    assert torch.allclose(idm(pixels), idm(pixels + 0.5), atol=1e-5)
    both = InverseDynamics(replace(CONFIG, input="frames+change"))
    assert not torch.allclose(both(pixels), both(pixels + 0.5), atol=1e-3)


@pytest.mark.parametrize(("stride", "transitions"), [(1, 4), (4, 8)])
def test_the_actions_of_a_latent_frame_are_those_that_lead_into_it(stride: int, transitions: int) -> None:
    actions = torch.arange(transitions).float().reshape(1, transitions, 1).expand(1, transitions, 2)
    laid = actions_per_frame(actions, torch.tensor([-1.0, -1.0]), stride)
    assert laid.shape == (1, 1 + transitions // stride, 2 * stride)
    assert laid[0, 0].unique().tolist() == [-1.0]
    for frame in range(1, laid.shape[1]):
        assert laid[0, frame, ::2].tolist() == [float(index) for index in range((frame - 1) * stride, frame * stride)]


def test_actions_that_do_not_fill_latent_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="7 transitions do not fill latent frames of 4"):
        actions_per_frame(torch.zeros(1, 7, 2), torch.zeros(2), 4)


def conditioning(stride: int = 1) -> ActionConditioning:
    torch.manual_seed(0)
    module = ActionConditioning(ConditioningConfig(depth=2, width=16, heads=2), 3, 5, (2, 9, 8), stride)
    with torch.no_grad():
        module.null.normal_()
    return module


def test_modulation_starts_at_zero() -> None:
    out = conditioning()(torch.randn(2, 4, 3, 5))
    assert out.shape == (2, 5, 2, 9, 8)
    assert not out.any()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transition", range(4))
def test_an_action_moves_its_latent_frame_and_later_ones_only(stride: int, transition: int) -> None:
    module = conditioning(stride)
    torch.nn.init.normal_(module.head[-1].weight)
    actions = torch.randn(2, 4, 3, 5)
    changed = actions.clone()
    changed[:, transition] += 1.0
    moved = (module(actions) - module(changed)).abs().flatten(2).amax((0, 2)) > 1e-6
    into = 1 + transition // stride
    assert moved.tolist() == [frame >= into for frame in range(1 + 4 // stride)]


def test_a_dropped_action_is_the_null_action() -> None:
    module = conditioning()
    torch.nn.init.normal_(module.head[-1].weight)
    actions = torch.randn(2, 4, 3, 5)
    dropped = torch.tensor([[True, False, True, False], [False, False, False, False]])
    by_hand = actions.clone()
    by_hand[0, 0] = by_hand[0, 2] = module.null.detach()
    torch.testing.assert_close(module(actions, dropped), module(by_hand))
    everything = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(module(actions, everything), module(module.null_actions(2, 4)))

"""What planners imagine with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cola_dist.config import ConditioningConfig, LamConfig, WorldConfig
from cola_dist.errors import UserError
from cola_dist.evaluation.imagine import sampling_of
from cola_dist.methods import build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.planning.domains import open_domain
from cola_dist.planning.models import LearnedModel, Moment, SimulatorModel, check_adapter
from cola_dist.planning.planner import ActionSpace
from cola_dist.planning.watch import Watch
from cola_dist.recipes import tiny
from tests.methods.method_parts import awaken

CPU = torch.device("cpu")


class Affine(nn.Module):
    """Raw actions of two dimensions to two tokens of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 64, bias=False)
        nn.init.normal_(self.map.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, actions: Tensor) -> Tensor:
        latent: Tensor = self.map(actions)
        return latent.unflatten(-1, (2, 32))


def method() -> CoTrain:
    base = tiny()
    config = replace(
        base,
        lam=LamConfig(width=16, depth=1, heads=2),
        conditioning=ConditioningConfig(depth=1, width=16, heads=2),
        world=WorldConfig(width=16, depth=2, heads=2),
        flow=replace(base.flow, sampler_steps=2),
    )
    built = build_method(config, bf16=False)
    assert isinstance(built, CoTrain)
    awaken(built)
    return built.eval()


def learned(at_once: int = 100) -> LearnedModel:
    built = method()
    return LearnedModel(built, Affine(), sampling_of(built.config), CPU, at_once)


def moment(frames: int) -> Moment:
    domain = open_domain("square", "")
    seen, actions = [domain.reset(3)], np.random.default_rng(0).uniform(-1, 1, (frames - 1, 2))
    seen += [domain.step(action) for action in actions]
    return Moment(seen, list(actions), domain.get_state(), 3)


@pytest.mark.parametrize("frames", [1, 2, 6])
def test_a_learned_model_imagines_the_horizon_at_its_own_resolution(frames: int) -> None:
    model, watch = learned(), Watch(CPU)
    model.observe(moment(frames), watch)
    actions = np.random.default_rng(1).uniform(-1, 1, (4, 7, 2))
    imagined = model.rollout(actions, watch)
    assert imagined.shape == (4, 7, 3, 32, 32)
    assert imagined.dtype == torch.uint8
    assert torch.equal(model.rollout(actions, watch), imagined)
    assert set(watch.seconds) == {"encode", "rollout"}


def test_sequences_do_not_depend_on_those_beside_them() -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (5, 6, 2))
    together, apart = learned(), learned(at_once=2)
    for model in (together, apart):
        model.observe(moment(3), Watch(CPU))
    difference = together.rollout(actions, Watch(CPU)).int() - apart.rollout(actions, Watch(CPU)).int()
    # A rounding may tip a pixel.
    assert difference.abs().max() <= 1


def test_an_action_changes_what_comes_after_it_alone() -> None:
    model = learned()
    model.observe(moment(2), Watch(CPU))
    actions = np.zeros((1, 6, 2))
    changed = actions.copy()
    changed[:, 3] = 1.0
    moved = (model.rollout(actions, Watch(CPU)).int() - model.rollout(changed, Watch(CPU)).int()).abs().amax((0, 2, 3, 4)) > 1
    assert moved.tolist() == [False] * 3 + [True] * 3


def test_the_simulator_imagines_what_then_happens() -> None:
    domain = open_domain("square", "")
    frames = [domain.reset(3)]
    model = SimulatorModel(open_domain("square", ""))
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 4, 2))
    model.observe(Moment(frames, [], domain.get_state(), 3), Watch(CPU))
    imagined = model.rollout(actions, Watch(CPU))
    happened = np.stack([domain.step(action) for action in actions[2]])
    assert np.array_equal(imagined[2].permute(0, 2, 3, 1).numpy(), happened)


def test_an_adapter_of_other_actions_is_named() -> None:
    built = method()
    space = ActionSpace(np.full(5, -1.0), np.full(5, 1.0), np.full(5, 0.5))
    with pytest.raises(
        UserError, match=r"runs/a: its adapter does not take the 5 action dimensions of robodesk .*: adapt the model to robodesk"
    ):
        check_adapter(Affine(), built, "runs/a", "robodesk", space, CPU)
    check_adapter(Affine(), built, "runs/a", "square", open_domain("square", "").space, CPU)
    wrong: Any = nn.Linear(2, 64)
    with pytest.raises(UserError, match="not 2 tokens of 32"):
        check_adapter(wrong, built, "runs/a", "square", open_domain("square", "").space, CPU)

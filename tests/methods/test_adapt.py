"""Adaptation to real actions: the co-training loss under an adapter's actions, and what teaches whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_parts import awaken
from torch import Tensor

from cola_dist.config import AdaptConfig, RunConfig
from cola_dist.methods import Clips, build_method, phases
from cola_dist.methods.adapt import Adapt
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.adapter import ActionAdapter
from cola_dist.models.autoencoder import to_pixels

STATE = 3


@pytest.fixture
def start(config: RunConfig, tmp_path: Path) -> CoTrain:
    """A co-trained method, its roles written where adaptation reads them."""
    from safetensors.torch import save_file

    method = build_method(config, bf16=False)
    assert isinstance(method, CoTrain)
    awaken(method)
    method.world.save_pretrained(str(tmp_path / "world"))
    for role in ("lam", "conditioning"):
        (tmp_path / role).mkdir()
        weights = {name: tensor.contiguous() for name, tensor in method.get_submodule(role).state_dict().items()}
        save_file(weights, tmp_path / role / "model.safetensors")
    return method


@pytest.fixture
def config_adapt(config: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(
        config,
        method="adapt",
        world=replace(config.world, pretrained=str(tmp_path / "world")),
        warmup=replace(config.warmup, steps=0),
        joint=replace(config.joint, steps=0),
        adapt=AdaptConfig(steps=3, lr_world=1e-3, start=str(tmp_path), action_dim=4, state_dim=STATE, use_state=True),
    )


@pytest.fixture
def labelled(clips: Clips) -> Clips:
    generator = torch.Generator().manual_seed(1)
    actions, state = torch.randn(6, 4, 4, generator=generator), torch.randn(6, 5, STATE, generator=generator)
    return replace(clips, actions=actions, state=state)


def adapt(config: RunConfig, **changes: object) -> Adapt:
    method = build_method(replace(config, adapt=replace(config.adapt, **changes)), bf16=False)
    assert isinstance(method, Adapt)
    (phase,) = phases(method.config)
    method.set_phase(phase)
    return method


class Copies(torch.nn.Module):
    """Stands where the adapter does and gives what the LAM inferred."""

    def __init__(self, actions: Tensor) -> None:
        super().__init__()
        self.actions = torch.nn.Parameter(actions.detach())
        self.token_std = torch.ones(actions.shape[-1])

    def forward(self, actions: Tensor, state: Tensor | None) -> Tensor:
        return self.actions


@pytest.mark.parametrize("quantise", [False, True])
def test_an_adapter_that_gives_the_lams_actions_has_the_loss_of_cotraining(
    start: CoTrain, config_adapt: RunConfig, labelled: Clips, quantise: bool
) -> None:
    method = adapt(config_adapt, quantise=quantise)
    _, quantised = start.latent_actions(labelled)
    method.adapter = Copies(quantised.actions)  # type: ignore[assignment]
    ours, theirs = method(labelled, 0), start(labelled, 0)
    torch.testing.assert_close(ours.metrics["flow_loss"], theirs.metrics["flow_loss"], rtol=1e-6 if quantise else 0, atol=0)
    assert float(ours.metrics["match_loss"]) == 0
    assert torch.equal(ours.loss, ours.metrics["flow_loss"])
    assert theirs.codes is not None
    assert ours.codes is not None
    assert torch.equal(ours.codes, theirs.codes)
    mine, yours = method.evaluate(labelled), start.evaluate(labelled)
    for name in ("flow_own", "flow_shuffled", "flow_null", "code_counts", "joint_counts"):
        # Rounding a code to itself, as ``quantise`` does, may cost a last digit.
        torch.testing.assert_close(mine[name], yours[name], rtol=1e-6 if quantise else 0, atol=0, msg=name)
    assert float(mine["match_error"]) == 0
    assert float(mine["match_count"]) == len(labelled)
    torch.testing.assert_close(method.clip_losses(labelled), start.clip_losses(labelled))


def test_roles_cover_every_parameter_once_and_the_lam_stays(start: CoTrain, config_adapt: RunConfig, labelled: Clips) -> None:
    method = adapt(config_adapt)
    named = [name for role in method.roles() for name, _ in method.role_parameters(role)]
    assert sorted(named) == sorted(name for name, _ in method.named_parameters())
    for role in ("lam", "conditioning", "world"):
        for (_, mine), (_, theirs) in zip(method.role_parameters(role), start.role_parameters(role), strict=True):
            assert torch.equal(mine, theirs)
    method(labelled, 0).loss.backward()
    assert all(parameter.grad is None for _, parameter in method.role_parameters("lam"))
    for role in ("adapter", "conditioning", "world"):
        assert any(parameter.grad is not None and parameter.grad.any() for _, parameter in method.role_parameters(role)), role


@pytest.mark.parametrize(("quantise", "kind"), [(False, "mlp"), (True, "mlp"), (False, "linear")])
def test_the_flow_loss_alone_teaches_the_adapter(
    start: CoTrain, config_adapt: RunConfig, labelled: Clips, quantise: bool, kind: str
) -> None:
    method = adapt(config_adapt, match_weight=0.0, quantise=quantise, kind=kind)
    output = method(labelled, 0)
    assert "match_loss" not in output.metrics
    output.loss.backward()
    silent = [name for name, parameter in method.role_parameters("adapter") if parameter.grad is None or not parameter.grad.any()]
    assert silent == []
    gradients = method.gradients(labelled)
    assert sorted(gradients) == ["flow/adapter", "flow/conditioning", "flow/world"]
    for (_, parameter), gradient in zip(method.role_parameters("adapter"), gradients["flow/adapter"], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_quantised_actions_are_codes(start: CoTrain, config_adapt: RunConfig, labelled: Clips) -> None:
    tokens, given = adapt(config_adapt, quantise=True).latent_actions(labelled)
    codebook = start.lam.bottleneck.codebook  # type: ignore[attr-defined]
    torch.testing.assert_close(given.actions, codebook[given.codes])
    plain, same = adapt(config_adapt).latent_actions(labelled)
    assert torch.equal(plain, same.actions)
    assert torch.equal(plain, tokens)


def test_a_lam_with_a_learning_rate_goes_on_by_the_cotraining_loss(start: CoTrain, config_adapt: RunConfig, labelled: Clips) -> None:
    method = adapt(config_adapt, lr_lam=1e-3)
    output, alone = method(labelled, 0), start(labelled, 0)
    assert torch.equal(output.metrics["lam_flow_loss"], alone.metrics["flow_loss"])
    parts = output.metrics["flow_loss"] + method.config.adapt.match_weight * output.metrics["match_loss"]
    torch.testing.assert_close(output.loss.detach(), alone.loss.detach() + parts)
    output.loss.backward()
    assert all(parameter.grad is not None for _, parameter in method.role_parameters("lam"))


def test_the_adapter_sees_the_state_before_the_action_in_units_of_the_data(
    config_adapt: RunConfig, start: CoTrain, labelled: Clips
) -> None:
    method = adapt(config_adapt)
    assert labelled.actions is not None
    assert labelled.state is not None
    before, _ = method.latent_actions(labelled)
    moved = replace(labelled, state=torch.cat([labelled.state[:, :-1], labelled.state[:, -1:] + 1], 1))
    assert torch.equal(method.latent_actions(moved)[0], before), "the state after the last action is not given"
    moved = replace(labelled, state=torch.cat([labelled.state[:, :1] + 1, labelled.state[:, 1:]], 1))
    changed = (method.latent_actions(moved)[0] != before).flatten(2).any(2)
    assert changed[:, 0].all()
    assert not changed[:, 1:].any()
    method.adapter.action_mean.fill_(3.0)
    method.adapter.action_std.fill_(0.5)
    scaled = replace(labelled, actions=labelled.actions * 0.5 + 3.0)
    torch.testing.assert_close(method.latent_actions(scaled)[0], before)


def test_clips_move_and_split_with_their_labels(labelled: Clips) -> None:
    parts = labelled.split(4)
    assert [len(part) for part in parts] == [4, 2]
    assert parts[1].actions is not None
    assert labelled.actions is not None
    assert torch.equal(parts[1].actions, labelled.actions[4:])
    assert parts[0].latents is None
    assert labelled.to("cpu").state is labelled.state


def test_an_adapter_begins_where_the_codes_are(start: CoTrain, config_adapt: RunConfig, labelled: Clips) -> None:
    method = adapt(config_adapt)
    codes = method.lam.bottleneck.actions_of(torch.arange(method.lam.bottleneck.codes))
    torch.testing.assert_close(method.adapter.token_mean, codes.mean(0))
    torch.testing.assert_close(method.adapter.token_std, codes.std(0))
    # Wherever they are, a guess of their mean is about one deviation from what the LAM infers.
    with torch.no_grad():
        for parameter in method.adapter.net.parameters():
            parameter.zero_()
        sums = method.evaluate(labelled)
    _, inferred = method.lam.infer(to_pixels(labelled.video))
    expected = ((inferred.actions - codes.mean(0)) / codes.std(0)).square().mean()
    torch.testing.assert_close(float(sums["match_error"] / sums["match_count"]), float(expected), rtol=1e-5, atol=0)


def test_an_adapter_comes_back_from_its_folder_and_refuses_other_actions(tmp_path: Path) -> None:
    adapter = ActionAdapter("mlp", 4, 2, tokens=2, dim=3, width=8)
    adapter.action_mean.copy_(torch.arange(4.0))
    adapter.state_std.fill_(2.0)
    adapter.save(str(tmp_path))
    again = ActionAdapter.load(str(tmp_path))
    actions, state = torch.randn(2, 5, 4), torch.randn(2, 5, 2)
    assert adapter(actions, state).shape == (2, 5, 2, 3)
    assert torch.equal(adapter(actions, state), again(actions, state))
    for given in ((actions[..., :3], state), (actions,), (actions, state[..., :1])):
        with pytest.raises(ValueError, match=r"takes actions of 4 numbers and states of 2, it was given"):
            adapter(*given)

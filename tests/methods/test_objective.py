"""The optional terms of the loss, and the phases in which roles are frozen or the generator is not asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_parts import awaken

from cola_dist.arms import ARMS
from cola_dist.config import RunConfig
from cola_dist.methods import Clips, build_method, phases
from cola_dist.methods.cotrain import CoTrain
from cola_dist.methods.objective import motion_weights, ranking_loss


def build(config: RunConfig) -> CoTrain:
    method = build_method(config, bf16=False)
    assert isinstance(method, CoTrain)
    awaken(method)
    return method


def with_objective(config: RunConfig, **fields: float | bool) -> RunConfig:
    return replace(config, objective=replace(config.objective, **fields))


@settings(deadline=None)
@given(st.floats(0.1, 20), st.integers(0, 1000))
def test_motion_weights_have_mean_one_and_follow_the_motion(strength: float, seed: int) -> None:
    x0 = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    weights = motion_weights(x0, strength)
    assert weights.shape == (2, 4, 1, 5, 5)
    torch.testing.assert_close(weights.mean((1, 2, 3, 4)), torch.ones(2))
    change = (x0[:, 1:] - x0[:, :-1]).abs().mean(2)
    order = change[0].flatten().argsort()
    assert (weights[0, 1:].flatten()[order].diff() >= -1e-6).all()
    assert (weights[:, 0] <= weights.amin((1, 2, 3, 4))[:, None, None, None] + 1e-6).all(), "the first frame comes from nowhere"


def test_motion_weights_of_a_known_case_and_of_standstill() -> None:
    x0 = torch.zeros(2, 2, 1, 1, 2)
    x0[0, 1, 0, 0, 0] = 4.0
    # Changes 0 0 | 4 0, mean 1: weights 1 1 | 1 + 2 * 4 1, divided by their mean 3.
    assert motion_weights(x0, 2.0)[0].flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 3.0, 1 / 3])
    assert motion_weights(x0, 2.0)[1].flatten().tolist() == [1.0] * 4


def test_ranking_loss_of_a_known_case() -> None:
    own, other = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.05, 4.0], requires_grad=True)
    loss = ranking_loss(own, other, 0.1)
    assert float(loss.detach()) == pytest.approx((0.05 + 0) / 2)
    loss.backward()
    assert own.grad is not None
    assert own.grad.tolist() == pytest.approx([0.5, 0.0])
    assert other.grad is not None
    assert other.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_terms_add_to_the_loss_with_their_weights(config: RunConfig, clips: Clips) -> None:
    plain = build(config)(clips, 0)
    ranked = build(with_objective(config, ranking_weight=0.3, ranking_margin=5.0))(clips, 0)
    assert float(ranked.metrics["ranking_loss"]) > 0
    torch.testing.assert_close(ranked.loss, plain.loss + 0.3 * ranked.metrics["ranking_loss"])
    assert not torch.equal(build(with_objective(config, motion_weight=4.0))(clips, 0).loss, plain.loss)
    foreseen = build(with_objective(config, forward_weight=2.0))
    output = foreseen(clips, 0)
    terms = output.metrics
    torch.testing.assert_close(
        terms["loss"], terms["flow_loss"] + 2 * terms["forward_loss"] + terms["codebook_loss"] + 0.25 * terms["commitment_loss"]
    )


def test_the_forward_model_starts_at_no_change_and_learns(config: RunConfig, clips: Clips) -> None:
    method = build_method(with_objective(config, forward_weight=1.0), bf16=False)
    assert isinstance(method, CoTrain)
    still = (clips.video[:, 1:].float() - clips.video[:, :-1].float()).div(127.5).square().mean()
    before = method(clips, 0).metrics["forward_loss"]
    torch.testing.assert_close(before, still)
    optimizer = torch.optim.Adam(method.lam.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        method(clips, step).loss.backward()
        optimizer.step()
    assert method(clips, 40).metrics["forward_loss"] < 0.8 * before


def test_without_the_generators_gradient_the_decoder_alone_teaches_the_lam(config: RunConfig, clips: Clips) -> None:
    cut = build(
        ARMS["stop-grad"](replace(config, lam=replace(config.lam, bottleneck=replace(config.lam.bottleneck, commitment_weight=0.0))))
    )
    idm = cut.lam.idm.embed.weight
    flow = cut(clips, 0)
    (from_all,) = torch.autograd.grad(flow.loss, idm, retain_graph=True)
    assert from_all.any()
    found = cut.gradients(clips)
    assert not any(part.any() for part in found["flow/lam"])
    assert any(part.any() for part in found["flow/conditioning"])


def test_in_the_lams_own_phase_the_generator_is_not_asked(config: RunConfig, clips: Clips) -> None:
    config = ARMS["two-stage"](config)
    method = build(config)
    first, second = phases(config)
    method.set_phase(first)
    output = method(clips, 0)
    assert "flow_loss" not in output.metrics
    output.loss.backward()
    assert all(p.grad is None for role in ("conditioning", "world") for _, p in method.role_parameters(role))
    assert all(p.grad is not None for _, p in method.role_parameters("lam"))
    method.set_phase(second)
    output = method(clips, 0)
    assert set(output.metrics) == {"loss", "flow_loss"}, "a frozen LAM has no loss of its own"
    output.loss.backward()
    assert all(p.grad is None for _, p in method.role_parameters("lam"))
    assert any(p.grad is not None and p.grad.any() for _, p in method.role_parameters("conditioning"))


def test_a_frozen_lam_moves_no_code(config: RunConfig, clips: Clips) -> None:
    placing = replace(config.lam, bottleneck=replace(config.lam.bottleneck, init="data", reset_every=1))
    config = ARMS["freeze-lam-after-warmup"](replace(config, lam=placing))
    method = build(config)
    method.set_phase(phases(config)[1])
    before = {name: buffer.clone() for name, buffer in method.lam.named_buffers()}
    for step in range(1, 4):
        method(clips, step)
    assert all(torch.equal(before[name], buffer) for name, buffer in method.lam.named_buffers())


def test_gradients_are_those_of_the_loss_and_touch_nothing(config: RunConfig, clips: Clips) -> None:
    method = build(config)
    method.set_phase(phases(config)[0])
    found = method.gradients(clips)
    assert set(found) == {"flow/lam", "bottleneck/lam", "flow/conditioning"}, "the generator is frozen"
    assert all(parameter.grad is None for parameter in method.parameters())
    method.set_phase(phases(config)[1])
    found = method.gradients(clips)
    method(clips, 0).loss.backward()
    names = [name for name, _ in method.lam.idm.named_parameters()]
    for name, flow, own in zip(names, found["flow/lam"], found["bottleneck/lam"], strict=True):
        torch.testing.assert_close(method.lam.idm.get_parameter(name).grad, flow + own, rtol=1e-4, atol=1e-6)


def test_modulation_shares_tell_who_is_heard(config: RunConfig, clips: Clips) -> None:
    method = build(config)
    sums = method.evaluate(clips)
    assert sums["modulation_action"].shape == (2,)
    assert (sums["modulation_action"] > 0).all()
    torch.nn.init.zeros_(method.conditioning.head[-1].weight)
    deaf = method.evaluate(clips)
    assert not deaf["modulation_action"].any()
    assert (deaf["modulation_base"] > 0).all()


def test_clip_losses_are_those_of_the_sums(config: RunConfig, clips: Clips) -> None:
    method = build(config)
    losses, sums = method.clip_losses(clips).double(), method.evaluate(clips)
    for column, name in enumerate(("flow_own", "flow_shuffled", "flow_null", "flow_copy")):
        torch.testing.assert_close(losses[:, column].sum() * 2, sums[name].sum(), rtol=1e-5, atol=1e-6)

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_parts import awaken, part
from torch.utils._python_dispatch import TorchDispatchMode

from cola_dist.config import BottleneckConfig, RunConfig
from cola_dist.methods import Clips, build_method, phases
from cola_dist.methods.cotrain import CoTrain, other_clip
from cola_dist.methods.pretrain import TAU_BINS, bin_times
from cola_dist.models.flow import flow_loss
from cola_dist.models.layers import patchify


def cotrain(config: RunConfig) -> CoTrain:
    method = build_method(config, bf16=False)
    assert isinstance(method, CoTrain)
    return method


def test_roles_cover_every_parameter_once(config: RunConfig) -> None:
    method = cotrain(config)
    named = [name for role in method.roles() for name, _ in method.role_parameters(role)]
    assert sorted(named) == sorted(name for name, _ in method.named_parameters())


def test_a_fresh_conditioning_leaves_the_generator_as_it_was_bit_for_bit(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    for layer in (method.conditioning.head[-1].weight, method.conditioning.head[-1].bias):
        torch.nn.init.zeros_(layer)
    pretrain = build_method(replace(config, method="pretrain"), bf16=False)
    pretrain.world.load_state_dict(method.world.state_dict())
    assert torch.equal(method(clips, 0).metrics["flow_loss"], pretrain(clips, 0).loss)


def test_warm_up_trains_the_lam_through_a_frozen_generator(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    warmup, joint = phases(config)
    method.set_phase(warmup)
    method(clips, 0).loss.backward()
    assert all(parameter.grad is None for _, parameter in method.role_parameters("world"))
    silent = [name for name, parameter in method.role_parameters("lam") if parameter.grad is None or not parameter.grad.any()]
    assert silent == []
    method.set_phase(joint)
    method(clips, 0).loss.backward()
    assert all(parameter.grad is not None for _, parameter in method.role_parameters("world"))


def test_the_flow_loss_alone_teaches_the_inverse_dynamics_once_the_head_moved(config: RunConfig, clips: Clips) -> None:
    quiet = replace(config.lam.bottleneck, codebook_weight=0.0, commitment_weight=0.0)
    method = cotrain(replace(config, lam=replace(config.lam, bottleneck=quiet)))
    weight = method.lam.idm.embed.weight
    with torch.no_grad():
        method.world.out.weight.normal_(std=0.1)
        method.world.tables.normal_(std=0.1)
    method(clips, 0).loss.backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    with torch.no_grad():
        method.conditioning.head[-1].weight.normal_(std=0.1)
    method(clips, 0).loss.backward()
    assert weight.grad.any()


def test_the_loss_of_a_batch_is_the_mean_over_its_equal_parts(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    whole = method(clips, 0).loss
    parts = [method(part(clips, rows), 0).loss for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-5, atol=1e-6)


def test_chance_depends_on_seed_and_position_alone(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    flow = method(clips, 0).metrics["flow_loss"]
    assert torch.equal(flow, method(clips, 7).metrics["flow_loss"])
    moved = replace(clips, position=clips.position + 1)
    assert not torch.equal(flow, method(moved, 0).metrics["flow_loss"])
    other = cotrain(replace(config, train=replace(config.train, seed=1)))
    other.load_state_dict(method.state_dict())
    assert not torch.equal(flow, other(clips, 0).metrics["flow_loss"])


def test_equal_seeds_build_equal_weights_whatever_was_drawn_before(config: RunConfig) -> None:
    first = cotrain(config).state_dict()
    torch.randn(3)
    second = cotrain(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_golden_losses(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    metrics = method(clips, 0).metrics
    golden = {"flow_loss": 0.810799, "codebook_loss": 0.440774, "commitment_loss": 0.440774, "loss": 1.361767}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(golden, rel=1e-4)


def test_bf16_keeps_weights_fp32_and_the_loss_close(config: RunConfig, clips: Clips) -> None:
    exact, mixed = cotrain(config), build_method(config, bf16=True)
    awaken(exact)
    mixed.load_state_dict(exact.state_dict())
    output = mixed(clips, 0)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}
    torch.testing.assert_close(output.loss, exact(clips, 0).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("keeps", ["inputs", "products"])
def test_activation_checkpointing_changes_no_gradient(config: RunConfig, clips: Clips, keeps: Literal["inputs", "products"]) -> None:
    plain = cotrain(config)
    saving = cotrain(replace(config, train=replace(config.train, activation_checkpointing=True, checkpointing_keeps=keeps)))
    for method in (plain, saving):
        awaken(method)
        method(clips, 0).loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_evaluation_adds_up_and_is_repeatable(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    one = method.evaluate(clips)
    two = method.evaluate(clips)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["code_counts"].sum(1).tolist() == [24.0, 24.0]
    assert float(one["joint_counts"].sum()) == 24
    assert float(one["z_count"]) == 48
    assert float(one["flow_count"].sum()) == 2 * len(clips)
    pairs = [method.evaluate(part(clips, rows)) for rows in (slice(0, 2), slice(2, 6))]
    for name in ("code_counts", "joint_counts", "z_count", "z_sum", "z_outer", "flow_count", "flow_own", "flow_null", "flow_copy"):
        torch.testing.assert_close(one[name], pairs[0][name] + pairs[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_generator_that_ignores_actions_shows_no_gap_and_one_that_listens_does(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config)
    awaken(method)
    listening = method.evaluate(clips)
    assert not torch.allclose(listening["flow_own"], listening["flow_shuffled"])
    torch.nn.init.zeros_(method.conditioning.head[-1].weight)
    deaf = method.evaluate(clips)
    assert torch.equal(deaf["flow_own"], deaf["flow_shuffled"])
    assert torch.equal(deaf["flow_own"], deaf["flow_null"])


def test_a_repeated_frame_is_judged_by_what_moved_alone(config: RunConfig, clips: Clips) -> None:
    still = clips.video[:, :1].expand_as(clips.video)
    x0, bins = clips.video.double() / 127.5 - 1, torch.arange(TAU_BINS)
    moved = (x0 - x0[:, :1]).square().mean((2, 3, 4))[:, 1:].mean(1)
    halves = (clips.position[:, None] + bins) % 2 == 0
    pretrain = build_method(replace(config, method="pretrain"), bf16=False)
    for method, measured in ((cotrain(config), halves), (pretrain, torch.ones_like(halves))):
        assert method.evaluate(Clips(still, clips.position, clips.source))["flow_copy"].sum() < 1e-8
        sums = method.evaluate(clips)
        expected = (moved[:, None] * measured).sum(0) / bin_times(config.flow.tau_min, bins).double().square()
        torch.testing.assert_close(sums["flow_copy"], expected, rtol=1e-4, atol=1e-6)


def test_a_single_clip_measures_codes_but_no_gap(config: RunConfig, clips: Clips) -> None:
    sums = cotrain(config).evaluate(part(clips, slice(0, 1)))
    assert float(sums["flow_count"].sum()) == 0
    assert float(sums["z_count"]) == 8


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_other_clip_is_never_the_same_and_of_the_same_source_where_there_is_one(source: list[int]) -> None:
    other = other_clip(torch.tensor(source)).tolist()
    assert all(index != mine for mine, index in enumerate(other))
    for mine, index in enumerate(other):
        if source.count(source[mine]) > 1:
            assert source[index] == source[mine]


def test_flow_loss_weighs_clips_equally_and_leaves_context_out() -> None:
    x0 = torch.zeros(2, 3, 1, 2, 2)
    velocity = torch.ones(2, 3, 1, 2, 2)
    velocity[0, 0] = 100.0
    velocity[1, 2] = 3.0
    generated = torch.tensor([[False, True, True], [False, False, True]])
    assert flow_loss(velocity, x0, torch.zeros_like(x0), generated).tolist() == [1.0, 9.0]
    assert patchify(x0, 2).shape == (2, 3, 1, 4)


class _Questions(TorchDispatchMode):
    """Operations whose answer the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in operation.name() for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select")):
            self.asked.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "bottleneck",
    [
        *(BottleneckConfig(kind=kind) for kind in ("vq", "cosine", "simvq", "rotation", "fsq", "continuous")),
        BottleneckConfig(init="data", reset_every=25),
    ],
)
def test_a_step_asks_the_device_nothing(config: RunConfig, clips: Clips, bottleneck: BottleneckConfig) -> None:
    """The host runs ahead of an accelerator as long as it need not know what that has computed."""
    method = cotrain(replace(config, lam=replace(config.lam, bottleneck=bottleneck)))
    for step in range(2):  # codes that are placed on data are placed, and seen to be so
        method(clips, step)
    with _Questions() as questions:
        method(clips, 2).loss.backward()
    assert questions.asked == []
    assert clips.to("meta").position.device.type == "cpu", "or reading them would ask"
    with _Questions() as questions:
        bool(torch.ones(1).sum() > 0)
    assert questions.asked, "a question would be seen"

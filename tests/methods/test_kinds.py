"""Co-training with each kind of bottleneck."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from method_parts import awaken, part

from cola_dist.config import BottleneckConfig, RunConfig
from cola_dist.diagnostics import Monitor
from cola_dist.methods import Clips, build_method
from cola_dist.methods.cotrain import CoTrain

KINDS = get_args(get_type_hints(BottleneckConfig)["kind"])


def cotrain(config: RunConfig, kind: str, bf16: bool = False, **fields: object) -> CoTrain:
    bottleneck = BottleneckConfig(kind=kind, **fields)  # type: ignore[arg-type]
    method = build_method(replace(config, lam=replace(config.lam, bottleneck=bottleneck)), bf16)
    assert isinstance(method, CoTrain)
    return method


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_the_lam_learns_and_the_loss_falls(config: RunConfig, clips: Clips, kind: str) -> None:
    method = cotrain(config, kind)
    awaken(method)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        output = method(clips, step)
        output.loss.backward()
        silent = [name for name, weight in method.role_parameters("lam") if weight.grad is None or not weight.grad.any()]
        assert silent == []
        optimizer.step()
        losses.append(output.loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_teaches_the_inverse_dynamics(config: RunConfig, clips: Clips, kind: str) -> None:
    method = cotrain(config, kind, codebook_weight=0.0, commitment_weight=0.0, beta=0.0)
    awaken(method)
    method(clips, 0).loss.backward()
    gradient = method.lam.idm.embed.weight.grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_keeps_weights_fp32_and_the_loss_close(config: RunConfig, clips: Clips, kind: str) -> None:
    exact, mixed = cotrain(config, kind), cotrain(config, kind, bf16=True)
    awaken(exact)
    mixed.load_state_dict(exact.state_dict())
    output = mixed(clips, 0)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}
    torch.testing.assert_close(output.loss, exact(clips, 0).loss, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "fields", "own"),
    [
        ("vq", {}, {"codebook_loss", "commitment_loss"}),
        ("rotation", {"entropy_weight": 0.1}, {"codebook_loss", "commitment_loss", "entropy"}),
        ("fsq", {}, set()),
        ("continuous", {}, {"kl"}),
    ],
)
def test_what_does_not_apply_is_not_logged(config: RunConfig, clips: Clips, kind: str, fields: dict[str, object], own: set[str]) -> None:
    metrics = cotrain(config, kind, **fields)(clips, 0).metrics
    assert set(metrics) == {"loss", "flow_loss", *own}


def test_the_noise_of_continuous_actions_is_keyed_by_position(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config, "continuous")
    awaken(method)
    whole = method(clips, 0)
    assert torch.equal(whole.loss, method(clips, 7).loss)
    parts = [method(part(clips, rows), 0).loss for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole.loss, torch.stack(parts).mean(), rtol=1e-5, atol=1e-6)
    assert whole.codes is not None
    assert whole.codes.shape == (6, 4, 0)
    assert method._noise(clips) is not None
    assert not torch.equal(method._noise(clips), method._noise(replace(clips, position=clips.position + 1)))
    assert cotrain(config, "vq")._noise(clips) is None


def test_continuous_actions_are_judged_without_codes(config: RunConfig, clips: Clips) -> None:
    method = cotrain(config, "continuous")
    awaken(method)
    sums = method.evaluate(clips)
    assert all(torch.equal(value, again) for value, again in zip(sums.values(), method.evaluate(clips).values(), strict=True))
    assert not {"code_counts", "joint_counts"} & set(sums)
    monitor = Monitor(config.diagnostics, config.lam.bottleneck.codes)
    figures = monitor.indicators(sums)
    assert {"effective_rank", "z_std", "sensitivity_gap", "flow_loss"} <= set(figures)
    assert not {"perplexity", "max_usage", "utilisation", "entropy"} & set(figures)
    assert monitor.verdict(figures) in ("healthy", "at risk", "collapsed")


def test_fsq_counts_every_code_of_its_grid(config: RunConfig, clips: Clips) -> None:
    sums = cotrain(config, "fsq", codes=15).evaluate(clips)
    assert sums["code_counts"].shape == (2, 15)
    assert sums["code_counts"].sum(1).tolist() == [24.0, 24.0]
    assert sums["joint_counts"].shape == (225,)

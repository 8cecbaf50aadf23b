from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.continuous import ContinuousLatents


def latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_known_case() -> None:
    bottleneck = ContinuousLatents(BottleneckConfig(kind="continuous", dim=2, beta=0.5))
    with torch.no_grad():
        bottleneck.log_variance.weight.copy_(torch.tensor([[0.0, 0.0], [math.log(4), 0.0]]))
        bottleneck.log_variance.bias.zero_()
    out = bottleneck(torch.tensor([[[[1.0, -3.0]]]]), 0, torch.tensor([[[[2.0, 0.5]]]]))
    torch.testing.assert_close(out.actions.detach().flatten(), torch.tensor([3.0, -2.0]))
    # Variances 1 and 4: 0.5 (1 + 1 - 1 - 0) and 0.5 (9 + 4 - 1 - log 4).
    assert out.regulariser.item() == pytest.approx((0.5 + 0.5 * (12 - math.log(4))) / 2)
    assert out.loss.item() == pytest.approx(0.5 * out.regulariser.item())
    assert out.codebook_loss.item() == out.commitment_loss.item() == 0
    assert out.codes.shape == (1, 1, 0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 6))
def test_the_divergence_is_that_of_normal_distributions(seed: int, dim: int) -> None:
    torch.manual_seed(seed)
    bottleneck = ContinuousLatents(BottleneckConfig(kind="continuous", dim=dim))
    torch.nn.init.normal_(bottleneck.log_variance.weight)
    z = latents(seed, 2, 3, 2, dim)
    std = (0.5 * bottleneck.log_variance(z)).exp()
    expected = kl_divergence(Normal(z, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(bottleneck(z).regulariser, expected)


def test_noise_moves_the_actions_by_the_learnt_amount_and_nothing_else() -> None:
    bottleneck = ContinuousLatents(BottleneckConfig(kind="continuous", dim=4))
    z, noise = latents(0, 2, 3, 2, 4), latents(1, 2, 3, 2, 4)
    plain, sampled = bottleneck(z), bottleneck(z, 0, noise)
    assert torch.equal(plain.actions, z)
    torch.testing.assert_close(sampled.actions, z + math.exp(-3) * noise)
    assert torch.equal(plain.loss, sampled.loss)
    assert torch.equal(bottleneck.features(plain), z.reshape(6, 8))


def test_the_spread_learns_from_what_is_made_of_the_actions() -> None:
    bottleneck = ContinuousLatents(BottleneckConfig(kind="continuous", dim=4, beta=0.0))
    z, noise = latents(0, 2, 3, 2, 4), latents(1, 2, 3, 2, 4)
    bottleneck(z, 0, noise).actions.square().sum().backward()
    assert bool(bottleneck.log_variance.weight.grad.any())
    assert bool((bottleneck.log_variance.bias.grad > 0).any())


def test_placing_leaves_everything_as_it_was() -> None:
    bottleneck = ContinuousLatents(BottleneckConfig(kind="continuous", dim=4))
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    bottleneck.place(latents(0, 9, 4))
    assert all(torch.equal(before[name], value) for name, value in bottleneck.state_dict().items())

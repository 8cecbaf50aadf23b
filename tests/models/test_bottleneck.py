from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.vq import VectorQuantiser


def latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), codes=st.integers(1, 9), dim=st.integers(1, 6), slots=st.integers(1, 3))
def test_every_token_gets_its_nearest_code(seed: int, codes: int, dim: int, slots: int) -> None:
    torch.manual_seed(seed)
    quantiser = VectorQuantiser(BottleneckConfig(codes=codes, dim=dim, init="normal"), seed)
    z = latents(seed, 2, 3, slots, dim)
    out = quantiser(z)
    chosen = (z - quantiser.codebook[out.codes]).square().sum(-1)
    every = (z[..., None, :] - quantiser.codebook).square().sum(-1)
    torch.testing.assert_close(chosen, every.amin(-1))
    torch.testing.assert_close(out.actions, quantiser.codebook[out.codes])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    quantiser = VectorQuantiser(BottleneckConfig(codes=4, dim=3, init="normal"), seed)
    z = latents(seed, 2, 2, 2, 3).requires_grad_()
    upstream = latents(seed + 1, 2, 2, 2, 3)
    out = quantiser(z)
    (straight,) = torch.autograd.grad((out.actions * upstream).sum(), z, retain_graph=True)
    assert torch.equal(straight, upstream)
    difference = (z - quantiser.codebook[out.codes]).detach()
    (commitment,) = torch.autograd.grad(out.commitment_loss, z, retain_graph=True)
    torch.testing.assert_close(commitment, 2 * difference / z.numel())
    (codebook,) = torch.autograd.grad(out.codebook_loss, quantiser.weight)
    expected = torch.zeros(4, 3).index_add_(0, out.codes.flatten(), -2 * difference.reshape(-1, 3) / z.numel())
    torch.testing.assert_close(codebook, expected)


def test_losses_of_a_known_case() -> None:
    quantiser = VectorQuantiser(BottleneckConfig(codes=2, dim=2), 0)
    with torch.no_grad():
        quantiser.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    out = quantiser(torch.tensor([[[[1.0, 0.0]], [[3.0, 2.0]]]]))
    assert out.codes.flatten().tolist() == [0, 1]
    assert out.codebook_loss.item() == pytest.approx((1 + 0 + 1 + 4) / 4)
    assert out.commitment_loss.item() == pytest.approx(1.5)
    assert out.loss.item() == pytest.approx(1.5 + 0.25 * 1.5)
    assert out.regulariser.item() == 0


def test_starts() -> None:
    torch.manual_seed(0)
    uniform = VectorQuantiser(BottleneckConfig(codes=32, dim=64, init="uniform"), 0).codebook
    assert 0.9 / 32 < float(uniform.abs().max()) <= 1 / 32
    assert abs(float(VectorQuantiser(BottleneckConfig(codes=64, dim=64, init="normal"), 0).codebook.std()) - 1) < 0.05


def test_data_start_takes_codes_from_the_first_batch_only() -> None:
    quantiser = VectorQuantiser(BottleneckConfig(codes=8, dim=3, init="data"), 0)
    first, second = latents(0, 4, 3, 2, 3), latents(1, 4, 3, 2, 3)
    quantiser(first)
    assert not quantiser.placed
    quantiser(first, step=0)
    placed = quantiser.codebook.detach().clone()
    assert float(torch.cdist(placed, first.reshape(-1, 3)).amin(1).max()) < 1e-6
    assert len(placed.unique(dim=0)) == 8
    quantiser(second, step=1)
    assert torch.equal(quantiser.codebook, placed)


def test_reset_moves_dead_codes_onto_the_batch_and_leaves_live_ones() -> None:
    quantiser = VectorQuantiser(BottleneckConfig(codes=4, dim=2, reset_every=2), 0)
    with torch.no_grad():
        quantiser.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [60.0, 60.0]]))
    z = torch.rand(4, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    z[0, 0], z[0, 1] = 0.0, 1.0
    for step in (0, 1):
        quantiser(z, step)
    assert torch.equal(quantiser.codebook[2:], quantiser.weight[2:])
    assert quantiser.uses.tolist()[2:] == [0, 0]
    quantiser(z, 2)
    assert torch.equal(quantiser.codebook[:2], quantiser.weight[:2])
    assert float(torch.cdist(quantiser.codebook[2:].detach(), z.reshape(-1, 2)).amin(1).max()) < 1e-5
    moved = quantiser.offset.clone()
    quantiser(z + 9, 2)
    assert torch.equal(quantiser.offset, moved), "a second micro-batch of the same step must not reset again"


def test_the_faithful_baseline_never_writes_its_buffers() -> None:
    quantiser = VectorQuantiser(BottleneckConfig(codes=4, dim=2), 0)
    before = {name: buffer.clone() for name, buffer in quantiser.named_buffers()}
    for step in range(5):
        quantiser(latents(step, 2, 2, 1, 2), step)
    assert all(torch.equal(before[name], buffer) for name, buffer in quantiser.named_buffers())

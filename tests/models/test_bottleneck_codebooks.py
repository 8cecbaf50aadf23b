"""Kinds with a codebook that differ from the baseline, and the entropy term."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.codebook import CodebookQuantiser
from cola_dist.models.bottleneck.cosine import CosineQuantiser
from cola_dist.models.bottleneck.entropy import entropy_term
from cola_dist.models.bottleneck.rotation import RotationQuantiser, rotated
from cola_dist.models.bottleneck.simvq import SimVQ
from cola_dist.models.bottleneck.vq import VectorQuantiser


def latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantiser(kind: type[VectorQuantiser] | type[SimVQ], seed: int, codes: int, dim: int) -> CodebookQuantiser:
    torch.manual_seed(seed)
    return kind(BottleneckConfig(codes=codes, dim=dim, init="normal"), seed)


@settings(deadline=None, max_examples=15)
@given(
    kind=st.sampled_from([CosineQuantiser, SimVQ, RotationQuantiser]),
    seed=st.integers(0, 10_000),
    codes=st.integers(1, 9),
    dim=st.integers(1, 6),
)
def test_every_token_gets_its_nearest_code(kind: type[VectorQuantiser], seed: int, codes: int, dim: int) -> None:
    made = quantiser(kind, seed, codes, dim)
    z = latents(seed, 2, 3, 2, dim)
    out = made(z)
    compared = torch.nn.functional.normalize(z, dim=-1) if kind is CosineQuantiser else z
    every = (compared[..., None, :] - made.codebook).square().sum(-1)
    chosen = every.gather(-1, out.codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, every.amin(-1))
    torch.testing.assert_close(out.actions, made.codebook[out.codes])


def test_cosine_of_a_known_case() -> None:
    made = CosineQuantiser(BottleneckConfig(kind="cosine", codes=2, dim=2), 0)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    out = made(torch.tensor([[[[4.0, 3.0]], [[0.03, 0.04]]]]))
    assert out.codes.flatten().tolist() == [0, 1]
    torch.testing.assert_close(out.actions.detach().reshape(2, 2), torch.eye(2))
    assert out.codebook_loss.item() == out.commitment_loss.item() == pytest.approx((0.2**2 + 0.6**2) / 2)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), power=st.integers(-8, 8))
def test_cosine_knows_directions_only(seed: int, power: int) -> None:
    made = quantiser(CosineQuantiser, seed, 7, 4)
    z = latents(seed, 2, 3, 2, 4).requires_grad_()
    one, two = made(z), made(z * 2.0**power)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    similarity = torch.nn.functional.cosine_similarity(z[..., None, :], made.codebook, dim=-1)
    torch.testing.assert_close(similarity.gather(-1, one.codes[..., None])[..., 0], similarity.amax(-1))
    torch.testing.assert_close(one.actions.norm(dim=-1), torch.ones(2, 3, 2))
    (gradient,) = torch.autograd.grad((one.actions * latents(seed + 1, 2, 3, 2, 4)).sum(), z)
    torch.testing.assert_close((gradient * z).sum(-1), torch.zeros(2, 3, 2), atol=1e-4, rtol=0)


def test_simvq_of_a_known_case() -> None:
    made = SimVQ(BottleneckConfig(kind="simvq", codes=2, dim=2), 0)
    made.basis.copy_(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    with torch.no_grad():
        made.map.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    out = made(torch.tensor([[[[3.0, 0.0]], [[2.0, 4.0]]]]))
    assert out.codes.flatten().tolist() == [0, 1]
    assert out.actions.reshape(2, 2).tolist() == [[2.0, 0.0], [2.0, 2.0]]
    assert out.codebook_loss.item() == pytest.approx((1 + 4) / 4)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_simvq_moves_every_code_whichever_is_used(seed: int) -> None:
    made = quantiser(SimVQ, seed, 8, 4)
    before, basis = made.codebook.detach().clone(), made.basis.clone()
    assert [name for name, _ in made.named_parameters()] == ["map"]
    z = (before[3] + 0.01).expand(1, 1, 1, 4)
    out = made(z, step=0)
    out.codebook_loss.backward()
    with torch.no_grad():
        made.map -= 0.1 * made.map.grad
    assert bool((made.codebook != before).any(1).all())
    assert torch.equal(made.basis, basis)


def test_simvq_starts_with_codes_of_the_scale_it_says() -> None:
    made = quantiser(SimVQ, 0, 512, 64)
    assert made.codebook.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)


def test_rotation_of_a_known_case() -> None:
    z = torch.tensor([2.0, 0.0], requires_grad=True)
    code = torch.tensor([0.0, 1.0])
    (gradient,) = torch.autograd.grad(rotated(z, code), z, torch.tensor([3.0, 5.0]))
    # A quarter turn leads from z to the code, so a quarter turn back, and half as long.
    torch.testing.assert_close(gradient, torch.tensor([2.5, -1.5]))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_the_rotation_keeps_the_angle_of_gradient_and_code(seed: int, dim: int, scale: float) -> None:
    z = latents(seed, 5, dim).double().requires_grad_()
    code, upstream = scale * latents(seed + 1, 5, dim).double(), latents(seed + 2, 5, dim).double()
    value = rotated(z, code)
    assert torch.equal(value, code)
    (gradient,) = torch.autograd.grad(value, z, upstream)
    factor = code.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(gradient.norm(dim=1), factor * upstream.norm(dim=1))
    at_code, at_z = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1) for a, b in ((upstream, code), (gradient, z)))
    torch.testing.assert_close(at_code, at_z, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("z", "code"), [((0.0, 0.0), (1.0, 2.0)), ((1.0, 2.0), (0.0, 0.0)), ((0.0, 0.0), (0.0, 0.0))])
def test_where_nothing_can_be_turned_the_gradient_passes_straight(z: tuple[float, float], code: tuple[float, float]) -> None:
    start = torch.tensor(z, requires_grad=True)
    (gradient,) = torch.autograd.grad(rotated(start, torch.tensor(code)), start, torch.tensor([3.0, 5.0]))
    assert gradient.tolist() == [3.0, 5.0]


def test_opposite_directions_are_turned_too() -> None:
    z = torch.tensor([1.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(rotated(z, torch.tensor([-2.0, 0.0])), z, torch.tensor([3.0, 5.0]))
    assert gradient[0].item() == pytest.approx(-6.0)
    assert abs(gradient[1].item()) == pytest.approx(10.0)


def test_rotation_differs_from_vq_in_the_gradient_alone() -> None:
    plain, turned = quantiser(VectorQuantiser, 0, 6, 3), quantiser(RotationQuantiser, 0, 6, 3)
    z = latents(0, 2, 3, 2, 3).requires_grad_()
    one, two = plain(z), turned(z)
    torch.testing.assert_close(one.actions, two.actions)
    assert all(torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))
    gradients = [torch.autograd.grad(out.actions.sum(), z)[0] for out in (one, two)]
    assert not torch.allclose(*gradients)


def test_entropy_term_of_a_known_case() -> None:
    rows, codebook = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0], [4.0]])
    # Squared distances 0 1 16 and 4 1 4, excess 0 1 16 and 3 0 3: the temperature is a tenth of 23/6.
    p = [[math.exp(-value / (2.3 / 6)) for value in row] for row in ((0, 1, 16), (3, 0, 3))]
    p = [[value / sum(row) for value in row] for row in p]
    mean = [(first + second) / 2 for first, second in zip(*p, strict=True)]
    nats = [-sum(value * math.log(value) for value in row) for row in (*p, mean)]
    assert entropy_term(rows, codebook).item() == pytest.approx((nats[0] + nats[1]) / 2 - nats[2], rel=1e-5)


def test_entropy_term_is_least_where_each_token_is_sure_and_all_codes_are_used() -> None:
    codebook = torch.eye(8)
    assert entropy_term(codebook, codebook).item() == pytest.approx(-math.log(8), abs=2e-3)
    assert entropy_term(codebook[:1].expand(5, 8), codebook).item() == pytest.approx(0, abs=1e-6)
    assert entropy_term(codebook[:4], codebook).item() == pytest.approx(-math.log(4), abs=2e-3)
    assert entropy_term(codebook, torch.ones(8, 8)).item() == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), codes=st.integers(2, 9), power=st.integers(-6, 6))
def test_entropy_term_has_bounds_and_no_scale(seed: int, codes: int, power: int) -> None:
    rows, codebook = latents(seed, 20, 3).requires_grad_(), latents(seed + 1, codes, 3).requires_grad_()
    term = entropy_term(rows, codebook)
    assert -math.log(codes) - 1e-5 <= term.item() <= 1e-5
    torch.testing.assert_close(term, entropy_term(rows * 2.0**power, codebook * 2.0**power), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(term, entropy_term(rows + 2, codebook + 2), rtol=1e-3, atol=1e-4)
    gradients = torch.autograd.grad(term, (rows, codebook))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert all(bool(gradient.any()) for gradient in gradients)


def perplexity_after_training(kind: type[VectorQuantiser], entropy_weight: float) -> float:
    """Perplexity of codes after an encoder learnt from the bottleneck's own terms alone, z starting in a heap far from all codes."""
    torch.manual_seed(0)
    made = kind(BottleneckConfig(codes=8, dim=4, entropy_weight=entropy_weight), 0)
    encoder = torch.nn.Linear(6, 4)
    inputs = torch.randn(128, 6)
    optimizer = torch.optim.Adam([*encoder.parameters(), *made.parameters()], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        made(0.1 * encoder(inputs)[:, None, None] + 1).loss.backward()
        optimizer.step()
    share = torch.bincount(made(0.1 * encoder(inputs)[:, None, None] + 1).codes.flatten(), minlength=8) / 128
    return float(torch.special.entr(share).sum().exp())


@pytest.mark.parametrize("kind", [VectorQuantiser, CosineQuantiser, SimVQ, RotationQuantiser])
def test_entropy_term_brings_codes_into_use(kind: type[VectorQuantiser]) -> None:
    assert perplexity_after_training(kind, 1.0) > 2 * perplexity_after_training(kind, 0.0)

"""The contract that every kind of bottleneck keeps."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck import Bottleneck, build_bottleneck
from cola_dist.models.bottleneck.vq import VectorQuantiser

KINDS = get_args(get_type_hints(BottleneckConfig)["kind"])
DISCRETE = [kind for kind in KINDS if kind != "continuous"]
PLACING = ["vq", "cosine", "rotation"]


def build(kind: str, **fields: object) -> Bottleneck:
    torch.manual_seed(0)
    return build_bottleneck(BottleneckConfig(kind=kind, **fields), seed=0)  # type: ignore[arg-type]


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_default_is_the_faithful_baseline() -> None:
    assert type(build_bottleneck(BottleneckConfig(), 0)) is VectorQuantiser
    assert len(KINDS) == len({type(build(kind)) for kind in KINDS})


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_types_under_bf16_autocast(kind: str) -> None:
    bottleneck = build(kind, codes=32, dim=6)
    z = latents(2, 3, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bottleneck(z.bfloat16(), step=0)
    assert {value.dtype for name, value in out._asdict().items() if name != "codes"} == {torch.float32}
    assert {value.shape for value in out[2:]} == {()}
    assert out.actions.shape == z.shape
    assert bottleneck.codes == (0 if kind == "continuous" else 32)
    assert out.codes.shape == (2, 3, 0 if kind == "continuous" else 4)
    assert out.codes.dtype == torch.int64
    exact = bottleneck(z.bfloat16().float(), step=1)
    assert all(torch.equal(one, two) for one, two in zip(out, exact, strict=True)), "autocast has no say inside"


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_of_the_terms(kind: str) -> None:
    weights = {"codebook_weight": 0.7, "commitment_weight": 0.3, "entropy_weight": 0.2, "beta": 0.1}
    bottleneck = build(kind, dim=6, **weights)
    out = bottleneck(latents(2, 3, 4, 6))
    metrics = bottleneck.metrics(out)
    by_name = {"codebook_loss": 0.7, "commitment_loss": 0.3, "entropy": 0.2, "kl": 0.1}
    torch.testing.assert_close(out.loss.detach(), sum((by_name[name] * value for name, value in metrics.items()), torch.tensor(0.0)))
    assert not any(value.requires_grad for value in metrics.values())
    expected = {"fsq": [], "continuous": ["kl"]}.get(kind, ["codebook_loss", "commitment_loss", "entropy"])
    assert list(metrics) == expected
    if kind not in ("fsq", "continuous"):
        quiet = build(kind, dim=6)
        assert list(quiet.metrics(quiet(latents(2, 3, 4, 6)))) == ["codebook_loss", "commitment_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing_and_ignores_what_training_asks_for(kind: str) -> None:
    bottleneck = build(kind, dim=6)
    z = latents(2, 3, 4, 6)
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    one, two = bottleneck(z), bottleneck(z)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(before[name], value) for name, value in bottleneck.state_dict().items())
    if not bottleneck.samples:
        assert torch.equal(bottleneck(z, None, latents(2, 3, 4, 6, seed=1)).actions, one.actions)


@pytest.mark.parametrize("kind", KINDS)
def test_the_actions_carry_a_gradient_to_z(kind: str) -> None:
    bottleneck = build(kind, dim=6)
    z = latents(2, 3, 4, 6).requires_grad_()
    (bottleneck(z).actions * latents(2, 3, 4, 6, seed=1)).sum().backward()
    assert z.grad is not None
    assert z.grad.flatten(0, 2).any(1).all()


@pytest.mark.parametrize("kind", DISCRETE)
def test_a_code_is_a_value_and_features_name_the_codes(kind: str) -> None:
    bottleneck = build(kind, codes=12, dim=6)
    out = bottleneck(latents(20, 3, 2, 6))
    actions, codes = out.actions.detach().flatten(0, 2), out.codes.flatten()
    assert 0 <= int(codes.min()) <= int(codes.max()) < 12
    for code in codes.unique():
        torch.testing.assert_close(actions[codes == code], actions[codes == code][:1].expand((codes == code).sum(), 6))
    features = bottleneck.features(out)
    assert features.shape == (60, 2 * 12)
    assert features.dtype == torch.float32
    assert torch.equal(features.reshape(20, 3, 2, 12).argmax(-1), out.codes)
    assert float(features.sum()) == out.codes.numel()


@pytest.mark.parametrize("kind", DISCRETE)
def test_placing_lets_z_that_hardly_vary_use_many_codes(kind: str) -> None:
    bottleneck = build(kind, codes=32, dim=6)
    z = 3 + 0.01 * latents(100, 2, 2, 6)
    assert len(bottleneck(z).codes.unique()) < 8
    bottleneck.place(z.flatten(0, 2))
    assert len(bottleneck(z).codes.unique()) > 16


@pytest.mark.parametrize("kind", PLACING)
def test_codes_are_placed_without_a_write_into_the_weights(kind: str) -> None:
    quantiser = build(kind, codes=32, dim=6, init="data", reset_every=2)
    assert isinstance(quantiser, VectorQuantiser)
    weight = quantiser.weight.detach().clone()
    for step in range(3):
        z = latents(4, 3, 2, 6, seed=step) + 5 * step
        quantiser(z, step)
        if step != 1:
            rows = z.reshape(-1, 6) / (z.reshape(-1, 6).norm(dim=1, keepdim=True) if kind == "cosine" else 1)
            distance = torch.cdist(quantiser.codebook.detach(), rows, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
            # Of 32 codes on 24 tokens 8 are doubles that nothing uses.
            assert int((distance < 1e-5).sum()) == (8 if step else 32)
    assert torch.equal(quantiser.weight, weight), "an optimizer with its own copy of the weights would undo that"
    assert int(quantiser.last_reset) == 2


@pytest.mark.parametrize("kind", DISCRETE)
def test_codes_stand_for_the_actions_that_they_were_read_from(kind: str) -> None:
    bottleneck = build(kind, codes=32, dim=6)
    out = bottleneck(latents(2, 3, 4, 6))
    assert len(out.codes.unique()) > 1
    torch.testing.assert_close(bottleneck.actions_of(out.codes), out.actions, rtol=1e-5, atol=1e-6)


def test_where_there_are_no_codes_none_stands_for_an_action() -> None:
    with pytest.raises(ValueError, match="no codes"):
        build("continuous").actions_of(torch.zeros(1, dtype=torch.int64))

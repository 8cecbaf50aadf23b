"""Cosmos-Predict2's transformer against diffusers' own, as its published pipeline asks it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from cola_dist.models.world import CosmosVideo
from tests.models.published import COSMOS, load_theirs, write_cosmos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cosmos(tmp_path_factory.mktemp("cosmos"))


@torch.no_grad()
def test_it_is_the_published_pipelines_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline scales by sigma, and takes clean frames from the network's output; here that is a velocity at tau = sigma / (1 + sigma)."""
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    # It resizes the mask of what lies outside the picture, which is empty, with a package that is not installed here.
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: functional.interpolate(mask, size))
    monkeypatch.setattr(
        transformer_cosmos, "transforms", SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST="")), raising=False
    )
    torch.manual_seed(1)
    b, frames, sigma = 2, 4, 3.0
    x0, eps = torch.randn(2, b, 16, frames, 4, 6)
    context = torch.zeros(b, 1, frames, 1, 1)
    context[:, :, 0] = 1
    noisy = x0 + sigma * eps
    t = sigma / (1 + sigma)
    theirs = load_theirs(CosmosTransformer3DModel, folder)
    asked = context * x0 + (1 - context) * noisy * (1 - t)
    times = context * (1e-4 / (1 + 1e-4)) + (1 - context) * t
    out = theirs(
        asked,
        times,
        torch.zeros(b, 512, 1024),
        fps=5,
        condition_mask=context.expand(-1, 1, -1, 4, 6),
        padding_mask=torch.zeros(1, 1, 32, 48),
        return_dict=False,
    )[0]
    clean = (1 - t) * noisy - t * out

    tau = torch.tensor([[0.0, t, t, t]]).expand(b, -1)
    x_tau = asked.transpose(1, 2)
    velocity = CosmosVideo.from_pretrained(str(folder), COSMOS)(x_tau, tau, None)
    found = (x_tau - tau[:, :, None, None, None] * velocity).transpose(1, 2)
    assert float((found - clean)[:, :, 1:].abs().max() / clean.abs().max()) < 1e-5
    assert float((velocity.transpose(1, 2) - out).abs().max() / out.abs().max()) < 1e-5


@torch.no_grad()
def test_zero_modulation_is_none_and_rows_are_per_frame(folder: Path) -> None:
    model = CosmosVideo.from_pretrained(str(folder), COSMOS)
    x, tau = torch.randn(1, 3, 16, 4, 4), torch.tensor([[0.0, 0.5, 0.5]])
    assert torch.equal(model(x, tau, None), model(x, tau, torch.zeros(1, 3, *model.modulation_shape)))
    base = model.base_modulation(tau)
    assert base.shape == (1, 3, *model.modulation_shape)
    torch.testing.assert_close(base[:, 1], base[:, 2])
    assert not torch.equal(base[:, 0], base[:, 1])


def test_checkpointing_changes_no_gradient(folder: Path) -> None:
    gradients = []
    x, tau = torch.ones(1, 2, 16, 4, 4), torch.full((1, 2), 0.5)
    for keep in (True, False):
        model = CosmosVideo.from_pretrained(str(folder), COSMOS)
        if not keep:
            model.enable_checkpointing()
        model(x, tau, None).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_full_size_is_two_billion() -> None:
    with torch.device("meta"):
        full = CosmosVideo(channels=16, patch=2, width=2048, depth=28, heads=16, fps=16)
    assert 1.4e9 < sum(p.numel() for p in full.parameters()) < 2.1e9

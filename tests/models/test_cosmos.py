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


def test_full_size_is_the_published_one_without_its_text() -> None:
    """Cosmos-Predict2 2B as diffusers builds it, less each block's cross-attention and the norm before it."""
    from diffusers import CosmosTransformer3DModel

    with torch.device("meta"):
        full = CosmosVideo(channels=16, patch=2, width=2048, depth=28, heads=16, fps=16)
        whole = CosmosTransformer3DModel(17, 16, 16, 128, 28, rope_scale=(1.0, 3.0, 3.0), extra_pos_embed_type=None)
    left_out = 28 * (2 * 2048**2 + 2 * 1024 * 2048 + 2 * 128 + 256 * 2048 + 256 * 3 * 2048)
    counts = [sum(p.numel() for p in model.parameters()) for model in (full, whole)]
    assert counts[0] + left_out == counts[1]
    assert round(counts[1] / 1e9, 2) == 1.96

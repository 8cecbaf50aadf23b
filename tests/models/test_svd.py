"""Stable Video Diffusion's UNet against diffusers' own, asked as its scheduler asks it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cola_dist.config import AutoencoderConfig
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.world import SvdUNet
from tests.models.published import SVD, load_theirs, write_svd, write_svd_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svd(tmp_path_factory.mktemp("svd"))


@torch.no_grad()
def test_it_is_diffusers_denoising_behind_a_velocity(folder: Path) -> None:
    """EDM's v-prediction at one noise for all frames, by the formulas of diffusers' Euler scheduler."""
    from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel

    torch.manual_seed(1)
    tau = 0.75
    sigma = tau / (1 - tau)
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0)
    scheduler.set_timesteps(25)
    nearest = int((scheduler.sigmas - sigma).abs().argmin())
    sigma = float(scheduler.sigmas[nearest])
    tau = sigma / (1 + sigma)
    x0, eps = torch.randn(2, 2, 5, 4, 8, 8)
    noisy = x0 + sigma * eps
    x_tau = (1 - tau) * noisy
    unet = load_theirs(UNetSpatioTemporalConditionModel, folder)
    step = scheduler.timesteps[nearest]
    image = (x_tau[:, :1] / 0.18215).expand_as(x_tau)
    asked = torch.cat([scheduler.scale_model_input(noisy, step), image], 2)
    told = torch.tensor([[4.0, 127.0, 0.02]]).expand(2, -1)
    out = unet(asked, step, torch.zeros(2, 1, 1024), added_time_ids=told, return_dict=False)[0]
    scheduler._step_index = None
    clean = scheduler.step(out, step, noisy).pred_original_sample

    velocity = SvdUNet.from_pretrained(str(folder), SVD)(x_tau, torch.full((2, 5), tau), None)
    found = x_tau - tau * velocity
    assert float((found - clean).abs().max() / clean.abs().max()) < 1e-4


@torch.no_grad()
def test_times_are_per_frame(folder: Path) -> None:
    model = SvdUNet.from_pretrained(str(folder), SVD)
    x, tau = torch.randn(1, 3, 4, 8, 8), torch.tensor([[0.0, 0.5, 1.0]])
    plain = model(x, tau, None)
    assert torch.isfinite(plain).all()
    base = model.base_modulation(tau)
    assert base.shape == (1, 3, *model.modulation_shape)
    assert len({float(row.sum()) for row in base[0]}) == 3
    moved = torch.zeros(1, 3, *model.modulation_shape)
    moved[:, 2] = 1.0
    assert not torch.equal(plain, model(x, tau, moved))


def test_full_size_is_one_and_a_half_billion() -> None:
    with torch.device("meta"):
        full = SvdUNet(channels=4, patch=8, width=320, depth=2, heads=5, fps=7)
    assert round(sum(p.numel() for p in full.parameters()) / 1e9, 2) == 1.52


def test_the_autoencoder_has_a_latent_frame_per_frame(tmp_path: Path) -> None:
    video = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    made = build_autoencoder(AutoencoderConfig("svd", str(write_svd_vae(tmp_path))), bf16=False)
    latents = made.encode(video)
    assert latents.shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(made.encode(video[:, 1:2]), latents[:, 1:2])
    assert made.decode(latents).shape == video.shape

"""Wan's transformer and autoencoder against diffusers' own on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cola_dist.config import AutoencoderConfig
from cola_dist.errors import UserError
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.world import WanVideo
from tests.models.published import WAN, load_theirs, write_opensora_vae, write_wan, write_wan_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"))


def theirs(folder: Path, x: Tensor, tau: Tensor, tokens: int = 512) -> Tensor:
    """diffusers' forward with one flow time per token and a prompt of zeros."""
    from diffusers import WanTransformer3DModel

    model = load_theirs(WanTransformer3DModel, folder)
    places = (x.shape[-2] // 2) * (x.shape[-1] // 2)
    times = (1000 * tau).repeat_interleave(places, 1)
    out: Tensor = model(x.transpose(1, 2), times, torch.zeros(len(x), tokens, WAN["text_width"]), return_dict=False)[0]
    return out.transpose(1, 2)


@pytest.mark.parametrize("size", [(4, 4), (4, 8)])
@torch.no_grad()
def test_it_is_diffusers_forward_with_an_empty_prompt(folder: Path, size: tuple[int, int]) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    torch.manual_seed(1)
    x, tau = torch.randn(2, 3, 16, *size), torch.rand(2, 3)
    model = WanVideo.from_pretrained(str(folder), WAN)
    reference = theirs(folder, x, tau)
    assert float((model(x, tau, None) - reference).abs().max() / reference.abs().max()) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, tau, None)
    assert half.dtype == torch.float32
    assert float((half - reference).abs().max() / reference.abs().max()) < 2e-2


@torch.no_grad()
def test_a_frames_modulation_is_its_own(folder: Path) -> None:
    """Rows given to frame 1 alone are what a flow time of its own would be: they reach the others through attention only."""
    model = WanVideo.from_pretrained(str(folder), WAN)
    tau = torch.tensor([[0.2, 0.7, 0.7]])
    base = model.base_modulation(tau)
    assert base.shape == (1, 3, *model.modulation_shape)
    torch.testing.assert_close(base[:, 1], base[:, 2])
    later = model.base_modulation(torch.tensor([[0.2, 0.9, 0.7]]))
    moved = (later - base).abs().amax((0, 2, 3, 4)) > 0
    assert moved.tolist() == [False, True, False]


def test_cross_attention_can_be_removed(folder: Path) -> None:
    whole, bare = (WanVideo.from_pretrained(str(folder), WAN | {"text_width": width}) for width in (20, 0))
    names = {name for name, _ in bare.named_parameters()}
    gone = {name for name, _ in whole.named_parameters()} - names
    assert names < {name for name, _ in whole.named_parameters()}
    assert all("attn2" in name or "norm2" in name or "text_embedder" in name for name in gone)
    x, tau = torch.randn(1, 2, 16, 4, 4), torch.rand(1, 2)
    assert not torch.equal(whole(x, tau, None), bare(x, tau, None))


def test_full_size_is_the_published_one() -> None:
    """What is called 1.3B has 1.42 B parameters, its text layers among them."""
    with torch.device("meta"):
        full = WanVideo(channels=16, patch=2, width=1536, depth=30, heads=12, mlp_width=8960, text_width=4096)
    assert round(sum(p.numel() for p in full.parameters()) / 1e9, 2) == 1.42


def test_the_autoencoder_places_latents_as_its_file_says(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    uri = str(write_wan_vae(tmp_path))
    video = torch.randint(0, 256, (3, 9, 3, 32, 32), dtype=torch.uint8)
    made = build_autoencoder(AutoencoderConfig("wan", uri, images_at_once=2), bf16=False)
    latents = made.encode(video)
    assert latents.shape == (3, 3, 16, 4, 4)
    vae = load_theirs(AutoencoderKLWan, Path(uri))
    with torch.no_grad():
        raw = vae.encode((video.float() / 127.5 - 1).transpose(1, 2)).latent_dist.mode()
    mean, std = (torch.tensor(getattr(vae.config, name))[None, :, None, None, None] for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, ((raw - mean) / std).transpose(1, 2))
    assert made.decode(latents).shape == video.shape


def test_another_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is of None, not AutoencoderKLWan: choose another autoencoder\.pretrained"):
        build_autoencoder(AutoencoderConfig("wan", str(write_opensora_vae(tmp_path))), bf16=False)

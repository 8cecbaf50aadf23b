"""Open-Sora's autoencoder: published shapes, and how its latent frames lie to the frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cola_dist.config import AutoencoderConfig
from cola_dist.errors import UserError
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.opensora_vae import OpenSoraVae, sizes_of
from tests.models.published import write_opensora_vae, write_stdit3


def test_full_size_is_the_published_one() -> None:
    """SDXL's image autoencoder of 83.65 M parameters and a temporal one of 309.69 M."""
    with torch.device("meta"):
        vae = OpenSoraVae((128, 256, 512, 512), 2, 32, 128, 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    counts = {half: sum(p.numel() for p in vae.get_submodule(half).parameters()) for half in ("spatial_vae", "temporal_vae")}
    assert {half: round(count / 1e6, 2) for half, count in counts.items()} == {"spatial_vae": 83.65, "temporal_vae": 309.69}
    assert shapes["temporal_vae.encoder.conv_blocks.1.conv.weight"] == (256, 256, 3, 3, 3)
    assert shapes["temporal_vae.decoder.conv_blocks.2.conv.weight"] == (1024, 512, 3, 3, 3)
    assert "temporal_vae.encoder.conv_blocks.0.conv.weight" not in shapes
    assert shapes["temporal_vae.quant_conv.conv.weight"] == (8, 8, 1, 1, 1)
    assert sizes_of(shapes) == {"image_widths": [128, 256, 512, 512], "image_layers": 2, "image_groups": 32, "filters": 128, "blocks": 4}


@pytest.mark.parametrize("frames", [5, 9, 17])
def test_latent_frames_follow_the_frames_that_they_stand_for(tmp_path: Path, frames: int) -> None:
    """A change in the video from frame 4 * (l - 1) + 1 on leaves the convolutions of latent frames before l as they were."""
    vae = OpenSoraVae((4, 4, 4, 4), 1, 4, 4, 1).double().eval()
    for module in vae.temporal_vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            # Its statistics go over time as well, so in the published model the past knows a little of the future. The convolutions do not.
            module.forward = lambda x: x  # type: ignore[method-assign]
    video = torch.rand(1, 3, frames, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = vae.encode(video, 4)
        assert plain.shape == (1, 4, 1 + (frames - 1) // 4, 2, 2)
        for latent in range(1, plain.shape[2]):
            changed = video.clone()
            changed[:, :, 4 * (latent - 1) + 1 :] += 1.0
            moved = (vae.encode(changed, 4) - plain).abs().amax((0, 1, 3, 4)) > 1e-12
            assert moved.tolist() == [later >= latent for later in range(plain.shape[2])]
        assert vae.decode(plain, 4).shape == video.shape


def test_clips_are_encoded_as_the_file_says_and_in_parts_alike(tmp_path: Path) -> None:
    folder = str(write_opensora_vae(tmp_path))
    video = torch.randint(0, 256, (2, 5, 3, 32, 32), dtype=torch.uint8)
    made = build_autoencoder(AutoencoderConfig("opensora", folder), bf16=False)
    latents = made.encode(video)
    assert latents.shape == (2, 2, 4, 4, 4)
    assert latents.dtype == torch.float32
    parts = build_autoencoder(AutoencoderConfig("opensora", folder, images_at_once=3), bf16=False)
    torch.testing.assert_close(parts.encode(video), latents)
    half = build_autoencoder(AutoencoderConfig("opensora", folder), bf16=True)
    assert float((half.encode(video) - latents).abs().max() / latents.abs().max()) < 0.05
    back = made.decode(latents)
    assert back.shape == video.shape
    assert back.dtype == torch.uint8
    assert len({one.hash for one in (made, half)}) == 2
    other = build_autoencoder(AutoencoderConfig("opensora", str(write_opensora_vae(tmp_path / "other", seed=1))), bf16=False)
    assert other.hash != made.hash


def test_another_model_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not Open-Sora v1\.2's autoencoder .* choose another autoencoder\.pretrained"):
        build_autoencoder(AutoencoderConfig("opensora", str(write_stdit3(tmp_path))), bf16=False)

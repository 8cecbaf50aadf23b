"""The autoencoder of a configuration; those that their authors publish, with the place and scale of latents that generators were trained on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cola_dist.config import AUTOENCODERS, AutoencoderConfig
from cola_dist.errors import UserError
from cola_dist.models.autoencoder import Autoencoder, PixelAutoencoder, to_pixels, to_video
from cola_dist.models.published import HERE, Place, load_published, read_config, tensor_shapes, without_weights


class PublishedAutoencoder(Autoencoder):
    """Frozen weights, in bf16 where the run computes in it; means instead of samples, so that a clip has one latent."""

    def __init__(self, config: AutoencoderConfig, bf16: bool, place: Place) -> None:
        """Load ``config.pretrained`` to ``place``. Raises `UserError` if that folder does not hold this autoencoder."""
        if config.pretrained is None:
            raise UserError(f"autoencoder.kind is {config.kind}: say with --autoencoder.pretrained where its published folder is")
        self.shape = AUTOENCODERS[config.kind]
        uri = config.pretrained
        vae: nn.Module = without_weights(lambda: self._build(uri))
        self.loaded = load_published(vae, uri, "(?!)", place)
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        # torch's own cast: that of diffusers warns of modules that it would keep in fp32, and there are none.
        self._vae: Any = nn.Module.to(vae.eval().requires_grad_(False), self._dtype)
        _tile(self._vae, config.tile)
        self._at_once = config.images_at_once
        self.hash = f"{config.kind} {self.loaded.sha256} {self._dtype}" + (f" in tiles of {config.tile}" if config.tile else "")

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        self._vae.to(video.device)
        with torch.autocast(video.device.type, enabled=False):
            latents: Tensor = self._encode(to_pixels(video).transpose(1, 2).to(self._dtype)).transpose(1, 2).float()
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self._vae.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return to_video(self._decode(latents.transpose(1, 2).to(self._dtype)).transpose(1, 2))

    @abstractmethod
    def _build(self, uri: str) -> nn.Module:
        """The module that the folder's tensors fit."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` in [-1, 1] to ``[B, C, L, h, w]``."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """The inverse."""


class OpenSoraAutoencoder(PublishedAutoencoder):
    """Open-Sora v1.2's, `cola_dist.models.opensora_vae`."""

    def _build(self, uri: str) -> nn.Module:
        from cola_dist.models.opensora_vae import OpenSoraVae, sizes_of

        try:
            return OpenSoraVae(**sizes_of(tensor_shapes(uri)))
        except (KeyError, IndexError) as error:
            lacking = f"it has no tensor {error}"
            raise UserError(f"{uri} is not Open-Sora v1.2's autoencoder ({lacking}): choose another autoencoder.pretrained") from None

    def _encode(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self._vae.encode(pixels, self._at_once)
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        video: Tensor = self._vae.decode(latents, self._at_once)
        return video


class WanAutoencoder(PublishedAutoencoder):
    """Wan 2.1's causal video autoencoder, from diffusers, with a place and scale of each channel; Cosmos-Predict2 uses it as well."""

    def _build(self, uri: str) -> nn.Module:
        from diffusers import AutoencoderKLWan

        return _from_config(AutoencoderKLWan, uri)

    def _placed(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of each channel, ``[C, 1, 1, 1]``."""
        config, like = self._vae.config, next(self._vae.parameters())
        mean, spread = (like.new_tensor(getattr(config, name))[:, None, None, None] for name in ("latents_mean", "latents_std"))
        return mean, spread

    def _encode(self, pixels: Tensor) -> Tensor:
        mean, spread = self._placed()
        parts = [self._vae.encode(part).latent_dist.mode() for part in pixels.split(self._at_once)]
        return (torch.cat(parts) - mean) / spread

    def _decode(self, latents: Tensor) -> Tensor:
        mean, spread = self._placed()
        video: Tensor = torch.cat([self._vae.decode(part).sample for part in (latents * spread + mean).split(self._at_once)])
        return video


class SvdAutoencoder(PublishedAutoencoder):
    """Stable Video Diffusion's, from diffusers: each frame by itself, and a decoder that looks at its neighbours."""

    def _build(self, uri: str) -> nn.Module:
        from diffusers import AutoencoderKLTemporalDecoder

        return _from_config(AutoencoderKLTemporalDecoder, uri)

    def _encode(self, pixels: Tensor) -> Tensor:
        frames = pixels.transpose(1, 2).flatten(0, 1)
        parts = [self._vae.encode(part).latent_dist.mode() for part in frames.split(self._at_once)]
        latents: Tensor = torch.cat(parts).unflatten(0, (len(pixels), -1)).transpose(1, 2) * self._vae.config.scaling_factor
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        clips = (latents / self._vae.config.scaling_factor).transpose(1, 2)
        return torch.stack([self._vae.decode(clip, num_frames=len(clip)).sample for clip in clips]).transpose(1, 2)


def _from_config(kind: Any, uri: str) -> nn.Module:
    config = read_config(uri, "autoencoder.pretrained", inside=("vae",))
    if config.get("_class_name") != kind.__name__:
        raise UserError(f"{uri}/config.json is of {config.get('_class_name')}, not {kind.__name__}: choose another autoencoder.pretrained")
    module: nn.Module = kind.from_config(config)
    return module


def _tile(vae: Any, side: int) -> None:
    """Let frames that are larger pass in tiles of ``side`` pixels, a quarter of it shared; 0 = whole."""
    if side:
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)


KINDS: Mapping[str, type[PublishedAutoencoder]] = {"opensora": OpenSoraAutoencoder, "wan": WanAutoencoder, "svd": SvdAutoencoder}


def build_autoencoder(config: AutoencoderConfig, bf16: bool, place: Place = HERE) -> Autoencoder:
    """The autoencoder of ``config``, loaded to ``place``. Raises `UserError` if its folder does not hold it."""
    return PixelAutoencoder() if config.kind == "pixels" else KINDS[config.kind](config, bf16, place)


def full_size_encoder(config: AutoencoderConfig) -> Callable[[Tensor], Any]:
    """The published size's way from ``[B, 3, T, H, W]`` to latents, with random weights, for counting what it costs."""
    from diffusers import AutoencoderKLTemporalDecoder, AutoencoderKLWan

    from cola_dist.models.opensora_vae import OpenSoraVae

    if config.kind == "opensora":
        vae = OpenSoraVae((128, 256, 512, 512), 2, 32, 128, 4)
        _tile(vae, config.tile)
        return lambda pixels: vae.encode(pixels, images_at_once=len(pixels) * pixels.shape[2])
    if config.kind == "wan":
        wan = AutoencoderKLWan()
        _tile(wan, config.tile)
        return wan.encode  # type: ignore[no-any-return]
    images = AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
    )
    return lambda pixels: images.encode(pixels.transpose(1, 2).flatten(0, 1))

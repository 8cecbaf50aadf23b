"""From video to the latents that the generator models, and back. Autoencoders are frozen and belong to no role."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cola_dist.config import AUTOENCODERS, AutoencoderConfig, LatentShape
from cola_dist.errors import UserError


def to_pixels(video: Tensor) -> Tensor:
    """uint8 video of any shape to fp32 in [-1, 1]."""
    return video.float() / 127.5 - 1.0


def to_video(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels`; values outside [-1, 1] are cut."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).byte()


class Autoencoder(ABC):
    """What a generator's latents are made with."""

    shape: LatentShape
    hash: str
    """Identity of the transform, by which its latents are kept and found again."""

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """uint8 ``[B, T, 3, H, W]`` to fp32 latents ``[B, L, C, h, w]``, on the video's device."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, L, C, h, w]`` to uint8 ``[B, T, 3, H, W]``."""


class PixelAutoencoder(Autoencoder):
    """The small scale's autoencoder: latents are the pixels themselves, one latent frame per frame."""

    shape = AUTOENCODERS["pixels"]
    hash = "pixels, x / 127.5 - 1"

    def encode(self, video: Tensor) -> Tensor:
        return to_pixels(video)

    def decode(self, latents: Tensor) -> Tensor:
        return to_video(latents)


class OpenSoraAutoencoder(Autoencoder):
    """Open-Sora v1.2's, with the latents placed and scaled as its generator was trained on."""

    shape = AUTOENCODERS["opensora"]

    def __init__(self, uri: str, images_at_once: int, bf16: bool) -> None:
        """Load the published folder ``uri``. Raises `UserError` if it does not hold this autoencoder."""
        from cola_dist.models.opensora_vae import OpenSoraVae, sizes_of
        from cola_dist.models.published import load_published, tensor_shapes

        try:
            sizes = sizes_of(tensor_shapes(uri))
        except (KeyError, IndexError) as error:
            raise UserError(
                f"{uri} is not Open-Sora v1.2's autoencoder (it has no tensor {error}): choose another autoencoder.pretrained"
            ) from None
        self._vae = OpenSoraVae(**sizes).eval().requires_grad_(False)
        found = load_published(self._vae, uri, drops="(?!)")
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self._vae.to(self._dtype)
        self._images = images_at_once
        self.hash = f"opensora {found.sha256} {self._dtype}"

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        pixels = to_pixels(video).transpose(1, 2).to(self._dtype)
        with torch.autocast(video.device.type, enabled=False):
            return self._vae.to(video.device).encode(pixels, self._images).transpose(1, 2).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return to_video(self._vae.to(latents.device).decode(latents.transpose(1, 2).to(self._dtype), self._images).transpose(1, 2))


@functools.cache
def build_autoencoder(config: AutoencoderConfig, bf16: bool) -> Autoencoder:
    """The autoencoder of ``config``, loaded once per process. Raises `UserError` if its folder does not hold it."""
    if config.kind == "pixels":
        return PixelAutoencoder()
    assert config.pretrained is not None, "checked with the configuration"
    return OpenSoraAutoencoder(config.pretrained, config.images_at_once, bf16)

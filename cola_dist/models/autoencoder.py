"""From video to the latents that the generator models, and back. Autoencoders are frozen and belong to no role."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from cola_dist.config import AUTOENCODERS, LatentShape
from cola_dist.models.published import Loaded


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
    loaded: Loaded | None = None
    """What became of the tensors in its files; none where it has none."""

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

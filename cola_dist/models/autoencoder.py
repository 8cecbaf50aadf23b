"""From video to the latents that the generator models, and back."""

from __future__ import annotations

from torch import Tensor


def to_pixels(video: Tensor) -> Tensor:
    """uint8 video of any shape to fp32 in [-1, 1]."""
    return video.float() / 127.5 - 1.0


class PixelAutoencoder:
    """The small scale's autoencoder: latents are the pixels themselves, one latent frame per frame."""

    hash = "pixels, x / 127.5 - 1"
    """Identity of the transform, by which its latents are kept and found again; there are no weights in it."""
    channels = 3
    stride = 1
    """r, video frames per latent frame; ``L = 1 + (T-1) / r``."""

    def encode(self, video: Tensor) -> Tensor:
        """uint8 ``[B, T, 3, H, W]`` to fp32 latents ``[B, L, C, h, w]`` in [-1, 1]."""
        return to_pixels(video)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, L, C, h, w]`` to uint8 ``[B, T, 3, H, W]``; values outside [-1, 1] are cut."""
        return ((latents.float() + 1.0) * 127.5).round().clamp(0, 255).byte()

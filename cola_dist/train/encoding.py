"""The autoencoder that methods encode with, as a stage of the stream uses it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cola_dist.config import RunConfig
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.published import Place
from cola_dist.train.hardware import computes_bf16


class AutoencoderEncoder:
    """The methods' autoencoder on one device, from arrays to arrays."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._autoencoder = build_autoencoder(config.autoencoder, computes_bf16(config.train.precision, device), Place(device))
        self._device = device
        # The same arithmetic rounds otherwise on another kind of device.
        self.hash = f"{self._autoencoder.hash} on {device.type}"

    @torch.no_grad()
    def encode(self, video: np.ndarray) -> np.ndarray:
        """uint8 ``[B, T, 3, H, W]`` to float32 ``[B, L, C, h, w]``, the very latents that a method makes of the clips on this kind of device."""
        latents: np.ndarray = self._autoencoder.encode(torch.tensor(video).to(self._device)).float().cpu().numpy()
        return latents


@dataclass(frozen=True)
class EncoderFactory:
    """Builds the encoder in the actor that encodes. Picklable: it holds no weights."""

    config: RunConfig

    def __call__(self) -> AutoencoderEncoder:
        return AutoencoderEncoder(self.config, torch.device("cuda" if self.config.train.gpus else "cpu"))

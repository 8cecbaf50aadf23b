"""The latent action model: inverse dynamics, bottleneck, and where something trains on it a forward model of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_dist.config import LamConfig
from cola_dist.models.bottleneck import Quantised, build_bottleneck
from cola_dist.models.forward import ForwardModel
from cola_dist.models.layers import NORM_EPS, AttentionPool, SpaceTimeBlock, patchify, spatial_positions, temporal_positions

_CHANGE_GAIN = 4.0
"""Brings the change between two frames to about the range of the frames: its root mean square is near a quarter of theirs."""


class InverseDynamics(nn.Module):
    """ST-transformer over pixels; the patches of two neighbouring frames are pooled by attention into N tokens of D dimensions.

    Temporal attention is causal, so the token of a transition depends on no frame after it.
    """

    def __init__(self, config: LamConfig) -> None:
        super().__init__()
        self.config = config
        channels = 6 if config.input == "frames+change" else 3
        self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.blocks = nn.ModuleList(SpaceTimeBlock(config.width, config.heads, modulated=False) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.side = nn.Parameter(torch.randn(2, 1, config.width) * 0.02)
        self.pool = AttentionPool(config.width, config.heads, config.tokens)
        self.pooled_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.project = nn.Linear(config.width, config.bottleneck.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, T, 3, H, W]`` in [-1, 1] to ``z [B, T-1, N, D]``."""
        if side := self.config.resolution:
            small = F.interpolate(pixels.flatten(0, 1), (side, side), mode="bilinear", antialias=True, align_corners=False)
            pixels = small.unflatten(0, pixels.shape[:2])
        if self.config.input != "frames":
            change = torch.zeros_like(pixels)
            change[:, 1:] = (pixels[:, 1:] - pixels[:, :-1]) * _CHANGE_GAIN
            pixels = change if self.config.input == "change" else torch.cat([pixels, change], 2)
        b, t, _, height, width = pixels.shape
        x = self.embed(patchify(pixels, self.config.patch))
        x = x + spatial_positions(height // self.config.patch, width // self.config.patch, self.config.width, x.device)
        x = x + temporal_positions(t, self.config.width, x.device)[:, None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.config.pool == "difference":
            transitions = x[:, 1:] - x[:, :-1]
        else:
            transitions = torch.cat([x[:, :-1] + self.side[0], x[:, 1:] + self.side[1]], 2)
        z: Tensor = self.project(self.pooled_norm(self.pool(transitions.flatten(0, 1))))
        return z.reshape(b, t - 1, self.config.tokens, -1)


class LatentActionModel(nn.Module):
    """Role "lam": what names the transitions of a video."""

    def __init__(self, config: LamConfig, seed: int) -> None:
        super().__init__()
        self.idm = InverseDynamics(config)
        self.bottleneck = build_bottleneck(config.bottleneck, seed)
        self.forward_model: ForwardModel | None = None

    def infer(self, pixels: Tensor, step: int | None = None, noise: Tensor | None = None) -> tuple[Tensor, Quantised]:
        """z ``[B, T-1, N, D]`` of pixels ``[B, T, 3, H, W]`` in [-1, 1], and its latent actions; ``step`` and ``noise`` as in `Bottleneck`."""
        z = self.idm(pixels)
        return z, self.bottleneck(z, step, noise)

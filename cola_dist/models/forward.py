"""The latent action model's own forward model: a frame and an action to the next frame's pixels (LAPA, villa-X, AdaWorld; two-stage baseline)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cola_dist.config import LamConfig
from cola_dist.models.layers import NORM_EPS, Block, patchify, spatial_positions, unpatchify


class ForwardModel(nn.Module):
    """A spatial transformer over the frame's patches and the action's tokens. It predicts the change, and starts at no change."""

    def __init__(self, config: LamConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * config.patch**2
        self.embed = nn.Linear(pixels, config.width)
        self.embed_action = nn.Linear(config.bottleneck.dim, config.width)
        self.slots = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, causal=False) for _ in range(config.forward_depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.out = nn.Linear(config.width, pixels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, pixels: Tensor, actions: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [-1, 1] and ``actions [B, T-1, N, D]`` to predictions of frames 1 ... T-1, ``[B, T-1, 3, H, W]``."""
        height, width = pixels.shape[-2:]
        patch = self.config.patch
        before = pixels[:, :-1]
        x = self.embed(patchify(before, patch))
        x = x + spatial_positions(height // patch, width // patch, self.config.width, x.device)
        places = x.shape[2]
        x = torch.cat([x, self.embed_action(actions) + self.slots], 2).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        change = self.out(self.norm(x[:, :places])).unflatten(0, before.shape[:2])
        return before + unpatchify(change, patch, height, width)

"""From latent actions to the shift / scale / gate that they add to every block of the generator, per latent frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cola_dist.config import ConditioningConfig
from cola_dist.models.layers import NORM_EPS, Block, temporal_positions


def actions_per_frame(actions: Tensor, null: Tensor, stride: int) -> Tensor:
    """Lay T-1 actions ``[B, T-1, F]`` onto L latent frames ``[B, L, r*F]``, with ``L = 1 + (T-1) / r``.

    Latent frame 0 has no action that leads into it: it gets r times ``null [F]``. Latent frame l >= 1 gets the r actions
    ``(l-1)*r ... l*r-1``, concatenated in order: those that lead from the video frame of latent frame l-1 into that of l.
    """
    b, transitions, features = actions.shape
    if transitions % stride:
        raise ValueError(f"{transitions} transitions do not fill latent frames of {stride}")
    first = null.to(actions.dtype).expand(b, stride, features)
    return torch.cat([first, actions], 1).reshape(b, 1 + transitions // stride, stride * features)


class ActionConditioning(nn.Module):
    """Causal self-attention over the action sequence, then a head that starts at zero.

    The modulation of frame t depends on the actions up to the one that leads into t, so a rollout may be prolonged without changing its
    past.
    """

    def __init__(self, config: ConditioningConfig, tokens: int, dim: int, modulation_shape: tuple[int, ...], stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.modulation_shape = modulation_shape
        self.null = nn.Parameter(torch.zeros(tokens, dim))
        self.embed = nn.Linear(stride * tokens * dim, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, causal=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        last = nn.Linear(config.width, math.prod(modulation_shape))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(config.width, config.width), nn.SiLU(), last)

    def forward(self, actions: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Actions ``[B, T-1, N, D]`` to modulation ``[B, L, *modulation_shape]``; where ``dropped [B, T-1]`` is true, the null action."""
        if dropped is not None:
            actions = torch.where(dropped[:, :, None, None], self.null, actions)
        x = self.embed(actions_per_frame(actions.flatten(2), self.null.flatten(), self.stride))
        x = x + temporal_positions(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            x = block(x)
        modulation: Tensor = self.head(self.norm(x))
        return modulation.reshape(*modulation.shape[:2], *self.modulation_shape)

    def null_actions(self, batch: int, transitions: int) -> Tensor:
        """The null action throughout, ``[batch, transitions, N, D]``."""
        return self.null.expand(batch, transitions, -1, -1)

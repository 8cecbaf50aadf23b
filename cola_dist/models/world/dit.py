"""A small space-time diffusion transformer, causal in time, in the manner of Open-Sora's STDiT3 without text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cola_dist.models.layers import (
    NORM_EPS,
    Past,
    SpaceTimeBlock,
    patchify,
    pooled_places,
    sinusoid,
    spatial_positions,
    temporal_positions,
    unpatchify,
)
from cola_dist.models.world.base import WorldModel

_SMALLEST_TAU = 0.05
"""Bounds the velocity of nearly clean frames; at tau = 0 a frame is context and its velocity has no meaning."""


class SpaceTimeDiT(WorldModel):
    """Blocks of spatial attention, causal temporal attention and MLP, each modulated per frame by the flow time.

    As in STDiT3 one small network turns the flow time into nine shared rows (shift, scale, gate of three sublayers) and each block adds a
    table of its own. The network predicts the clean frames, and the velocity follows from them: v = (x_tau - x0) / tau. A patch of noise has more
    dimensions than the network is wide, so it could not predict the noise; clean patches lie near a surface of few dimensions (Li & He,
    "Back to Basics", arXiv 2511.13720). Gates and output start at zero. Positions are fixed sinusoids: frames of other sizes and lengths need no new
    weights.
    """

    kind = "space_time_dit"
    shape_names = ("channels", "patch", "width", "depth", "heads")

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.channels, self.patch, self.width, self.depth, self.heads = channels, patch, width, depth, heads
        self.embed = nn.Linear(channels * patch**2, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.time_modulation = nn.Linear(width, 9 * width)
        self.tables = nn.Parameter(torch.zeros(depth, 9, width))
        self.blocks = nn.ModuleList(SpaceTimeBlock(width, heads, modulated=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels * patch**2)
        for layer in (self.time_modulation, self.out_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """Per block nine rows: shift, scale, gate of spatial attention, temporal attention and MLP."""
        return (self.depth, 9, self.width)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """fp32 velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at ``tau [B, L]``; ``modulation [B, L, depth, 9, width]`` or none."""
        return self._velocity(x_tau, tau, modulation, None)

    def new_past(self) -> list[Past]:
        return [Past() for _ in self.blocks]

    def velocity_after(self, past: list[Past], x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        return self._velocity(x_tau, tau, modulation, past)

    def _velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None, past: list[Past] | None) -> Tensor:
        height, width = x_tau.shape[-2:]
        time = self._time(tau)
        x = self._hidden(x_tau, time, modulation, past)
        shift, scale = self.out_modulation(time).unsqueeze(2).chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        clean = unpatchify(x, self.patch, height, width).float()
        return (x_tau.float() - clean) / tau.float().clamp(min=_SMALLEST_TAU)[:, :, None, None, None]

    def base_modulation(self, tau: Tensor) -> Tensor:
        return self._rows(self._time(tau)) + self.tables

    def features(self, x0: Tensor) -> Tensor:
        """The last block's output, its places pooled to a grid of at most 4 x 4, ``[B, L, F]``."""
        hidden = self._hidden(x0, self._time(torch.zeros(x0.shape[:2], device=x0.device)), None)
        return pooled_places(hidden, x0.shape[-2] // self.patch, x0.shape[-1] // self.patch)

    def _time(self, tau: Tensor) -> Tensor:
        time: Tensor = self.time(sinusoid(tau * 1000.0, self.width))
        return time

    def _rows(self, time: Tensor) -> Tensor:
        """The rows that all blocks share, ``[B, L, 1, 9, width]``."""
        rows: Tensor = self.time_modulation(time).unflatten(-1, (1, 9, self.width))
        return rows

    def _hidden(self, x: Tensor, time: Tensor, modulation: Tensor | None, past: list[Past] | None = None) -> Tensor:
        """``x [B, L, C, h, w]`` through all blocks, ``[B, L, n, width]``; the frames stand after those of ``past``."""
        _, frames, _, height, width = x.shape
        before = past[0].length if past else 0
        shared = self._rows(time)[:, :, 0]
        x = self.embed(patchify(x, self.patch))
        x = x + spatial_positions(height // self.patch, width // self.patch, self.width, x.device)
        x = x + temporal_positions(before + frames, self.width, x.device)[before:, None]
        for index, block in enumerate(self.blocks):
            rows = shared + self.tables[index]
            if modulation is not None:
                rows = rows + modulation[:, :, index]
            x = block(x, rows, past[index] if past else None)
        return x

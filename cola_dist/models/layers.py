"""Parts that the inverse dynamics model, the action conditioning and the generator share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
_POOLED_SIDE = 4


def patchify(frames: Tensor, patch: int) -> Tensor:
    """Cut frames ``[B, T, C, H, W]`` into tokens ``[B, T, (H/p)(W/p), C*p*p]``, rows first."""
    b, t, c, h, w = frames.shape
    if h % patch or w % patch:
        raise ValueError(f"frames of {h}x{w} cannot be cut into patches of {patch}")
    cut = frames.reshape(b, t, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, t, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`: tokens ``[B, T, n, C*p*p]`` to frames ``[B, T, C, height, width]``."""
    b, t, _, features = tokens.shape
    c = features // (patch * patch)
    cut = tokens.reshape(b, t, height // patch, width // patch, c, patch, patch)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, t, c, height, width)


def unpatchify_channels_last(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Tokens ``[B, T, n, p*p*C]``, whose channel is the last part of the index, to frames ``[B, T, C, height, width]``."""
    cut = tokens.unflatten(-1, (patch, patch, -1)).unflatten(2, (height // patch, width // patch))
    frames: Tensor = cut.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    return frames


class Nothing(nn.Module):
    """In the place of a layer that is gone and whose output was added: zeros."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


def pooled_places(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens ``[B, L, rows*columns, width]`` averaged over a grid of at most 4 x 4 places, fp32 ``[B, L, F]``."""
    grid = tokens.float().flatten(0, 1).transpose(1, 2).unflatten(2, (rows, columns))
    pooled = F.adaptive_avg_pool2d(grid, (min(rows, _POOLED_SIDE), min(columns, _POOLED_SIDE)))
    frames: Tensor = pooled.flatten(1).unflatten(0, tokens.shape[:2])
    return frames


def sinusoid(values: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Cosines and sines of ``values [...]`` at ``width / 2`` frequencies from 1 down to ``1 / longest``: ``[..., width]`` fp32."""
    half = width // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def temporal_positions(count: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions of ``count`` frames, ``[count, width]``. The longest period, 100 frames, suits clips of seconds."""
    return sinusoid(torch.arange(count, device=device), width, longest=100.0)


def spatial_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions of a grid of patches, ``[rows*columns, width]``: half of the features for the row, half for the column."""
    row = sinusoid(torch.arange(rows, device=device), width // 2, longest=100.0)
    column = sinusoid(torch.arange(columns, device=device), width // 2, longest=100.0)
    grid = torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], -1)
    return grid.reshape(rows * columns, width)


class Past:
    """Keys and values ``[..., heads, n, width/heads]`` of one attention layer's first call, to which queries of its later calls attend as well."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """How many positions are kept; 0 before the first call."""
        return 0 if self._kept is None else self._kept[0].shape[-2]

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``k`` and ``v`` after those that are kept; what is given first is kept."""
        if self._kept is None:
            self._kept = k, v
            return k, v
        return torch.cat([self._kept[0], k], -2), torch.cat([self._kept[1], v], -2)


def attend_back(q: Tensor, k: Tensor, v: Tensor, past: Past | None) -> Tensor:
    """Attention of each position ``[..., heads, n, d]`` to itself, to those before it and to all of ``past``."""
    before = 0
    if past is not None:
        before = past.length
        k, v = past.extended(k, v)
    if not before:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(before)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Attention(nn.Module):
    """Multi-head self-attention over the last but one dimension of ``[..., n, width]``."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """``past`` only where the layer is causal: ``x`` then stands after it."""
        *lead, n, width = x.shape
        # As one matrix: with a frozen weight and a transposed x, torch would multiply each sequence by itself, several times slower.
        q, k, v = self.qkv(x.flatten(0, -2)).reshape(-1, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attend_back(q, k, v, past) if self.causal else F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(*lead, n, width))
        return out


class AttentionPool(nn.Module):
    """``queries`` learned queries gather a set of tokens ``[M, n, width]`` into ``[M, queries, width]``."""

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        m, n, width = x.shape
        k, v = self.kv(x).reshape(m, n, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q = self.queries.to(k.dtype).reshape(1, -1, self.heads, width // self.heads).transpose(1, 2).expand(m, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(m, -1, width))
        return out


class Mlp(nn.Sequential):
    """Two linear layers, four times wider in the middle."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block over a sequence ``[B, n, width]``."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SpaceTimeBlock(nn.Module):
    """Spatial attention inside each frame, causal attention along time at each place, MLP; ``[B, T, n, width]`` to the same.

    With ``modulated`` the three norms carry no weights of their own and `forward` takes ``modulation [B, T, 9, width]``: shift, scale and
    gate of each sublayer in turn (AdaLN, Peebles & Xie 2023).
    """

    def __init__(self, width: int, heads: int, modulated: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=not modulated) for _ in range(3))
        self.spatial = Attention(width, heads)
        self.temporal = Attention(width, heads, causal=True)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, modulation: Tensor | None = None, past: Past | None = None) -> Tensor:
        """``x [B, T, n, width]`` to the same shape; ``modulation [B, T, 9, width]`` exactly where the block was built ``modulated``.

        ``past`` is what temporal attention keeps of frames before ``x``.
        """
        parts = None if modulation is None else modulation.unsqueeze(2).unbind(3)
        for index in range(3):
            h = self.norms[index](x)
            if parts is not None:
                h = torch.addcmul(h + parts[3 * index], h, parts[3 * index + 1])
            if index == 0:
                h = self.spatial(h)
            elif index == 1:
                h = self.temporal(h.transpose(1, 2), past).transpose(1, 2)
            else:
                h = self.mlp(h)
            x = x + h if parts is None else torch.addcmul(x, h, parts[3 * index + 2])
        return x

"""Open-Sora v1.2's STDiT3 as a world model: without its text, causal in time, modulated per frame.

Names and shapes of all weights are those of the published checkpoint, so its files load as they are. What differs from the published model: the text
embedder and every cross-attention are gone, temporal attention looks back only, and the flow time is one per latent frame instead of one per clip
(its own way of giving clean context frames, a second modulation at time 0, is the case of two different times).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_dist.models.layers import NORM_EPS, Past, attend_back, pooled_places, sinusoid, unpatchify_channels_last
from cola_dist.models.world.base import WorldModel

_TIME_FEATURES = 256
_TRAINED_SIDE = 512
"""Pixels of a side at which places have the distance that the position embedding was trained with."""
_PIXELS_PER_PLACE = 8
"""By how much the model's autoencoder shrinks height and width."""


class STDiT3(WorldModel):
    """Pairs of blocks, spatial attention and temporal attention, each with an MLP of its own (Zheng et al., Open-Sora v1.2, 2024).

    The network predicts data minus noise, beside a variance that is not used; `velocity` is its negative. One row set of shift, scale and gate of
    the two sublayers comes from the flow time and is shared by all blocks, which add a table of their own: that is where actions come in.
    """

    kind = "stdit3"
    shape_names = ("channels", "patch", "width", "depth", "heads", "fps")
    published_class, published_model = "STDiT3", "Open-Sora v1.2"
    published_fixed: ClassVar[Mapping[str, Any]] = {
        "qk_norm": True,
        "pred_sigma": True,
        "mlp_ratio": 4.0,
        "input_sq_size": _TRAINED_SIDE,
        "patch_size": [1, 2, 2],
    }
    published_drops = r"(?:.*\.)?(y_embedder|cross_attn)\."

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, fps: int) -> None:
        """``depth`` counts pairs of blocks. ``fps``, frames per second of the clips, is told to the model as in its pretraining."""
        super().__init__()
        if width % 4 or width % heads or width // heads % 2:
            raise ValueError(f"width {width} must be a multiple of 4 and of twice the heads, {heads}")
        self.channels, self.patch, self.width, self.depth, self.heads, self.fps = channels, patch, width, depth, heads, fps
        window = (1, patch, patch)
        self.rope = RotaryPositions(width // heads)
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv3d(channels, width, window, stride=window)))
        self.t_embedder = nn.Sequential(OrderedDict(mlp=_time_mlp(width)))
        self.fps_embedder = nn.Sequential(OrderedDict(mlp=_time_mlp(width)))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(width, heads, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(width, heads, temporal=True) for _ in range(depth))
        self.final_layer = _FinalLayer(width, patch**2 * 2 * channels)

    @classmethod
    def published_sizes(cls, config: Mapping[str, Any]) -> dict[str, int]:
        names = {"channels": "in_channels", "width": "hidden_size", "depth": "depth", "heads": "num_heads"}
        return {name: config[published] for name, published in names.items()} | {"patch": config["patch_size"][1]}

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """One set of six rows that all blocks share: shift, scale, gate of attention and of MLP."""
        return (1, 6, self.width)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """Spatial and temporal blocks in the order in which they are passed."""
        return list(chain.from_iterable(zip(self.spatial_blocks, self.temporal_blocks, strict=True)))

    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """fp32 velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at ``tau [B, L]``; ``modulation [B, L, 1, 6, width]`` or none."""
        return self._velocity(x_tau, tau, modulation, None)

    def new_past(self) -> list[Past]:
        return [Past() for _ in self.temporal_blocks]

    def velocity_after(self, past: list[Past], x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        return self._velocity(x_tau, tau, modulation, past)

    def _velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None, past: list[Past] | None) -> Tensor:
        height, width = x_tau.shape[-2:]
        time = self._time(tau)
        x = self.final_layer(self._hidden(x_tau, time, modulation, past), time)
        frames = unpatchify_channels_last(x, self.patch, height, width)
        # The second half of the channels is the variance.
        return -frames[:, :, : self.channels].float()

    def base_modulation(self, tau: Tensor) -> Tensor:
        rows: Tensor = self._rows(self._time(tau)).unsqueeze(2)
        return rows

    def features(self, x0: Tensor) -> Tensor:
        """The last block's output, its places pooled to a grid of at most 4 x 4, ``[B, L, F]``."""
        hidden = self._hidden(x0, self._time(torch.zeros(x0.shape[:2], device=x0.device)), None)
        return pooled_places(hidden, x0.shape[-2] // self.patch, x0.shape[-1] // self.patch)

    def _time(self, tau: Tensor) -> Tensor:
        """Embedding of the flow time and of the frame rate, ``[B, L, width]``."""
        rate = torch.full_like(tau, self.fps)
        time: Tensor = self.t_embedder(sinusoid(tau * 1000.0, _TIME_FEATURES)) + self.fps_embedder(sinusoid(rate, _TIME_FEATURES))
        return time

    def _rows(self, time: Tensor) -> Tensor:
        rows: Tensor = self.t_block(time).unflatten(-1, (6, self.width))
        return rows

    def _hidden(self, x: Tensor, time: Tensor, modulation: Tensor | None, past: list[Past] | None = None) -> Tensor:
        """``x [B, L, C, h, w]`` through all blocks, ``[B, L, n, width]``; the frames stand after those of ``past``."""
        _, frames, _, height, width = x.shape
        before = past[0].length if past else 0
        rows = self._rows(time)
        if modulation is not None:
            rows = rows + modulation[:, :, 0]
        x = self.x_embedder(x.transpose(1, 2)).permute(0, 2, 3, 4, 1).flatten(2, 3)
        x = x + places(
            height // self.patch, width // self.patch, self.width, height * _PIXELS_PER_PLACE, width * _PIXELS_PER_PLACE, x.device
        )
        angles = self.rope(before + frames)[before:]
        for index, block in enumerate(self.repeated_blocks()):
            x = block(x, rows, angles, past[index // 2] if past else None)
        return x


class STDiT3Block(nn.Module):
    """Attention inside each frame, or back along time at each place; then an MLP. ``[B, L, n, width]`` to the same."""

    def __init__(self, width: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = NormedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(approximate="tanh"), fc2=nn.Linear(4 * width, width))
        )
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, rows: Tensor, angles: Tensor, past: Past | None = None) -> Tensor:
        """``rows [B, L, 6, width]``: shift, scale, gate of attention and of MLP, from time and actions. ``angles [L, width/heads]``.

        ``past`` is what temporal attention keeps of frames before ``x``; spatial blocks leave it alone.
        """
        parts = (self.scale_shift_table + rows).unsqueeze(2).unbind(3)
        h = self.norm1(x)
        h = torch.addcmul(h + parts[0], h, parts[1])
        h = self.attn(h.transpose(1, 2), angles, past).transpose(1, 2) if self.temporal else self.attn(h, None)
        x = torch.addcmul(x, h, parts[2])
        h = self.norm2(x)
        h = torch.addcmul(h + parts[3], h, parts[4])
        return torch.addcmul(x, self.mlp(h), parts[5])


class NormedAttention(nn.Module):
    """Multi-head self-attention over the last but one dimension of ``[..., n, width]``; queries and keys have root mean square 1 per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None, past: Past | None = None) -> Tensor:
        """Causal and with rotary positions exactly where ``angles [n, width/heads]`` are given; ``x`` then stands after ``past``."""
        *lead, n, width = x.shape
        # As one matrix: with a frozen weight and a transposed x, torch would multiply each sequence by itself, several times slower.
        q, k, v = self.qkv(x.flatten(0, -2)).reshape(-1, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if angles is None:
            mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        else:
            mixed = attend_back(rotated(q, angles).to(v.dtype), rotated(k, angles).to(v.dtype), v, past)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(*lead, n, width))
        return out


class RotaryPositions(nn.Module):
    """Angles of rotary positions (Su et al. 2021). Their frequencies are part of the published checkpoint, so they are kept with the weights."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10_000.0 ** -(torch.arange(0, head_width, 2).float() / head_width))

    freqs: Tensor

    def forward(self, frames: int) -> Tensor:
        """Angles ``[frames, head_width]``, each twice in a row."""
        return torch.outer(torch.arange(frames, device=self.freqs.device, dtype=torch.float32), self.freqs.float()).repeat_interleave(2, 1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of the features of ``x [..., n, d]`` by ``angles [n, d]``."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def places(rows: int, columns: int, width: int, height_px: int, width_px: int, device: torch.device) -> Tensor:
    """Fixed positions of a grid of patches ``[rows*columns, width]``: half of the features for the column, half for the row, sines before cosines.

    Distances are stretched to those of the resolution that the model was trained at, and to a square.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, width // 2, 2, device=device).float() / (width // 2))
    stretch = round((rows * columns) ** 0.5) / ((height_px * width_px) ** 0.5 / _TRAINED_SIDE)
    row, column = (torch.arange(count, device=device) * (stretch / count) for count in (rows, columns))

    def waves(at: Tensor) -> Tensor:
        angles = torch.outer(at, frequencies)
        return torch.cat([angles.sin(), angles.cos()], -1)

    grid = torch.cat([waves(column)[None].expand(rows, -1, -1), waves(row)[:, None].expand(-1, columns, -1)], -1)
    return grid.reshape(rows * columns, width)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x [B, L, n, width]`` at ``time [B, L, width]`` to ``[B, L, n, outputs]``."""
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

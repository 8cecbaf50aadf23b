"""Open-Sora v1.2's autoencoder: an image autoencoder of each frame (SDXL's, from diffusers), then a causal one along time.

Names and shapes of all weights are those of the published checkpoint. 17 frames give 5 latent frames of an eighth of the height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_IMAGE_SCALE = 0.18215
"""By which the image autoencoder's latents are multiplied. (SDXL's own is 0.13025; the published code uses that of the first Stable Diffusion.)"""
_MULTIPLIERS = (1, 2, 2, 4)
_HALVES_TIME = (False, True, True)
"""After each level but the last: whether every second frame goes."""
_SHRINKS = 8
STRIDE = 4
MOST_FRAMES = 17
"""Published code encodes longer videos in pieces of so many frames, which do not join on to each other."""


class OpenSoraVae(nn.Module):
    """``spatial_vae``, ``temporal_vae`` and the place and size of the latents, as in the published file."""

    def __init__(self, image_widths: Sequence[int], image_layers: int, image_groups: int, filters: int, blocks: int) -> None:
        """The published one: (128, 256, 512, 512), 2, 32, 128, 4."""
        from diffusers import AutoencoderKL

        super().__init__()
        levels = len(image_widths)
        image = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(image_widths),
            layers_per_block=image_layers,
            norm_num_groups=image_groups,
            latent_channels=4,
        )
        self.spatial_vae = nn.ModuleDict({"module": image})
        self.temporal_vae = _TemporalVae(4, filters, blocks)
        self.register_buffer("shift", torch.tensor([-0.10, 0.34, 0.27, 0.98])[None, :, None, None, None])
        self.register_buffer("scale", torch.tensor([3.85, 2.32, 2.33, 3.06])[None, :, None, None, None])

    shift: Tensor
    scale: Tensor

    def enable_tiling(self, height: int, width: int, stride_height: int, stride_width: int) -> None:
        """Let larger images pass in square tiles of ``height`` pixels, as far apart as ``stride_height``, from here on; named as in diffusers' Wan.

        What comes after the images passes whole: there frames are an eighth as high and wide.
        """
        assert (height, stride_height) == (width, stride_width)
        image: Any = self.spatial_vae["module"]
        image.enable_tiling()
        image.tile_sample_min_size, image.tile_latent_min_size = height, height // _SHRINKS
        image.tile_overlap_factor = 1 - stride_height / height

    def encode(self, video: Tensor, images_at_once: int) -> Tensor:
        """``video [B, 3, T, H, W]`` in [-1, 1] to latents ``[B, 4, L, H/8, W/8]``: the mean, not a sample, so that a clip has one latent."""
        image: Any = self.spatial_vae["module"]
        frames = video.transpose(1, 2).flatten(0, 1)
        parts = [image.encode(part).latent_dist.mode() * _IMAGE_SCALE for part in frames.split(images_at_once)]
        images = torch.cat(parts).unflatten(0, (len(video), -1)).transpose(1, 2)
        clips = [self.temporal_vae.encode(part) for part in images.split(max(1, images_at_once // video.shape[2]))]
        latents: Tensor = (torch.cat(clips) - self.shift) / self.scale
        return latents

    def decode(self, latents: Tensor, images_at_once: int) -> Tensor:
        """Latents ``[B, 4, L, h, w]`` to video ``[B, 3, 1 + 4 * (L - 1), 8h, 8w]``."""
        image: Any = self.spatial_vae["module"]
        placed = latents * self.scale + self.shift
        clips = [self.temporal_vae.decode(part) for part in placed.split(max(1, images_at_once // (STRIDE * latents.shape[2])))]
        frames = torch.cat(clips).transpose(1, 2).flatten(0, 1)
        parts = [image.decode(part / _IMAGE_SCALE).sample for part in frames.split(images_at_once)]
        video: Tensor = torch.cat(parts).unflatten(0, (len(latents), -1)).transpose(1, 2)
        return video


def sizes_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `OpenSoraVae` from the shapes of published tensors, whose config.json does not tell them. Raises ``KeyError``."""

    def count(pattern: str) -> int:
        return next(index for index in range(100) if pattern.format(index) not in shapes)

    down = "spatial_vae.module.encoder.down_blocks.{}.resnets.0.conv1.weight"
    widths = [shapes[down.format(level)][0] for level in range(count(down))]
    return {
        "image_widths": widths,
        "image_layers": count("spatial_vae.module.encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "image_groups": min(32, widths[0]),
        "filters": shapes["temporal_vae.encoder.conv_in.conv.weight"][0],
        "blocks": count("temporal_vae.encoder.res_blocks.{}.conv1.conv.weight"),
    }


class _TemporalVae(nn.Module):
    def __init__(self, channels: int, filters: int, blocks: int) -> None:
        super().__init__()
        self.encoder = _Encoder(channels, 2 * channels, filters, blocks)
        self.quant_conv = _CausalConv(2 * channels, 2 * channels, 1)
        self.post_quant_conv = _CausalConv(channels, channels, 1)
        self.decoder = _Decoder(channels, channels, filters, blocks)

    def encode(self, x: Tensor) -> Tensor:
        """Mean of the latents ``[B, C, L, h, w]`` of ``x [B, C, 1 + 4 * (L - 1), h, w]``; frames of zeros before the first fill its latent frame."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % STRIDE, 0))
        mean: Tensor = self.quant_conv(self.encoder(x)).chunk(2, 1)[0]
        return mean

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(z))[:, :, STRIDE - 1 :]
        return out


class _CausalConv(nn.Module):
    """A convolution over ``[B, C, T, h, w]`` that sees no later frame."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        around = kernel // 2
        self.padding = (around, around, around, around, kernel - stride, 0)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.padding))
        return out


class _ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = _CausalConv(inputs, outputs, 3, bias=False)
        self.conv2 = _CausalConv(outputs, outputs, 3, bias=False)
        if inputs != outputs:
            self.conv3 = _CausalConv(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (self.conv3(x) if hasattr(self, "conv3") else x)
        return out


class _Encoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, filters: int, blocks: int) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in _MULTIPLIERS]
        self.conv_in = _CausalConv(inputs, filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _level(before, width, blocks) for before, width in zip([filters, *widths], widths, strict=False)
        )
        self.conv_blocks = nn.ModuleList(
            _CausalConv(width, width, 3, stride=2) if halves else nn.Identity() for width, halves in zip(widths, _HALVES_TIME, strict=False)
        )
        self.res_blocks = _level(widths[-1], widths[-1], blocks)
        self.norm1 = _norm(widths[-1])
        self.conv2 = _CausalConv(widths[-1], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, block in enumerate(self.block_res_blocks):
            x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        out: Tensor = self.conv2(F.silu(self.norm1(self.res_blocks(x))))
        return out


class _Decoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, filters: int, blocks: int) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in _MULTIPLIERS]
        self.conv1 = _CausalConv(inputs, widths[-1], 3)
        self.res_blocks = _level(widths[-1], widths[-1], blocks)
        self.block_res_blocks = nn.ModuleList(
            _level(before, width, blocks) for width, before in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            _CausalConv(width, 2 * width, 3) if doubles else nn.Identity() for width, doubles in zip(widths[1:], _HALVES_TIME, strict=True)
        )
        self.norm1 = _norm(widths[0])
        self.conv_out = _CausalConv(widths[0], outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if _HALVES_TIME[level - 1]:
                    x = _spread(x)
        out: Tensor = self.conv_out(F.silu(self.norm1(x)))
        return out


def _spread(x: Tensor) -> Tensor:
    """``[B, 2C, T, h, w]`` to ``[B, C, 2T, h, w]``: the two channels of each pair are neighbours in time."""
    b, _, t, h, w = x.shape
    return x.reshape(b, -1, 2, t, h, w).transpose(2, 3).reshape(b, -1, 2 * t, h, w)


def _level(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_ResBlock(inputs if index == 0 else outputs, outputs) for index in range(blocks)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels)

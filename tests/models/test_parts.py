"""Autoencoders that take a batch in parts and a frame in tiles: what comes out, and how much is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cola_dist.config import AutoencoderConfig
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.recipes import build_recipe
from cola_dist.train.estimate import estimate
from tests.models.published import write_opensora_vae, write_svd_vae, write_wan_vae

Kind = Literal["opensora", "wan", "svd"]
WRITERS: dict[Kind, Callable[[Path], Path]] = {"opensora": write_opensora_vae, "wan": write_wan_vae, "svd": write_svd_vae}
TILE = 96


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.convolution.default:
            self.elements = max(self.elements, out.numel())
        return out


def largest(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What ``work`` gives, and the elements of the largest tensor that a convolution made on the way."""
    with _Largest() as seen:
        out = work()
    return out, seen.elements


def waves(clips: int, frames: int, side: int) -> Tensor:
    """Smooth video: a wave that wanders, uint8 ``[clips, frames, 3, side, side]``."""
    clip, frame, channel, row, column = torch.meshgrid(*(torch.arange(count) for count in (clips, frames, 3, side, side)), indexing="ij")
    return (127 + 100 * torch.sin(2 * torch.pi * (row + column + 2 * frame + 16 * channel + 30 * clip) / side)).byte()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_batch_in_parts_is_the_batch_and_takes_less(tmp_path: Path, kind: Kind) -> None:
    uri, video = str(WRITERS[kind](tmp_path)), waves(3, 5, 64)
    whole, parts = (build_autoencoder(AutoencoderConfig(kind, uri, images_at_once=count), bf16=False) for count in (100, 1))
    assert parts.hash == whole.hash
    latents, most = largest(lambda: whole.encode(video))
    in_parts, less = largest(lambda: parts.encode(video))
    torch.testing.assert_close(in_parts, latents, rtol=1e-4, atol=1e-5)
    assert less <= most / 3
    back, most = largest(lambda: whole.decode(latents))
    in_parts, less = largest(lambda: parts.decode(latents))
    # Rounding to whole numbers may go the other way.
    assert int((in_parts.int() - back.int()).abs().max()) <= 1
    assert less <= (most if kind == "svd" else most / 3)


@pytest.mark.parametrize("kind", ["opensora", "wan"])
def test_a_frame_in_tiles_takes_less_and_a_small_one_is_left_whole(tmp_path: Path, kind: Kind) -> None:
    uri, video = str(WRITERS[kind](tmp_path)), waves(1, 5, 2 * TILE)
    whole, tiled = (build_autoencoder(AutoencoderConfig(kind, uri, tile=side), bf16=False) for side in (0, TILE))
    assert tiled.hash != whole.hash, "latents of the one must not be taken for those of the other"
    latents, most = largest(lambda: whole.encode(video))
    near, less = largest(lambda: tiled.encode(video))
    assert near.shape == latents.shape
    assert less <= most / 4
    back, most = largest(lambda: whole.decode(latents))
    near, less = largest(lambda: tiled.decode(latents))
    assert near.shape == back.shape
    assert less <= most / 4
    small = video[..., :TILE, :TILE]
    assert torch.equal(tiled.encode(small), whole.encode(small))
    assert torch.equal(tiled.decode(latents[..., : TILE // 8, : TILE // 8]), whole.decode(latents[..., : TILE // 8, : TILE // 8]))


@pytest.mark.parametrize("kind", ["opensora", "wan"])
def test_tiles_lie_where_they_belong_and_fade_into_each_other(tmp_path: Path, kind: Kind) -> None:
    """By how much latents differ, over how much they vary: tiles in the wrong places would be off by about 1. Of pixels, of 255.

    Each convolution is left its middle, so that a tile's edge looks like any other place, as in trained weights the most of a tile does.
    """
    uri, video = str(WRITERS[kind](tmp_path)), waves(1, 5, 24).repeat(1, 1, 1, 8, 8)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.ndim > 3 and tensor.shape[-1] == 3:
            middle = tensor[..., 1, 1].clone()
            tensor.zero_()[..., 1, 1] = middle
    save_file(tensors, file)
    whole, tiled = (build_autoencoder(AutoencoderConfig(kind, uri, tile=side), bf16=False) for side in (0, TILE))
    latents = whole.encode(video)
    difference = (tiled.encode(video) - latents).norm() / (latents - latents.mean((-2, -1), keepdim=True)).norm()
    assert float(difference) < 0.01
    assert float((tiled.decode(latents).float() - whole.decode(latents).float()).abs().mean()) < 2


@pytest.mark.parametrize("kind", ["opensora", "wan"])
def test_a_plan_counts_what_tiles_encode_twice(kind: Kind) -> None:
    base = build_recipe("tiny")
    base = replace(base, data=replace(base.data, resolution=64), world=replace(base.world, pretrained=None, patch=4))
    plans = [estimate(replace(base, autoencoder=AutoencoderConfig(kind, tile=side))).phases[0] for side in (0, 32)]
    whole, tiled = (plan.flops["autoencoder"] for plan in plans)
    # Three tiles a side, of 32, 32 and 16 pixels: 80 instead of 64. What comes after the images in opensora's has no tiles.
    assert 1.1 * whole < tiled < 1.05 * (80 / 64) ** 2 * whole

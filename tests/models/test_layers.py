from __future__ import annotations

import pytest
import torch

from cola_dist.models.autoencoder import PixelAutoencoder
from cola_dist.models.layers import Attention, AttentionPool, SpaceTimeBlock, patchify, sinusoid, spatial_positions, unpatchify


def test_patches_are_rows_first_and_come_back() -> None:
    frames = torch.randn(2, 3, 3, 8, 12)
    tokens = patchify(frames, 4)
    assert tokens.shape == (2, 3, 6, 48)
    torch.testing.assert_close(tokens[1, 2, 4].reshape(3, 4, 4), frames[1, 2, :, 4:8, 4:8])
    assert torch.equal(unpatchify(tokens, 4, 8, 12), frames)


def test_frames_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="10x8 cannot be cut into patches of 4"):
        patchify(torch.zeros(1, 1, 3, 10, 8), 4)


def test_attention_matches_the_formula() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2, causal=True)
    x = torch.randn(3, 4, 8)
    q, k, v = (part.reshape(3, 4, 2, 4).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    expected = layer.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 4, 8))
    torch.testing.assert_close(layer(x), expected)


def test_pooling_does_not_depend_on_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(8, 2, 3)
    x = torch.randn(5, 7, 8)
    assert pool(x).shape == (5, 3, 8)
    torch.testing.assert_close(pool(x), pool(x[:, torch.randperm(7)]))


def test_closed_gates_pass_the_input_through() -> None:
    torch.manual_seed(0)
    block = SpaceTimeBlock(8, 2, modulated=True)
    x = torch.randn(2, 3, 4, 8)
    modulation = torch.randn(2, 3, 9, 8)
    modulation[:, :, 2::3] = 0
    assert torch.equal(block(x, modulation), x)
    modulation[:, 1, 2] = 1
    changed = (block(x, modulation) != x).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, False]


def test_positions_tell_places_apart() -> None:
    places = spatial_positions(4, 6, 16, torch.device("cpu"))
    distances = torch.cdist(places, places) + 9 * torch.eye(24)
    assert float(distances.min()) > 0.1
    assert sinusoid(torch.tensor([0.0]), 4).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_pixel_latents_come_back_exactly() -> None:
    video = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
    latents = PixelAutoencoder().encode(video)
    assert (float(latents.min()), float(latents.max())) == (-1.0, 1.0)
    assert torch.equal(PixelAutoencoder().decode(latents), video)
    assert PixelAutoencoder().decode(torch.tensor([[[[[-7.0, 7.0]]]]])).flatten().tolist() == [0, 255]
